"""Templates, class names, labels, and top-k accuracy against sorting."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretrain.errors import ConfigError, UserError
from pretrain.evaluation.zero_shot import (
    TEMPLATES,
    build_classifier,
    fill_template,
    index_labels,
    load_class_names,
    load_imagenet_names,
    top_k_accuracy,
)


def test_filled_templates_are_correct_english() -> None:
    assert fill_template("a picture of a {}", "owl") == "a picture of an owl"
    assert fill_template("a {} far away", "owl") == "an owl far away"
    assert fill_template("a {}", "Boat") == "a Boat"
    assert fill_template("the {} in this picture", "owl") == "the owl in this picture"
    assert len({fill_template(template, "owl") for template in TEMPLATES}) == len(TEMPLATES) >= 12


def test_imagenet_has_a_thousand_different_names() -> None:
    names = load_imagenet_names()
    assert len({name.lower() for name in names}) == len(names) == 1000
    assert names[1] == "goldfish"
    assert names[134] != names[517]
    assert names[517].startswith("crane, ")
    assert load_class_names("imagenet") == names


def test_class_names_from_list_commas_and_file(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("cat\n\ndog \nhot air balloon\n")
    assert load_class_names(str(file)) == ["cat", "dog", "hot air balloon"]
    assert load_class_names("cat, dog") == load_class_names(["cat", "dog"]) == ["cat", "dog"]
    with pytest.raises(ConfigError, match=r"no classes 'cats.txt'.*imagenet"):
        load_class_names("cats.txt")
    with pytest.raises(ConfigError, match="names 'cat' more than once"):
        load_class_names("cat,dog,cat")
    with pytest.raises(ConfigError, match="at least two"):
        load_class_names(["cat"])


def test_labels_are_numbers_or_names() -> None:
    names = ["Cat", "dog"]
    assert index_labels([0, "dog", "cat", "1"], names).tolist() == [0, 1, 0, 1]
    with pytest.raises(UserError, match=r"sample 1 has label 'dg'.*did you mean 'dog'"):
        index_labels([0, "dg"], names)
    with pytest.raises(UserError, match="label 2; the 2 classes"):
        index_labels([2], names)
    with pytest.raises(UserError, match="sample 0 has no class"):
        index_labels([None], names)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_class_files_of_other_editors_are_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "classes,v2.txt"  # a comma in the path
    file.write_bytes("circle\r\nK\u00e4fer \r\n\r\n1\r\nhot\u2028air\n".encode(encoding))
    assert load_class_names(str(file)) == ["circle", "K\u00e4fer", "1", "hot\u2028air"]


def test_class_files_in_latin_1_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_bytes("circle\nK\u00e4fer\n".encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_class_names(str(file))
    assert str(caught.value) == (
        f"{file} is not in UTF-8 (byte 0xe4 in line 2): convert it, for example with iconv -f latin1 -t utf-8"
    )
    with pytest.raises(ConfigError, match="no classes"):
        load_class_names("a" * 5000)
    with pytest.raises(ConfigError, match="no classes"):
        load_class_names(str(tmp_path))


def test_names_that_are_numbers_are_names() -> None:
    names = ["1", "2", "3", "4"]
    assert index_labels(["4", "1", " 2 "], names).tolist() == [3, 0, 1]
    for label in (4, 1, 0, 2.0, "0", "5"):
        with pytest.raises(UserError, match=r"^sample 1 has the number \d as label.* class '1' is not at position 1; .*\"1\""):
            index_labels(["1", label], names)
    digits = [str(i) for i in range(10)]  # position and name agree
    assert index_labels([7, "7", 0.0], digits).tolist() == [7, 7, 0]
    assert index_labels(["7 up", "2", 1], ["cola", "7 up", "tea"]).tolist() == [1, 2, 1]
    planes = ["cat", "747", "dog"]  # 747 could be nothing but the name
    assert index_labels([0, 1, 2, "747", "2"], planes).tolist() == [0, 1, 2, 1, 2]
    with pytest.raises(UserError, match=r"^sample 0 has the number 747 as label"):
        index_labels([747], planes)
    with pytest.raises(UserError, match=r"^sample 1 has the number 2 as label"):
        index_labels([0, 2], ["cat", "2", "dog"])
    assert index_labels(["Cat", "cat", "CAT"], ["cat", "Cat"]).tolist() == [1, 0, 0]
    for label in (10, -1, 10**30):
        with pytest.raises(UserError, match=f"sample 0 has label {label}; the 10 classes are numbered from 0"):
            index_labels([label], digits)


def test_the_classifier_is_the_normalized_mean() -> None:
    embeddings: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def encode(texts: list[str]) -> torch.Tensor:
        for text in texts:
            embeddings.setdefault(text, F.normalize(torch.randn(8, generator=generator), dim=0))
        return torch.stack([embeddings[text] for text in texts])

    names = [f"class {i}" for i in range(200)]
    weights = build_classifier(names, ["a {}", "the {}", "{}"], encode)
    expected = F.normalize(sum(embeddings[f"{article}class 123"] for article in ("a ", "the ", "")) / 3, dim=0)
    torch.testing.assert_close(weights[123], expected)
    with pytest.raises(ConfigError, match="no place for the class name"):
        build_classifier(names, ["a class"], encode)


def test_top_k_against_sorting_and_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    image, weights = torch.randn(100, 8, generator=generator), torch.randn(12, 8, generator=generator)
    labels = torch.randint(12, (100,), generator=generator)
    order = (image.double() @ weights.double().T).argsort(dim=1, descending=True)
    accuracy = top_k_accuracy(image, labels, weights, tile=33)
    for k in (1, 5):
        assert accuracy[f"top{k}"] == pytest.approx((order[:, :k] == labels[:, None]).any(1).double().mean().item())
    constant = top_k_accuracy(torch.ones(10, 8), labels[:10], torch.ones(12, 8))
    assert constant["top1"] == pytest.approx(1 / 12)
    assert constant["top5"] == pytest.approx(5 / 12)
