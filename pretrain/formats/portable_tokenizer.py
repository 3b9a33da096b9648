"""A tokenizer folder that gives the text tower's ids wherever it is loaded.

Training fills up, cuts and, for tokenizers that leave it out, appends the end token itself (pretrain.data.text); other
libraries call the tokenizer alone. So these habits go into the tokenizer, and what it then gives is compared.
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
"""Short, punctuated, beyond ASCII, and longer than any tower reads."""


def build_portable(text: TextDecoder) -> Any:
    """A copy of the tokenizer with the tower's habits. Raises UserError where it cannot be given them."""
    made = copy.deepcopy(text.tokenizer)
    made.padding_side = made.truncation_side = "right"
    made.model_max_length = text.length
    if made.pad_token_id != text.pad_id:
        made.pad_token = made.convert_ids_to_tokens(text.pad_id)
    if text.appended_id is not None:
        _append(made, text.appended_id)
    wrong = find_difference(text, made)
    if wrong is not None:
        raise UserError(
            f"the tokenizer ({type(made).__name__}) alone does not give the ids that the tower was trained on: {wrong}"
        )
    return made


def find_difference(text: TextDecoder, tokenizer: Any) -> str | None:
    """What a tokenizer makes otherwise than the tower's does, in words, or None."""
    for probe in PROBES:
        ids, mask = text.encode([probe])
        ours = ids[0][mask[0]].tolist()
        theirs = tokenizer([probe], truncation=True, max_length=text.length)["input_ids"][0]
        if list(theirs) != ours:
            return f"{probe[:40]!r} becomes {list(theirs)[:8]}, not {ours[:8]}"
    return None


def save(text: TextDecoder, folder: Path) -> None:
    """Writes the portable tokenizer. Raises UserError."""
    build_portable(text).save_pretrained(folder)


def _append(tokenizer: Any, end: int) -> None:
    """Makes a fast tokenizer write the end token, keeping what it writes before a text."""
    from tokenizers import processors

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"the tokenizer ({type(tokenizer).__name__}) writes no end token and cannot be taught to")
    word = tokenizer.convert_ids_to_tokens(end)
    template = processors.TemplateProcessing(single=f"$A {word}", pair=f"$A {word} $B {word}", special_tokens=[(word, end)])
    before = backend.post_processor
    backend.post_processor = template if before is None else processors.Sequence([before, template])


def build_openai_tokenizer(length: int) -> Any:
    """OpenAI's byte-pair tokenizer, as open_clip ships its vocabulary, in transformers' form. Raises UserError."""
    import gzip
    from importlib.util import find_spec

    from transformers import CLIPTokenizer

    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("this model reads OpenAI's vocabulary, which comes with open_clip: pip install open_clip_torch")
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    # As OpenAI's SimpleTokenizer: a version line, then merges; of them 49152 - 256 - 2 are in use.
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    merges: Any = [(left, right) for left, right in (one.split() for one in lines)]
    letters = list(_bytes_as_letters())
    words = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    made = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges, model_max_length=length)
    made.padding_side = made.truncation_side = "right"
    return made


def _bytes_as_letters() -> list[str]:
    """A printable letter for each byte, in the order of OpenAI's vocabulary: printable ones first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
