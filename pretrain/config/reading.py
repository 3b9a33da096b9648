"""Reads configuration files with their `base:` files, and key=value settings, as values with their sources."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.omegaconf import get_yaml_loader

from pretrain.config.merging import merge
from pretrain.config.values import COMMAND_LINE, Section, Source, is_literal, shorten, with_sources, with_text_keys
from pretrain.errors import ConfigError, closest

LOADER: typing.Any = get_yaml_loader()
"""OmegaConf's reader of YAML, which takes longer to make than most values take to be read."""


def load_values(path: str | Path | None, dotlist: list[str]) -> dict[str, Any]:
    """Load a file, merge key=value settings over it and return plain values. Raises ConfigError."""
    return merge(read_yaml(Path(path)) if path is not None else {}, parse_dotlist(dotlist))


def read_yaml(path: Path, parents: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file as plain values, over the file that its `base:` names (relative to this file).

    parents: the files whose `base` led here, to detect a cycle. Raises ConfigError.
    """
    path = path.resolve()
    if path in parents:
        raise ConfigError(f"{path}: `base` leads back to itself: {' -> '.join(p.name for p in (*parents, path))}")
    try:
        _refuse_expansion(path)
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        loader = LOADER(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no configuration file {path}") from None
    except (yaml.YAMLError, ValueError, TypeError, OSError, OmegaConfBaseException, RecursionError) as error:
        reason = shorten(" ".join(str(error).split()), 500)
        raise ConfigError(f"{path} is not readable YAML: {reason}{_quote_hint(error, path)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` pairs, not a {type(content).__name__}")
    content = with_text_keys(with_sources(content, node, loader, str(path)) if node is not None else content)
    values = Section({str(key): value for key, value in content.items()}, {str(k): v for k, v in content.sources.items()})
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: `base` must name one file, not {base!r}")
    return merge(read_yaml(path.parent / base, (*parents, path)), values)


_MAX_FILE_BYTES = 1 << 22
_MAX_VALUES = 1 << 16
_MAX_DEPTH = 64


def _refuse_expansion(path: Path) -> None:
    """Raise YAMLError for a file that is no ordinary one, is far too large or deep, or stands for far too many values."""
    if not path.is_file() and not path.is_dir() and path.exists():
        raise yaml.YAMLError("it is not an ordinary file")
    if path.is_file() and path.stat().st_size > _MAX_FILE_BYTES:
        raise yaml.YAMLError(f"it has {path.stat().st_size:,} bytes, more than {_MAX_FILE_BYTES:,}")
    text = path.read_text(encoding="utf-8")
    depth = 0
    for i, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):  # a flat list, read until something is too much
        if i > 2 * _MAX_VALUES:  # a key and a value each
            raise yaml.YAMLError(f"it holds more than {_MAX_VALUES:,} values")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"its values are nested deeper than {_MAX_DEPTH} levels")
    sizes: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_VALUES + 1  # of a node inside itself
            pairs = node.value if isinstance(node, yaml.MappingNode) else [(item,) for item in node.value]
            sizes[id(node)] = 1 + sum(count(child) for pair in pairs for child in pair) if node.id != "scalar" else 1
        return sizes[id(node)]

    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is not None and count(node) > _MAX_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MAX_VALUES:,} values")


def _quote_hint(error: Exception, path: Path) -> str:
    """Return what to add where YAML stopped at a pattern of shards, whose first character means something else in YAML."""
    mark = getattr(error, "problem_mark", None)
    lines = path.read_text(encoding="utf-8").splitlines() if mark is not None else []
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    is_pattern = re.search(r"[:-]\s+(\*|[{\[].*[}\]]\S)", line)
    return "; put a pattern in quotes: '*.tar', '{0000..0099}.tar'" if is_pattern else ""


LONG_DASHES = ("\u2010", "\u2011", "\u2012", "\u2013", "\u2014", "\u2015", "\u2212")


def parse_dotlist(dotlist: list[str]) -> dict[str, Any]:
    """Parse settings: ["optim.lr=1e-3"] -> {"optim": {"lr": 0.001}}. Of a key given twice the last counts, and a note says so.

    Raises ConfigError.
    """
    merged_values = Section()
    texts: dict[str, str] = {}
    repeated: dict[str, str] = {}
    for order, item in enumerate(dotlist):
        key, equals, text = item.partition("=")
        if item.startswith("-"):
            raise ConfigError(f"{item!r}: settings have no dashes; write {item.lstrip('-') or 'key=value'!r}")
        if item[:1] in LONG_DASHES:
            raise ConfigError(f"{item!r} begins with a long dash, as word processors make of --; type it again")
        if equals and not all(key.split(".")):
            raise ConfigError(f"{item!r} is not a setting; a part of its key is empty, write for example optim.lr=1e-3")
        if not equals or not key:
            raise ConfigError(f"{item!r} is not a setting; write key=value, for example optim.lr=1e-3")
        if texts.setdefault(key, text) != text:
            repeated[key] = f"{shorten(item)}, not {shorten(texts[key]) or 'empty'}"
        texts[key] = text
        value, source = _parse_value(item, text, order)
        for name in reversed(key.split(".")):
            value, source = Section({name: value}, {name: source}), Source(None, None, COMMAND_LINE, order)
            source = source._replace(value=value)
        merged_values = merge(merged_values, value)
    if repeated:
        merged_values.notes.append(f"given more than once, the last counts: {'; '.join(repeated.values())}")
    return merged_values


def _parse_value(item: str, text: str, order: int) -> tuple[Any, Source]:
    """Parse the text behind key= as YAML. A text that YAML cannot read is its own value, and the source says why."""
    try:
        loader = LOADER(text)
        node = loader.get_single_node()
        value: Any = yaml.load(text, Loader=LOADER)
        value = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=False))["value"]
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        return text, Source(text, text, COMMAND_LINE, order, _explain_unreadable(item, error))
    if isinstance(node, yaml.ScalarNode) and node.style in ("'", '"'):
        return value, Source(value, node.value, COMMAND_LINE, order, is_literal=True)
    if value is None and text.strip().lower() not in ("", "~", "null"):  # YAML reads a comment or the name of an anchor
        return text, Source(text, text, COMMAND_LINE, order)
    if node is not None:
        value = with_sources(value, node, loader, COMMAND_LINE, order)
    if isinstance(value, Section) and not value:
        value.replaces = True
    return value, Source(value, text, COMMAND_LINE, order, is_literal=node is not None and is_literal(node, loader))


def _explain_unreadable(item: str, error: Exception) -> str:
    return f"{shorten(item)!r} cannot be read: {shorten(' '.join(str(error).split()), 500)}"


CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


def find_config(name: str, kind: str) -> Path:
    """Return the path of a configuration: `name` is a file, or the name of a shipped one.

    kind: "pretrain" or "finetune"; find_config("scenes", "pretrain") is configs/pretrain/scenes.yaml. Raises ConfigError.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = CONFIGS / kind / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))
    hint = closest(name, names)
    raise ConfigError(f"no configuration {name!r}{hint}; give a YAML file, or a shipped one: {', '.join(names)}")
