"""The linear probe against scikit-learn on the same problem."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pretrain.errors import UserError
from pretrain.evaluation import linear_probe


def blobs(n: int, classes: int = 4, width: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds with features of very different sizes, one of them constant."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(n, width, generator=generator)
    features = features * torch.logspace(-2, 2, width)
    features[:, 3] = 7.0
    return features, labels


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_agrees_with_scikit_learn(strength: float) -> None:
    features, labels = blobs(300)
    probe = linear_probe.fit(features, labels, 4, [strength])
    x = StandardScaler().fit_transform(features.double().numpy())
    theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(x, labels.numpy())
    logits = (x @ probe.weights[:, :-1].T.numpy()) + probe.weights[:, -1].numpy()
    ours = torch.from_numpy(logits).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(x), atol=2e-5)
    np.testing.assert_allclose(probe.weights[:, :-1].numpy(), theirs.coef_, atol=2e-3)
    test_features, test_labels = blobs(500, seed=1)
    scaler = StandardScaler().fit(features.double().numpy())
    score = theirs.score(scaler.transform(test_features.double().numpy()), test_labels.numpy())
    assert probe.top_k(test_features, test_labels)["top1"] == pytest.approx(score, abs=1e-9)


def test_rows_in_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = blobs(200)
    whole = linear_probe.fit(features, labels, 4, [1.0])
    monkeypatch.setattr(linear_probe, "ROWS", 4 * 33)
    local_shards = linear_probe.fit(features, labels, 4, [1.0])
    torch.testing.assert_close(whole.weights, local_shards.weights, atol=1e-6, rtol=0)


def test_sweep_picks_by_the_held_out_part_and_keeps_the_generator() -> None:
    features, labels = blobs(60, width=200)  # more features than samples: little regularisation loses
    before = torch.get_rng_state()
    probe = linear_probe.fit(features, labels, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert probe.strength in linear_probe.STRENGTHS
    test = blobs(400, width=200, seed=1)
    chosen = probe.top_k(*test)["top1"]
    worst = min(linear_probe.fit(features, labels, 4, [c]).top_k(*test)["top1"] for c in linear_probe.STRENGTHS)
    assert chosen > worst
    assert chosen > 0.5


def test_refuses_what_cannot_be_learnt() -> None:
    features, _ = blobs(10)
    with pytest.raises(UserError, match="two classes"):
        linear_probe.fit(features, torch.zeros(10, dtype=torch.int64), 4)
    features[2, 0] = torch.inf
    with pytest.raises(UserError, match="1 of 10 training embeddings are not finite"):
        linear_probe.fit(features, torch.arange(10) % 4, 4)


def test_classes_are_numbered_over_both_splits() -> None:
    train, test, classes = linear_probe.label_ids(["Cat", 3, "dog"], ["3", "cat", "owl"])
    assert classes == 4
    assert train.tolist() == [1, 0, 2]
    assert test.tolist() == [0, 1, 3]
    with pytest.raises(UserError, match="1 of 3 samples have no class"):
        linear_probe.label_ids(["cat", None], ["dog"])
