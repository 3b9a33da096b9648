"""CIDEr and BLEU of generated captions, computed as in the COCO caption evaluation.

CIDEr (Vedantam et al. 2015, arXiv 1411.5726) weighs words by how rare they are among the evaluated images: for ONE image
it is 0 by definition.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil

import regex

from pretrain.errors import UserError
from pretrain.runtime.console import log_info

INSTALL = "pip install 'clipfuse[finetune]'"


def score_captions(generated: list[str], references: list[list[str]]) -> dict[str, float]:
    """Compute CIDEr (0 to 10) and BLEU_1 to BLEU_4 (0 to 1) of one generated caption per image.

    Args:
        generated: one caption per image.
        references: all reference captions of each image.

    Returns:
        The metrics by name; empty, with a logged reason, where pycocoevalcap is not installed.

    Raises:
        UserError: no captions, or unequal numbers of captions and images.
    """
    if len(generated) != len(references) or not generated:
        raise UserError(f"{len(generated)} captions for {len(references)} images: nothing to compare")
    if importlib.util.find_spec("pycocoevalcap") is None:
        log_info(f"no CIDEr and BLEU: pycocoevalcap is not installed ({INSTALL})")
        return {}
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    tokenized = _tokenize([[text] for text in generated] + references)  # in one call: it may start a Java process
    candidate_words = {i: tokenized[i] for i in range(len(generated))}
    reference_words = {i: tokenized[i + len(generated)] for i in range(len(generated))}
    if len(generated) == 1:
        log_info("CIDEr of a single image is 0 by definition: it weighs words by how rare they are among images")
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress
        cider, _ = Cider().compute_score(reference_words, candidate_words)
        bleu, _ = Bleu(4).compute_score(reference_words, candidate_words, verbose=0)
    return {"CIDEr": float(cider), **{f"BLEU_{n}": float(value) for n, value in enumerate(bleu, 1)}}


def _tokenize(texts: list[list[str]]) -> dict[int, list[str]]:
    """Rewrite each text as lower-case words separated by spaces, without punctuation.

    Uses the Penn Treebank tokenizer where Java is installed, as published results do. Otherwise uses `tokenize_plainly`,
    which differs only in contractions, abbreviations and brackets.
    """
    if shutil.which("java") is not None:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        captions = {i: [{"caption": text} for text in group] for i, group in enumerate(texts)}
        with contextlib.suppress(OSError):  # it writes a file into its own folder, which may be read-only
            tokenized: dict[int, list[str]] = PTBTokenizer().tokenize(captions)
            if {i: len(group) for i, group in tokenized.items()} == {i: len(group) for i, group in enumerate(texts)}:
                return tokenized
    log_info("CIDEr and BLEU without a working Java: words are split by a plain rule, close to but not the Penn Treebank's")
    return {i: [tokenize_plainly(text) for text in group] for i, group in enumerate(texts)}


def tokenize_plainly(text: str) -> str:
    """Keep letters with their marks, digits, and punctuation inside a word (it's, e-mail, 3.5), in lower case."""
    return " ".join(regex.findall(r"[\w\p{M}]+(?:[-'.’][\w\p{M}]+)*", text.lower()))
