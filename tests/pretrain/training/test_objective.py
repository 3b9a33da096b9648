"""Several texts an image: the loss is the mean over the texts, against a closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support import tiny

B, K, D = 6, 3, 5


def draw_features() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(B, D, generator=g, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(B, K, D, generator=g, dtype=torch.float64), dim=-1)
    return {"image": image, "text": text, "logit_scale": torch.full((1,), 9.0, dtype=torch.float64)}


def test_the_loss_is_the_mean_over_texts() -> None:
    features = draw_features()
    loss, report = tiny.build_objective("clip").loss(features, {})
    assert torch.allclose(loss, tiny.closed_form_loss("clip", features), atol=1e-12)
    is_correct = torch.stack([(features["image"] @ text.T).argmax(1) == torch.arange(B) for text in features["text"].unbind(1)])
    assert report["image_to_text_accuracy"].item() == is_correct.float().mean().item()


def test_equal_captions_are_ignored_only_where_both_are_the_kth_text() -> None:
    """Rows 0 and 1 share their second caption, which is ignored.

    The first caption of row 2 is the second of row 3, and stays a negative.
    """
    ids = torch.arange(B * K).reshape(B, K)
    ids[1, 1], ids[3, 1] = ids[0, 1], ids[2, 0]
    features = draw_features()
    expected = []
    for k, text in enumerate(features["text"].unbind(1)):
        s = 9.0 * features["image"] @ text.T
        if k == 1:
            s[0, 1] = s[1, 0] = float("-inf")
        expected.append(-(2 * s.diagonal() - s.logsumexp(1) - s.logsumexp(0)).mean() / 2)
    loss, _ = tiny.build_objective("clip", same_caption="ignore").loss(features, {"caption_id": ids})
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-12)
