"""Texts that spell out special tokens, are very long, or have odd white space embed alike wherever a model is loaded."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import normalize
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from pretrain.checkpoints import export
from pretrain.checkpoints.loading import LoadedModel, load_model
from pretrain.data.text import load_tokenizer
from pretrain.formats import onnx, portable_tokenizer
from tests.pretrain.formats.test_export import CLIP, SCENES, SIGLIP, SIGLIP_TEXT, assert_close, build_model
from tests.support import ONE_BLOCK, TINY_TOWERS, Small

BERT_TEXT = "text.args={{model_type: {}, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}}"


def set_control_tokens(source: Path, folder: Path) -> Path:
    """Copy a tokenizer, with special tokens that a text can spell out: as published tokenizers, and ours until 0.1."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = False
    tokenizer.save_pretrained(folder)
    assert "<eos>" in AutoTokenizer.from_pretrained(folder).tokenize("a <eos> b")
    return folder


def build_bert_tokenizer(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz[]<>", "red", "ball", "cat", "and"]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return folder


def build_roberta_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer as RoBERTa's: no normalizer, spaces are part of words, pad=1."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", **names)
    tokenizer.save_pretrained(folder)
    return folder


def list_texts(tokenizer: Any) -> list[str]:
    """Texts with each special token at the start, in the middle and at the end; odd white space; a very long one."""
    names = list(map(str, tokenizer.all_special_tokens))
    texts = [text for name in names for text in (f"{name} red ball", f"red {name} ball", f"red ball{name}", f"{name}{name}")]
    return [*texts, "  red \n ball\t", "red ball", "red ball " * 100, "<|endoftext|> <EOS> [sep] red", ""]


@torch.no_grad()
def embed_texts(loaded: LoadedModel, texts: list[str]) -> torch.Tensor:
    return loaded.model.encode("text", *loaded.decoders["text"].encode(texts))


@torch.no_grad()
def embed_with(form: str, folder: Path, texts: list[str], size: int = 32) -> torch.Tensor:
    """Embed texts with the library alone, one by one and without the arguments that the card recommends."""
    if form == "onnx":
        run = onnx.load(folder)
        embeddings: list[torch.Tensor] = [run(torch.zeros(1, 3, size, size), [text])[1] for text in texts]
        return torch.cat(embeddings)
    if form == "open_clip":
        model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        return model.eval().encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), normalize=True)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    padding = "max_length" if model.config.model_type == "siglip" else True
    tokens = processor(text=texts, return_tensors="pt", padding=padding)
    tokens.pop("token_type_ids", None)
    features = model.get_text_features(**tokens)
    return normalize(getattr(features, "pooler_output", features), dim=-1)


CASES = {
    "dual encoder": ("clipart", TINY_TOWERS, ("hf", "open_clip")),
    "CLIP": ("vit-b-16", CLIP, ("hf",)),
    "CLIP, mean": (
        "vit-b-16",
        [
            *CLIP,
            "image.name=vit_base_patch16_clip_quickgelu_224",
            "text.args.hidden_act=quick_gelu",
            "text.pool=avg",
            *ONE_BLOCK,
        ],
        ("hf", "open_clip", "onnx"),
    ),
    "mean": ("scenes", SCENES, ("hf", "open_clip")),
    "SigLIP": ("siglip-b-16", SIGLIP, ("hf",)),
    "SigLIP's text": (
        "siglip-b-16",
        [*SIGLIP_TEXT, "image.name=resnet10t", "model.projection=linear", "model.dim=16"],
        ("open_clip",),
    ),
}


@pytest.mark.parametrize(("case", "is_control"), [*((case, True) for case in CASES), ("CLIP", False), ("SigLIP", False)])
def test_exports_give_the_embedding_of_any_text(case: str, is_control: bool, small: Small, tmp_path: Path) -> None:
    name, settings, forms = CASES[case]
    tokenizer = set_control_tokens(Path(small.tokenizer), tmp_path / "tokenizer") if is_control else small.tokenizer
    loaded = build_model(name, tokenizer, *settings)
    texts = list_texts(loaded.tokenizer)
    expected = embed_texts(loaded, texts)
    for form in forms:
        folder = export.export(loaded, tmp_path / form, form)
        torch.testing.assert_close(embed_with(form, folder, texts), expected, atol=1e-5, rtol=0, msg=form)


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_open_clip_holds_bert_and_roberta(kind: str, pool: str, small: Small, tmp_path: Path) -> None:
    """Their texts may spell out special tokens as well, padding included; what is exported is read again, unchanged."""
    build_tokenizer = build_bert_tokenizer if kind == "bert" else build_roberta_tokenizer
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    settings = [*TINY_TOWERS, BERT_TEXT.format(kind), *ONE_BLOCK, f"text.pool={pool}", "text.length=24"]
    loaded = build_model("clipart", tokenizer, *settings)
    texts = list_texts(loaded.tokenizer)
    expected = embed_texts(loaded, texts)
    for form in ("open_clip", "onnx") if pool == "avg" else ("open_clip",):
        folder = export.export(loaded, tmp_path / form, form)
        torch.testing.assert_close(embed_with(form, folder, texts), expected, atol=1e-5, rtol=0, msg=form)
    again = load_model(tmp_path / "open_clip")
    torch.testing.assert_close(embed_texts(again, texts), expected, atol=1e-6, rtol=0)
    moved = (tmp_path / "open_clip").rename(tmp_path / "moved")  # the card's code gives hf_model_name
    text_cfg = json.loads((moved / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{moved}", text_cfg=text_cfg | {"hf_model_name": str(moved)})
    ids = open_clip.get_tokenizer(f"local-dir:{moved}")(texts)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode_text(ids, normalize=True), expected, atol=1e-5, rtol=0)


def test_transformers_holds_bert_with_its_own_pooler(small: Small, tmp_path: Path) -> None:
    for kind, build_tokenizer in (("bert", build_bert_tokenizer), ("roberta", build_roberta_tokenizer)):
        tokenizer = build_tokenizer(tmp_path / f"tokenizer-{kind}")
        loaded = build_model("clipart", tokenizer, *TINY_TOWERS, BERT_TEXT.format(kind), "text.pool=tower", "text.length=24")
        texts = list_texts(loaded.tokenizer)
        folder = export.export(loaded, tmp_path / kind, "hf")
        torch.testing.assert_close(embed_with("hf", folder, texts), embed_texts(loaded, texts), atol=1e-5, rtol=0, msg=kind)
        assert len(AutoTokenizer.from_pretrained(folder)(texts[-3], truncation=True).input_ids) == 24
        assert load_model(folder).config.text.length == 24


def test_a_caption_that_spells_out_a_special_token_is_text(small: Small) -> None:
    """With tokenizers that `clipfuse tokenizer` writes."""
    tokenizer = load_tokenizer(small.tokenizer)
    ids = tokenizer(["red <eos> ball"])["input_ids"][0]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "red <eos> ball"


# ---------------------------------------------------------------------------------------------------------------------
# Published CLIPs


def save_clip(folder: Path, tokenizer_folder: Path, vocabulary: int | None = None, **text: Any) -> CLIPModel:
    """Save a small CLIPModel with random weights as transformers does, with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, **text, "max_position_embeddings": 24}
    if vocabulary is not None:
        text["vocab_size"] = vocabulary
    torch.manual_seed(0)
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.eval().save_pretrained(folder)
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def embed_published(model: Any, folder: Path, texts: list[str]) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    tokens.pop("token_type_ids", None)
    features = model.get_text_features(**tokens)
    return normalize(getattr(features, "pooler_output", features), dim=-1)


@pytest.mark.parametrize("vocabulary", ["own", "default"])
@pytest.mark.parametrize("eos", ["own", "legacy", "default"])
def test_a_published_clip_reads_any_text_as_in_transformers(vocabulary: str, eos: str, small: Small, tmp_path: Path) -> None:
    """With its own small tokenizer, also where vocab_size and eos_token_id were left at the defaults of transformers."""
    source = set_control_tokens(Path(small.tokenizer), tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source)
    size = len(tokenizer) if vocabulary == "own" else None
    ends = {"own": {"eos_token_id": tokenizer.eos_token_id}, "legacy": {"eos_token_id": 2}, "default": {}}
    model = save_clip(tmp_path / "in", source, size, **ends[eos])
    loaded = load_model(tmp_path / "in")
    assert loaded.model.towers["text"].model.config.vocab_size == (size or 49408)
    texts = [text for text in list_texts(loaded.tokenizer) if text == text.strip()]
    expected = embed_published(model, tmp_path / "in", texts)
    torch.testing.assert_close(embed_texts(loaded, texts), expected, atol=1e-5, rtol=0)
    if eos != "default":
        folder = export.export(loaded, tmp_path / "out", "hf")
        torch.testing.assert_close(embed_with("hf", folder, texts), expected, atol=1e-5, rtol=0)
    else:
        assert bool((expected - expected[:1]).abs().max() < 1e-5)  # what such a model does with any text


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "bert"])
def test_a_dual_encoder_of_clip_and_roberta_is_read(kind: str, tmp_path: Path) -> None:
    """As transformers' own example makes it: RoBERTa has two positions more than its longest text has tokens."""
    build_tokenizer = build_bert_tokenizer if kind == "bert" else build_roberta_tokenizer
    tokenizer = AutoTokenizer.from_pretrained(build_tokenizer(tmp_path / "in"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = AutoConfig.for_model(
        kind,
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=24 if kind == "bert" else 26,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = VisionTextDualEncoderModel(VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16))
    model.eval().save_pretrained(tmp_path / "in")
    loaded = load_model(tmp_path / "in")
    assert loaded.config.text.length == 24
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(tmp_path / "in")
    texts = [text for text in list_texts(tokenizer) if text == text.strip()]
    expected = embed_published(model, tmp_path / "in", texts)
    torch.testing.assert_close(embed_texts(loaded, texts), expected, atol=1e-5, rtol=0)
    folder = export.export(loaded, tmp_path / "out", "hf")
    torch.testing.assert_close(embed_with("hf", folder, texts), expected, atol=1e-5, rtol=0)


def test_open_clips_own_tokenizer_reads_special_tokens_as_open_clip_does() -> None:
    tokenizer, reference = portable_tokenizer.build_openai_tokenizer(24), open_clip.SimpleTokenizer(context_length=24)
    texts = ["a <|endoftext|> b", "a <END_of_text>'s b", "<start_of_text>a<end_of_text>", "don't 'RE 42", "x " * 50]
    for text in texts:
        ids = tokenizer([text], truncation=True, max_length=24)["input_ids"][0]
        assert ids == [i for i in reference([text])[0].tolist() if i], text


# ---------------------------------------------------------------------------------------------------------------------
# Longer than trained, and classes of transformers that read one tower


def test_positions_that_were_not_trained_are_not_exported(small: Small, tmp_path: Path) -> None:
    loaded = build_model("vit-b-16", small.tokenizer, *CLIP, "text.length=12")
    folder = export.export(loaded, tmp_path / "out", "hf")
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert loaded.model.towers["text"].model.config.max_position_embeddings > 12
    assert model.config.text_config.max_position_embeddings == tokenizer.model_max_length == 12
    assert load_model(folder).config.text.length == 12
    ids = torch.ones(1, 13, dtype=torch.int64)
    with pytest.raises((ValueError, IndexError)):
        model.get_text_features(input_ids=ids)


def test_one_tower_of_an_exported_clip_loads_alone(small: Small, tmp_path: Path) -> None:
    loaded = build_model("vit-b-16", small.tokenizer, *CLIP)
    folder = export.export(loaded, tmp_path / "out", "hf")
    text, info = CLIPTextModelWithProjection.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info.get("mismatched_keys")
    vision, info = CLIPVisionModelWithProjection.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info.get("mismatched_keys")
    texts = ["a red ball", "two green boxes on grass"]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    noise = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tower: Any = loaded.model.towers["image"]
    with torch.no_grad():
        actual = (
            normalize(vision.eval()(pixel_values=tower.normalize(noise)).image_embeds, dim=-1),
            normalize(text.eval()(**tokens).text_embeds, dim=-1),
        )
        expected = loaded.model.encode("image", noise), embed_texts(loaded, texts)
    assert_close(expected, actual)
