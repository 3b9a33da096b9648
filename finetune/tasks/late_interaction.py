"""Late interaction: each token of a text is compared with the token of the image that it resembles most.

The maximum over image tokens is that of ColBERT (arXiv 2004.12832) and FILIP (arXiv 2111.07783). There the similarities have
equal weights; here weight and bias of each depend on the fused token, so that "the" may count less than "striped". They begin
at zero: an untrained one adds nothing.

Shapes: b = images, m = texts per image, T = tokens of a text, N = tokens of an image, C = width of a token.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from finetune.attention.multihead import ZeroInitLinear
from pretrain.towers import TokenSequence


class LateInteraction(nn.Module):
    """The weighted sum over the tokens of a text of their largest similarity with a token of the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weigh = ZeroInitLinear(width, 2)

    def forward(self, fused: TokenSequence, text: TokenSequence, image: TokenSequence) -> Tensor:
        """Return (m b,), what is added to the matching logits.

        Args:
            fused: (m b, T, C), the tokens of the texts after cross-attention.
            text: (m b, T, C), the same before.
            image: (b, N, C), of the same width.
        """
        weight, bias = self.weigh(fused.states).unbind(dim=2)
        scores: Tensor = ((weight * largest_similarity(text, image) + bias) * fused.mask).sum(dim=1)
        return scores


def largest_similarity(text: TokenSequence, image: TokenSequence) -> Tensor:
    """Return (m b, T), the largest cosine similarity of each token of a text with a token of its image."""
    words, regions = F.normalize(text.states, dim=2), F.normalize(image.states, dim=2)
    cosines = words.reshape(regions.shape[0], -1, regions.shape[2]) @ regions.transpose(1, 2)  # (b, m T, N)
    return cosines.masked_fill(~image.mask[:, None], -1.0).amax(dim=2).reshape(text.mask.shape)
