"""`import clipfuse` computes with the `performance` settings of the run, and leaves torch's flags as it found them."""

from __future__ import annotations

from typing import Any

import torch

from launch.api.model import Model
from pretrain.runtime.performance import PerformanceConfig
from tests.support import tiny


def flags() -> tuple[bool, bool]:
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.benchmark), torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_the_settings_are_in_force_while_a_model_encodes() -> None:
    encoder = tiny.build_model("clip")
    inside: list[tuple[bool, bool]] = []
    encoder.tower("image").register_forward_hook(lambda *_: inside.append(flags()))
    before = flags()
    pixels = tiny.build_batch().inputs["image"]
    for performance, expected in ((None, (True, True)), (PerformanceConfig(tf32=False, cudnn_benchmark=False), (False, False))):
        model = Model(encoder, {}, "a run", torch.device("cpu"), performance=performance)
        inside.clear()
        model._encode_images(pixels)
        assert inside == [expected]
        assert flags() == before
