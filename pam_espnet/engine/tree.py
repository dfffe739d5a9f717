"""Keys and values that do not move: hypotheses are nodes of a tree, written once behind their utterance's prefix.

A beam that forks shares its past instead of copying it; a mask over slots says what a row may attend to. The prefix of
an utterance is stored once, however many hypotheses it has, and keys and values are never repeated over the heads or
rows that share them. Finished utterances are dropped from the memory, and so are dead branches of long answers.

Prior art: tree attention of SpecInfer (Miao et al., ASPLOS 2024) and Medusa (Cai et al., ICML 2024).

B utterances in memory, R rows, N rows still in the blocks, K rows of the utterance with most, P prefix positions, C
slots, A heads, G heads per key/value head, J key/value heads, E size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

RESERVE = 64  # slots for steps, allocated with the prefix
GROWTH = 1.5  # of the memory when it is full
DEAD = 2  # compact when there are this many times more slots behind the prefix than the live ones need


@dataclass(frozen=True)
class Front:
    """Rows that one pass runs through the blocks: all, or those that have not exited; utterances in their order.

    Attributes:
        rows, utterance, positions: (N,) which rows, and theirs.
        slots: (N,) where their keys and values are written.
        cell: (N,) of each row in the grid of (B,K) cells that attention computes.
        most: K.
        bias: (B,1,K*G,C) zero where a row may attend, minus infinity elsewhere.
    """

    rows: Tensor
    utterance: Tensor
    slots: Tensor
    positions: Tensor
    cell: Tensor
    most: int
    bias: Tensor


class Tree:
    """Keys and values of every row; the rows of an utterance are neighbours.

    Args:
        keys, values: per block (B,J,C,E), the prefixes in the first P slots.
        prefix_slots: P.
        lengths: (R,) positions of each row.
        utterance: (R,) of each row.
        groups: G.
        scale: of the products of queries and keys.

    Attributes:
        depths: (R,) the block that each row's last logits came from.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        prefix_slots: int,
        lengths: Tensor,
        utterance: Tensor,
        groups: int,
        scale: float,
    ) -> None:
        self.keys, self.values, self.groups, self.scale = keys, values, groups, scale
        self.prefix_slots = self.used = prefix_slots
        self.visible = torch.arange(keys[0].shape[2], device=lengths.device) < lengths[:, None]  # (R,C)
        self.utterance = utterance
        self.positions = lengths - 1  # (R,) of the last token
        self.slots = self.positions  # (R,) of the last token
        self.depths = torch.full_like(lengths, len(keys))

    def select(self, rows: Tensor) -> None:
        """Keep ``rows`` (R',), repeats and drops allowed, in any order.

        As long as the rows of an utterance stay neighbours and the utterances in their order, nothing is copied but
        the memory of those that remain when others finish.
        """
        self.visible, self.positions = self.visible[rows], self.positions[rows]
        utterances, self.utterance = self.utterance[rows].unique_consecutive(return_inverse=True)
        if not torch.equal(utterances, torch.arange(len(self.keys[0]), device=rows.device)):
            self._move(lambda memory: memory[utterances])
        self._compact()

    def append(self, chained: Tensor | None = None) -> Front:
        """A slot for one more token of every row; ``chained`` as in ``LlamaEngine.step``."""
        rows = torch.arange(len(self.utterance), device=self.utterance.device)
        rank, most = _ranks(self.utterance, len(self.keys[0]))
        self.slots = self.used + rank
        self.used += most
        if self.used > (have := self.keys[0].shape[2]):
            more = max(self.used, int(GROWTH * have)) - have
            self._move(lambda memory: F.pad(memory, (0, 0, 0, more)))
            self.visible = F.pad(self.visible, (0, more))
        self.visible[rows, self.slots] = True
        self.positions = self.positions + 1
        if chained is not None:
            every = torch.arange(self.visible.shape[1], device=rows.device)
            self.visible |= (every >= (self.slots - chained)[:, None]) & (every < self.slots[:, None])
            self.positions = self.positions + chained
        self.depths = torch.full_like(rows, len(self.keys))
        return self.front(rows)

    def front(self, rows: Tensor) -> Front:
        """``rows`` (N,) in the blocks, with all that their attention needs."""
        count, utterance = len(self.keys[0]), self.utterance[rows]
        rank, most = _ranks(utterance, count)
        cell = utterance * most + rank
        sees = self.visible[rows, : self.used]  # (N,C)
        if len(rows) < count * most:
            cells = torch.zeros(count * most, self.used, dtype=torch.bool, device=rows.device)
            cells[:, 0] = True  # cells without a row see something, or their softmax would divide by zero
            cells[cell] = sees
            sees = cells
        bias = torch.zeros(sees.shape, dtype=self.keys[0].dtype, device=rows.device).masked_fill(~sees, -torch.inf)
        bias = bias.view(count, 1, most, 1, self.used).expand(-1, -1, -1, self.groups, -1).flatten(2, 3)
        return Front(rows, utterance, self.slots[rows], self.positions[rows], cell, most, bias)

    def write(self, index: int, utterance: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Keys and values (N,J,E) into ``slots`` (N,) of ``utterance`` (N,) in block ``index``."""
        self.keys[index][utterance, :, slots] = key
        self.values[index][utterance, :, slots] = value

    def attend(self, index: int, front: Front, query: Tensor) -> Tensor:
        """Queries (N,A,E) of block ``index`` -> (N,A*E); all rows and heads that share a key are one matrix product."""
        keys, values = self.keys[index][:, :, : self.used], self.values[index][:, :, : self.used]
        count, kv_heads = keys.shape[:2]
        if not (full := len(query) == count * front.most):
            cells = query.new_zeros(count * front.most, *query.shape[1:])
            cells[front.cell] = query
            query = cells
        query = query.view(count, front.most, kv_heads, self.groups, -1).transpose(1, 2).flatten(2, 3)  # (B,J,K*G,E)
        found = F.scaled_dot_product_attention(query, keys, values, attn_mask=front.bias, scale=self.scale)
        found = found.unflatten(2, (front.most, self.groups)).transpose(1, 2).reshape(count * front.most, -1)
        return found if full else found[front.cell]

    def _compact(self) -> None:
        """Drop the slots that no row sees once most of them are dead; the live ones keep their order."""
        behind = self.used - self.prefix_slots
        if behind < 64:
            return
        live = torch.zeros(len(self.keys[0]), behind, dtype=torch.bool, device=self.visible.device)
        rows = self.visible[:, self.prefix_slots : self.used]
        live = live.to(torch.int32).index_add(0, self.utterance, rows.to(torch.int32)) > 0
        most = int(live.sum(1).max())
        if DEAD * most > behind:
            return
        # The live slots first, in their order; what follows them is dead and stays invisible.
        order = (~live).to(torch.int8).argsort(dim=1, stable=True)[:, :most]  # (B,most)
        head = torch.arange(self.prefix_slots, device=order.device).expand(len(order), -1)
        order = torch.cat([head, order + self.prefix_slots], dim=1)
        self.visible = self.visible.gather(1, order[self.utterance])
        self._move(lambda memory: memory.take_along_dim(order[:, None, :, None], dim=2))
        self.used = self.prefix_slots + most

    def _move(self, change: Callable[[Tensor], Tensor]) -> None:
        for memories in (self.keys, self.values):
            for index, memory in enumerate(memories):  # one by one: the old one is freed before the next is made
                memories[index] = change(memory)


def _ranks(utterance: Tensor, count: int) -> tuple[Tensor, int]:
    """Of rows (N,) in the order of their ``count`` utterances: each one's rank in its own, and the most of one."""
    sizes = torch.bincount(utterance, minlength=count)
    first = sizes.cumsum(0) - sizes
    return torch.arange(len(utterance), device=utterance.device) - first[utterance], int(sizes.max())
