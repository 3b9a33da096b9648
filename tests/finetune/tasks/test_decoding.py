"""Greedy, beam and nucleus search against exhaustive search and transformers' nucleus filter."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from finetune.tasks.decoding import Generated, beam_search, greedy_search, nucleus_probabilities, nucleus_sampling

V, LENGTH, END = 4, 4, 0


class Table:
    """A next-token model: random logits for each possible prefix and each sample."""

    def __init__(self, samples: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.samples = samples
        self.rows: dict[tuple[int, ...], np.ndarray] = {}
        for i in range(samples):
            for t in range(LENGTH):
                for prefix in itertools.product(range(V), repeat=t):
                    logits = 2 * rng.standard_normal(V)
                    self.rows[(i, *prefix)] = logits - np.log(np.exp(logits).sum())

    def __call__(self, ids: Tensor) -> Tensor:
        beams = len(ids) // self.samples
        rows = [self.rows[(n // beams, *row[1:])] for n, row in enumerate(ids.tolist())]
        return torch.from_numpy(np.stack(rows))

    def best_of_all(self, sample: int, penalty: float) -> tuple[list[int], float]:
        """Return the best of all sequences of at most LENGTH tokens, and its score before the penalty."""
        scores = {}
        for length in range(1, LENGTH + 1):
            for sequence in itertools.product(range(V), repeat=length):
                if END in sequence[:-1] or (length < LENGTH and sequence[-1] != END):
                    continue
                score = sum(self.rows[(sample, *sequence[:t])][token] for t, token in enumerate(sequence))
                scores[sequence] = (score / length**penalty, score)
        best = max(scores, key=lambda sequence: scores[sequence][0])
        return [token for token in best if token != END], scores[best][1]


def start(samples: int) -> Tensor:
    return torch.full((samples, 1), 3)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
def test_wide_beam_search_equals_exhaustive_search(penalty: float) -> None:
    table = Table(samples=12)
    generated = beam_search(table, start(12), END, LENGTH, beams=V**LENGTH, penalty=penalty)
    expected = [table.best_of_all(i, penalty) for i in range(12)]
    assert generated.ids == [ids for ids, _ in expected]
    assert generated.scores.tolist() == pytest.approx([score for _, score in expected], rel=1e-5)
    assert len({len(ids) for ids in generated.ids}) > 1, "all sequences have one length: this table tests too little"


def test_three_beams_score_between_one_beam_and_exhaustive_search() -> None:
    table = Table(samples=40, seed=1)
    narrow = beam_search(table, start(40), END, LENGTH, beams=1, penalty=0.0).scores
    wide = beam_search(table, start(40), END, LENGTH, beams=3, penalty=0.0).scores
    most = torch.tensor([table.best_of_all(i, 0.0)[1] for i in range(40)])
    assert bool((wide <= most + 1e-5).all())
    assert float(wide.sum()) > float(narrow.sum())


def test_greedy_search_takes_the_most_likely_token() -> None:
    table = Table(samples=20, seed=2)
    generated = greedy_search(table, start(20), END, LENGTH)
    for i in range(20):
        prefix: list[int] = []
        score = 0.0
        while len(prefix) < LENGTH:
            row = table.rows[(i, *prefix)]
            score += float(row.max())
            if int(row.argmax()) == END:
                break
            prefix.append(int(row.argmax()))
        assert generated.ids[i] == prefix
        assert float(generated.scores[i]) == pytest.approx(score)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_nucleus_probabilities_equal_those_of_transformers(top_p: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 50)) * 3)
    warped = TopPLogitsWarper(top_p=top_p)(torch.zeros(64, 1), logits).softmax(dim=-1) if top_p < 1 else logits.softmax(dim=-1)
    torch.testing.assert_close(nucleus_probabilities(logits, top_p), warped.double(), rtol=1e-9, atol=1e-12)


def test_nucleus_sampling_draws_with_these_probabilities() -> None:
    samples = 4000
    logits = torch.tensor([1.0, 0.5, 0.0, -1.0]).log_softmax(dim=-1)
    uniform = torch.from_numpy(np.random.default_rng(0).random((samples, 1)))
    generated = nucleus_sampling(
        lambda ids: logits.expand(len(ids), -1), start(samples), END, 1, uniform, top_p=0.8, temperature=0.5
    )
    counts = Counter(ids[0] if ids else END for ids in generated.ids)
    expected = nucleus_probabilities(logits[None] / 0.5, 0.8)[0]
    assert set(counts) == set(torch.nonzero(expected)[:, 0].tolist())
    for token, count in counts.items():
        p = float(expected[token])
        assert abs(count / samples - p) < 4 * (p * (1 - p) / samples) ** 0.5


def test_a_sample_gets_the_same_sequence_in_any_batch() -> None:
    table = Table(samples=6, seed=3)
    uniform = torch.from_numpy(np.random.default_rng(1).random((6, LENGTH)))

    def sample_sequences(samples: list[int]) -> Generated:
        def step(ids: Tensor) -> Tensor:
            return torch.from_numpy(np.stack([table.rows[(samples[n], *row[1:])] for n, row in enumerate(ids.tolist())]))

        return nucleus_sampling(step, start(len(samples)), END, LENGTH, uniform[samples])

    together = sample_sequences(list(range(6)))
    assert [sample_sequences([i]).ids[0] for i in range(6)] == together.ids
    assert len(set(map(tuple, together.ids))) > 1
