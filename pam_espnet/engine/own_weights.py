"""The LLM's own block weights, given back while fused blocks decode in their place.

Fused blocks (``decoder.fused``) are a packed copy with LoRA merged. Besides them the originals serve one purpose in
decoding: prompt vectors, which are read from the LLM without LoRA. A decoder that has seen its prompts can give the
originals' memory back; should an unknown prompt come, they are read again from where they came from, for as long as
that takes. Embeddings, norms and the output layer stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


class OwnWeights:
    """Weights of the projections of a Llama-type LLM.

    Args:
        lm: the LLM, with or without LoRA from peft; changed in place.
        load: reads the same LLM anew, without LoRA.

    Attributes:
        released: whether their memory is given back; the LLM cannot be run then.
    """

    def __init__(self, lm: Any, load: Callable[[], Any]) -> None:
        self.lm = lm
        self.load = load
        self.released = False

    def release(self) -> None:
        """Give their memory back."""
        for linear in projections(self.lm):
            linear.weight.data = linear.weight.new_empty(0)
        self.released = True

    def restore(self) -> None:
        """Read them again.

        Raises:
            ConfigError: the LLM is no longer where it was.
        """
        logging.info("reading the LLM's own blocks again")
        for linear, fresh in zip(projections(self.lm), projections(self.load()), strict=True):
            linear.weight.data = fresh.weight.data.to(linear.weight.device)
        self.released = False

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The context in which the LLM can be run, released or not."""
        if not self.released:
            yield
            return
        self.restore()
        try:
            yield
        finally:
            self.release()


def projections(lm: Any) -> Iterator[nn.Linear]:
    """The linear layers of all blocks, in order; of those with LoRA, the base."""
    for layer in lm.base_model.layers:
        for part, names in PROJECTIONS.items():
            for name in names:
                linear = getattr(getattr(layer, part), name)
                yield linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear
