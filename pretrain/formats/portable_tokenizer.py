"""A tokenizer folder that gives the text tower's ids wherever it is loaded.

In training, pretrain.data.text pads and truncates texts, and appends the end token for tokenizers that do not. Other
libraries call the tokenizer alone. These settings are therefore stored in the tokenizer, and its ids are compared.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pretrain.data.text import TextDecoder
from pretrain.errors import UserError

PROBES = [
    "a photo of a cat",
    "Two red balls, left of a blue box.",
    "naïve café — 42%",
    " ".join(["one", "two", "three"] * 200),
    "  two\tred \n\n balls\u00a0here \u2028",
]
"""Texts to compare tokenizers with: short, punctuated, not ASCII, longer than any tower reads, and with odd white space."""

WHITE_SPACE = r"[\s\x1c-\x1f\x85\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
"""What Python's str.split() takes for white space, as a regular expression of the tokenizers library."""


START, END = "<start_of_text>", "<end_of_text>"
"""Special tokens of open_clip's own tokenizer; OpenAI calls them <|startoftext|> and <|endoftext|>."""


def list_probes(text: TextDecoder) -> list[str]:
    """Return PROBES, and texts that spell out the special tokens of the tokenizer."""
    special_tokens = list(dict.fromkeys(map(str, text.tokenizer.all_special_tokens)))[:16]
    probes = [*PROBES]
    for token in special_tokens:
        probes += [f"a red {token} ball, {token.upper()} and {token.lower()}", f"{token}cat{token} {token}"]
    return probes


def build_portable(text: TextDecoder) -> Any:
    """Build a copy of the tokenizer that pads, truncates and ends texts as the text tower's training did.

    Raises UserError where the tokenizer cannot do so.
    """
    difference = None
    for prepare in (None, _normalize_white_space, _normalize_white_space_before_special_tokens):
        tokenizer = _copy_with_settings(text)
        if prepare is not None and not prepare(tokenizer):
            break
        difference = find_difference(text, tokenizer)
        if difference is None:
            return tokenizer
    raise UserError(
        f"the tokenizer ({type(text.tokenizer).__name__}) alone does not give the ids that the tower was trained on: "
        f"{difference}"
    )


def _copy_with_settings(text: TextDecoder) -> Any:
    """Return a copy of the tokenizer that pads, truncates and ends texts by itself."""
    tokenizer = copy.deepcopy(text.tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = text.length
    tokenizer.init_kwargs["truncation"] = True  # the processors of transformers take it for their default
    if tokenizer.pad_token_id != text.pad_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(text.pad_id)
    if text.appended_id is not None:
        _append_end_token(tokenizer, text.appended_id)
    return tokenizer


def _normalize_white_space(tokenizer: Any) -> bool:
    """Make a fast tokenizer treat white space as the text decoder does. Returns False for any other tokenizer."""
    from tokenizers import Regex, normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    steps: list[Any] = [normalizers.Replace(Regex(WHITE_SPACE), " "), normalizers.Strip()]
    if backend.normalizer is not None:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)
    return True


def _normalize_white_space_before_special_tokens(tokenizer: Any) -> bool:
    """Do the same, and search for special tokens afterwards: the space beside one is not at the end of the text."""
    from tokenizers import AddedToken

    if not _normalize_white_space(tokenizer):
        return False
    tokens = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    changed = [
        AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=True,
            special=token.special,
        )
        for token in tokens
    ]
    tokenizer.backend_tokenizer.add_special_tokens([token for token in changed if token.special])
    tokenizer.backend_tokenizer.add_tokens([token for token in changed if not token.special])
    return True


def find_difference(text: TextDecoder, tokenizer: Any) -> str | None:
    """Return the first probe that a tokenizer encodes otherwise than in training, in words, or None."""
    for probe in list_probes(text):
        ids, mask = text.encode([probe])
        expected = ids[0][mask[0]].tolist()
        actual = tokenizer([probe], truncation=True, max_length=text.length)["input_ids"][0]
        if list(actual) != expected:
            return f"{probe[:40]!r} becomes {list(actual)[:8]}, not {expected[:8]}"
    return None


def save(text: TextDecoder, folder: Path) -> None:
    """Write the portable tokenizer into a folder. Raises UserError where there can be none."""
    build_portable(text).save_pretrained(folder)


def _append_end_token(tokenizer: Any, end_id: int) -> None:
    """Make a fast tokenizer append the end token to every text, after its own post-processor.

    Raises UserError.
    """
    from tokenizers import processors

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(tokenizer).__name__
        raise UserError(f"the tokenizer ({kind}) appends no end token, and only a fast tokenizer can be made to append one")
    end = tokenizer.convert_ids_to_tokens(end_id)
    template = processors.TemplateProcessing(single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, end_id)])
    before = backend.post_processor
    backend.post_processor = template if before is None else processors.Sequence([before, template])


def build_openai_tokenizer(length: int) -> Any:
    """Build the byte-pair tokenizer of open_clip, OpenAI's, from the vocabulary that open_clip ships.

    It is a tokenizer of transformers. As in open_clip, a text that spells out <end_of_text>, in any case, ends there, and
    <|endoftext|> is text.

    Raises UserError where open_clip is not installed.
    """
    import gzip
    from importlib.util import find_spec

    from tokenizers import AddedToken, Regex, pre_tokenizers, processors
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("this model reads OpenAI's vocabulary, which comes with open_clip: pip install open_clip_torch")
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    # As in OpenAI's SimpleTokenizer: a version line, then the merges, of which 49152 - 256 - 2 are in use.
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    merges: Any = [(left, right) for left, right in (line.split() for line in lines)]
    letters = list(_list_byte_letters())
    words = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    words += [START, END]
    ids = {word: number for number, word in enumerate(words)}
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    backend: Any = CLIPTokenizer(vocab=ids, merges=merges, **names).backend_tokenizer
    # CLIPTokenizer splits texts at OpenAI's names of the special tokens; open_clip has names of its own.
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        pair=f"{START} $A {END} $B {END}",
        special_tokens=[(name, ids[name]) for name in (START, END)],
    )
    backend.add_special_tokens([AddedToken(name, normalized=True, special=True) for name in (START, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=AddedToken(START, normalized=True, special=True),
        eos_token=AddedToken(END, normalized=True, special=True),
        unk_token=AddedToken(END, normalized=True, special=True),
        pad_token=AddedToken(END, normalized=True, special=True),
        model_max_length=length,
        padding_side="right",
        truncation_side="right",
    )


def _list_byte_letters() -> list[str]:
    """Return a printable letter for each byte, in the order of OpenAI's vocabulary.

    Printable bytes come first and stand for themselves.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
