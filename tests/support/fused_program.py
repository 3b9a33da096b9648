"""Runs the Triton kernels of both losses in Triton's interpreter; prints one JSON line per case.

    TRITON_INTERPRET=1 python -m tests.support.fused_program [cpu | cuda]

Each line has the case and, for the loss, whether partners score best, and every gradient, the error relative to the norm of
the reference: the plain path in float64, or for bf16 the plain path in bf16.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.losses.sigmoid_tiles import sigmoid_loss
from pretrain.losses.softmax_tiles import softmax_loss
from pretrain.losses.tiles import PairLabels, Settings


def compute(name: str, inputs: list[Tensor], offset: int, ids: Any, settings: Settings) -> list[Tensor]:
    """Return loss, is_best and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss, is_best = (softmax_loss if name == "clip" else sigmoid_loss)(*leaves, offset, PairLabels(ids), settings)  # type: ignore[operator]
    return [loss, is_best, *torch.autograd.grad(3 * loss, leaves)]


def run_case(name: str, kind: str, tile: int, has_ids: bool, precision: Any, device: str) -> list[float]:
    """Return the relative errors of the fused path.

    The 150 rows and 40 dimensions are no multiple of a block. Siglip has more columns than rows, as on several processes.
    """
    b, offset = 150, 0 if name == "clip" else 70
    B = b + 2 * offset
    g = torch.Generator().manual_seed(0)
    rows, columns = (F.normalize(torch.randn(n, 40, generator=g), dim=1) for n in (b, B))
    if kind == "opposite":
        columns[offset : offset + b] = -rows
    if kind == "alike":
        rows, columns = rows[:1].repeat(b, 1), rows[:1].repeat(B, 1)
    ids = (torch.arange(b) % 41, (torch.arange(B) - offset) % 41) if has_ids else None
    inputs = [rows, columns, torch.tensor([100.0 if name == "clip" else 30.0])]
    inputs += [torch.tensor([-10.0])] if name == "siglip" else []
    inputs, ids = [x.to(device) for x in inputs], ids and tuple(x.to(device) for x in ids)
    settings = Settings(tile=tile, precision=precision)
    exact = [x.double() for x in inputs] if precision == "fp32" else inputs
    reference = compute(name, exact, offset, ids, settings)
    computed = compute(name, inputs, offset, ids, settings._replace(is_fused=True))
    if kind == "alike":  # every score ties, and rounding decides which is best
        reference[1] = computed[1]
    # Gradients that cancel to nothing (features all alike) have errors relative to the size of what cancels.
    smallest = [1e-3, 1e-3, *[float(inputs[2]) / b**0.5] * 2, 1.0, 1.0]
    return [
        float((x.double() - y.double()).norm()) / max(float(y.double().norm()), size)
        for x, y, size in zip(computed, reference, smallest, strict=False)
    ]


def main() -> None:
    """Run all cases."""
    torch.set_num_threads(1)
    device = sys.argv[1] if sys.argv[1:] else "cpu"
    cases = [*product(["clip", "siglip"], ["random", "opposite", "alike"], [0, 130], [False, True], ["fp32"])]
    cases += [*product(["clip", "siglip"], ["random"], [0], [False, True], ["bf16"])]
    for case in cases:
        print(json.dumps({"case": case, "errors": run_case(*case, device)}), flush=True)


if __name__ == "__main__":
    main()
