"""Several texts a picture: the mean of the losses that each would have alone, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support import tiny

B, K, D = 6, 3, 5


def features() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(B, D, generator=g, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(B, K, D, generator=g, dtype=torch.float64), dim=-1)
    return {"image": image, "text": text, "logit_scale": torch.full((1,), 9.0, dtype=torch.float64)}


def test_the_mean_over_texts() -> None:
    given = features()
    loss, report = tiny.build_objective("clip").loss(given, {})
    assert torch.allclose(loss, tiny.closed_form_loss("clip", given), atol=1e-12)
    best = torch.stack([(given["image"] @ text.T).argmax(1) == torch.arange(B) for text in given["text"].unbind(1)])
    assert report["image_to_text_accuracy"].item() == best.float().mean().item()


def test_equal_captions_are_left_out_among_texts_of_one_place_only() -> None:
    """Row 0 and row 1 share their second caption; the first of row 2 is the second of row 3: that one stays a negative."""
    ids = torch.arange(B * K).reshape(B, K)
    ids[1, 1], ids[3, 1] = ids[0, 1], ids[2, 0]
    given = features()
    expected = []
    for k, text in enumerate(given["text"].unbind(1)):
        s = 9.0 * given["image"] @ text.T
        if k == 1:
            s[0, 1] = s[1, 0] = float("-inf")
        expected.append(-(2 * s.diagonal() - s.logsumexp(1) - s.logsumexp(0)).mean() / 2)
    loss, _ = tiny.build_objective("clip", same_caption="ignore").loss(given, {"caption_id": ids})
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-12)
