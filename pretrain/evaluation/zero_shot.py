"""Classification without training: each class is the mean embedding of sentences that name it.

    names = class_names("imagenet")
    weights = classifier(names, TEMPLATES, encode)     (C, D), encode: list of texts -> (b, D) normalised
    top_k(image, labels, weights)                      {"top1": ..., "top5": ...}

Shapes: n = pictures, C = classes, D = embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.vocabulary import builtin_names, load_builtin
from pretrain.errors import ConfigError, UserError, closest
from pretrain.evaluation.retrieval import TIE, check_finite

# A class in many settings: averaged, they leave what the settings share, which is the class.
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


def phrase(template: str, name: str) -> str:
    """The sentence of a template, with "an" where the name starts with a vowel."""
    if name[:1].lower() in "aeiou":
        template = template.replace("A {}", "An {}").replace(" a {}", " an {}")
        template = "an {}" + template[len("a {}") :] if template.startswith("a {}") else template
    return template.replace("{}", name)


def check_templates(templates: Sequence[str]) -> None:
    """Raises ConfigError for an empty list or a template without its place for the name."""
    if not templates:
        raise ConfigError('templates is empty; give at least one, for example "a picture of a {}"')
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"template {template!r} has no place for the class name; write {{}} where it goes")


def class_names(spec: str | Sequence[str]) -> list[str]:
    """The classes, in the order of their integer labels.

    Args:
        spec: a list; or "imagenet" (the 1,000 classes, named by timm's own data); or a data set whose vocabulary ships
            with the package ("scenes"); or a file with one name a line; or the names themselves with commas between.

    Raises:
        ConfigError: fewer than two names, a name twice, or a file that is not there.
    """
    if not isinstance(spec, str):
        names, where = [str(name) for name in spec], "the list of classes"
    elif spec.lower() in ("imagenet", "imagenet-1k"):
        names, where = imagenet_names(), "imagenet"
    elif spec.lower() in builtin_names():
        names, where = list(load_builtin(spec.lower()).names), spec.lower()
    elif "," in spec:
        names, where = spec.split(","), "the list of classes"
    else:
        try:
            names, where = Path(spec).read_text(encoding="utf-8").splitlines(), spec
        except OSError:
            known = ", ".join(f'"{name}"' for name in ("imagenet", *builtin_names()))
            raise ConfigError(
                f"no classes {spec!r}; give {known}, a file with one name a line, or the names with commas between"
            ) from None
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2:
        raise ConfigError(f"{where} names {len(names)} classes; at least two are needed")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ConfigError(f"{where} names {twice[0]!r} more than once; each class needs a name of its own")
    return names


def imagenet_names() -> list[str]:
    """The first word WordNet gives each class; where two classes share it (crane, cardigan, maillot), its definition too."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    first = [info.index_to_description(i).split(",")[0].strip() for i in range(info.num_classes())]
    lower = [name.lower() for name in first]
    shared = {name for name in lower if lower.count(name) > 1}
    for i, name in enumerate(lower):
        if name in shared:
            definition = info.index_to_description(i, detailed=True).split(": ", 1)[1]
            first[i] = f"{first[i]}, {definition.split(';')[0].strip()}"
    return first


def label_ids(labels: Sequence[Any], names: Sequence[str]) -> Tensor:
    """(n,) int64 from what the samples' json says: the number of the class, or its name in any case.

    Raises:
        UserError: a label that is missing, out of range or not one of the names.
    """
    known = {name.lower(): i for i, name in enumerate(names)}
    ids = []
    for at, label in enumerate(labels):
        if isinstance(label, bool) or label is None:
            raise UserError(f'sample {at} has no class: its json needs "label", a number below {len(names)} or a class name')
        if isinstance(label, int) or (isinstance(label, str) and label.strip().isdigit()):
            if not 0 <= int(label) < len(names):
                raise UserError(f"sample {at} has label {label}; the {len(names)} classes are numbered from 0")
            ids.append(int(label))
        elif str(label).strip().lower() in known:
            ids.append(known[str(label).strip().lower()])
        else:
            near = closest(str(label), list(names))
            raise UserError(f"sample {at} has label {str(label)!r}, which is none of the {len(names)} classes{near}")
    return torch.tensor(ids, dtype=torch.int64)


def classifier(names: Sequence[str], templates: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """(C, D) float32, rows normalised: the mean over templates of the sentence embeddings of each class.

    Args:
        encode: texts -> (b, D) L2-normalised; called with one class's sentences for a few classes at a time.
    """
    check_templates(templates)
    rows = []
    step = max(1, 256 // len(templates))
    for start in range(0, len(names), step):
        some = names[start : start + step]
        embedded = encode([phrase(template, name) for name in some for template in templates]).float()
        rows.append(F.normalize(embedded.view(len(some), len(templates), -1).mean(dim=1), dim=-1))
    return torch.cat(rows)


def top_k(image: Tensor, labels: Tensor, weights: Tensor, ks: Sequence[int] = (1, 5), tile: int = 4096) -> dict[str, float]:
    """{"top1": ..., "top5": ...}: how often the right class is among the k nearest, as a fraction.

    Classes that tie with the right one are ordered by chance, so the figures are expectations (see retrieval.py).

    Args:
        image: (n, D); labels: (n,) int64; weights: (C, D), all on one device.
    """
    check_finite("image", image)
    check_finite("class", weights)
    if len(image) == 0:
        raise UserError("nothing to classify: no pictures")
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
