"""Templates run as they are: each names its command first, and is read by the program it is for."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import ConfigError
from pretrain.strategies import deepspeed_config
from tests.support import ROOT

LAUNCH = ROOT / "launch"
ACCELERATE = sorted((LAUNCH / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((LAUNCH / "deepspeed").glob("*.json"))
SLURM = sorted((LAUNCH / "slurm").glob("*.sbatch"))


def command(path: Path) -> list[str]:
    """The words of the command a template begins with (behind #!, which sbatch wants first)."""
    lines = path.read_text().splitlines()
    if path.suffix == ".json":
        return shlex.split(json.loads(path.read_text())["_command"])
    first = lines[1] if lines[0].startswith("#!") else lines[0]
    assert first.startswith("# "), first
    return shlex.split(first.removeprefix("# "))


def name(path: Path) -> str:
    return path.relative_to(LAUNCH).as_posix()


def test_there_are_templates_of_every_kind() -> None:
    assert ACCELERATE
    assert DEEPSPEED
    assert SLURM


@pytest.mark.parametrize("path", [*ACCELERATE, *DEEPSPEED, *SLURM], ids=name)
def test_the_command_names_its_program_its_file_and_a_shipped_configuration(path: Path) -> None:
    words = command(path)
    assert words[0] == {".yaml": "accelerate", ".json": "deepspeed", ".sbatch": "sbatch"}[path.suffix]
    assert any(word.endswith(f"launch/{name(path)}") for word in words)
    shipped = {config.stem for config in (ROOT / "configs" / "pretrain").glob("*.yaml")}
    assert shipped & set(words), words
    assert {word.partition("=")[0] for word in words if re.match(r"\w+\.\w+=", word)} >= {"data.train", "train.strategy"}


@pytest.mark.parametrize("path", ACCELERATE, ids=name)
def test_accelerate_reads_its_files(path: Path) -> None:
    """With accelerate's own parsers: the file, and the command line that names it."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    config: Any = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    words = [word.replace("HOST", "127.0.0.1") for word in command(path)[2:]]
    words[words.index("--config_file") + 1] = str(path)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.multi_gpu, "else accelerate starts ONE process on a machine without a GPU"
    assert (args.num_processes, args.num_machines) == (config.num_processes, config.num_machines)
    assert args.mixed_precision == "no"
    assert (args.module, args.training_script) == (True, "pretrain")


@pytest.mark.parametrize("path", DEEPSPEED, ids=name)
def test_deepspeed_reads_its_files(path: Path) -> None:
    """Laid over what the strategy says, by DeepSpeed's own parser; with nothing refused and nothing lost."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    word = next(w for w in command(path) if w.startswith("train.strategy=")).partition("=zero")[2]
    given = deepspeed_config.read(str(path), int(word))
    parsed = DeepSpeedZeroConfig(**given["zero_optimization"])
    for key, value in given["zero_optimization"].items():
        key = {  # these have shorter names inside
            "stage3_prefetch_bucket_size": "prefetch_bucket_size",
            "stage3_param_persistence_threshold": "param_persistence_threshold",
            "stage3_max_live_parameters": "max_live_parameters",
            "stage3_max_reuse_distance": "max_reuse_distance",
        }.get(key, key)
        assert getattr(parsed, key) == value, key


def test_a_deepspeed_file_may_not_change_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    for given, line in (
        ({"gradient_clipping": 1.0}, r"own\.json may not set gradient_clipping;"),
        ({"bf16": {"enabled": True}}, r"own\.json may not set bf16;"),
        ({"zero_optimization": {"stage": 3}}, r"is for stage 3; choose train\.strategy=zero3"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean 'overlap_comm'"),
        ([], "must hold settings of DeepSpeed"),
    ):
        path.write_text(json.dumps(given))
        with pytest.raises(ConfigError, match=line):
            deepspeed_config.read(str(path), 2)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        deepspeed_config.read(str(path), 2)
    with pytest.raises(ConfigError, match="No such file"):
        deepspeed_config.read(str(tmp_path / "none.json"), 2)


@pytest.mark.parametrize("path", SLURM, ids=name)
def test_bash_reads_the_scripts(path: Path) -> None:
    assert path.read_text().startswith("#!"), "sbatch refuses others"
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
