"""Layer dropout: in a training step some blocks of the LLM are left out, so that no block relies on all others.

The probability rises with depth along the exponential curve of LayerSkip (Elhoushi et al., ACL 2024), from 0 at the
first block: early blocks carry most of the work. There each sequence of a batch drops blocks of its own; here a block
is left out for the whole step, so that it costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def skip_probabilities(num_layers: int, most: float) -> Tensor:
    """(num_layers,) of each block: 0 for the first, near ``most`` below the last, which is never left out."""
    depth = torch.arange(num_layers) / max(num_layers - 1, 1)
    probabilities = most * (torch.exp2(depth) - 1)
    probabilities[-1] = 0.0
    return probabilities


@contextmanager
def blocks_skipped(transformer: Any, skipped: Collection[int]) -> Iterator[None]:
    """Within it, blocks ``skipped`` (from 1) of a transformers model hand their input on.

    They stay in the list of blocks: the others keep their index, by which some families choose their mask, and hidden
    states are still recorded one per block.
    """
    blocks = [transformer.layers[number - 1] for number in skipped]
    try:
        for block in blocks:
            block.forward = _hand_on  # of this object alone; the class's comes back when it is deleted
        yield
    finally:
        for block in blocks:
            del block.forward


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
