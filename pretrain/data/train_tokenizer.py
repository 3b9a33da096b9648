"""Training of a byte-level BPE tokenizer on the captions of shards, for use with transformers.

Byte-level: any text can be encoded, and there is no unknown token. As in CLIP's tokenizer, text is NFC-normalized and in lower
case, runs of white space become one space, and <bos> and <eos> surround each text. <eos> has the highest id of all:
the CLIP towers of open_clip and older transformers find the end of a text as the maximum of its ids.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.data import BadSample
from pretrain.data.captions import caption_members, check_caption_source, read_captions
from pretrain.data.sample_json import read_fields
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.index import load_index
from pretrain.data.shards.paths import expand_shards
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import ConfigError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
"""Special tokens, in the order of their ids, which are the last of the vocabulary."""

MIN_VOCAB = 256 + 3
"""Size of the smallest vocabulary: every byte, and the special tokens."""


def train_tokenizer(
    shards: str | Sequence[str],
    out: str | Path,
    vocab: int = 8192,
    caption: str = "txt",
    length: int = 77,
    lowercase: bool = True,
    limit: int = 10_000_000,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer and save it to a folder, from which AutoTokenizer loads it without network.

    The result is deterministic: the same shards and arguments give the same tokenizer.

    Args:
        shards: shards, as in `data.train`.
        out: the folder, created where it does not exist.
        vocab: maximum size, the 256 bytes and 3 special tokens included; little text gives a smaller vocabulary.
        caption: "txt", "txt:lines", or a json field (of a list all captions are used), or several separated by commas:
            "txt,questions".
        length: model_max_length of the tokenizer, in tokens.
        lowercase: convert text to lower case.
        limit: maximum number of captions read, from the start.

    Returns:
        The tokenizer; its len() is the size of the vocabulary.

    Raises:
        ConfigError: `vocab` is too small, or no shard matches.
        UserError: there are no captions, a shard is damaged, or the folder cannot be written.
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
    """Train a tokenizer on any texts and save it to `out`.

    Args:
        texts: the captions.
        out: an existing folder.
        vocab: as in `train_tokenizer`.
        length: as in `train_tokenizer`.
        lowercase: as in `train_tokenizer`.
        source: where the texts come from, for error messages.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    bpe.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()] if lowercase else steps)
    # A space also before the first word, so that a word has the same tokens at any place in a text.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    counting = _CountingIterable(texts)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 3,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing forks here; the result does not depend on it
    try:
        bpe.train_from_iterator(counting, trainer)
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = threads or "false"
    if not counting.count:
        raise UserError(f"no captions in {source}: there is nothing to train a tokenizer on")
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)])
    special_tokens = [(token, bpe.token_to_id(token)) for token in (BOS, EOS)]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", pair=f"{BOS} $A {EOS} $B {EOS}", special_tokens=special_tokens
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
        split_special_tokens=True,  # "<eos>" in a caption is text, and not the end of the caption
    )
    try:
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise UserError(f"cannot write a tokenizer to {out}: {error.strerror or error}") from error
    return tokenizer


def iterate_captions(paths: Sequence[str], caption: str = "txt", cache: ShardCache | None = None) -> Iterator[str]:
    """Yield every caption of the shards, in order; samples without one are skipped.

    Args:
        paths: shards.
        caption: "txt", "txt:lines", a json field, or several separated by commas.
        cache: where fetched shards and indices are kept.

    Raises:
        UserError: a shard is damaged.
    """
    reader, fields = ShardReader(paths, cache), [field.strip() for field in caption.split(",")]
    for field in fields:
        check_caption_source(field, "--caption")
    members = sorted({member for field in fields for member in caption_members(field)})
    for shard, path in enumerate(paths):
        for sample in range(load_index(path, cache).count):
            try:
                contents = reader.read(shard, sample, members).members
            except BadSample:  # a text of many megabytes
                continue
            for field in fields:
                try:
                    yield from _read_questions(contents) if field == "questions" else read_captions(contents, field)
                except BadSample:
                    continue


def _read_questions(members: dict[str, bytes]) -> list[str]:
    """Return the questions of a sample, which the text tower reads as it reads captions."""
    questions = read_fields(members).get("questions")
    return [item["question"] for item in questions or [] if isinstance(item, dict) and isinstance(item.get("question"), str)]


class _CountingIterable:
    """Iterable of texts that counts how many were read."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.count = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.count += 1
            yield text
