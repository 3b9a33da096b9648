"""Measures whether a word's map finds its tone in time, on drawn sounds (`clipfuse data scenes DIR --sound`).

    python -m tests.bench.sounds RUN --data 'DIR/val-*.tar' [--samples 400] [--method raw]

RUN is fine-tuned with fusion.context=audio, or a pretraining run. Words are the kinds that are heard once in a sample. For a
run that answers questions their texts are "what colour is the bird?", one for each kind; for others the first of the sample's
sound_captions, such as "a purple bird, then a purple sofa". Of a pretraining run `similarity` alone is measured, with the word
by itself, in such a caption, and in such a question. A map is summed over frequencies. One JSON line:

    hit     share of maps whose highest column lies in the word's own sound (its center; pointing game in time)
    lift    share of a map's sum inside the sound, over the sound's share of the time: 1 = a uniform map

each with its interval (95 %, bootstrapped over samples), for the run and for:

    time          a uniform map, or a random column
    loudness      the map that is the loudness of each column, the same for every word
    other_word    the map of another kind's word of the same sample
    untrained     the same encoders and a new fusion
    similarity    without fusion, where both towers pool the mean of their tokens

For a run that answers questions a second line has the words of "what is heard first?" and "what is heard last?": whether the
highest column lies in that sound, or no farther from it than one column, the same for a random column, and the medians of its
distance from the sound's beginning and end, in seconds.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from finetune import loading
from finetune.explain.attribution import METHODS
from finetune.explain.similarity import compute_similarity_maps
from finetune.explain.token_spans import TokenSpans, average_tokens
from finetune.explain.word_maps import METHOD, compute_token_maps, find_text_decoder
from finetune.grounding.pointing_game import Array, bootstrap
from finetune.grounding.probes import build_untrained
from finetune.loading import Finetuned, encode_inputs
from finetune.model import FusionModel
from finetune.search.modalities import find_content
from pretrain.checkpoints.loading import LoadedModel, load_model
from pretrain.data.shards.paths import expand_shards
from pretrain.data.shards.reader import ShardReader
from pretrain.data.text import TextDecoder

BATCH = 32


class Heard(NamedTuple):
    """One sample: its sound file, and of each kind that is heard once a text, and when it is heard, in seconds."""

    data: bytes
    texts: dict[str, str]
    spans: dict[str, tuple[float, float]]


def read_samples(shards: str, count: int, text: str) -> list[Heard]:
    """Return the first samples with two sounds of different kinds or more. text: word, caption or question."""
    reader = ShardReader(expand_shards(shards))
    samples: list[Heard] = []
    for shard in range(len(reader.paths)):
        for sample in range(reader.count(shard)):
            members = reader.read(shard, sample).members
            content = json.loads(members["json"])
            names = Counter(sound["name"] for sound in content["sounds"])
            spans = {s["name"]: (s["start"], s["end"]) for s in content["sounds"] if names[s["name"]] == 1}
            if len(spans) >= 2:
                data = cast(bytes, find_content(members, "audio"))
                caption = content["sound_captions"][0]
                choices = {
                    kind: {"word": kind, "caption": caption, "question": f"what colour is the {kind}?"} for kind in spans
                }
                texts = {kind: choice[text] for kind, choice in choices.items()}
                samples.append(Heard(data, texts, spans))
            if len(samples) == count:
                return samples
    return samples


def compute_columns(tuned: Finetuned, model: FusionModel | None, samples: list[Heard], method: str) -> list[dict[str, Array]]:
    """Return, for each sample, the map of each kind's word summed over frequencies: {kind: (W,)}; None = similarity."""

    def compute_maps(sounds: list[bytes], texts: list[str]) -> torch.Tensor:
        inputs, masks = tuned.encode_inputs(sounds, texts)
        batch = (inputs["audio"], inputs["text"], masks["text"])
        if model is None:
            return compute_similarity_maps(tuned.model.encoder, *batch, "audio")[0].clamp(min=0)
        return compute_token_maps(model, tuned.task, *batch, method)[0]

    return _sum_columns(find_text_decoder(tuned.decoders), samples, compute_maps)


def _sum_columns(
    decoder: TextDecoder, samples: list[Heard], compute_maps: Callable[[list[bytes], list[str]], torch.Tensor]
) -> list[dict[str, Array]]:
    results = [dict[str, Array]() for _ in samples]
    pairs = [(i, kind) for i, sample in enumerate(samples) for kind in sample.texts]
    for begin in range(0, len(pairs), BATCH):
        chunk = pairs[begin : begin + BATCH]
        texts = [samples[i].texts[kind] for i, kind in chunk]
        maps = compute_maps([samples[i].data for i, _ in chunk], texts)
        for (i, kind), text, values in zip(chunk, texts, maps, strict=True):
            words = {re.sub(r"\W", "", word.text): word for word in TokenSpans(decoder, text).find_words()}
            if kind in words:
                results[i][kind] = average_tokens(values, words[kind].tokens).sum(dim=0).double().numpy()
    return results


def measure_loudness(tower: Any, decoder: Any, samples: list[Heard], columns: int) -> list[Array]:
    """Return for each sample the energy of the sound in each of the map's columns (W,)."""
    levels = []
    for sample in samples:
        mel = tower.mel(decoder.decode_eval(sample.data)[None])[0]  # (T, F), logarithms
        energy = (mel * tower.mel.settings.std / 10 * np.log(10)).exp().sum(dim=1)
        levels.append(torch.nn.functional.adaptive_avg_pool1d(energy[None], columns)[0].double().numpy())
    return levels


def score(maps: Array, span: tuple[float, float], seconds: float) -> tuple[float, float]:
    """Return (hit, lift) of one map over time (W,)."""
    edges = np.linspace(0, seconds, len(maps) + 1)
    overlap = np.clip(np.minimum(edges[1:], span[1]) - np.maximum(edges[:-1], span[0]), 0, None) / np.diff(edges)
    best = np.flatnonzero(maps >= maps.max() - 1e-12)
    center = (edges[:-1] + edges[1:])[best] / 2
    hit = float(((center >= span[0]) & (center <= span[1])).mean())
    total = maps.sum()
    return hit, float((maps * overlap).sum() / total / overlap.mean()) if total > 0 else 1.0


def measure(tuned: Finetuned, samples: list[Heard], method: str) -> dict[str, Any]:
    """Return the figures of one run."""
    trained = compute_columns(tuned, tuned.model, samples, method)
    columns = {"trained": trained, "untrained": compute_columns(tuned, build_untrained(tuned, 0), samples, method)}
    towers = tuned.model.encoder
    if towers.tower("audio").pools_mean and towers.tower("text").pools_mean:
        columns["similarity"] = compute_columns(tuned, None, samples, method)
    return {"method": method, **compare(columns, "trained", samples, towers.tower("audio"), tuned.decoders["audio"])}


def measure_encoders(loaded: LoadedModel, shards: str, count: int) -> dict[str, Any]:
    """Return the figures of similarity maps of a pretraining run, by the text in which the word stands."""
    model, lines = loaded.model, {}
    for text in ("word", "caption", "question"):
        samples = read_samples(shards, count, text)

        def compute_maps(sounds: list[bytes], texts: list[str]) -> torch.Tensor:
            inputs, masks = encode_inputs(loaded.decoders, torch.device("cpu"), sounds, texts, "audio")
            maps = compute_similarity_maps(model, inputs["audio"], inputs["text"], masks["text"], "audio")[0]
            return maps.clamp(min=0)

        columns = _sum_columns(find_text_decoder(loaded.decoders), samples, compute_maps)
        lines[text] = compare({"similarity": columns}, "similarity", samples, model.tower("audio"), loaded.decoders["audio"])
    return lines


def compare(
    columns: dict[str, list[dict[str, Array]]], name: str, samples: list[Heard], tower: Any, decoder: Any
) -> dict[str, Any]:
    """Return hit and lift of maps and baselines, with intervals. name: whose maps of other words are a baseline."""
    first = columns[name]
    width = len(next(iter(first[0].values())))
    loudness = measure_loudness(tower, decoder, samples, width)
    rows: dict[str, list[tuple[float, float]]] = {}
    index: list[int] = []
    for i, sample in enumerate(samples):
        for kind, span in sample.spans.items():
            if kind not in first[i] or len(first[i]) < 2:
                continue
            index.append(i)
            other = next(word for word in first[i] if word != kind)
            for key, maps in columns.items():
                rows.setdefault(key, []).append(score(maps[i][kind], span, tower.seconds))
            rows.setdefault("other_word", []).append(score(first[i][other], span, tower.seconds))
            rows.setdefault("loudness", []).append(score(loudness[i], span, tower.seconds))
            rows.setdefault("time", []).append(score(np.ones(width), span, tower.seconds))
    samples_of = np.array(index)
    line: dict[str, Any] = {"samples": len(set(index)), "words": len(index), "columns": width}
    for position, measure_name in enumerate(("hit", "lift")):
        values: dict[str, NDArray[np.float64]] = {
            key: np.array([row[position] for row in row_list]) for key, row_list in rows.items()
        }
        line[measure_name] = {
            key: [round(float(x), 3) for x in bootstrap(column, samples_of)] for key, column in values.items()
        }
    return line


def measure_order(tuned: Finetuned, shards: str, count: int, method: str) -> dict[str, Any]:
    """Return where "first" and "last" look, for the sounds that are heard first and last."""
    decoder, seconds = find_text_decoder(tuned.decoders), cast(Any, tuned.model.encoder.tower("audio")).seconds
    reader = ShardReader(expand_shards(shards))
    addresses = [(shard, sample) for shard in range(len(reader.paths)) for sample in range(reader.count(shard))]
    rows: dict[str, list[tuple[float, ...]]] = {"first": [], "last": []}
    for number, address in enumerate(addresses[:count]):
        members = reader.read(*address).members
        data = cast(bytes, find_content(members, "audio"))
        for item in json.loads(members["json"])["sound_questions"]:
            match = re.fullmatch(r"what is heard (first|last)\?", item["question"])
            if match is None:
                continue
            inputs, masks = tuned.encode_inputs([data], [item["question"]])
            maps, prediction = compute_token_maps(
                tuned.model, tuned.task, inputs["audio"], inputs["text"], masks["text"], method
            )
            (word,) = (w for w in TokenSpans(decoder, item["question"]).find_words() if w.text.startswith(match[1]))
            column = average_tokens(maps[0], word.tokens).sum(dim=0).double().numpy()
            centers = (np.arange(len(column)) + 0.5) / len(column) * seconds
            (start, end), peak = item["span"], float(centers[column.argmax()])
            hits = [((at >= start - far) & (at <= end + far)) for far in (0, seconds / len(column)) for at in (peak, centers)]
            is_right = prediction.best[0][0][0] == item["answers"][0]
            rows[match[1]].append((number, *(float(np.mean(hit)) for hit in hits), float(is_right), peak - start, peak - end))
    line: dict[str, Any] = {"method": method}
    for name, values in rows.items():
        table = np.array(values)
        means = [[round(float(x), 3) for x in bootstrap(table[:, i], table[:, 0].astype(np.int64))] for i in range(1, 6)]
        line[name] = {
            "questions": len(table),
            **dict(zip(("hit", "random_hit", "near", "random_near", "accuracy"), means, strict=True)),
            "from_start": round(float(np.median(table[:, 6])), 3),
            "from_end": round(float(np.median(table[:, 7])), 3),
        }
    return line


def main() -> None:
    """Measure one run and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a fine-tuned run with fusion.context=audio, or a pretraining run")
    parser.add_argument("--data", required=True, help="shards drawn with --sound")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--method", default=METHOD, choices=METHODS)
    options = parser.parse_args()
    if not loading.is_finetuned(options.run):
        print(json.dumps({"run": options.run, **measure_encoders(load_model(options.run), options.data, options.samples)}))
        return
    tuned = loading.load(options.run)
    text = "question" if tuned.task.text_is_question else "caption"
    samples = read_samples(options.data, options.samples, text)
    print(json.dumps({"run": options.run, **measure(tuned, samples, options.method)}))
    if tuned.task.text_is_question:
        print(json.dumps(measure_order(tuned, options.data, options.samples, options.method)))


if __name__ == "__main__":
    main()
