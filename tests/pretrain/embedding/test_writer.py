"""The thread that writes embeddings ends, whatever moment a signal chooses."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pretrain.embedding.encoder import EncodedBatch
from pretrain.embedding.parquet import Layout, Writer
from pretrain.runtime.entrypoint import EarlyStop, raise_on_stop_signals

LAYOUT = Layout(("image",), 2, "float32", False)


def put(writer: Writer, moment: int) -> tuple[bool, bool]:
    """Put a batch; SIGTERM arrives at a moment of it, counted in calls, lines and returns of Python.

    Returns whether the moment came, and whether EarlyStop was raised.
    """
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        if count == moment:
            signal.raise_signal(signal.SIGTERM)
        return trace

    batch = EncodedBatch(["s/0"], {"image": torch.ones(1, 2)}, [], [{}], {}, {})
    before = sys.gettrace()
    try:
        with raise_on_stop_signals():
            sys.settrace(trace)
            try:
                writer.put("0", batch)
            finally:
                sys.settrace(before)
    except EarlyStop:
        return True, True
    return count >= moment, False


def test_a_signal_at_any_moment_of_a_write_leaves_nobody_waiting(tmp_path: Path) -> None:
    moment, comes = 0, True
    while comes:
        moment += 1
        writer = Writer(tmp_path, LAYOUT, {})
        comes, is_stopped = put(writer, moment)
        assert is_stopped == comes, moment
        closing = threading.Thread(target=writer.close, args=(True,), daemon=True)
        closing.start()
        closing.join(20)
        assert not closing.is_alive(), f"the writer hangs after a signal at moment {moment}"
    assert moment > 50
