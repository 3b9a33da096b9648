"""The random numbers of a step."""

import torch

from pretrain.training.step import derive_seed, seed_generators


def test_seeding_gives_the_numbers_of_torch_manual_seed() -> None:
    seed = derive_seed(3, 7, 0, 1)
    torch.manual_seed(seed)
    expected = torch.randn(5), torch.nn.functional.dropout(torch.ones(50), 0.5), torch.randperm(9)
    seed_generators(seed, torch.device("cpu"))
    numbers = torch.randn(5), torch.nn.functional.dropout(torch.ones(50), 0.5), torch.randperm(9)
    assert all(torch.equal(a, b) for a, b in zip(numbers, expected, strict=True))
