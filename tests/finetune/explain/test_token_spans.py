"""Tokens are joined into words, with tokenizers of several kinds."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune.explain.token_spans import TokenSpans, average_words
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.errors import ConfigError
from tests.support import Small


def test_words_of_a_trained_tokenizer(small: Small) -> None:
    """With a byte-level BPE of 400 tokens rare words have many, which are positions in the model's input."""
    decoder = TextDecoder(load_tokenizer(small.tokenizer), 48)
    text = "what colour  is the unpronounceable car, naïve?\n"
    spans, (ids, mask) = TokenSpans(decoder, text), decoder.encode([text])
    words = spans.find_words()
    assert [word.text for word in words] == ["what", "colour", "is", "the", "unpronounceable", "car", "naïve"]
    assert len(words[4].tokens) > 3
    for word in words:
        decoded = decoder.tokenizer.decode(ids[0, list(word.tokens)])
        assert decoded.strip() == word.text
    used = [token for word in words for token in word.tokens]
    assert used == sorted(set(used))  # no token in two words
    assert len(spans.spans) == int(mask.sum())  # positions are those of the encoded text, special tokens included


@pytest.mark.parametrize(
    "text",
    [
        "लाल गाड़ी पुल पर है",  # Hindi: vowel signs and nuktas are marks
        "একটি লাল গাড়ি সেতুতে",  # Bengali
        "سَيَّارَةٌ حَمْرَاءُ عَلَى الجِسْرِ",  # Arabic with vowels
        "cafe\u0301 nai\u0308ve",  # accents as separate characters
        "می\u200cخواهم ماشین",  # Persian: a joiner inside a word
        "รถสีแดง บนสะพาน",  # Thai: phrases between spaces
        "אוֹטוֹ אָדֹם",  # Hebrew with points
        "xe hơi màu đỏ",
    ],
)
def test_marks_belong_to_their_word(text: str) -> None:
    """The reference is the text itself, divided at its spaces."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # one token a character
    decoder = TextDecoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]"), 64)
    assert [word.text for word in TokenSpans(decoder, text).find_words()] == text.split()


def test_words_beyond_the_maximum_length_are_left_out(small: Small) -> None:
    decoder = TextDecoder(load_tokenizer(small.tokenizer), 8)
    spans = TokenSpans(decoder, "a red car on a black sofa in a meadow with unpronounceable things")
    assert 0 < len(spans.find_words()) < 12
    assert max(token for word in spans.find_words() for token in word.tokens) < 8


def test_words_of_a_wordpiece_tokenizer() -> None:
    """As in BERT: tokens without spaces, ## in front of those inside a word, lower case."""
    vocabulary = {"[UNK]": 0, "red": 1, "car": 2, "##s": 3, "left": 4, "-": 5}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    decoder = TextDecoder(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[UNK]"), 16)
    words = TokenSpans(decoder, "RED Cars left-left, zebra").find_words()
    assert [(word.text, word.tokens) for word in words] == [
        ("RED", (0,)), ("Cars", (1, 2)), ("left-left", (3, 4, 5)), ("zebra", (7,))
    ]  # fmt: skip
    maps = torch.arange(8.0)[:, None, None].expand(8, 2, 3)
    torch.testing.assert_close(average_words(maps, words)[:, 0, 0], torch.tensor([0, 1.5, 4, 7]))
    assert average_words(maps, []).shape == (0, 2, 3)


def test_a_tokenizer_without_offsets_is_refused(small: Small) -> None:
    decoder = TextDecoder(load_tokenizer(small.tokenizer), 48)

    class Slow:
        is_fast = False

    decoder.tokenizer = Slow()
    with pytest.raises(ConfigError, match="Slow does not say"):
        TokenSpans(decoder, "a car")
