"""Coarse-to-fine attention: every region as one token, and the best regions at full detail.

A first pass attends to the region means. The regions with the most attention are then opened: queries attend to their cells,
in one softmax. A region that is not opened stays in the softmax as its mean, counted once per cell (log n is added to its
score):

- The output is exactly a weighted mean over all cells: the weight of a mean is shared evenly by its cells.
- It equals dense attention with every region opened, and where the cells of each region are identical.
- The score of a region that should be opened has a gradient, because its mean is part of the output.

The words of one text select regions together: their regions are then one small set of keys for a fused kernel, and only
those are projected. Or each word selects its own. In self-attention an image selects region by region (arXiv 2303.08810).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from finetune.attention.multihead import Keys, attend
from finetune.attention.trace import Weights
from finetune.context import Context, Queries
from finetune.context.tiling import Tiling
from pretrain.config import check_numbers
from pretrain.errors import ConfigError


@dataclass
class Config:
    """Two levels of detail: a query has N / region^2 + keep x region^2 keys instead of N."""

    name: str = "coarse_to_fine"
    """This file."""
    region: int = 4
    """Side of a region, tokens."""
    keep: int = 8
    """Number of regions that each selection opens."""
    choose: Literal["text", "word"] = "text"
    """Whether a text's words select regions together, or each word its own (more memory, more detail)."""

    def check(self) -> None:
        """Raise ConfigError for a number out of range."""
        if self.region < 1 or self.keep < 0:
            raise ConfigError(f"context.region={self.region} (from 1) and context.keep={self.keep} (from 0) do not fit")
        check_numbers(self, "context")


class Selection(NamedTuple):
    """The regions that G groups of queries opened, and biases for the scores."""

    regions: Tensor
    """(B, G, n) int64."""
    coarse: Tensor
    """(B, G, R), added to the score of a region's mean: log of its number of cells, -inf where opened or empty."""
    fine: Tensor
    """(B, G, n P), added to the scores of the opened cells: 0, or -inf for padding."""


class CoarseToFine(Context):
    """Attention to region means and to the cells of the best regions; see the module docstring.

    Shapes, besides those of attention/multihead.py: R regions of P cells, n of them opened, G groups of U queries, T tokens
    after the image.
    """

    has_hard_selection: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def has_shared_selection(self) -> bool:
        """Return whether the words of a text select together (choose=text)."""
        return self.config.choose == "text"

    def forward(self, queries: Queries, keys: Keys, exact: bool = False) -> tuple[Tensor, Weights | None]:
        """See Context. Raises ConfigError for an image whose tokens have no grid."""
        if keys.tokens.grid is None:
            raise ConfigError("context.name=coarse_to_fine needs the image's grid; patch dropout breaks it: use dense")
        tiling = Tiling(keys.tokens.grid, self.config.region)
        q_BGHUD = self._group_queries(queries, tiling)

        # The coarse pass: a mean of states is projected once, which is the mean of the projected states.
        N, mask = keys.grid_size, keys.tokens.mask
        T = keys.tokens.states.shape[1] - N
        states_BNC = keys.tokens.states[:, :N] if T else keys.tokens.states
        cells_BRPC = tiling.split(states_BNC[:, None])[:, :, 0]
        valid_BRP = tiling.build_valid_mask(None if mask is None else mask[:, :N], q_BGHUD.device)
        valid_BRP = valid_BRP.expand(len(cells_BRPC), -1, -1)
        mean_BRP = _mean_weights(valid_BRP, cells_BRPC.dtype)
        k_BHRD, v_BHRD = keys.project((mean_BRP[:, :, None] @ cells_BRPC)[:, :, 0])
        selection = self._select_regions(queries, q_BGHUD, k_BHRD, valid_BRP)

        # The fine pass: opened cells, then means, then the tokens after the image.
        k_BGHKD, v_BGHKD = self._project_opened(keys, tiling, cells_BRPC, selection)
        G, R, opened = q_BGHUD.shape[1], k_BHRD.shape[2], selection.regions.shape[2]
        bias = [selection.fine]
        if opened < R:
            k_BGHKD, v_BGHKD = _append_keys(k_BGHKD, k_BHRD), _append_keys(v_BGHKD, v_BHRD)
            bias.append(selection.coarse)
        if T:
            k_BHTD, v_BHTD = keys.project(keys.tokens.states[:, N:])
            k_BGHKD, v_BGHKD = _append_keys(k_BGHKD, k_BHTD), _append_keys(v_BGHKD, v_BHTD)
            visible = valid_BRP.new_ones(len(valid_BRP), T) if mask is None else mask[:, N:]
            bias.append(_mask_to_bias(visible)[:, None].expand(-1, G, -1))
        bias_BGK = torch.cat(bias, dim=2).to(q_BGHUD.dtype)
        out_BGHUD, used = attend(q_BGHUD, k_BGHKD, v_BGHKD, bias_BGK[:, :, None, None], exact)
        out = tiling.join(out_BGHUD) if queries.is_self else _ungroup_queries(out_BGHUD)
        if used is None:
            return out, None
        return out, Weights(used, lambda w: _expand_weights(w, tiling, selection.regions, valid_BRP, T, queries.is_self))

    def _group_queries(self, queries: Queries, tiling: Tiling) -> Tensor:
        """(B, H, Q, D) -> (B, G, H, U, D): a group is the queries that open the same regions."""
        if queries.is_self:
            return tiling.split(queries.q)
        B, H, Q, D = queries.q.shape
        groups = queries.rows if self.config.choose == "text" else Q
        return queries.q.reshape(B, H, groups, Q // groups, D).transpose(1, 2)

    @torch.no_grad()
    def _select_regions(self, queries: Queries, q_BGHUD: Tensor, k_BHRD: Tensor, valid_BRP: Tensor) -> Selection:
        """Select the `keep` regions that get the most attention from the group's queries, summed over heads."""
        count = valid_BRP.sum(dim=2)[:, None]
        if queries.is_self:  # the mean query of a region selects for all of its queries
            total = (q_BGHUD * valid_BRP[:, :, None, :, None]).sum(dim=3, keepdim=True)
            q_BGHUD = total / count.transpose(1, 2).clamp(min=1)[:, :, :, None, None]
        wide = torch.promote_types(q_BGHUD.dtype, torch.float32)
        coarse_BGR = count.to(wide).log().expand(-1, q_BGHUD.shape[1], -1)
        scores = (q_BGHUD @ k_BHRD[:, None].transpose(-1, -2)).to(wide) * q_BGHUD.shape[-1] ** -0.5
        attention = (scores + coarse_BGR[:, :, None, None]).softmax(dim=-1)
        if queries.mask is not None and not queries.is_self:  # padding does not select
            attention = attention.masked_fill(~queries.mask.reshape(len(count), attention.shape[1], 1, -1, 1), 0.0)
        attention_BGR = attention.sum(dim=(2, 3)).nan_to_num()  # NaN where no region has a cell
        index = attention_BGR.topk(min(self.config.keep, attention_BGR.shape[2]), dim=2).indices
        coarse = coarse_BGR.scatter(2, index, float("-inf"))
        samples = torch.arange(len(index), device=index.device)[:, None, None]
        return Selection(index, coarse, _mask_to_bias(valid_BRP[samples, index].flatten(2)))

    def _project_opened(self, keys: Keys, tiling: Tiling, cells_BRPC: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """Return k and v (B, G, H, n P, D) of the opened cells.

        Projects the whole image only where that is less work.
        """
        B, G, n = selection.regions.shape
        samples = torch.arange(B, device=selection.regions.device)[:, None, None]
        if G * n * cells_BRPC.shape[2] < keys.grid_size:
            picked = cells_BRPC[samples, selection.regions].flatten(1, 3)
            k, v = (t.unflatten(2, (G, n * cells_BRPC.shape[2])).transpose(1, 2) for t in keys.project(picked))
            return k, v
        k, v = (tiling.split(t[:, :, : keys.grid_size]) for t in keys.project_all())
        k, v = (t[samples, selection.regions].transpose(2, 3).flatten(3, 4) for t in (k, v))
        return k, v


def _mean_weights(valid_BRP: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, R, P): 1 / n for the n real cells of a region, 0 for its padding."""
    return valid_BRP.to(dtype) / valid_BRP.sum(dim=2, keepdim=True).clamp(min=1)


def _append_keys(group_BGHKD: Tensor, shared_BHRD: Tensor) -> Tensor:
    return torch.cat([group_BGHKD, shared_BHRD[:, None].expand(-1, group_BGHKD.shape[1], -1, -1, -1)], dim=3)


def _mask_to_bias(visible: Tensor) -> Tensor:
    """Turn True into 0 and False into -inf."""
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, float("-inf"))


def _ungroup_queries(x_BGHUD: Tensor) -> Tensor:
    return x_BGHUD.transpose(1, 2).flatten(2, 3)


def _expand_weights(w_BGHUK: Tensor, tiling: Tiling, regions_BGn: Tensor, valid_BRP: Tensor, T: int, is_self: bool) -> Tensor:
    """(B, G, H, U, n P + R + T) -> (B, H, Q, N + T): the weight of a mean is shared by its cells."""
    B, G, H, U, _ = w_BGHUK.shape
    (R, P), n = valid_BRP.shape[1:], regions_BGn.shape[2]
    fine, coarse, rest = w_BGHUK.split([n * P, w_BGHUK.shape[4] - n * P - T, T], dim=4)
    where = regions_BGn[:, :, None, None, :, None].expand(B, G, H, U, n, P)
    cells = w_BGHUK.new_zeros(B, G, H, U, R, P).scatter(4, where, fine.unflatten(4, (n, P)))
    if coarse.shape[4]:
        cells = cells + coarse[..., None] * _mean_weights(valid_BRP, w_BGHUK.dtype)[:, None, None, None]
    expanded = torch.cat([cells.flatten(4)[..., tiling.index_cells(w_BGHUK.device)], rest], dim=4)
    return tiling.join(expanded) if is_self else _ungroup_queries(expanded)


def build(config: Config, width: int) -> CoarseToFine:
    """Build the context; `width` is unused, because a mean has no parameters."""
    return CoarseToFine(config)
