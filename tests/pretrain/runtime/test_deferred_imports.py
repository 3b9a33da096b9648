"""What a run without train.compile imports, in a fresh interpreter; what it left out works when it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import HEAVY, Small, environment

PROGRAM = """
import json, sys
from launch import cli
assert cli.main(json.loads(sys.argv[1])) == 0
imported = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
import numpy, torch, torchvision, timm
from timm.models.naflexvit import NaFlexRopeIterator
from transformers.loss.loss_for_object_detection import linear_sum_assignment
assigned = linear_sum_assignment(numpy.array([[4.0, 1.0], [2.0, 8.0]]))[1].tolist()
boxes = torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]])
pooled = torchvision.ops.roi_align(torch.arange(16.0).reshape(1, 1, 4, 4), boxes, 1).item()
compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager", fullgraph=True)(torch.ones(1, 2)).shape
print(json.dumps([imported, assigned, pooled, list(compiled), type(sys.modules["torch._dynamo"]).__name__]))
"""


def test_a_run_leaves_out_what_it_does_not_use_and_all_of_it_works_afterwards(small: Small, tmp_path: Path) -> None:
    arguments = ["pretrain", "scenes", *small.settings(tmp_path / "run", "train.steps=1", "train.trackers=[tensorboard]")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments), json.dumps(HEAVY)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    imported, assigned, pooled, compiled, kind = json.loads(done.stdout.splitlines()[-1])
    assert imported == []
    assert assigned == [1, 0]  # the cheapest assignment: 1 + 2
    assert 0 <= pooled <= 15
    assert compiled == [1, 2]
    assert kind == "module"
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


COLLECTIONS = """
import gc, json, sys
generations, frozen = [], gc.get_freeze_count()
gc.callbacks.append(lambda phase, info: generations.append(info["generation"]) if phase == "start" else None)
from pretrain.runtime import deferred_imports
generations.clear()
with deferred_imports.uncollected():
    import torch
inside = len(generations)
objects = len(gc.get_objects())
cycle = []
cycle.append(cycle)
del cycle
print(json.dumps([inside, gc.isenabled(), gc.get_freeze_count() > frozen + 10_000, objects, gc.collect()]))
try:
    with deferred_imports.uncollected():
        raise KeyError
except KeyError:
    print(json.dumps(gc.isenabled()))
gc.disable()
with deferred_imports.uncollected():
    pass
print(json.dumps(gc.isenabled()))
"""


def test_no_garbage_is_collected_during_imports_and_all_of_it_afterwards() -> None:
    """CPython's own callbacks count the collections; a cycle made afterwards is found by one."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECTIONS], env=environment(), capture_output=True, text=True, timeout=120, check=True
    )
    (inside, is_enabled, is_frozen, objects, found), after_error, stays_disabled = map(json.loads, done.stdout.splitlines())
    assert inside == 0
    assert (is_enabled, is_frozen, after_error) == (True, True, True)
    assert objects < 10_000  # those that a collection walks through; torch alone has over 200,000
    assert found >= 1
    assert stays_disabled is False
