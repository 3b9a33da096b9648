"""Checks of RUN and --task before torch is imported, so that a typo is an error at once; then the imports."""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.config.static_schema import component_names
from pretrain.errors import ConfigError, closest

ENCODER_TASKS = ("retrieval", "zero_shot", "linear_probe", "grounding")


def check_run(run: str) -> None:
    """Raise ConfigError where RUN is neither a path nor the name of a run, nor looks like the name of a published model."""
    path = Path(run)
    is_named = len(path.parts) == 1 and (Path("runs") / path).exists()
    is_hub_name = run.count("/") == 1 and not run.startswith((".", "/", "~", "runs/")) and not path.parent.exists()
    if not (path.exists() or is_named or is_hub_name or ":" in run):
        raise ConfigError(f"no run or checkpoint at {run}; give a run folder (runs/NAME) or one of its checkpoints")


def import_models(is_search: bool = False) -> None:
    """Import what loads and runs models, and nothing that they never use. Call it before anything else imports torch.

    is_search: numpy compares vectors in turn with the models. Its threads and torch's then take the same cores, so torch's must
    not wait for work at full speed, as they do by default. Measured on two cores, 1e5 vectors and 16 candidates re-ranked:
    54 -> 21 to 31 ms a query.
    """
    if is_search:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pretrain.runtime import deferred_imports

    with deferred_imports.uncollected():
        deferred_imports.import_libraries()
        import finetune.loading  # noqa: F401


def check_task(task: str | None) -> None:
    """Raise ConfigError for a --task that is neither an evaluation nor a task of fine-tuning."""
    choices = [*ENCODER_TASKS, *(name for name in component_names("tasks") if name not in ENCODER_TASKS)]
    if task is not None and "." not in task and task not in choices:
        raise ConfigError(f"--task {task}: no such evaluation{closest(task, choices)}; the choices are {', '.join(choices)}")
