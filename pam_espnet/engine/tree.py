"""Keys and values that do not move: hypotheses are nodes of a tree, written once behind their utterance's prefix.

A beam that forks shares its past instead of copying it; a mask over slots says what a row may attend to. The prefix of
an utterance is stored once, however many hypotheses it has, and keys and values are never repeated over the heads or
rows that share them. Finished utterances are dropped from the memory, and so are dead branches of long answers.

Only keys and values are on the device. The tree is kept on the host, so that no decision waits for the device.

Prior art: tree attention of SpecInfer (Miao et al., ASPLOS 2024) and Medusa (Cai et al., ICML 2024).

B utterances in memory, R rows, N rows still in the blocks, K rows of the utterance with most, P prefix positions, C
slots, S slots in use, A heads, G heads per key/value head, J key/value heads, E size of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.transfer import send, upload

RESERVE = 64  # slots for steps, allocated with the prefix
GROWTH = 1.5  # of the memory when it is full
DEAD = 2  # compact when there are this many times more slots behind the prefix than the live ones need
ALIGNED = 8  # columns of a bias lie in multiples of this, or CUDA's attention would copy it in every block


@dataclass(frozen=True)
class Front:
    """Rows that one pass runs through the blocks: all, or those that have not exited; utterances in their order.

    Attributes:
        rows: (N,) which rows, on the host.
        sizes: (B',) of each utterance that has rows here, how many; on the host.
        most: K.
        bias: (B,1,K*G,S) zero where a row may attend, minus infinity elsewhere.
        best: (B',) of each of these utterances, which of the N rows is its best hypothesis: its first.
        utterance: (N,) of each row.
        slots: (N,) where their keys and values are written.
        positions: (N,) of each row.
        cell: (N,) of each row in the grid of (B,K) cells that attention computes.
    """

    rows: np.ndarray
    sizes: np.ndarray
    most: int
    bias: Tensor
    best: Tensor
    utterance: Tensor
    slots: Tensor
    positions: Tensor
    cell: Tensor


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
        lengths: Sequence[int],
        utterance: Sequence[int],
        groups: int,
        scale: float,
    ) -> None:
        self.keys, self.values, self.groups, self.scale = keys, values, groups, scale
        self.prefix_slots = prefix_slots
        self.utterance = np.asarray(utterance)
        self._ranks = _ranks(self.utterance)
        self.positions = np.asarray(lengths) - 1  # (R,) of the last token
        self.slots = self.positions  # (R,) of the last token
        self.visible = np.arange(prefix_slots) <= self.positions[:, None]  # (R,S) bool
        self.depths = [len(keys)] * len(utterance)

    @property
    def used(self) -> int:
        """S."""
        return self.visible.shape[1]

    def select(self, rows: Sequence[int]) -> None:
        """Keep ``rows`` (R',), repeats and drops allowed, in any order.

        As long as the rows of an utterance stay neighbours and the utterances in their order, nothing is copied but
        the memory of those that remain when others finish.
        """
        order = np.asarray(rows)
        self.visible, self.positions, owners = self.visible[order], self.positions[order], self.utterance[order]
        first, sizes, _ = self._ranks = _ranks(owners)
        kept = owners[first]
        self.utterance = np.repeat(np.arange(len(kept)), sizes)
        if not np.array_equal(kept, np.arange(len(self.keys[0]))):
            (index,) = upload(self.keys[0].device, kept)
            self._move(lambda memory: memory[index])
        self._compact()

    def append(self, chained: Sequence[int] | None = None) -> Front:
        """A slot for one more token of every row; ``chained`` as in ``LlamaEngine.step``."""
        _, sizes, rank = self._ranks
        column = np.arange(sizes.max())
        own = column == rank[:, None]
        self.slots, self.positions = self.used + rank, self.positions + 1
        if chained is not None:
            before = np.asarray(chained)
            own |= (column >= (rank - before)[:, None]) & (column < rank[:, None])
            self.positions = self.positions + before
        self.visible = np.concatenate([self.visible, own], axis=1)
        if self.used > (have := self.keys[0].shape[2]):
            more = max(self.used, int(GROWTH * have)) - have
            self._move(lambda memory: F.pad(memory, (0, 0, 0, more)))
        self.depths = [len(self.keys)] * len(rank)
        return self._front(np.arange(len(rank)), self.utterance, *self._ranks)

    def front(self, rows: np.ndarray) -> Front:
        """``rows`` (N,), at least one, in the blocks, with all that their attention needs."""
        utterance = self.utterance[rows]
        return self._front(rows, utterance, *_ranks(utterance))

    def _front(
        self, rows: np.ndarray, utterance: np.ndarray, first: np.ndarray, sizes: np.ndarray, rank: np.ndarray
    ) -> Front:
        count, device, most = len(self.keys[0]), self.keys[0].device, int(sizes.max())
        cell = utterance * most + rank
        hidden = np.ones((count * most, -(-self.used // ALIGNED) * ALIGNED), dtype=bool)
        hidden[:, 0] = False  # cells without a row see something, or their softmax would divide by zero
        hidden[cell, : self.used] = ~self.visible[rows]
        bias = torch.zeros(hidden.shape, dtype=self.keys[0].dtype, device=device)
        bias.masked_fill_(send(torch.from_numpy(hidden), device), -torch.inf)
        bias = bias.view(count, 1, most, 1, -1).expand(-1, -1, -1, self.groups, -1).flatten(2, 3)[..., : self.used]
        lists = (first, utterance, self.slots[rows], self.positions[rows], cell)
        return Front(rows, sizes, most, bias, *upload(device, *lists))

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
        live = np.logical_or.reduceat(self.visible, self._ranks[0])  # (B,S)
        live[:, : self.prefix_slots] = True
        most = int(live.sum(axis=1).max())
        if DEAD * (most - self.prefix_slots) > behind:
            return
        # The live slots first, in their order; what follows them is dead and stays invisible.
        order = np.argsort(~live, axis=1, kind="stable")[:, :most]
        self.visible = np.take_along_axis(self.visible, order[self.utterance], axis=1)
        index = send(torch.from_numpy(order), self.keys[0].device)
        self._move(lambda memory: memory.take_along_dim(index[:, None, :, None], dim=2))

    def _move(self, change: Callable[[Tensor], Tensor]) -> None:
        for memories in (self.keys, self.values):
            for index, memory in enumerate(memories):  # one by one: the old one is freed before the next is made
                memories[index] = change(memory)


def _ranks(utterance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of rows (N,), those of an utterance neighbours: where each utterance begins, its size, each row's rank in it."""
    edges = np.concatenate([[0], np.flatnonzero(utterance[1:] != utterance[:-1]) + 1, [len(utterance)]])
    first, sizes = edges[:-1], edges[1:] - edges[:-1]
    return first, sizes, np.arange(len(utterance)) - np.repeat(first, sizes)
