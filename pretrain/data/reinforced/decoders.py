"""Decoders of reinforced samples: an image with one of its stored augmentations, and the embeddings of what was drawn.

Both draw the augmentation from equal random numbers, so a batch holds the picture that its embedding is of.

Legend: b = samples, k = captions of a sample, S = synthetic captions, A = augmentations, D = width of all teachers together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pretrain.data import BadSample
from pretrain.data.batch import Batch
from pretrain.data.captions import SYNTHETIC, TXT, read_caption_groups, split_sources
from pretrain.data.decode import decode_pixels, read_header
from pretrain.data.images import ImageDecoder, get_image
from pretrain.data.reinforced.augmentation import apply_augmentation, fit_box, parse_augmentation, read_augmentations
from pretrain.data.reinforced.npz_embeddings import read_matrices
from pretrain.data.sample_json import read_fields
from pretrain.data.shards.paths import RawSample
from pretrain.data.teachers import TARGET
from pretrain.data.training_captions import DrawnCaptions

_RANDOM_KEY = "image"


def draw_augmentation(count: int, rng: np.random.Generator) -> int:
    """Return which of `count` augmentations is used: the first number that both decoders draw of their `rng`."""
    return int(rng.integers(count))


class ReinforcedImageDecoder(ImageDecoder):
    """A decoder for training that applies one of the augmentations of KEY.paug.json, in place of random changes.

    The box is of the pixels as they are stored: an EXIF orientation is not applied, as the teachers did not see it.

    Args:
        image: the decoder whose size and limits it takes.
    """

    random_key = _RANDOM_KEY

    def __init__(self, image: ImageDecoder) -> None:
        super().__init__(image.size, None, image.resize, image.interpolation, image.max_pixels, image.exact, image.pad_color)

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> torch.Tensor:
        """Decode to (3, size, size) uint8. Raises BadSample."""
        if not train:
            return super().__call__(sample, rng, train)
        data = get_image(sample)
        entries = read_augmentations(sample.members)
        augmentation = parse_augmentation(entries[draw_augmentation(len(entries), rng)])
        header = read_header(data, self.max_pixels)
        if header.orientation >= 5:
            header = header._replace(height=header.width, width=header.height)
        header = header._replace(orientation=1)
        box = fit_box(augmentation.box, header.height, header.width, read_fields(sample.members))
        pixels = apply_augmentation(decode_pixels(data, header), augmentation._replace(box=box), self.size)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class SampleEmbeddings(NamedTuple):
    """The embeddings of a sample that a batch may need."""

    image: np.ndarray
    """(D,) float32, of the augmentation that was drawn."""
    text: np.ndarray
    """(1 + S, D) float32."""
    rows: dict[str, int]
    """The row of `text` of each caption."""


class SampleTeacherDecoder:
    """A decoder that gives targets only: the embeddings in KEY.npz of the augmentation and of the captions that were drawn.

    Args:
        caption: the sources of captions (data.caption).
        widths: numbers of an embedding of each teacher, side by side in D; () = a single teacher of any width.
    """

    random_key = _RANDOM_KEY

    def __init__(self, caption: str = TXT, widths: Sequence[int] = ()) -> None:
        self.caption, self.widths = caption, tuple(widths)
        self.width: int | None = sum(widths) or None
        """D; a sample with another one is a bad sample. None = not known yet."""

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> SampleEmbeddings:
        """Return the embeddings of a sample. Raises BadSample."""
        data = sample.members.get("npz")
        if data is None:
            pickled = "pth.gz" in sample.members
            hint = "; KEY.pth.gz is a pickle, which is not read: write its arrays with numpy.savez" if pickled else ""
            raise BadSample("no teacher embeddings", f"data.teachers=samples needs KEY.npz{hint}")
        image, text = read_matrices(data, ("image_emb", "text_emb"))
        if image.shape[1] != text.shape[1] or self.width not in (None, image.shape[1]):
            expected = f", not {self.width:,}" if self.width else ""
            raise BadSample(
                "teacher embeddings of another width",
                f"image_emb has {image.shape[1]:,} numbers, text_emb {text.shape[1]:,}{expected}",
            )
        count = len(read_augmentations(sample.members))
        if count != len(image):
            raise BadSample("teacher embeddings of another number", f"{len(image):,} in image_emb for {count:,} augmentations")
        return SampleEmbeddings(image[draw_augmentation(count, rng)].copy(), text, self._number_rows(sample.members, len(text)))

    def _number_rows(self, members: Mapping[str, bytes], count: int) -> dict[str, int]:
        """Return which of `count` rows of text_emb is of which caption. Raises BadSample."""
        if "syn.json" in members:
            stored = read_fields({"json": members["syn.json"]}).get("syn_text")
            synthetic = len(stored) if isinstance(stored, list) else 1
            if count != 1 + synthetic:
                raise BadSample(
                    "teacher embeddings of another number",
                    f"{count:,} in text_emb for a caption and {synthetic:,} synthetic ones",
                )
        rows: dict[str, int] = {}
        sources = split_sources(self.caption)
        for source, captions in zip(sources, read_caption_groups(dict(members), self.caption), strict=True):
            if source == SYNTHETIC:
                for place, text in captions.items():
                    rows.setdefault(text, 1 + place)
            elif len(captions) == 1:
                rows.setdefault(next(iter(captions.values())), 0)
        return rows

    def collate(self, items: list[SampleEmbeddings]) -> None:
        """Return None: embeddings are targets, not inputs."""

    def targets(self, items: list[SampleEmbeddings]) -> dict[str, Any]:
        """Return nothing; see `complete`."""
        return {}

    def complete(self, batch: Batch, items: Mapping[str, list[Any]]) -> None:
        """Add the embeddings to the targets of a batch, as teachers.py describes them.

        items: the decoded items of each modality.
        """
        embeddings: list[SampleEmbeddings] = items[TARGET]
        image = torch.from_numpy(np.stack([item.image for item in embeddings]))
        values = {"image": image, "image_mask": torch.ones(len(image), dtype=torch.bool)}
        if "text" in items:
            texts = [_drawn_texts(item) for item in items["text"]]
            rows = [[item.rows.get(text, -1) for text in drawn] for item, drawn in zip(embeddings, texts, strict=True)]
            blank = np.zeros(image.shape[1], np.float32)
            drawn = [[e.text[row] if row >= 0 else blank for row in own] for e, own in zip(embeddings, rows, strict=True)]
            shape = batch.targets["caption_id"].shape
            values["text"] = torch.from_numpy(np.array(drawn, np.float32)).view(*shape, -1)
            values["text_mask"] = (torch.tensor(rows) >= 0).view(shape)
        ends = np.cumsum(self.widths or [image.shape[1]]).tolist()
        batch.targets[TARGET] = {
            str(i): {name: value if name.endswith("_mask") else value[..., start:end] for name, value in values.items()}
            for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
        }


def _drawn_texts(item: Any) -> tuple[str, ...]:
    """Return the captions that a text decoder drew of a sample."""
    if isinstance(item, DrawnCaptions):
        return item.captions
    return (item,) if isinstance(item, str) else tuple(item)
