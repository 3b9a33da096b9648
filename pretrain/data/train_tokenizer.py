"""Trains a tokenizer on the captions of shards: byte-level BPE with CLIP's habits, saved as transformers loads it.

Byte-level: any text can be encoded, none becomes unknown. As CLIP's: NFC, white space made single, lower case, <bos> and
<eos> around each text, and <eos> the highest id of all, because CLIP's towers in open_clip and older transformers find the
end of a text as the maximum of its ids.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.data import BadSample
from pretrain.data.captions import read_captions
from pretrain.data.sample_json import read_fields
from pretrain.data.shards.index import load_index
from pretrain.data.shards.paths import expand_shards
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import ConfigError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
"""In the order of their ids, the last of the vocabulary."""

MIN_VOCAB = 256 + 3
"""The smallest vocabulary: every byte, and the special tokens."""


def train_tokenizer(
    shards: str | Sequence[str],
    out: str | Path,
    vocab: int = 8192,
    caption: str = "txt",
    length: int = 77,
    lowercase: bool = True,
    limit: int = 10_000_000,
) -> PreTrainedTokenizerFast:
    """Writes a tokenizer into a folder, from which AutoTokenizer loads it without network. The same shards give the same.

    Args:
        shards: as for `data.train`.
        out: the folder; made if it is not there.
        vocab: most tokens, the 256 bytes and 3 special ones included; captions may hold too little text for as many.
        caption: "txt", or a json field (all captions of a list are used), or several with commas between: "txt,questions".
        length: what the tokenizer states as its longest text, in tokens.
        lowercase: make no difference between cases.
        limit: captions read at most, from the start.

    Returns:
        The tokenizer; its len() is the size of the vocabulary.

    Raises:
        UserError: nothing to learn from, or the folder cannot be written.
    """
    if vocab < MIN_VOCAB:
        raise ConfigError(f"vocab={vocab} is too small: a byte-level vocabulary has at least {MIN_VOCAB} tokens")
    paths, out = expand_shards(shards, "SHARDS"), Path(out).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise UserError(f"cannot write a tokenizer to {out}: {error.strerror or error}") from error
    return train_tokenizer_on(
        islice(iterate_captions(paths, caption), limit), out, vocab, length, lowercase, source=str(shards)
    )


def train_tokenizer_on(
    texts: Iterable[str], out: Path, vocab: int = 8192, length: int = 77, lowercase: bool = True, source: str = "the input"
) -> PreTrainedTokenizerFast:
    """The same from any captions."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    bpe.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()] if lowercase else steps)
    # A space before the first word too: a word is the same token wherever it stands.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    counted = _CountingIterable(texts)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 3,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # here, where nobody forks; the result does not depend on it
    try:
        bpe.train_from_iterator(counted, trainer)
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = threads or "false"
    if not counted.count:
        raise UserError(f"no captions in {source}: there is nothing to train a tokenizer on")
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)])
    ends = [(token, bpe.token_to_id(token)) for token in (BOS, EOS)]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", pair=f"{BOS} $A {EOS} $B {EOS}", special_tokens=ends
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=length,
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
    )
    try:
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise UserError(f"cannot write a tokenizer to {out}: {error.strerror or error}") from error
    return tokenizer


def iterate_captions(paths: Sequence[str], caption: str = "txt") -> Iterator[str]:
    """Every caption of these shards in order; samples without one are passed over. Raises UserError for a damaged shard."""
    reader, fields = ShardReader(paths), [field.strip() for field in caption.split(",")]
    members = sorted({"txt" if field == "txt" else "json" for field in fields})
    for shard, path in enumerate(paths):
        for sample in range(load_index(path).count):
            read = reader.read(shard, sample, members).members
            for field in fields:
                try:
                    yield from _read_questions(read) if field == "questions" else read_captions(read, field)
                except BadSample:
                    continue


def _read_questions(members: dict[str, bytes]) -> list[str]:
    """The questions of a sample: what is asked is read by the same tower as what is said."""
    asked = read_fields(members).get("questions")
    return [item["question"] for item in asked or [] if isinstance(item, dict) and isinstance(item.get("question"), str)]


class _CountingIterable:
    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.count = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.count += 1
            yield text
