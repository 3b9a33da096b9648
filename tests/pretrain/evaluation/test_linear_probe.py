"""The linear probe against scikit-learn on the same problem."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pretrain.errors import UserError
from pretrain.evaluation import linear_probe


def draw_clusters(n: int, classes: int = 4, width: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw overlapping clusters, (n, width) and (n,).

    The features have very different scales, and one of them is constant.
    """
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    features = centers[labels] + 1.5 * torch.randn(n, width, generator=generator)
    features = features * torch.logspace(-2, 2, width)
    features[:, 3] = 7.0
    return features, labels


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_agrees_with_scikit_learn(strength: float) -> None:
    features, labels = draw_clusters(300)
    probe = linear_probe.fit(features, labels, 4, [strength])
    x = StandardScaler().fit_transform(features.double().numpy())
    reference = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(x, labels.numpy())
    logits = (x @ probe.weights[:, :-1].T.numpy()) + probe.weights[:, -1].numpy()
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, reference.predict_proba(x), atol=2e-5)
    np.testing.assert_allclose(probe.weights[:, :-1].numpy(), reference.coef_, atol=2e-3)
    test_features, test_labels = draw_clusters(500, seed=1)
    scaler = StandardScaler().fit(features.double().numpy())
    score = reference.score(scaler.transform(test_features.double().numpy()), test_labels.numpy())
    assert probe.top_k_accuracy(test_features, test_labels)["top1"] == pytest.approx(score, abs=1e-9)


def test_computing_logits_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = draw_clusters(200)
    whole = linear_probe.fit(features, labels, 4, [1.0])
    monkeypatch.setattr(linear_probe, "LOGITS_PER_CHUNK", 4 * 33)
    chunked = linear_probe.fit(features, labels, 4, [1.0])
    torch.testing.assert_close(whole.weights, chunked.weights, atol=1e-6, rtol=0)


def test_the_sweep_picks_a_strength_on_held_out_samples_and_leaves_the_generator_alone() -> None:
    features, labels = draw_clusters(60, width=200)  # more features than samples: little regularization does worst
    before = torch.get_rng_state()
    probe = linear_probe.fit(features, labels, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert probe.strength in linear_probe.STRENGTHS
    test = draw_clusters(400, width=200, seed=1)
    chosen = probe.top_k_accuracy(*test)["top1"]
    worst = min(linear_probe.fit(features, labels, 4, [c]).top_k_accuracy(*test)["top1"] for c in linear_probe.STRENGTHS)
    assert chosen > worst
    assert chosen > 0.5


def test_a_single_class_and_infinite_features_are_refused() -> None:
    features, _ = draw_clusters(10)
    with pytest.raises(UserError, match="at least two classes; the 10 given ones have fewer"):
        linear_probe.fit(features, torch.zeros(10, dtype=torch.int64), 4)
    features[2, 0] = torch.inf
    with pytest.raises(UserError, match="1 of 10 training embeddings are not finite"):
        linear_probe.fit(features, torch.arange(10) % 4, 4)


def test_classes_are_numbered_over_both_splits() -> None:
    train, test, classes = linear_probe.index_labels(["Cat", 3, "dog"], ["3", "cat", "owl"])
    assert classes == 4
    assert train.tolist() == [1, 0, 2]
    assert test.tolist() == [0, 1, 3]
    with pytest.raises(UserError, match="1 of 3 samples have no class"):
        linear_probe.index_labels(["cat", None], ["dog"])
