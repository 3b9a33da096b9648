"""What worker processes send: small tensors by value, large ones in shared memory, nothing changed."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler

import torch

from pretrain.data.batch import SENT_BY_VALUE, Batch


def test_small_tensors_are_sent_by_value_and_large_ones_in_shared_memory() -> None:
    large = torch.arange(SENT_BY_VALUE // 8 + 1)
    ids, mask = torch.arange(24).reshape(4, 6)[:, :5], torch.tensor([[True, False]] * 4)
    inputs = {"image": large, "text": ids, "half": torch.ones(4, dtype=torch.bfloat16), "empty": torch.empty(0, 3)}
    batch = Batch(inputs, {"text": mask}, ["a", "b"], {"captions": [["x"], ["y"]], "nested": {"id": torch.tensor([3])}})
    sent = bytes(ForkingPickler.dumps(batch))
    assert sent.count(b"rebuild_storage_fd") == 1  # named once, for two tensors: the large one, and bfloat16, which numpy lacks
    assert sent.count(b"_SmallTensor") == 1
    received = pickle.loads(pickle.dumps(batch))
    assert received.keys == batch.keys
    assert received.targets["captions"] == batch.targets["captions"]
    for value, expected in (
        *((received.inputs[name], tensor) for name, tensor in inputs.items()),
        (received.masks["text"], mask),
        (received.targets["nested"]["id"], torch.tensor([3])),
    ):
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)
    received.inputs["text"].add_(1)  # writable, and its own memory
    assert ids[0, 0] == 0


def test_without_large_tensors_no_file_descriptor_is_sent() -> None:
    batch = Batch({"text": torch.arange(24).reshape(4, 6)}, {"text": torch.ones(4, 6, dtype=torch.bool)}, ["a"] * 4)
    assert b"rebuild_storage_fd" not in bytes(ForkingPickler.dumps(batch))
