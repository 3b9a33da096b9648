"""Similarity maps: how much each pair of a token and a cell adds to the similarity of a text and an image, without a fusion.

Both towers pool the mean of their tokens, and a projection is a matrix, so the similarity of the two embeddings, before they
are normalized, is the mean of the products of all projected tokens and cells:

    image . text  =  1 / (T N)  *  sum over t, n of  token_t . cell_n

A word's map holds its products with all cells. With image.stride, the similarity is the mean over the coarser cells. Class
tokens, attention pooling and pooling of the last token have no such split, and are refused. May import pretrain.
Shapes: b images, each with one text; T tokens; N = H W cells.

Measured: on 200 clip-art images, maps of words in titles lie on what is drawn 1.5 times as densely as on the whole image, and
1.2 times with the title of another image (tests/bench/RESULTS.md, foreground).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.embedding.split import eval_mode
from pretrain.errors import UserError
from pretrain.model import DualEncoder


@torch.no_grad()
def compute_similarity_maps(
    encoder: DualEncoder, images: Tensor, ids: Tensor, mask: Tensor, subject: str = "image"
) -> tuple[Tensor, Tensor]:
    """Compute the products of projected tokens and cells, (b, T, H, W), and the cosines of the embeddings, (b,).

    Products have their sign, and are 0 for padding.

    Args:
        encoder: of images and texts.
        images: (b, 3, h, w) uint8.
        ids: (b, T), one text per image.
        mask: (b, T), True for real tokens.
        subject: the modality of `images`.

    Raises:
        UserError: a tower that does not pool the mean of its tokens.
    """
    check_pooling(encoder, subject)
    with eval_mode(encoder):
        image, text = encoder.tokens(subject, images), encoder.tokens("text", ids, mask)
    assert image.grid is not None  # no patch dropout in eval mode
    products = (text.states * text.mask[..., None]) @ image.states.mT
    return products.unflatten(2, image.grid), F.cosine_similarity(image.pooled, text.pooled)


def check_pooling(encoder: DualEncoder, subject: str) -> None:
    """Raise UserError where single tokens of texts, or of `subject`, have no place in the shared space."""
    if encoder.has_mlp:
        raise UserError(
            "similarity maps need projections that are matrices, and this model has two layers (model.projection=mlp): draw "
            "the attention of a fine-tuned run (raw)"
        )
    for name in (subject, "text"):
        if not encoder.tower(name).pools_mean:
            raise UserError(
                f"similarity maps need towers that pool the mean of their tokens, and the {name} tower of this model does not: "
                f"pretrain with {name}.pool=avg, or draw the attention of a fine-tuned run (raw)"
            )
