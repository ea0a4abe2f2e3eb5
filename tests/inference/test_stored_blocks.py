"""Blocks in a file are told from what was written there."""

import pytest
import torch

from landmark_cli.inference.stored_blocks import checksums_of
from tests.tiny import FREQ


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_blocks_that_differ_have_other_checksums(device):
    """One bit, the same bit of two words, words that take each other's place, words that are gone."""
    block = torch.randn(2, FREQ + 1, 8, generator=torch.Generator().manual_seed(0))
    words = block.view(-1).view(torch.int32)
    assert len(words) == 80
    changed = [words.clone()]
    for bit in range(32):
        for places in ([0], [79], [0, 1], [0, 2], [1, 3], [5, 78]):
            changed.append(words.clone())
            changed[-1][places] ^= torch.tensor(1 << bit).to(torch.int32)
    for swapped in ([1, 0], [2, 1], [3, 0]):
        changed.append(words.clone())
        changed[-1][swapped] = changed[-1][swapped[::-1]]
    for count in (1, 2, 80):
        changed.append(words.clone())
        changed[-1][:count] = 0
    blocks = torch.stack(changed).view(torch.float32).view(-1, *block.shape)
    sums = checksums_of(blocks.to(device)).cpu()
    assert len(set(sums.tolist())) == len(blocks) and torch.equal(sums, checksums_of(blocks))
    assert torch.equal(sums[:1], checksums_of(block[None])) and checksums_of(blocks[:0]).shape == (0,)
