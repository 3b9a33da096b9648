"""Towers: one encoder for each modality, and the base class of all towers.

    timm.py            images: any timm model
    timm_models.py     creates the timm model, and refuses what does not fit
    pooling.py         how a timm model pools its tokens into one vector
    image_sizes.py     images of several sizes in one vision transformer
    stem.py            a convolutional stem for vision transformers
    dilation.py        finer grids of convolutional models (image.stride)
    layer_numbers.py   the layer of each parameter of a timm model
    weight_files.py    weights of timm models from files of other trainers
    transformers.py    texts: any transformers text model
    hf_models.py       finds and builds the transformers model
    audio.py           sounds: transformers' audio models, and a small convolutional one
    hf_audio.py        builds transformers' audio models, and reads how their spectrograms are computed
    spectrogram_conv.py   the convolutional model
    mel.py             log-mel spectrograms of waveforms
    length_buckets.py  encodes a batch of texts in groups of similar length
    positions.py       tables of positions at another size
    meta_copy.py       copies of models on the meta device

A tower is one file with a Config dataclass and build(config, tokenizer=None) -> Tower.

May import pretrain.runtime, pretrain.ops and pretrain.errors.

Shapes: b = samples, N = tokens of a sample, C = width of a token, P = width of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError


class TokenSequence(NamedTuple):
    """The output of every tower."""

    states: Tensor
    """(b, N, C): grid tokens in row-major order, or text tokens. Class and register tokens are left out."""
    mask: Tensor
    """(b, N) bool, True where a state is valid."""
    grid: tuple[int, int] | None
    """(H, W) with N = H W for images, and for sounds (frequencies, times); None for texts, and where patch dropout has removed
    tokens of the grid."""
    pooled: Tensor
    """(b, P): one vector for each sample."""


class Tower(nn.Module):
    """Base class of all towers: freezing, layer numbers, checkpointing.

    A subclass sets the attributes and defines forward() and layer_ids().
    """

    modality: str
    """The name of its input in a batch: "image", "text", ..."""
    width: int
    """C, the width of a token."""
    pooled_width: int
    """P, the width of the pooled vector."""
    token_count: int = 0
    """N, the most tokens that a sample has; 0 = the tower does not say."""
    depth: int = 0
    """Number of blocks L. Layer ids run from 0 to L + 1."""
    trims: bool = False
    """Whether leaving out padding on the right leaves `pooled` and the valid states unchanged."""
    packs: bool = False
    """Whether pool_packed() gives `pooled`."""
    pools_mean: bool = False
    """Whether `pooled` is the mean of the valid `states`; with image.stride, of those that the model has without it."""
    pools_max: bool = False
    """Whether `pooled` is the maximum of `states`, or of those that the model has without image.stride, by channel."""
    weights_origin: str | None = None
    """Where build() loaded the weights from, in words; empty where they are random, None where the tower does not say."""
    pretrained_settings: str = ""
    """The settings that start the tower from trained weights, for messages."""

    def __init__(self) -> None:
        super().__init__()
        self.unused_parameters: frozenset[str] = frozenset()
        """Parameters that forward() never uses. They stay frozen, so that no strategy waits for their gradients."""
        self._frozen_modules: list[str] = []

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        """Encode inputs (b, ...) with a mask (b, N) bool; None means that every token is valid."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def pool_groups(self, inputs: Tensor, mask: Tensor | None, sections: Sequence[tuple[Tensor, int]]) -> Tensor:
        """Return forward(inputs, mask).pooled (b, P), computed in groups of rows, each trimmed to its own length.

        sections: (rows, tokens) of each group; every row is in one. Towers with `trims` may support it.
        """
        raise NotImplementedError(f"{type(self).__name__}.pool_groups")

    def pool_packed(self, inputs: Tensor, mask: Tensor | None, tokens: Tensor, starts: Tensor) -> Tensor:
        """Return forward(inputs, mask).pooled (b, P), computed on several texts a row. For towers with `packs`.

        tokens: (3, R, T), for each token of R rows its index in the flattened inputs, its text (-1 = padding) and its
        position. starts: (b,), index of each text's first token in the flattened rows.
        """
        raise NotImplementedError(f"{type(self).__name__}.pool_packed")

    def layer_ids(self) -> dict[str, int]:
        """Return the layer of each parameter: 0 stem and embeddings, 1..L blocks, L + 1 final norm and pooler."""
        raise NotImplementedError(f"{type(self).__name__}.layer_ids")

    def settings(self) -> dict[str, Any]:
        """Return the Config fields that build this architecture without the hub or a model folder."""
        return {}

    def fit_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of this architecture at another size of image or length of text, with their positions resampled.

        weights: by the names of state_dict(). Those that fit, and those that cannot be made to, are returned as they are.
        """
        return weights

    def settings_for(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Return the Config fields that must change for this architecture to take inputs of another size.

        section: of a configuration, which names the size. {} where the size alone is enough.
        """
        return {}

    def accept_size(self, size: int) -> None:
        """Let forward() take inputs of another size than the tower was built for, too. Raises ConfigError where it cannot."""
        raise ConfigError(f"this {self.modality} tower takes inputs of one size only")

    def set_patch_dropout(self, fraction: float) -> None:
        """Set the fraction of patches that are left out in training. Raises ConfigError where the tower cannot."""
        if fraction:
            raise ConfigError(f"{self.modality}.patch_dropout={fraction}: this tower has no patch dropout")

    def set_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass, or stop doing so: less memory, a third more time.

        Raises ConfigError where the model cannot.
        """
        if on:
            raise ConfigError(
                f"{self.modality}.checkpointing=true: this tower cannot recompute activations; use checkpointing=false"
            )

    def set_channels_last(self, on: bool) -> None:
        """Compute convolutions on NHWC maps, or stop doing so; no effect on towers that are not convolutional."""

    # -----------------------------------------------------------------------------------------------------------------
    # Freezing

    def freeze(self, trainable_blocks: int) -> None:
        """Freeze all but the last `trainable_blocks` blocks, final norm and pooler. Raises ConfigError.

        -1 trains everything, 0 nothing. Frozen modules are in eval mode (dropout off, BatchNorm on its running statistics)
        and stay in it after train().
        """
        if trainable_blocks > self.depth:
            raise ConfigError(
                f"{self.modality}.trainable_blocks={trainable_blocks}, but the tower has {self.depth} blocks; "
                "-1 trains everything"
            )
        ids = self.layer_ids()
        first_trained = {-1: 0, 0: self.depth + 2}.get(trainable_blocks, self.depth + 1 - trainable_blocks)
        frozen_names = {name for name, layer in ids.items() if layer < first_trained}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen_names and name not in self.unused_parameters)
        frozen = {id(p) for name, p in self.named_parameters() if name in frozen_names}
        self._frozen_modules = [""] if first_trained > self.depth + 1 else list(_find_frozen_modules(self, frozen))
        self.train(self.training)

    def train(self, mode: bool = True) -> Tower:
        """Set training mode for all modules but the frozen ones, which stay in eval mode."""
        super().train(mode)
        for name in self._frozen_modules:
            for module in self.get_submodule(name).modules():  # eval() of the tower itself would call train() again
                module.training = False
        return self

    def freeze_unused(self, used: Iterable[str]) -> None:
        """Freeze every parameter whose name is not in `used`, for good: freeze() will not train it again."""
        self.unused_parameters = frozenset(name for name, _ in self.named_parameters()) - frozenset(used)
        for name, parameter in self.named_parameters():
            if name in self.unused_parameters:
                parameter.requires_grad_(False)


def _find_frozen_modules(module: nn.Module, frozen: set[int], prefix: str = "") -> Iterable[str]:
    """Yield the names of the largest modules that have parameters, all of them frozen.

    frozen: ids of the parameters, because a tied parameter has several names.
    """
    parameters = [id(p) for p in module.parameters()]
    if parameters and frozen.issuperset(parameters):
        yield prefix.removesuffix(".")
        return
    for name, child in module.named_children():
        yield from _find_frozen_modules(child, frozen, f"{prefix}{name}.")


def used_parameters(output: Tensor, tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the leaf tensors in the autograd graph of `output`; computes no gradient."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    used: list[str] = []
    visited: set[Any] = set()
    pending: list[Any] = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in names:
            used.append(names[id(leaf)])
        pending.extend(next_node for next_node, _ in node.next_functions)
    return used


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the valid states: (b, N, C), (b, N) -> (b, C)."""
    weight = mask.to(states.dtype).unsqueeze(-1)
    return (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def last_valid(states: Tensor, mask: Tensor) -> Tensor:
    """Return the state at each row's last valid position: (b, N, C), (b, N) -> (b, C)."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(dim=1)
    return states[torch.arange(states.shape[0], device=states.device), last]
