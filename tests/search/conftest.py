"""Shared fixtures of the search's tests."""

import pytest
from torch import Tensor

from pam_espnet.engine.llama import Block


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each block, from the first, how many positions every forward pass runs through it."""
    counts: list[list[int]] = []
    finish = Block.finish

    def count(block: Block, x: Tensor, attended: Tensor) -> Tensor:
        counts.extend([] for _ in range(block.index + 1 - len(counts)))
        counts[block.index].append(len(x))
        return finish(block, x, attended)

    monkeypatch.setattr(Block, "finish", count)
    return counts
