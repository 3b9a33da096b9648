"""The commands that a fine-tuning run prints at its end: report, evaluate, attend, index and search, export.

They work as printed: `attend` is given an image or a sound, and a text, of the run's own data; the file is written into the
run folder.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.config import FinetuneConfig
from finetune.explain.word_maps import find_text_decoder
from finetune.tasks import Task
from pretrain.data import BadSample
from pretrain.data.audio_files import AUDIO_EXTENSIONS
from pretrain.data.captions import read_captions
from pretrain.data.config import evaluation_caption, resolve_sources
from pretrain.data.decode import EXTENSIONS
from pretrain.data.sample_json import read_fields
from pretrain.data.shards.paths import count_samples
from pretrain.data.shards.reader import ShardReader
from pretrain.data.shards.urls import is_remote
from pretrain.errors import UserError
from pretrain.runtime import distributed
from pretrain.runtime.console import log_info
from pretrain.training import run_end
from pretrain.training.loop import Outcome
from pretrain.training.run_dir import RunFolder

LOOKED_AT = 16
"""Samples among which one is looked for that has an image or a sound, and a text."""
WORDS = 12
"""Words of a text that are printed, at most."""


def suggest_commands(
    config: FinetuneConfig, task: Task, decoders: dict[str, Any], folder: RunFolder, outcome: Outcome, exports: str
) -> list[list[str]]:
    """Return the words of the commands that a user may want next; on rank 0, of a run that is done, else [].

    Args:
        config: of the run.
        task: its task.
        decoders: for evaluation, by modality.
        folder: the run folder, where the file for `attend` is written.
        outcome: of the run.
        exports: the line that names the formats.
    """
    if not distributed.is_main() or outcome.state == "stopped":
        return []
    run, formats = str(folder.path), run_end.named_formats(exports)
    commands = [run_end.report_command(folder), *run_end.evaluate_command(config, folder)]
    example = _save_example(config, task, folder.path) if _has_maps(config, task, decoders) else None
    if example is not None:
        image, text = example
        commands.append(["clipfuse", "attend", run, str(image), text, "--out", str(folder.path / "attended.png")])
        if config.task.name == "retrieval":
            commands += run_end.index_command(config, folder, task.subject)
            commands.append(["clipfuse", "search", str(folder.path / "index"), text, "--rerank", run])
    if formats:
        commands.append(run_end.export_command(folder, formats[0], outcome.step))
    return commands


def _has_maps(config: FinetuneConfig, task: Task, decoders: dict[str, Any]) -> bool:
    """Return whether `clipfuse attend` can draw what each word attends to: there is cross-attention, and text is read."""
    try:
        find_text_decoder(decoders)
    except UserError:
        return False
    return config.fusion is not None and task.subject in decoders


def _save_example(config: FinetuneConfig, task: Task, folder: Path) -> tuple[Path, str] | None:
    """Write an image or a sound of the run's data to the run folder; return its path and the first words of its text.

    None where no sample that is looked at has both, where shards are not on this machine, or where it cannot be written, which
    is logged.
    """
    key = "val" if config.data.val else "train"
    extensions = AUDIO_EXTENSIONS if task.subject == "audio" else EXTENSIONS
    try:
        shard = resolve_sources(getattr(config.data, key), f"data.{key}")[0].shards[0]
        if is_remote(shard):
            return None
        cache = config.data.build_cache()
        reader = ShardReader([shard], cache)
        for number in range(min(LOOKED_AT, count_samples([shard], cache)[0])):
            with suppress(BadSample):
                members = reader.read(0, number).members
                extension = next((name for name in extensions if name in members), None)
                text = _first_text(config, task, members)
                if extension is not None and any(map(str.isalnum, text)) and not text.startswith("-"):
                    path = folder / f"example.{extension}"
                    path.write_bytes(members[extension])
                    return path, text
    except (UserError, OSError) as error:
        log_info(f"no example for `clipfuse attend`: {error}")
    return None


def _first_text(config: FinetuneConfig, task: Task, members: dict[str, bytes]) -> str:
    """Return the first words of a question or caption of a sample; "" where it has none."""
    if task.text_is_question:
        questions = task.questions(read_fields(members))
        return questions[0].text if questions else ""
    return " ".join(read_captions(members, evaluation_caption(vars(config.data)))[0].split()[:WORDS])
