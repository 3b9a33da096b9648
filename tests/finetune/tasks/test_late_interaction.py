"""Late interaction compared with a loop over tokens; off and untrained, it changes no logit."""

import pytest
import torch

from finetune import model as models
from finetune import train
from finetune.tasks import retrieval
from finetune.tasks.late_interaction import LateInteraction, largest_similarity
from pretrain import registry
from pretrain.errors import ConfigError
from pretrain.towers import TokenSequence
from tests.support import tiny


def build_tokens(rows: int, lengths: list[int], width: int = 6) -> TokenSequence:
    states = torch.randn(rows, max(lengths), width, generator=torch.Generator().manual_seed(rows))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TokenSequence(states, mask, None, states[:, 0])


@torch.no_grad()
def test_each_token_counts_by_the_token_of_its_image_that_it_resembles_most() -> None:
    text, fused, image = build_tokens(4, [3, 1, 2, 3]), build_tokens(4, [3, 1, 2, 3]), build_tokens(2, [5, 4])
    fused = fused._replace(states=fused.states.flip(0))
    module = LateInteraction(6)
    assert torch.equal(module(fused, text, image), torch.zeros(4))
    torch.nn.init.normal_(module.weigh.weight)
    torch.nn.init.normal_(module.weigh.bias)
    for row, score in enumerate(module(fused, text, image)):
        expected = 0.0
        for t in range(int(text.mask[row].sum())):
            regions = image.states[row // 2][image.mask[row // 2]]  # two texts about each image
            cosine = max(float(torch.cosine_similarity(text.states[row, t], region, dim=0)) for region in regions)
            assert float(largest_similarity(text, image)[row, t]) == pytest.approx(cosine, abs=1e-5)
            weight, bias = (module.weigh.weight @ fused.states[row, t] + module.weigh.bias).tolist()
            expected += weight * cosine + bias
        assert float(score) == pytest.approx(expected, abs=1e-4)


def test_an_untrained_one_changes_nothing_and_tokens_must_share_a_space() -> None:
    logits = []
    for is_used in (False, True):
        task = retrieval.build(retrieval.Config(late_interaction=is_used), None)
        torch.manual_seed(0)
        fusion = registry.get_component("fusion", "cross").Config(layers=1, heads=2)
        model = models.build(tiny.build_model("clip", image={"pool": "avg"}, text={"pool": "avg"}), fusion, None)
        model.head = task.build_head(model)
        batch = tiny.build_batch(0, 4)
        batch.targets["caption_id"] = torch.arange(4)
        features = task.encode(model, batch)
        logits.append(features["match"])
        loss, _ = task.loss(features, batch.targets)
        loss.backward()
        if is_used:
            assert any("late_interaction" in name and p.grad.abs().sum() > 0 for name, p in model.named_parameters())  # type: ignore[union-attr]
    assert torch.equal(*logits)
    model = models.build(tiny.build_model("clip"), fusion, None, tokens="tower")
    with pytest.raises(ConfigError, match="with tokens=aligned only"):
        task.build_head(model)


def test_runs_that_began_before_these_settings_resume() -> None:
    """The hash of the default settings is the one that the code before them wrote into checkpoints."""
    assert train._digest(retrieval.Config()) == "55c330155973"
    others = [retrieval.Config(weighting="equal"), retrieval.Config(late_interaction=True), retrieval.Config(rerank=8)]
    assert len({train._digest(config) for config in [retrieval.Config(), *others]}) == 4
