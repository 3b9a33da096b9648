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
]
"""Texts to compare tokenizers with: short, punctuated, not ASCII, and longer than any tower reads."""


def build_portable(text: TextDecoder) -> Any:
    """Build a copy of the tokenizer that pads, truncates and ends texts as the text tower's training did.

    Raises UserError where the tokenizer cannot do so.
    """
    tokenizer = copy.deepcopy(text.tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = text.length
    if tokenizer.pad_token_id != text.pad_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(text.pad_id)
    if text.appended_id is not None:
        _append_end_token(tokenizer, text.appended_id)
    difference = find_difference(text, tokenizer)
    if difference is not None:
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) alone does not give the ids that the tower was trained on: "
            f"{difference}"
        )
    return tokenizer


def find_difference(text: TextDecoder, tokenizer: Any) -> str | None:
    """Return the first of PROBES that a tokenizer encodes otherwise than in training, in words, or None."""
    for probe in PROBES:
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
    """Build OpenAI's byte-pair tokenizer from the vocabulary that open_clip ships.

    It is a tokenizer of transformers.

    Raises UserError where open_clip is not installed.
    """
    import gzip
    from importlib.util import find_spec

    from transformers import CLIPTokenizer

    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("this model reads OpenAI's vocabulary, which comes with open_clip: pip install open_clip_torch")
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    # As in OpenAI's SimpleTokenizer: a version line, then the merges, of which 49152 - 256 - 2 are in use.
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    merges: Any = [(left, right) for left, right in (line.split() for line in lines)]
    letters = list(_list_byte_letters())
    words = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges, model_max_length=length)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _list_byte_letters() -> list[str]:
    """Return a printable letter for each byte, in the order of OpenAI's vocabulary.

    Printable bytes come first and stand for themselves.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
