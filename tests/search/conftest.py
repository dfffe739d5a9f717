"""What tests of the search share."""

from __future__ import annotations

import pytest
from torch import Tensor

from pam_espnet.engine.blocks import FusedLlama


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each block, from the first, how many positions every forward pass runs through it."""
    counts: list[list[int]] = []
    finish = FusedLlama.finish

    def count(model: FusedLlama, index: int, x: Tensor, attended: Tensor) -> Tensor:
        counts.extend([] for _ in range(index + 1 - len(counts)))
        counts[index].append(len(x))
        return finish(model, index, x, attended)

    monkeypatch.setattr(FusedLlama, "finish", count)
    return counts
