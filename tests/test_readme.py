"""What the README and the package docstrings say about files and commands is true."""

import ast
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from launch import cli
from pretrain.config import find_config
from tests.support import ROOT

README = (ROOT / "README.md").read_text()
PACKAGES = [path.parent for top in ("pretrain", "finetune", "launch") for path in sorted((ROOT / top).rglob("__init__.py"))]


def tree() -> dict[str, bool]:
    """path -> whether it is a folder, from the README's tree."""
    block = README.split("## The layout", 1)[1].split("\n\n")[1]
    paths: dict[str, bool] = {}
    stack: list[tuple[int, str]] = []
    for line in block.splitlines():
        if not line.startswith("    ") or not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        while stack and stack[-1][0] >= indent:
            stack.pop()
        path = "".join(part for _, part in stack) + name
        paths[path.rstrip("/")] = name.endswith("/")
        if name.endswith("/"):
            stack.append((indent, name))
    return paths


def test_the_tree_is_the_disk() -> None:
    documented = tree()
    assert len(documented) > 15
    for path, is_folder in documented.items():
        assert (ROOT / path).is_dir() if is_folder else (ROOT / path).is_file(), path
    folders = {path for path, is_folder in documented.items() if is_folder}
    for top in ("pretrain", "finetune", "launch"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            assert "/".join(parts[:-1]) in folders, path
    tops = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - {"runs", "demo", "clipfuse.egg-info"}
    assert tops - {"README.md"} <= {path.split("/")[0] for path in documented}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: str(package.relative_to(ROOT)))
def test_a_package_docstring_names_every_file_in_it(package: Path) -> None:
    names = re.findall(r"[\w*]+\.py\b", ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or "")
    for path in package.glob("*.py"):
        is_named = path.name == "__init__.py" or any(fnmatch(path.name, pattern) for pattern in names)
        assert is_named, f"{package.name}/__init__.py does not say what {path.name} is for"
    for name in names:
        assert list((ROOT / package.relative_to(ROOT).parts[0]).rglob(name)), (
            f"{package.name}/__init__.py names {name}, which is not there"
        )


def commands() -> list[list[str]]:
    """Every `clipfuse` line in README's code blocks and in the first line of each configuration."""
    lines = [line.strip() for line in README.splitlines() if re.match(r"\s+clipfuse ", line)]
    lines += [path.read_text().splitlines()[0].lstrip("# ") for path in sorted(ROOT.glob("configs/**/*.yaml"))]
    return [shlex.split(line[line.index("clipfuse ") :], comments=True)[1:] for line in lines]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_every_command_is_one_the_parser_knows(words: list[str]) -> None:
    args, rest = cli.build_parser().parse_known_args(words)
    assert all("=" in word and not word.startswith("-") for word in rest)
    if words[0] == "pretrain":
        assert find_config(args.config, "pretrain").is_file()


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("*/README.md"), ROOT / "CONTRIBUTING.md"]:
        if page.exists():
            for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
                assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_a_wheel_holds_every_package() -> None:
    """setuptools does not search several packages at the top by itself: they are listed."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    renamed = {Path(folder): name for name, folder in settings["package-dir"].items()}
    folders = {
        path.parent.relative_to(ROOT) for top in ("pretrain", "finetune", "launch") for path in (ROOT / top).rglob("*.py")
    }
    expected = {renamed.get(folder, ".".join(folder.parts)) for folder in folders}
    assert expected == {name for name in settings["packages"] if not name.startswith("configs")}
