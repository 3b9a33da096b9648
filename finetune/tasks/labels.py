"""Labels of samples: reading, class weights, and classification metrics (computed by torchmetrics).

Shapes: b = samples of a batch, n = samples of an evaluation, K = classes.
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
    """A decoder that gives targets only: `label` (b,) int64, or `labels` (b, K) float32 of 0 and 1.

    In evaluation, a label that is not among the classes is -1; of several labels, unknown ones are left out.
    """

    def __init__(self, field: str, classes: Sequence[str], several: bool) -> None:
        self.field, self.several = field, several
        self.ids = {name: i for i, name in enumerate(classes)}

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> list[int]:
        """Return the class index of each label. Raises BadSample."""
        values = read_json(sample.members)
        names = read_labels(values, self.field, self.several)
        unknown = [name for name in names if name not in self.ids]
        if unknown and train:
            raise BadSample("unknown label", f"{self.field}={unknown[0]!r} is not one of the {len(self.ids)} classes"[:200])
        return [self.ids.get(name, -1) for name in names]

    def collate(self, items: list[list[int]]) -> None:
        """Return None: labels are targets, not inputs."""
        return

    def targets(self, items: list[list[int]]) -> dict[str, Any]:
        """Collate the targets described at the class."""
        if not self.several:
            return {"label": torch.tensor([item[0] for item in items], dtype=torch.int64)}
        labels = torch.zeros(len(items), len(self.ids))
        for i, item in enumerate(items):
            labels[i, [index for index in item if index >= 0]] = 1
        return {"labels": labels}


def read_labels(values: Any, field: str, several: bool) -> list[str]:
    """Return the labels in a sample's json as text: names, whole numbers, booleans. Raises BadSample."""
    label = values.get(field) if isinstance(values, dict) else None
    if label is None:
        fields = ", ".join(sorted(map(str, values)))[:150] if isinstance(values, dict) else ""
        raise BadSample("no label", f"its json has no field {field!r}, only {fields or 'none'}")
    if isinstance(label, list) != several:
        raise BadSample(
            "label of the wrong kind",
            f"{field}={label!r} is {'a list, but one label is' if not several else 'not a list, but several labels are'} "
            "expected"[:200],
        )
    return list(dict.fromkeys(_label_text(value, field) for value in (label if several else [label])))


def _label_text(value: Any, field: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip() if isinstance(value, str | int) else ""
    if not text:
        raise BadSample("label of the wrong kind", f"{field}={value!r} is neither a name nor a whole number"[:200])
    return text


def count_labels(samples: Iterator[dict[str, Any]], field: str, several: bool) -> tuple[Counter[str], int]:
    """Count how often each label occurs, and the samples whose labels can be read."""
    counts: Counter[str] = Counter()
    usable = 0
    for values in samples:
        try:
            counts.update(read_labels(values, field, several))
        except BadSample:
            continue  # training counts it when it reads the sample
        usable += 1
    return counts, usable


def sort_labels(names: Sequence[str]) -> list[str]:
    """Sort whole numbers by value, then names alphabetically."""
    numbers = {name: int(name) for name in names if name.lstrip("-").isdecimal()}
    return sorted(names, key=lambda name: (name not in numbers, numbers.get(name, 0), name))


def balanced_weights(counts: Counter[str], samples: int, several: bool) -> dict[str, float]:
    """Return weights with which all classes contribute equally to the loss.

    For single labels n / (K n_c). For several labels, how often a class is absent for each time it is present.
    """
    if several:
        return {name: max(samples - n, 1) / n for name, n in counts.items()}
    return {name: samples / (len(counts) * n) for name, n in counts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def check_torchmetrics() -> None:
    """Raise UserError where torchmetrics is missing: at the start of a run, not at its first evaluation."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise UserError("classification is measured by torchmetrics, which is not installed: pip install torchmetrics")


def single_label_metrics(logits: Tensor, label: Tensor, top: Sequence[int]) -> dict[str, float]:
    """Compute top-k accuracies, macro F1 and AUC of one label per sample.

    Args:
        logits: (n, K).
        label: (n,) int64.
        top: values of k; with k >= K the accuracy is 1.

    Returns:
        top1, top5, ... (fractions), macro_f1, and auc: one class against the rest, averaged over the classes that occur in
        some samples and not in others. auc is left out where there is no such class.
    """
    from torchmetrics.functional import classification as measure

    K = logits.shape[1]
    probabilities = logits.float().softmax(dim=1)

    def top_k_accuracy(k: int) -> float:
        return float(measure.multiclass_accuracy(probabilities, label, K, average="micro", top_k=k)) if k < K else 1.0

    out = {f"top{k}": top_k_accuracy(k) for k in top}
    out["macro_f1"] = float(measure.multiclass_f1_score(probabilities, label, K, average="macro"))
    one_hot = torch.nn.functional.one_hot(label, K)
    return {**out, **_mean_auc([measure.binary_auroc(probabilities[:, c], one_hot[:, c]) for c in _classes_with_both(one_hot)])}


def multi_label_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute F1, exact matches and AUC of several labels per sample.

    Args:
        logits: (n, K); a probability above one half is a prediction.
        labels: (n, K) of 0 and 1.

    Returns:
        macro_f1, micro_f1, exact (fraction of samples with all labels right), auc as in `single_label_metrics`.
    """
    from torchmetrics.functional import classification as measure

    K, labels = logits.shape[1], labels.long()
    probabilities = logits.float().sigmoid()
    out = {
        "macro_f1": float(measure.multilabel_f1_score(probabilities, labels, K, average="macro")),
        "micro_f1": float(measure.multilabel_f1_score(probabilities, labels, K, average="micro")),
        "exact": float(measure.multilabel_exact_match(probabilities, labels, K)),
    }
    return {**out, **_mean_auc([measure.binary_auroc(probabilities[:, c], labels[:, c]) for c in _classes_with_both(labels)])}


def prior_logits(labels: Tensor, several: bool) -> Tensor:
    """Return (n, K) logits of a classifier that gives every sample the frequencies of the classes, labels (n, K) of 0 and 1."""
    frequencies = labels.double().mean(dim=0)
    return (frequencies.logit() if several else frequencies.log()).float().expand(len(labels), -1)


def _classes_with_both(labels: Tensor) -> list[int]:
    """Return the classes that some samples have and others lack: only these have an ROC curve."""
    counts = labels.sum(dim=0)
    classes: list[int] = ((counts > 0) & (counts < len(labels))).nonzero().flatten().tolist()
    return classes


def _mean_auc(areas: list[Tensor]) -> dict[str, float]:
    mean = float(torch.stack(areas).mean()) if areas else math.nan
    return {} if math.isnan(mean) else {"auc": mean}
