"""Zero-shot classification: the weights of a class are the mean embedding of sentences that name it.

    names = load_class_names("imagenet")
    weights = build_classifier(names, TEMPLATES, encode)   (C, D), encode: list of texts -> (b, D) normalized
    top_k_accuracy(image, labels, weights)                 {"top1": ..., "top5": ...}

Shapes: n = images, C = classes, D = embedding width.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.vocabulary import builtin_names, load_builtin
from pretrain.errors import ConfigError, UserError, closest
from pretrain.evaluation.retrieval import TIE, check_finite

TEMPLATES = [
    "{}",
    "a {}",
    "the {} in this picture",
    "a picture of a {}",
    "a picture showing one {} and little else",
    "a {} seen from nearby",
    "a {} far away",
    "a {} in its usual place",
    "part of a {}",
    "a small {}",
    "a big {}",
    "a bright picture with a {} in it",
    "a dim, grainy picture of a {}",
    "an artist's drawing of a {}",
]
"""Sentences that name a class in many settings: what their embeddings have in common, the average, is the class."""


def fill_template(template: str, name: str) -> str:
    """Put a class name into a template, with "an" where the name starts with a vowel."""
    if name[:1].lower() in "aeiou":
        template = template.replace("A {}", "An {}").replace(" a {}", " an {}")
        template = "an {}" + template[len("a {}") :] if template.startswith("a {}") else template
    return template.replace("{}", name)


def check_templates(templates: Sequence[str]) -> None:
    """Refuse an empty list and templates without {}, where the name goes. Raises ConfigError."""
    if not templates:
        raise ConfigError('templates is empty; give at least one, for example "a picture of a {}"')
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"template {template!r} has no place for the class name; write {{}} where the name goes")


def load_class_names(spec: str | Sequence[str]) -> list[str]:
    """Return the names of the classes, in the order of their integer labels.

    Args:
        spec: a list; or "imagenet" (the 1,000 classes, named by timm's own data); or a data set whose vocabulary ships
            with the package ("scenes"); or a file with one name a line, in UTF-8, or in UTF-16 with a byte-order mark; or
            the names themselves, separated by commas.

    Raises:
        ConfigError: fewer than two names, a repeated name, or a file that does not exist or is in another encoding.
    """
    if not isinstance(spec, str):
        names, origin = [str(name) for name in spec], "the list of classes"
    elif spec.lower() in ("imagenet", "imagenet-1k"):
        names, origin = load_imagenet_names(), "imagenet"
    elif spec.lower() in builtin_names():
        names, origin = list(load_builtin(spec.lower()).names), spec.lower()
    elif os.path.isfile(os.path.expanduser(spec)):  # first: the name of a file may hold a comma
        names, origin = _read_lines(Path(spec).expanduser()), spec
    elif "," in spec:
        names, origin = spec.split(","), "the list of classes"
    else:
        known = ", ".join(f'"{name}"' for name in ("imagenet", *builtin_names()))
        raise ConfigError(f"no classes {spec!r}; give {known}, a file with one name a line, or the names separated by commas")
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2:
        raise ConfigError(f"{origin} names {len(names)} classes; at least two are needed")
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ConfigError(f"{origin} names {repeated[0]!r} more than once; every class needs a different name")
    return names


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, without a byte-order mark. Raises ConfigError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the classes in {path}: {error.strerror or error}") from error
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path} is not in UTF-8 (byte 0x{data[error.start]:02x} in line {line}): convert it, for example with "
            f"iconv -f latin1 -t utf-8"
        ) from error
    return re.split(r"[\r\n]+", text)


def load_imagenet_names() -> list[str]:
    """Return the 1,000 names of ImageNet's classes, as timm knows them.

    A name is the first that WordNet gives the class; where two classes share it (crane, cardigan, maillot), the definition
    follows.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = [info.index_to_description(i).split(",")[0].strip() for i in range(info.num_classes())]
    lower = [name.lower() for name in names]
    shared = {name for name in lower if lower.count(name) > 1}
    for i, name in enumerate(lower):
        if name in shared:
            definition = info.index_to_description(i, detailed=True).split(": ", 1)[1]
            names[i] = f"{names[i]}, {definition.split(';')[0].strip()}"
    return names


def index_labels(labels: Sequence[Any], names: Sequence[str]) -> Tensor:
    """Return the class of each sample, (n,) int64, from the labels in the samples' json.

    A label is the number of the class, or its name in upper or lower case. Text that is a name is that name: with classes
    named "1" to "4", the label "4" is the last. There, the number 4 could be a name or a position, and is refused unless both
    are the same class.

    Raises:
        UserError: a label that is missing, out of range, not one of the names, or a number where it is ambiguous.
    """
    index_by_name = {name.lower(): i for i, name in reversed(list(enumerate(names)))}
    index_by_name |= {name: i for i, name in enumerate(names)}
    numbered = {int(name): i for i, name in enumerate(names) if _is_number(name)}
    # Where all names are numbers, so may all labels be: none is a position unless each name is its own position.
    is_ambiguous = len(numbered) == len(names) and any(number != i for number, i in numbered.items())
    ids = []
    for i, label in enumerate(labels):
        if isinstance(label, bool) or label is None:
            raise UserError(f'sample {i} has no class: its json needs "label", a number below {len(names)} or a class name')
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        text = str(label).strip()
        if isinstance(label, str) and (text in index_by_name or text.lower() in index_by_name):
            ids.append(index_by_name.get(text, index_by_name.get(text.lower(), -1)))
        elif isinstance(label, int) or _is_number(text):
            if is_ambiguous or numbered.get(int(label), int(label)) != int(label):
                example = next(name for j, name in enumerate(names) if _is_number(name) and int(name) != j)
                raise UserError(
                    f"sample {i} has the number {text} as label, a position or a name: class {example!r} is not at "
                    f'position {example}; write labels as text, "{example}", or list a class for each number from 0'
                )
            if not 0 <= int(label) < len(names):
                raise UserError(f"sample {i} has label {text}; the {len(names)} classes are numbered from 0")
            ids.append(int(label))
        else:
            near = closest(str(label), list(names))
            raise UserError(f"sample {i} has label {str(label)!r}, which is none of the {len(names)} classes{near}")
    return torch.tensor(ids, dtype=torch.int64)


def _is_number(text: str) -> bool:
    """Return whether a text consists of a few ASCII digits."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def build_classifier(names: Sequence[str], templates: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """Return class weights (C, D), float32, rows normalized: the mean embedding of each class's sentences.

    Args:
        encode: texts -> (b, D) L2-normalized; called with all sentences of a few classes at a time.
    """
    check_templates(templates)
    rows = []
    step = max(1, 256 // len(templates))
    for start in range(0, len(names), step):
        batch = names[start : start + step]
        embedded = encode([fill_template(template, name) for name in batch for template in templates]).float()
        rows.append(F.normalize(embedded.view(len(batch), len(templates), -1).mean(dim=1), dim=-1))
    return torch.cat(rows)


def top_k_accuracy(
    image: Tensor, labels: Tensor, weights: Tensor, ks: Sequence[int] = (1, 5), tile: int = 4096
) -> dict[str, float]:
    """Return {"top1": ..., "top5": ...}: the fraction of images whose class is among the k best.

    Classes that tie with the right one are in random order, so the fractions are expectations (see retrieval.py).

    Args:
        image: (n, D); labels: (n,) int64; weights: (C, D), all on one device.
    """
    check_finite("image", image)
    check_finite("class", weights)
    if len(image) == 0:
        raise UserError("nothing to classify: there are no samples")
    hits = dict.fromkeys(ks, 0.0)
    for start in range(0, len(image), tile):
        rows = image[start : start + tile].double() @ weights.double().T  # (rows, C)
        right = labels[start : start + tile].to(rows.device)
        above = rows - rows.gather(1, right[:, None])
        better = (above > TIE).sum(1)
        tied = (above.abs() <= TIE).sum(1) - 1
        for k in ks:
            hits[k] += float(((k - better) / (tied + 1)).clamp(0, 1).sum())
    return {f"top{k}": hits[k] / len(image) for k in ks}
