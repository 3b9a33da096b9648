"""Every region of the picture at one token, the best regions at full detail, in one softmax.

A first pass asks the region means; the regions that get the most attention are then asked cell by cell. A region that
is not opened stays in the softmax as its mean, counted as often as it has cells (log n is added to its score), so

- the answer is a weighted mean over all cells, exactly: the weight of a mean is shared evenly by its cells;
- with every region opened it is dense attention, with identical cells in each region too;
- a region that ought to be opened hears of it: its mean is in the answer, so its score has a gradient.

Who chooses: the words of one text together (their regions then are one small set of keys for a fused kernel, and only
those are projected), or each word for itself; a picture that asks itself chooses region by region (arXiv 2303.08810).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from finetune.attention.multihead import Keys, attend
from finetune.attention.trace import Weights
from finetune.context import Asking, Context
from finetune.context.tiling import Tiling
from pretrain.errors import ConfigError


@dataclass
class Config:
    """Two levels of detail: keys a query sees: N / region^2 + keep x region^2 instead of N."""

    name: str = "coarse_to_fine"
    """This file."""
    region: int = 4
    """Side of a region, tokens."""
    keep: int = 8
    """Regions opened for each choice."""
    choose: Literal["text", "word"] = "text"
    """Whether a text's words open regions together, or each word its own (more memory, more detail)."""

    def check(self) -> None:
        """Raises ConfigError."""
        if self.region < 1 or self.keep < 0:
            raise ConfigError(f"context.region={self.region} (from 1) and context.keep={self.keep} (from 0) do not fit")


class Chosen(NamedTuple):
    """What G groups of queries opened."""

    regions: Tensor
    """(B, G, n) int64."""
    coarse: Tensor
    """(B, G, R): what is added to the score of a region's mean: log of its cells, -inf where opened or empty."""
    fine: Tensor
    """(B, G, n P): added to the scores of the opened cells: 0, or -inf for padding."""


class CoarseToFine(Context):
    """Legend, besides attention.py's: R regions of P cells, n of them opened, G groups of U queries, T tokens beside."""

    chooses: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def shares_a_choice(self) -> bool:
        """The words of a text choose together, unless each chooses for itself."""
        return self.config.choose == "text"

    def forward(self, asking: Asking, keys: Keys, exact: bool = False) -> tuple[Tensor, Weights | None]:
        """See Context. Raises ConfigError for a picture that has lost its grid."""
        if keys.tokens.grid is None:
            raise ConfigError("context.name=coarse_to_fine needs the picture's grid; patch dropout breaks it: use dense")
        tiling = Tiling(keys.tokens.grid, self.config.region)
        q_BGHUD = self._grouped(asking, tiling)

        # The coarse pass: a mean of states is projected once, which is the mean of the projected states.
        N, mask = keys.picture, keys.tokens.mask
        T = keys.tokens.states.shape[1] - N
        states_BNC = keys.tokens.states[:, :N] if T else keys.tokens.states
        cells_BRPC = tiling.split(states_BNC[:, None])[:, :, 0]
        valid_BRP = tiling.valid(None if mask is None else mask[:, :N], q_BGHUD.device).expand(len(cells_BRPC), -1, -1)
        share_BRP = _shares(valid_BRP, cells_BRPC.dtype)
        k_BHRD, v_BHRD = keys.project((share_BRP[:, :, None] @ cells_BRPC)[:, :, 0])
        chosen = self._choose(asking, q_BGHUD, k_BHRD, valid_BRP)

        # The fine pass: opened cells, then means, then what stands beside the picture.
        k_BGHKD, v_BGHKD = self._opened(keys, tiling, cells_BRPC, chosen)
        G, R, opened = q_BGHUD.shape[1], k_BHRD.shape[2], chosen.regions.shape[2]
        bias = [chosen.fine]
        if opened < R:
            k_BGHKD, v_BGHKD = _append(k_BGHKD, k_BHRD), _append(v_BGHKD, v_BHRD)
            bias.append(chosen.coarse)
        if T:
            k_BHTD, v_BHTD = keys.project(keys.tokens.states[:, N:])
            k_BGHKD, v_BGHKD = _append(k_BGHKD, k_BHTD), _append(v_BGHKD, v_BHTD)
            seen = valid_BRP.new_ones(len(valid_BRP), T) if mask is None else mask[:, N:]
            bias.append(_hide(seen)[:, None].expand(-1, G, -1))
        bias_BGK = torch.cat(bias, dim=2).to(q_BGHUD.dtype)
        out_BGHUD, used = attend(q_BGHUD, k_BGHKD, v_BGHKD, bias_BGK[:, :, None, None], exact)
        out = tiling.join(out_BGHUD) if asking.home else _ungroup(out_BGHUD)
        if used is None:
            return out, None
        return out, Weights(used, lambda w: _spread(w, tiling, chosen.regions, valid_BRP, T, asking.home))

    def _grouped(self, asking: Asking, tiling: Tiling) -> Tensor:
        """(B, H, Q, D) -> (B, G, H, U, D): queries that share what they open."""
        if asking.home:
            return tiling.split(asking.q)
        B, H, Q, D = asking.q.shape
        groups = asking.rows if self.config.choose == "text" else Q
        return asking.q.reshape(B, H, groups, Q // groups, D).transpose(1, 2)

    @torch.no_grad()
    def _choose(self, asking: Asking, q_BGHUD: Tensor, k_BHRD: Tensor, valid_BRP: Tensor) -> Chosen:
        """The `keep` regions that draw the most attention from the group's queries, over all heads."""
        count = valid_BRP.sum(dim=2)[:, None]
        if asking.home:  # the mean query of a region chooses for all of them
            total = (q_BGHUD * valid_BRP[:, :, None, :, None]).sum(dim=3, keepdim=True)
            q_BGHUD = total / count.transpose(1, 2).clamp(min=1)[:, :, :, None, None]
        wide = torch.promote_types(q_BGHUD.dtype, torch.float32)
        coarse_BGR = count.to(wide).log().expand(-1, q_BGHUD.shape[1], -1)
        scores = (q_BGHUD @ k_BHRD[:, None].transpose(-1, -2)).to(wide) * q_BGHUD.shape[-1] ** -0.5
        drawn = (scores + coarse_BGR[:, :, None, None]).softmax(dim=-1)
        if asking.mask is not None and not asking.home:  # padding does not choose
            drawn = drawn.masked_fill(~asking.mask.reshape(len(count), drawn.shape[1], 1, -1, 1), 0.0)
        drawn_BGR = drawn.sum(dim=(2, 3)).nan_to_num()  # NaN: no region has a cell
        index = drawn_BGR.topk(min(self.config.keep, drawn_BGR.shape[2]), dim=2).indices
        coarse = coarse_BGR.scatter(2, index, float("-inf"))
        each = torch.arange(len(index), device=index.device)[:, None, None]
        return Chosen(index, coarse, _hide(valid_BRP[each, index].flatten(2)))

    def _opened(self, keys: Keys, tiling: Tiling, cells_BRPC: Tensor, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """k and v (B, G, H, n P, D) of the opened cells; projects the whole picture only where that is less work."""
        B, G, n = chosen.regions.shape
        each = torch.arange(B, device=chosen.regions.device)[:, None, None]
        if G * n * cells_BRPC.shape[2] < keys.picture:
            picked = cells_BRPC[each, chosen.regions].flatten(1, 3)
            k, v = (t.unflatten(2, (G, n * cells_BRPC.shape[2])).transpose(1, 2) for t in keys.project(picked))
            return k, v
        k, v = (tiling.split(t[:, :, : keys.picture]) for t in keys.projected())
        k, v = (t[each, chosen.regions].transpose(2, 3).flatten(3, 4) for t in (k, v))
        return k, v


def _shares(valid_BRP: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, R, P): 1 / n for the n real cells of a region, 0 for its padding."""
    return valid_BRP.to(dtype) / valid_BRP.sum(dim=2, keepdim=True).clamp(min=1)


def _append(group_BGHKD: Tensor, shared_BHRD: Tensor) -> Tensor:
    return torch.cat([group_BGHKD, shared_BHRD[:, None].expand(-1, group_BGHKD.shape[1], -1, -1, -1)], dim=3)


def _hide(seen: Tensor) -> Tensor:
    """True -> 0, False -> -inf."""
    return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, float("-inf"))


def _ungroup(x_BGHUD: Tensor) -> Tensor:
    return x_BGHUD.transpose(1, 2).flatten(2, 3)


def _spread(w_BGHUK: Tensor, tiling: Tiling, regions_BGn: Tensor, valid_BRP: Tensor, T: int, home: bool) -> Tensor:
    """(B, G, H, U, n P + R + T) -> (B, H, Q, N + T): means share their weight among their cells."""
    B, G, H, U, _ = w_BGHUK.shape
    (R, P), n = valid_BRP.shape[1:], regions_BGn.shape[2]
    fine, coarse, beside = w_BGHUK.split([n * P, w_BGHUK.shape[4] - n * P - T, T], dim=4)
    where = regions_BGn[:, :, None, None, :, None].expand(B, G, H, U, n, P)
    cells = w_BGHUK.new_zeros(B, G, H, U, R, P).scatter(4, where, fine.unflatten(4, (n, P)))
    if coarse.shape[4]:
        cells = cells + coarse[..., None] * _shares(valid_BRP, w_BGHUK.dtype)[:, None, None, None]
    spread = torch.cat([cells.flatten(4)[..., tiling.places(w_BGHUK.device)], beside], dim=4)
    return tiling.join(spread) if home else _ungroup(spread)


def build(config: Config, width: int) -> CoarseToFine:
    """`width` is not needed: a mean has no parameters."""
    return CoarseToFine(config)
