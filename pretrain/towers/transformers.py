"""The text tower: any transformers text model, published or described in the configuration.

    text: {name: FacebookAI/roberta-base, tokenizer: FacebookAI/roberta-base, pool: avg}
    text: {args: {model_type: clip_text_model, hidden_size: 192, num_hidden_layers: 4, ...}, tokenizer: runs/tokenizer}

What differs between architectures is measured when a tower is built, not looked up in a table: whether attention is causal
(then the model needs no padding mask), whether trimming padding leaves the result unchanged (`trims`), and which parameters
forward() uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pretrain.config import check_numbers
from pretrain.errors import ConfigError
from pretrain.towers import TokenSequence, Tower, hf_models, last_valid, masked_mean, used_parameters
from pretrain.towers.length_buckets import encode_grouped, pool_sections
from pretrain.towers.positions import stretch


@dataclass
class Config:
    """Settings of a text tower, which name a published model or describe a new one in `args`."""

    tower: str = "transformers"
    """Name of this file."""
    name: str | None = None
    """A hub name or a local folder; null builds a new model from `args`."""
    args: dict[str, Any] = field(default_factory=dict)
    """The model's own configuration: `model_type` and sizes of a new model, or changes to a named one."""
    pretrained: bool | None = None
    """Whether a named model is loaded with its weights; null: yes. A model without a name starts at random."""
    tokenizer: str = ""
    """Hub name or local folder of the tokenizer; empty takes `name`'s own."""
    length: int = 77
    """Longest text in tokens. The default is CLIP's."""
    pool: Literal["auto", "eot", "cls", "avg", "tower"] = "auto"
    """eot: the last valid position (CLIP). cls: the first. avg: the mean over valid positions. tower: the model's own
    pooler (SigLIP: the last position, padding or not, and no padding mask). auto: what a sentence-transformers folder says
    (1_Pooling), for other models eot."""
    groups: int = 6
    """On the CPU a batch is encoded in at most so many groups of similar length; 1 encodes it as a whole."""
    static_groups: int = 8
    """The same for groups whose shapes do not depend on the batch (group_shapes): the most groups; 1 = none."""
    group_shapes: Literal["auto", "dynamic", "static", "packed"] = "auto"
    """dynamic: lengths and rows of the groups follow each batch, on CPUs only. static: they are chosen once, from the first
    captions of the training data, which suits GPUs and compiled models. packed: one group of rows that hold several texts
    each, also in shapes chosen once, for causal towers with pool=eot (CLIP). auto: dynamic on CPUs; on GPUs packed where the
    tower can, else static, but under fsdp2 and zero3, which would gather their weights for each group. Evaluation uses neither
    static nor packed."""
    trainable_blocks: int = -1
    """-1 trains everything, 0 freezes the tower, n trains the last n blocks and the final norm."""
    checkpointing: bool = False
    """Whether to recompute activations in the backward pass: less memory, a third more time."""

    def check(self) -> None:
        """Raise ConfigError for an impossible value or combination."""
        if self.name is None and "model_type" not in self.args:
            raise ConfigError("text: give text.name (hub name or folder) or text.args.model_type (a new model)")
        if self.length < 2 or min(self.groups, self.static_groups) < 1 or self.trainable_blocks < -1:
            raise ConfigError(
                f"text.length={self.length} must be 2 or more, text.groups={self.groups} 1 or more, "
                f"text.static_groups={self.static_groups} 1 or more, text.trainable_blocks={self.trainable_blocks} -1 or more"
            )
        check_numbers(self, "text")


class TextTower(Tower):
    """A transformers text model and the pooling of its states.

    Inputs are token ids (b, T) int64, padded on the right, and a mask (b, T) bool.
    """

    modality = "text"
    pretrained_settings = "text.name=FOLDER"
    round_to = 4
    """Group lengths are multiples of this, in tokens."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.model = model
        self.pool = config.pool
        self.groups = config.groups
        self.length = self.token_count = config.length
        self.pools_mean = config.pool == "avg"
        self.causal = False
        """Whether a state depends only on tokens to its left. Padding on the right then needs no mask."""
        self.end_id: int | None = None
        """Id of the token that ends a text. A causal tower reads a text up to the first one, as published CLIPs do."""
        self.pad_id: int | None = None
        """Id of the token that only pads. A tower pooled by `avg` or `cls` ignores it also where a caption spells it out, as
        open_clip does."""
        blocks = max(
            (m for m in model.named_modules() if isinstance(m[1], nn.ModuleList)),
            key=lambda m: sum(p.numel() for p in m[1].parameters()),
            default=("", nn.ModuleList()),
        )
        self._blocks, self.depth = blocks[0], len(blocks[1])

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        """Encode token ids (b, T) with a mask (b, T) or None (all valid): states (b, T, C), pooled (b, P)."""
        mask = self._read_tokens(inputs, mask)
        can_group = self.groups > 1 and self.trims and inputs.device.type == "cpu" and inputs.shape[0] > 1
        if can_group and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            return encode_grouped(self._encode, inputs, mask, self.groups, self.round_to)
        return self._encode(inputs, mask)

    def pool_groups(self, inputs: Tensor, mask: Tensor | None, sections: Sequence[tuple[Tensor, int]]) -> Tensor:
        """Return forward(inputs, mask).pooled (b, P), computed in groups of rows and tokens."""
        return pool_sections(self._encode, inputs, self._read_tokens(inputs, mask), sections)

    def pool_packed(self, inputs: Tensor, mask: Tensor | None, tokens: Tensor, starts: Tensor) -> Tensor:
        """Return forward(inputs, mask).pooled (b, P), computed on rows of several texts (pretrain/data/text_packing.py)."""
        index, texts, positions = tokens.unbind(0)
        is_left = torch.ones(texts.shape[1], texts.shape[1], dtype=torch.bool, device=texts.device).tril()
        attention_mask = (texts[:, :, None] == texts[:, None, :]) & is_left  # padding attends to padding, so no row is empty
        out = self.model(input_ids=inputs.flatten()[index], position_ids=positions, attention_mask=attention_mask[:, None])
        states: Tensor = out.last_hidden_state
        lengths = self._read_tokens(inputs, mask).sum(dim=1)
        return states.flatten(0, 1).index_select(0, starts + (lengths - 1).clamp(min=0))

    def _read_tokens(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mask (b, T) of the tokens that are read: in a causal tower those up to the first end token."""
        mask = torch.ones_like(inputs, dtype=torch.bool) if mask is None else mask.bool()
        if self.causal and self.end_id is not None and self.pool in ("eot", "avg"):
            mask = mask & _up_to_first(inputs, self.end_id)
        return mask

    def _encode(self, inputs: Tensor, mask: Tensor) -> TokenSequence:
        if self.pad_id is not None and not self.causal and self.pool in ("avg", "cls"):
            mask = mask & (inputs != self.pad_id)
        out = self.model(input_ids=inputs, attention_mask=self._attention_mask(mask))
        states: Tensor = out.last_hidden_state
        if self.pool == "tower":
            pooled: Tensor = out.pooler_output
        elif self.pool == "cls":
            pooled = states[:, 0]
        else:
            pooled = (masked_mean if self.pool == "avg" else last_valid)(states, mask)
        return TokenSequence(states, mask, None, pooled)

    def _attention_mask(self, mask: Tensor) -> Tensor | None:
        """Return the padding mask for the model, or None where it needs none.

        Attention is fastest without a mask.

        SigLIP was trained without a mask. A causal model does not attend to padding on the right.
        """
        if self.causal or (self.pool == "tower" and hf_models.attends_to_padding(self.model)):
            return None
        return mask.long()

    def layer_ids(self) -> dict[str, int]:
        """Return 0 for embeddings, 1..L for the blocks, L + 1 for what the model registers after its blocks."""
        ids, is_after_blocks, prefix = {}, False, f"model.{self._blocks}."
        for name, _ in self.named_parameters():
            if name.startswith(prefix):
                is_after_blocks = True
                ids[name] = 1 + int(name[len(prefix) :].split(".")[0])
            else:
                is_embedding = "embed" in name or "relative" in name  # relative positions that all blocks share
                ids[name] = self.depth + 1 if is_after_blocks and not is_embedding else 0
        return ids

    def settings(self) -> dict[str, Any]:
        """Return the Config fields that build this architecture from `args` alone, without a name."""
        return {"name": None, "pretrained": False, "args": hf_models.inline_args(self.model), "pool": self.pool}

    def settings_for(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Return text.args with a table of positions that is long enough for text.length of the section."""
        table, length = hf_models.find_positions(self.model), section.get("length")
        if table is None or not isinstance(length, int) or table.rows - table.first >= length:
            return {}
        return {"args": {**self.settings()["args"], "max_position_embeddings": length + table.first}}

    def fit_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of this architecture for another length, with their table of positions stretched or cut."""
        table = hf_models.find_positions(self.model)
        if table is None:
            return weights
        name = f"model.{table.name}.weight"
        if name not in weights or weights[name].shape[1:] != (table.width,):
            return weights
        return {**weights, name: stretch(weights[name], table.rows, table.first)}

    def set_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass, or stop. Raises ConfigError where the model cannot."""
        model: Any = self.model
        if on and not getattr(model, "supports_gradient_checkpointing", False):
            raise ConfigError(
                f"text.checkpointing=true: {type(model).__name__} cannot recompute activations; use text.checkpointing=false"
            )
        has_new_name = hasattr(model, "activation_checkpointing_enable")  # the name since transformers 5.2x
        kind = "activation" if has_new_name else "gradient"
        if on:
            options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(model, f"{kind}_checkpointing_enable")(**options)
        else:
            getattr(model, f"{kind}_checkpointing_disable")()

    # -----------------------------------------------------------------------------------------------------------------
    # Measuring the model when it is built

    def measure(self, vocabulary: int, pad: int) -> None:
        """Encode two short texts to set the widths, causal, trims and unused_parameters.

        The texts are encoded padded to `length` tokens, and trimmed.

        vocabulary: number of token ids. pad: id of the padding token. Uses no random numbers. Raises an error of the model
        where it cannot encode `length` tokens; build() turns it into a ConfigError.
        """
        was_training, short = self.training, max(1, min(8, self.length // 2))
        self.eval()
        ids = torch.arange(2 * self.length).reshape(2, -1) * 7 % max(1, vocabulary - 3) + 3
        ids[ids == pad] = (pad + 1) % vocabulary
        end = getattr(self.model.config, "eos_token_id", None)
        if isinstance(end, int) and end < vocabulary:
            ids[:, short - 1] = end  # CLIP's own pooling searches for the end token, which every text has
        padded, changed = ids.clone(), ids.clone()
        padded[:, short:] = pad
        changed[:, short:] = ids[:, :1]
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, short:] = False
        with torch.no_grad():
            self.causal = True  # so that _encode passes no mask to the model
            states, changed_states = self._encode(ids, mask | True).states, self._encode(changed, mask | True).states
            self.causal = _is_equal(states[:, :short], changed_states[:, :short])
            full = self._encode(padded, mask)
            self.packs = self.causal and self.pool == "eot" and self._can_pack(padded, mask, full.pooled)
        trimmed = self._encode(ids[:, :short], mask[:, :short])
        self.trims = _is_equal(full.pooled, trimmed.pooled) and _is_equal(full.states[:, :short], trimmed.states)
        self.width, self.pooled_width = full.states.shape[-1], full.pooled.shape[-1]
        self.freeze_unused(used_parameters(trimmed.pooled, dict(self.named_parameters())))
        self.train(was_training)

    def _can_pack(self, inputs: Tensor, mask: Tensor, pooled: Tensor) -> bool:
        """Return whether two texts, of equal lengths that leave room for both in a row, are encoded in one row as alone."""
        length = int(mask[0].sum())
        tokens = torch.zeros(3, 1, inputs.shape[1], dtype=torch.int64)
        tokens[1] = -1
        for text in range(2):
            place = torch.arange(length)
            tokens[:, 0, text * length : (text + 1) * length] = torch.stack(
                (place + text * inputs.shape[1], torch.full_like(place, text), place)
            )
        try:
            return _is_equal(pooled, self.pool_packed(inputs, mask, tokens, torch.tensor([0, length])))
        except (IndexError, ValueError, RuntimeError, TypeError, AttributeError):  # it takes no positions, or no such mask
            return False


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether a and b are equal but for float32 rounding.

    Measured: even a tiny untrained model that attends to its padding changes its states by 1e-3.
    """
    return bool((a - b).abs().max() <= 3e-5 * b.abs().max())


def _up_to_first(ids: Tensor, end_id: int) -> Tensor:
    """Return a mask (b, T) of the ids (b, T) up to the first `end_id`, which is included; all where there is none."""
    is_end = (ids == end_id).long()
    return is_end.cumsum(dim=1) - is_end < 1


def build(config: Config, tokenizer: Any = None) -> TextTower:
    """Build a TextTower.

    A new model takes its vocabulary and special tokens from the tokenizer, if there is one.

    Raises ConfigError: an unknown model or argument, a vocabulary smaller than the tokenizer's, too few positions.
    """
    model, pool, origin = hf_models.load_text_model(config, tokenizer)
    config = replace(config, pool=cast(Any, pool))
    rows = model.get_input_embeddings().weight.shape[0]
    if isinstance(tokenizer, Sized) and len(tokenizer) > rows:
        raise ConfigError(
            f"text.tokenizer {config.tokenizer or config.name!r} has {len(tokenizer)} tokens, "
            f"the model only {rows} embeddings; leave out text.args.vocab_size, or take the model's own tokenizer"
        )
    if config.pool != "tower":
        hf_models.drop_pooler(model)
    tower = TextTower(model, config)
    tower.weights_origin = origin
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(model.config, "pad_token_id", None) if pad is None else pad
    try:
        tower.measure(rows, min(pad or 0, rows - 1))
    except (IndexError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        positions, usable = getattr(model.config, "max_position_embeddings", None), hf_models.count_positions(model)
        reason = f"it has {positions} positions" if positions and positions < config.length + 4 else hf_models.one_line(error)
        if positions and usable and usable < positions:
            reason += f", {usable} of them for tokens"
        raise ConfigError(
            f"text: {type(model).__name__} cannot encode {config.length} tokens with pool={config.pool}: {reason}"
        ) from error
    tower.end_id, tower.pad_id = hf_models.find_end_id(tokenizer), hf_models.find_pad_id(tokenizer)
    tower.freeze(config.trainable_blocks)
    if config.checkpointing:
        tower.set_checkpointing(True)
    return tower
