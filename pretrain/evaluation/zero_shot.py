"""Zero-shot classification: the weights of a class are the mean embedding of sentences that name it.

    names = load_class_names("imagenet")
    weights = build_classifier(names, TEMPLATES, encode)   (C, D), encode: list of texts -> (b, D) normalized
    top_k_accuracy(image, labels, weights)                 {"top1": ..., "top5": ...}

Shapes: n = images, C = classes, D = embedding width.
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
            with the package ("scenes"); or a file with one name a line; or the names themselves, separated by commas.

    Raises:
        ConfigError: fewer than two names, a repeated name, or a file that does not exist.
    """
    if not isinstance(spec, str):
        names, origin = [str(name) for name in spec], "the list of classes"
    elif spec.lower() in ("imagenet", "imagenet-1k"):
        names, origin = load_imagenet_names(), "imagenet"
    elif spec.lower() in builtin_names():
        names, origin = list(load_builtin(spec.lower()).names), spec.lower()
    elif "," in spec:
        names, origin = spec.split(","), "the list of classes"
    else:
        try:
            names, origin = Path(spec).read_text(encoding="utf-8").splitlines(), spec
        except OSError:
            known = ", ".join(f'"{name}"' for name in ("imagenet", *builtin_names()))
            raise ConfigError(
                f"no classes {spec!r}; give {known}, a file with one name a line, or the names separated by commas"
            ) from None
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2:
        raise ConfigError(f"{origin} names {len(names)} classes; at least two are needed")
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ConfigError(f"{origin} names {repeated[0]!r} more than once; every class needs a different name")
    return names


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

    A label is the number of the class, or its name in upper or lower case.

    Raises:
        UserError: a label that is missing, out of range or not one of the names.
    """
    index_by_name = {name.lower(): i for i, name in enumerate(names)}
    ids = []
    for i, label in enumerate(labels):
        if isinstance(label, bool) or label is None:
            raise UserError(f'sample {i} has no class: its json needs "label", a number below {len(names)} or a class name')
        if isinstance(label, int) or (isinstance(label, str) and label.strip().isdigit()):
            if not 0 <= int(label) < len(names):
                raise UserError(f"sample {i} has label {label}; the {len(names)} classes are numbered from 0")
            ids.append(int(label))
        elif str(label).strip().lower() in index_by_name:
            ids.append(index_by_name[str(label).strip().lower()])
        else:
            near = closest(str(label), list(names))
            raise UserError(f"sample {i} has label {str(label)!r}, which is none of the {len(names)} classes{near}")
    return torch.tensor(ids, dtype=torch.int64)


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
        raise UserError("nothing to classify: there are no images")
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
