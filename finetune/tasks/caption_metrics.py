"""How close generated captions are to those people wrote: CIDEr and BLEU, as the COCO caption evaluation computes them.

CIDEr (Vedantam et al. 2015, arXiv 1411.5726) weighs words by how rare they are among the pictures that are evaluated: of ONE
picture it is 0 by definition.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shutil

from pretrain.errors import UserError
from pretrain.runtime.console import log_info

INSTALL = "pip install 'clipfuse[finetune]'"


def scores(generated: list[str], references: list[list[str]]) -> dict[str, float]:
    """A caption a picture, and all that people wrote about it -> CIDEr (0 to 10) and BLEU_1 to BLEU_4 (0 to 1).

    Empty, with a line that says so, where pycocoevalcap is not installed.
    """
    if len(generated) != len(references) or not generated:
        raise UserError(f"{len(generated)} captions for {len(references)} pictures: nothing to compare")
    if importlib.util.find_spec("pycocoevalcap") is None:
        log_info(f"no CIDEr and BLEU: pycocoevalcap is not installed ({INSTALL})")
        return {}
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    both = _words([[text] for text in generated] + references)  # in one go: it may start a program of its own
    said = {i: both[i] for i in range(len(generated))}
    written = {i: both[i + len(generated)] for i in range(len(generated))}
    if len(generated) == 1:
        log_info("CIDEr of a single picture is 0 by definition: it weighs words by how rare they are among pictures")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        cider, _ = Cider().compute_score(written, said)
        bleu, _ = Bleu(4).compute_score(written, said, verbose=0)
    return {"CIDEr": float(cider), **{f"BLEU_{n}": float(value) for n, value in enumerate(bleu, 1)}}


def _words(texts: list[list[str]]) -> dict[int, list[str]]:
    """Words in lower case with spaces between, punctuation left out: by the Penn Treebank rules where Java is, as published
    figures are; else by `plain`, which differs in contractions, abbreviations and brackets only."""
    if shutil.which("java") is not None:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        given = {i: [{"caption": text} for text in group] for i, group in enumerate(texts)}
        with contextlib.suppress(OSError):  # it writes beside its own file, which may be read-only
            found: dict[int, list[str]] = PTBTokenizer().tokenize(given)
            if {i: len(group) for i, group in found.items()} == {i: len(group) for i, group in enumerate(texts)}:
                return found
    log_info("CIDEr and BLEU without a working Java: words are cut by a plain rule, close to but not the Penn Treebank's")
    return {i: [plain(text) for text in group] for i, group in enumerate(texts)}


def plain(text: str) -> str:
    """Letters, digits and what stands inside a word (it's, e-mail, 3.5)."""
    return " ".join(re.findall(r"\w+(?:[-'.’]\w+)*", text.lower()))
