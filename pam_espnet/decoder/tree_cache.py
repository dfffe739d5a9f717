"""Keys and values that do not move: hypotheses are nodes of a tree, written once behind their utterance's prefix.

A beam that forks shares its past instead of copying it; what a row may attend to is said by a mask over slots. The
prefix of an utterance is stored once, however many hypotheses it has, and keys and values are never repeated over the
heads or rows that share them. Utterances that are done leave the memory, and so do dead branches of long answers.

Prior art: tree attention of SpecInfer (Miao et al., ASPLOS 2024) and Medusa (Cai et al., ICML 2024).

B utterances in memory, R rows, K rows of the utterance with most, P prefix positions, C slots, D width, A heads, G
heads per key/value head, J key/value heads, E size of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.decoder.exits import ExitPolicy
from pam_espnet.decoder.fused import FusedLlama

GROWTH = 1.5  # of the memory when it is full
DEAD = 2  # compact when there are so many times more slots behind the prefix than the living need


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
        from the hidden state they left with (state propagation of CALM, Schuster et al., NeurIPS 2022).

        Args:
            embeds: (R,D).
            before: (R,) how many of the rows directly before it each row follows in a chain; full depth then.

        Returns:
            hidden states (R,D) after the final norm, of the block at which each row left; ``depths`` says which.
        """
        policy = self.policy if before is None else None
        counts = torch.bincount(self.utterance, minlength=len(self.keys[0]))
        most, last = int(counts.max()), len(self.model.blocks)
        first = counts.cumsum(0) - counts  # (B,) the row of each utterance's best hypothesis
        place = torch.arange(len(embeds), device=embeds.device) - first[self.utterance]
        slots = self.used + place
        self._reserve(self.used + most)
        self.used += most
        self.visible[torch.arange(len(embeds), device=embeds.device), slots] = True
        if before is not None:
            every = torch.arange(self.visible.shape[1], device=embeds.device)
            self.visible |= (every >= (slots - before)[:, None]) & (every < slots[:, None])
        cell = self.utterance * most + place  # of the grid (B,K)
        bias = self._bias(cell, len(counts), most)
        cos, sin = self.model.rotary(self.positions)
        x = embeds.to(self.model.dtype)
        self.depths = torch.full((len(x),), last, device=x.device)
        rows = torch.arange(len(x), device=x.device)  # under way
        done = torch.empty_like(x)
        if policy is not None:
            policy.begin(len(counts), x.device)
        for index in range(last):
            query, key, value = self.model.project(index, x, (cos[rows], sin[rows]))
            self._write(index, rows, slots, key, value)
            attended = self._attend(query, self.keys[index], self.values[index], bias, cell[rows], most)
            x = self.model.finish(index, x, attended)
            if policy is None or index + 1 not in policy.layers or index + 1 == last:
                continue
            under_way = self.utterance[rows].unique()
            leaves = torch.zeros(len(counts), dtype=torch.bool, device=x.device)
            leaves[under_way] = policy.leave(index + 1, under_way, x[torch.searchsorted(rows, first[under_way])])
            leaving = leaves[self.utterance[rows]]
            gone, rows = rows[leaving], rows[~leaving]
            left, x = x[leaving], x[~leaving]
            done[gone] = policy.spoken(index + 1, left)
            self.depths[gone] = index + 1
            for skipped in range(index + 1, last):
                key, value = self.model.project_memory(skipped, left, (cos[gone], sin[gone]))
                self._write(skipped, gone, slots, key, value)
            if not len(rows):
                break
        done[rows] = x
        self.positions = self.positions + 1
        return self.model.norm(done)

    def _write(self, index: int, rows: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Keys and values (R',J,E) of ``rows`` into their slots of block ``index``."""
        if len(rows):
            self.keys[index][self.utterance[rows], :, slots[rows]] = key
            self.values[index][self.utterance[rows], :, slots[rows]] = value

    def _bias(self, cell: Tensor, utterances: int, most: int) -> Tensor:
        """(B,1,K*G,C'): zero where a row may look, minus infinity elsewhere."""
        grid = torch.zeros(utterances * most, self.used, dtype=torch.bool, device=cell.device)
        grid[:, 0] = True  # cells without a row see something, or their softmax would divide by zero
        grid[cell] = self.visible[:, : self.used]
        bias = torch.zeros(grid.shape, dtype=self.model.dtype, device=cell.device).masked_fill(~grid, -torch.inf)
        return bias.view(utterances, 1, most, 1, -1).expand(-1, -1, -1, self.model.groups, -1).flatten(2, 3)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, cell: Tensor, most: int) -> Tensor:
        """Queries (R,A,E) -> (R,A*E); all rows and heads that share a key are one matrix product."""
        model, utterances = self.model, len(keys)
        full = len(cell) == utterances * most
        grid = query
        if not full:
            grid = query.new_zeros(utterances * most, *query.shape[1:])
            grid[cell] = query
        grid = grid.view(utterances, most, model.kv_heads, model.groups, model.head).transpose(1, 2).flatten(2, 3)
        found = F.scaled_dot_product_attention(
            grid, keys[:, :, : self.used], values[:, :, : self.used], attn_mask=bias, scale=model.scale
        )
        found = found.unflatten(2, (most, model.groups)).transpose(1, 2).reshape(utterances * most, -1)
        return found if full else found[cell]

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
