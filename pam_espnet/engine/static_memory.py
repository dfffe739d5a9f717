"""Buffers of fixed shape for decoding: what CUDA graphs read and write.

Prefixes lie in the first P slots, row k of step t in slot P + t * K + k, so that keys and values never move and a step
knows its slots from one counter. What is left of the tree of hypotheses is which slots each row may look at.

B utterances, K rows of each, P prefix positions, S steps, C slots, J key/value heads, E size of a head, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

UNIT = 64  # slots that attention reads together: prefixes are padded to a multiple, or its sums would depend on others
STEPS = 16


@dataclass(frozen=True)
class Shape:
    """What buffers are made for."""

    utterances: int  # B
    rows: int  # K
    prefix: int  # P, a multiple of ``UNIT``
    steps: int  # S

    @property
    def slots(self) -> int:
        """C."""
        return _up(self.prefix + self.rows * self.steps, UNIT)

    @classmethod
    def holding(cls, utterances: int, rows: int, prefix: int, steps: int) -> Shape:
        """One of few shapes that is large enough."""
        return cls(rounded(utterances, 1), rows, rounded(prefix, UNIT), rounded(steps, STEPS))


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def rounded(number: int, unit: int = 1) -> int:
    """The next multiple of ``unit``, and of an eighth of the next power of two: few sizes for many numbers."""
    return _up(number, max(unit, 1 << max(0, (number - 1).bit_length() - 3)))


class Memory:
    """The buffers of one shape.

    Args:
        shape: of the buffers.
        blocks, kv_heads, head, width: of the LLM.
        cos, sin: (longest,E/2) float32, of every position that there can be.
        dtype: of keys and values.

    Attributes:
        keys, values: (blocks,B,J,C,E).
        embeds: (B,P,D) prefixes, right-padded.
        start: (B,) positions of each prefix.
        lengths: (B,) the same and those of the draft behind it.
        used: (1,) slots used so far.
        next: (B,) position of the next token; a chain's later rows have the positions behind it.
        visible: (B,K,C) uint8, what each row may look at.
        parents: (B,K) the row of the step before that each row continues.
        tokens: (B,K) vocabulary indices that the rows read.
        finished: (B,) bool, utterances that early exit need not wait for.
        depths: (B,) the block that each utterance's last logits came from.
        graphs: captured functions, by name.
        scratch: other buffers that belong to these, by name.
    """

    def __init__(
        self,
        shape: Shape,
        blocks: int,
        kv_heads: int,
        head: int,
        width: int,
        cos: Tensor,
        sin: Tensor,
        dtype: torch.dtype,
    ) -> None:
        b, k, p, c, device = shape.utterances, shape.rows, shape.prefix, shape.slots, cos.device
        self.shape, self.device, self.cos, self.sin = shape, device, cos, sin
        # Zeros, not empty: what is masked is multiplied by zero, and zero times NaN is NaN.
        self.keys = torch.zeros(blocks, b, kv_heads, c, head, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.embeds = torch.zeros(b, p, width, dtype=dtype, device=device)
        long: dict[str, Any] = {"dtype": torch.long, "device": device}
        self.start, self.lengths, self.next = (torch.ones(b, **long) for _ in range(3))
        self.used = torch.full((1,), p, **long)
        self.visible = torch.zeros(b, k, c, dtype=torch.uint8, device=device)
        self.parents, self.tokens = torch.zeros(b, k, **long), torch.zeros(b, k, **long)
        self.finished = torch.zeros(b, dtype=torch.bool, device=device)
        self.depths = torch.full((b,), blocks, **long)
        self.utterance = torch.arange(b, device=device).repeat_interleave(k)  # (R,) of each row
        self.graphs: dict[Hashable, Callable[[], Any]] = {}
        self.scratch: dict[Hashable, Any] = {}

    def clear(self) -> None:
        """Drop the graphs and what belongs to them, which refer to these buffers: now they can be freed."""
        self.graphs.clear()
        self.scratch.clear()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is done inside to rows is undone: keys and values behind ``used`` are nobody's."""
        tensors = (self.used, self.next, self.visible, self.parents, self.tokens, self.finished, self.depths)
        copies = [tensor.clone() for tensor in tensors]
        try:
            yield
        finally:
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)

    @property
    def nbytes(self) -> int:
        """Of what grows with the shape."""
        return self.keys.nbytes + self.values.nbytes + self.embeds.nbytes + self.visible.nbytes

    def begin(self, chained: bool) -> None:
        """Before the prefix is run: nothing but it can be seen; of chained rows each sees one position more."""
        slots = torch.arange(self.shape.slots, device=self.device)
        ahead = torch.arange(self.shape.rows, device=self.device)[:, None] * int(chained)  # (K,1)
        self.visible.copy_(slots < self.start[:, None, None] + ahead)
        self.used.fill_(self.shape.prefix)
        self.next.copy_(self.start)
        self.depths.fill_(len(self.keys))

    def append(self, chained: bool) -> tuple[Tensor, Tensor]:
        """Slots and positions (R,) of one more token of every row, which sees what its parent saw, and itself; a
        chained row also sees those before it in its utterance."""
        count, size, slots = self.visible.shape
        rank = torch.arange(size, device=self.device)  # (K,)
        own = (self.used + rank).clamp_max(slots - 1)  # a capture may run a step more than there is room for
        every = torch.arange(slots, device=self.device)
        new = (every <= own[:, None]) & (every >= (self.used if chained else own)[:, None])  # (K,C)
        inherited = self.visible.gather(1, self.parents[:, :, None].expand(-1, -1, slots))
        self.visible.copy_(inherited | new)
        positions = self.next[:, None] + rank * int(chained)  # (B,K)
        self.used.add_(size)
        self.next.add_(1)  # a chain's is set by whoever knows how much of it was right
        # Rows of utterances that have ended go on, and must not go beyond the tables.
        return own.repeat(count), positions.expand(count, size).flatten().clamp_max(len(self.cos) - 1)
