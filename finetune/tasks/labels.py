"""What a sample is labelled with, and how well labels were told: reading, weighing, figures (by torchmetrics).

Shapes: b = samples, n = samples of an evaluation, K = classes.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data import BadSample
from pretrain.data.sample_json import read_json
from pretrain.data.shards.paths import RawSample
from pretrain.errors import UserError


class Labels:
    """A decoder that gives targets only: `label` (b,) int64, or of several labels a sample `labels` (b, K) float32, 0 or 1.

    In evaluation a label that is none of the classes is -1, and an unknown one of several is left out.
    """

    def __init__(self, field: str, classes: Sequence[str], several: bool) -> None:
        self.field, self.several = field, several
        self.ids = {name: i for i, name in enumerate(classes)}

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> list[int]:
        """Positions in the classes. Raises BadSample."""
        values = read_json(sample.members)
        names = labels_of(values, self.field, self.several)
        unknown = [name for name in names if name not in self.ids]
        if unknown and train:
            raise BadSample("unknown label", f"{self.field}={unknown[0]!r} is none of the {len(self.ids)} classes"[:200])
        return [self.ids.get(name, -1) for name in names]

    def collate(self, items: list[list[int]]) -> None:
        """No input."""
        return

    def targets(self, items: list[list[int]]) -> dict[str, Any]:
        """See the class."""
        if not self.several:
            return {"label": torch.tensor([item[0] for item in items], dtype=torch.int64)}
        found = torch.zeros(len(items), len(self.ids))
        for i, item in enumerate(items):
            found[i, [at for at in item if at >= 0]] = 1
        return {"labels": found}


def labels_of(values: Any, field: str, several: bool) -> list[str]:
    """The labels in a sample's json, as words: names, numbers, true and false. Raises BadSample."""
    given = values.get(field) if isinstance(values, dict) else None
    if given is None:
        has = ", ".join(sorted(map(str, values)))[:150] if isinstance(values, dict) else ""
        raise BadSample("no label", f"its json has no {field!r}, but {has or 'nothing'}")
    if isinstance(given, list) != several:
        raise BadSample(
            "label of the wrong kind",
            f"{field}={given!r} is {'a list: one' if not several else 'no list: several'} labels are expected"[:200],
        )
    return list(dict.fromkeys(_word(each, field) for each in (given if several else [given])))


def _word(value: Any, field: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip() if isinstance(value, str | int) else ""
    if not text:
        raise BadSample("label of the wrong kind", f"{field}={value!r} is no name and no whole number"[:200])
    return text


def count(samples: Iterator[dict[str, Any]], field: str, several: bool) -> tuple[Counter[str], int]:
    """How often each label occurs, and in how many samples labels can be read."""
    found: Counter[str] = Counter()
    usable = 0
    for values in samples:
        try:
            found.update(labels_of(values, field, several))
        except BadSample:
            continue  # counted where it is read to be learned from
        usable += 1
    return found, usable


def in_order(names: Sequence[str]) -> list[str]:
    """Whole numbers by size, then words by the alphabet."""
    numbers = {name: int(name) for name in names if name.lstrip("-").isdecimal()}
    return sorted(names, key=lambda name: (name not in numbers, numbers.get(name, 0), name))


def balance(counts: Counter[str], samples: int, several: bool) -> dict[str, float]:
    """Weights under which all classes count the same: n / (K n_c); of several labels, how often a class is absent for each
    time it is there."""
    if several:
        return {name: max(samples - n, 1) / n for name, n in counts.items()}
    return {name: samples / (len(counts) * n) for name, n in counts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def check_measures() -> None:
    """Raises UserError where torchmetrics is missing: now, not at the first evaluation."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise UserError("classification is measured by torchmetrics, which is not installed: pip install torchmetrics")


def single(logits: Tensor, label: Tensor, top: Sequence[int]) -> dict[str, float]:
    """(n, K), (n,) -> top1, top5, ... (fractions; of fewer classes: of all), macro_f1, auc (one class against the rest, the
    mean over classes that some samples have and some have not; left out where there is none)."""
    from torchmetrics.functional import classification as measure

    K = logits.shape[1]
    share = logits.float().softmax(dim=1)
    out = {
        f"top{k}": float(measure.multiclass_accuracy(share, label, K, average="micro", top_k=min(k, K))) if k < K else 1.0
        for k in top
    }
    out["macro_f1"] = float(measure.multiclass_f1_score(share, label, K, average="macro"))
    there = torch.nn.functional.one_hot(label, K)
    return {**out, **_auc([measure.binary_auroc(share[:, c], there[:, c]) for c in _mixed(there)])}


def multi(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """(n, K), (n, K) of 0 and 1 -> macro_f1 and micro_f1 of what is above one half, exact (all labels of a sample right),
    auc (mean over classes, as in `single`)."""
    from torchmetrics.functional import classification as measure

    K, labels = logits.shape[1], labels.long()
    share = logits.float().sigmoid()
    out = {
        "macro_f1": float(measure.multilabel_f1_score(share, labels, K, average="macro")),
        "micro_f1": float(measure.multilabel_f1_score(share, labels, K, average="micro")),
        "exact": float(measure.multilabel_exact_match(share, labels, K)),
    }
    return {**out, **_auc([measure.binary_auroc(share[:, c], labels[:, c]) for c in _mixed(labels)])}


def _mixed(there: Tensor) -> list[int]:
    """(n, K) of 0 and 1 -> the classes that some samples have and some have not: those with an area under a curve."""
    seen = there.sum(dim=0)
    found: list[int] = ((seen > 0) & (seen < len(there))).nonzero().flatten().tolist()
    return found


def _auc(areas: list[Tensor]) -> dict[str, float]:
    mean = float(torch.stack(areas).mean()) if areas else math.nan
    return {} if math.isnan(mean) else {"auc": mean}
