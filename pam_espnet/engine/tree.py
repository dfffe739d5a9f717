"""Keys and values that do not move: hypotheses are nodes of a tree, written once behind their utterance's prefix.

A beam that forks shares its past instead of copying it; what a row may attend to is said by a mask over slots. The
prefix of an utterance is stored once, however many hypotheses it has, and keys and values are never repeated over the
heads or rows that share them. Utterances that are done leave the memory, and so do dead branches of long answers.

Prior art: tree attention of SpecInfer (Miao et al., ASPLOS 2024) and Medusa (Cai et al., ICML 2024).

B utterances in memory, R rows, N nodes under way, K nodes of the utterance with most, P prefix positions, C slots, D
width, A heads, G heads per key/value head, J key/value heads, E size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.engine.blocks import FusedLlama
from pam_espnet.engine.exits import ExitPolicy

GROWTH = 1.5  # of the memory when it is full
DEAD = 2  # compact when there are so many times more slots behind the prefix than the living need


@dataclass
class Nodes:
    """Some nodes, those of an utterance neighbours and the utterances in their order.

    Attributes:
        x: (N,D) output of the last block that they went through.
        utterance: (N,).
        slots: (N,) where their keys and values are written.
        rows: (N,) their rows.
    """

    x: Tensor
    utterance: Tensor
    slots: Tensor
    rows: Tensor

    def __getitem__(self, chosen: Tensor) -> Nodes:
        return Nodes(self.x[chosen], self.utterance[chosen], self.slots[chosen], self.rows[chosen])


@dataclass(frozen=True)
class Grid:
    """How nodes are laid out for attention: (B,K) cells, K nodes of the utterance with most.

    Attributes:
        cell: (N,) of each node.
        most: K.
        bias: (B,1,K*G,C) zero where a node may look, minus infinity elsewhere.
        rotary: of the nodes' positions.
    """

    cell: Tensor
    most: int
    bias: Tensor
    rotary: tuple[Tensor, Tensor]


class TreeState:
    """What the LLM remembers of every row; the rows of an utterance are neighbours.

    Args:
        model: the blocks.
        keys, values: per block (B,J,C,E), the prefixes in the first P slots.
        lengths: (B,) positions of each prefix.
        prefix_slots: P.
        utterance: (R,) whose rows ``lengths`` (R,) speaks of, where an utterance has other than one.
    """

    def __init__(
        self,
        model: FusedLlama,
        keys: list[Tensor],
        values: list[Tensor],
        lengths: Tensor,
        prefix_slots: int,
        utterance: Tensor | None = None,
    ) -> None:
        self.model, self.keys, self.values = model, keys, values
        self.prefix_slots = self.used = prefix_slots
        slots = torch.arange(keys[0].shape[2], device=lengths.device)
        self.visible = slots < lengths[:, None]  # (R,C)
        self.utterance = torch.arange(len(lengths), device=lengths.device) if utterance is None else utterance  # (R,)
        self.positions = lengths.clone()  # (R,) of the next token
        self.depths = torch.full_like(lengths, len(keys))  # (R,) block from which each row's last result came
        self.policy: ExitPolicy | None = None  # when steps may leave before the last block

    def select(self, rows: Tensor) -> None:
        """Keep ``rows`` (R',), repeats and drops allowed, in any order.

        As long as the rows of an utterance stay neighbours and the utterances in their order, nothing is copied but
        the memory of those that remain when others leave.
        """
        self.visible, self.positions = self.visible[rows], self.positions[rows]
        utterances, self.utterance = self.utterance[rows].unique_consecutive(return_inverse=True)
        if not torch.equal(utterances, torch.arange(len(self.keys[0]), device=rows.device)):
            self._move(lambda memory: memory[utterances])
        self._compact()

    def chain(self, embeds: Tensor, lengths: Tensor) -> Tensor:
        """Append several tokens, one after the other, to every row; each of them becomes a row, at full depth.

        Args:
            embeds: (N,D), the tokens of the first row, then those of the second, ...
            lengths: (R,) tokens for each row, at least 1; they sum to N.

        Returns:
            hidden states (N,D) after the final norm. ``select`` chooses where to go on.
        """
        row = torch.arange(len(lengths), device=embeds.device).repeat_interleave(lengths)
        before = torch.arange(len(embeds), device=embeds.device) - (lengths.cumsum(0) - lengths)[row]
        self.select(row)
        self.positions = self.positions + before
        return self.step(embeds, before)

    def step(self, embeds: Tensor, before: Tensor | None = None) -> Tensor:
        """Append one token to every row.

        ``policy`` may let utterances leave before the last block. The keys and values of the blocks they skip are made
        from the hidden state they left with.

        Args:
            embeds: (R,D).
            before: (R,) how many of the rows directly before it each row follows in a chain; full depth then.

        Returns:
            hidden states (R,D) after the final norm, of the block at which each row left; ``depths`` says which.
        """
        count = len(self.keys[0])
        rows = torch.arange(len(embeds), device=embeds.device)
        place, most = _places(self.utterance, count)
        slots = self.used + place
        self._reserve(self.used + most)
        self.used += most
        self.visible[rows, slots] = True
        if before is not None:
            every = torch.arange(self.visible.shape[1], device=embeds.device)
            self.visible |= (every >= (slots - before)[:, None]) & (every < slots[:, None])
        self.depths = torch.full_like(self.utterance, len(self.model.blocks))
        policy = self.policy if before is None else None
        if policy is not None:
            policy.begin(count, embeds.device)
        way = Nodes(embeds.to(self.model.dtype), self.utterance, slots, rows)
        done = self._run(way, policy)
        self.positions = self.positions + 1
        return self.model.norm(done)

    def _run(self, way: Nodes, policy: ExitPolicy | None) -> Tensor:
        """Nodes of all rows through the blocks -> (R,D) what they say, not normed."""
        model, done = self.model, torch.empty_like(way.x)
        grid: Grid | None = None
        for index in range(len(self.model.blocks)):
            if not len(way.x):
                break
            if grid is None:
                grid = self._grid(way)
            query, key, value = model.project(index, way.x, grid.rotary)
            self._write(index, way, key, value)
            way.x = model.finish(index, way.x, self._attend(query, index, grid))
            if policy is None or index + 1 not in policy.layers:
                continue
            asked, sizes = way.utterance.unique_consecutive(return_counts=True)
            leaves = torch.zeros(len(self.keys[0]), dtype=torch.bool, device=asked.device)
            leaves[asked] = policy.leave(index + 1, asked, way.x[sizes.cumsum(0) - sizes])  # asked of the best row
            if not leaves.any():
                continue
            leaving = leaves[way.utterance]
            left, way, grid = way[leaving], way[~leaving], None
            done[left.rows] = policy.spoken(index + 1, left.x)
            self.depths[left.rows] = index + 1
            self._fill(index + 1, left)
        done[way.rows] = way.x
        return done

    def _grid(self, way: Nodes) -> Grid:
        """Where the nodes stand, and what they may look at."""
        count, groups = len(self.keys[0]), self.model.groups
        place, most = _places(way.utterance, count)
        cell = way.utterance * most + place
        slots = torch.arange(self.visible.shape[1], device=cell.device)
        sees = self.visible[way.rows] & (slots <= way.slots[:, None])  # (N,C)
        looks = torch.zeros(count * most, self.used, dtype=torch.bool, device=cell.device)
        looks[:, 0] = True  # cells without a node see something, or their softmax would divide by zero
        looks[cell] = sees[:, : self.used]
        bias = torch.zeros(looks.shape, dtype=self.model.dtype, device=cell.device).masked_fill(~looks, -torch.inf)
        bias = bias.view(count, 1, most, 1, -1).expand(-1, -1, -1, groups, -1).flatten(2, 3)
        return Grid(cell, most, bias, self.model.rotary(sees.sum(1) - 1))

    def _fill(self, layer: int, left: Nodes) -> None:
        """Keys and values in the blocks behind ``layer`` of nodes that left there."""
        rotary = self.model.rotary(self.positions[left.rows])
        for skipped in range(layer, len(self.model.blocks)):
            memory = self.model.memory(skipped, left.x)
            self._write(skipped, left, *self.model.turned(skipped, memory, rotary))

    def _write(self, index: int, nodes: Nodes, key: Tensor, value: Tensor) -> None:
        """Keys and values (N,J,E) of nodes into their slots of block ``index``."""
        self.keys[index][nodes.utterance, :, nodes.slots] = key
        self.values[index][nodes.utterance, :, nodes.slots] = value

    def _attend(self, query: Tensor, index: int, grid: Grid) -> Tensor:
        """Queries (N,A,E) of block ``index`` -> (N,A*E); all rows and heads that share a key are one matrix product."""
        model, keys, values = self.model, self.keys[index], self.values[index]
        cells, most = len(keys) * grid.most, grid.most
        full = len(grid.cell) == cells
        placed = query
        if not full:
            placed = query.new_zeros(cells, *query.shape[1:])
            placed[grid.cell] = query
        placed = placed.view(-1, most, model.kv_heads, model.groups, model.head).transpose(1, 2).flatten(2, 3)
        found = F.scaled_dot_product_attention(
            placed, keys[:, :, : self.used], values[:, :, : self.used], attn_mask=grid.bias, scale=model.scale
        )
        found = found.unflatten(2, (most, model.groups)).transpose(1, 2).reshape(cells, -1)
        return found if full else found[grid.cell]

    def _reserve(self, wanted: int) -> None:
        have = self.keys[0].shape[2]
        if wanted > have:
            more = max(wanted, int(GROWTH * have)) - have
            self._move(lambda memory: F.pad(memory, (0, 0, 0, more)))
            self.visible = F.pad(self.visible, (0, more))

    def _compact(self) -> None:
        """Drop the slots that no row sees once most of them are dead; the living keep their order."""
        behind = self.used - self.prefix_slots
        if behind < 64:
            return
        alive = torch.zeros(len(self.keys[0]), behind, dtype=torch.bool, device=self.visible.device)
        rows = self.visible[:, self.prefix_slots : self.used]
        alive = alive.to(torch.int32).index_add(0, self.utterance, rows.to(torch.int32)) > 0
        most = int(alive.sum(1).max())
        if DEAD * most > behind:
            return
        # The living first, in their order; what follows them is dead and stays invisible.
        order = (~alive).to(torch.int8).argsort(dim=1, stable=True)[:, :most]  # (B,most)
        head = torch.arange(self.prefix_slots, device=order.device).expand(len(order), -1)
        order = torch.cat([head, order + self.prefix_slots], dim=1)
        self.visible = self.visible.gather(1, order[self.utterance])
        self._move(lambda memory: memory.take_along_dim(order[:, None, :, None], dim=2))
        self.used = self.prefix_slots + most

    def _move(self, change: Callable[[Tensor], Tensor]) -> None:
        for memories in (self.keys, self.values):
            for index, memory in enumerate(memories):  # one by one: the old one is freed before the next is made
                memories[index] = change(memory)


def _places(utterance: Tensor, count: int) -> tuple[Tensor, int]:
    """Of nodes (N,) in the order of their ``count`` utterances: each one's place in its own, and the most of one."""
    sizes = torch.bincount(utterance, minlength=count)
    first = sizes.cumsum(0) - sizes
    return torch.arange(len(utterance), device=utterance.device) - first[utterance], int(sizes.max())


@torch.no_grad()
def tree_prefill(
    model: FusedLlama, prefix: Tensor, lengths: Tensor, reserve: int = 0, asked: Tensor | None = None
) -> tuple[Tensor, TreeState]:
    """Run every prefix once; padding is neither computed nor remembered.

    Args:
        model: the blocks.
        prefix: (B,P,D) embeddings, right-padded.
        lengths: (B,) valid positions, at least 1.
        reserve: slots to keep free behind the prefix.
        asked: (B,) how many of each prefix's last positions become rows, at least 1; None for the last one alone.

    Returns:
        the rows' hidden states after the final norm (R,D), and the state for steps.
    """
    count, most = prefix.shape[:2]
    place = torch.arange(most, device=prefix.device).expand(count, -1)
    valid = place < lengths[:, None]
    asked = torch.ones_like(lengths) if asked is None else asked
    owner = torch.arange(count, device=prefix.device).repeat_interleave(asked)  # (R,)
    behind = asked.cumsum(0)[owner] - 1 - torch.arange(len(owner), device=prefix.device)  # positions behind a row's own
    wanted = lengths.cumsum(0)[owner] - 1 - behind  # among the packed positions
    rotary = model.rotary(place[valid])
    x = prefix[valid].to(model.dtype)
    all_keys, all_values = [], []
    for index in range(len(model.blocks)):
        query, key, value = model.project(index, x, rotary)
        grid = query.new_zeros(count, most, *query.shape[1:])
        grid[valid] = query
        keys, values = (key.new_zeros(count, model.kv_heads, most + reserve, model.head) for _ in range(2))
        keys.transpose(1, 2)[:, :most][valid] = key
        values.transpose(1, 2)[:, :most][valid] = value
        attended = _causal(model, grid, keys[:, :, :most], values[:, :, :most])[valid]
        if index == len(model.blocks) - 1:  # of the last block only these positions are asked for
            x, attended = x[wanted], attended[wanted]
        x = model.finish(index, x, attended)
        all_keys.append(keys)
        all_values.append(values)
    return model.norm(x), TreeState(model, all_keys, all_values, lengths[owner] - behind, most, owner)


def _causal(model: FusedLlama, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of queries (B,P,A,E) over (B,J,P,E) -> (B,P,A*E); padding comes later, so no query sees it."""
    query = query.unflatten(2, (model.kv_heads, model.groups)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (B*J,G,P,E)
    keys, values = (
        memory.reshape(-1, 1, *memory.shape[2:]).expand(-1, model.groups, -1, -1) for memory in (keys, values)
    )
    found = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=model.scale)
    return found.unflatten(0, (-1, model.kv_heads)).permute(0, 3, 1, 2, 4).flatten(2)
