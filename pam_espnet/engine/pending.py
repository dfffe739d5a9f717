"""Nodes of the tree of hypotheses on their way through the blocks, and those that wait (``exit.fill: deferred``).

A node that left early waits at its block with its hidden state. When its utterance next goes beyond that block, it goes
along; the blocks behind then remember what the whole LLM would have, and the node says what it would have said.

N nodes, R rows, B utterances, C slots, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Nodes:
    """Some nodes, those of an utterance neighbours and the utterances in their order.

    Attributes:
        x: (N,D) output of the last block that they went through.
        utterance: (N,).
        slots: (N,) where their keys and values are written.
        rows: (N,) a row that descends from each; of a new one the row itself.
        new: (N,) bool, appended in this step.
    """

    x: Tensor
    utterance: Tensor
    slots: Tensor
    rows: Tensor
    new: Tensor

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, chosen: Tensor) -> Nodes:
        return Nodes(*(one[chosen] for one in self._tensors()))

    def joined(self, others: Nodes) -> Nodes:
        """With others; of an utterance these come first."""
        both = Nodes(*map(torch.cat, zip(self._tensors(), others._tensors(), strict=True)))
        return both[both.utterance.argsort(stable=True)]

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.utterance, self.slots, self.rows, self.new


def no_nodes(nothing: Tensor) -> Nodes:
    """None at all; ``nothing`` is (0,D)."""
    nobody = torch.empty(0, dtype=torch.long, device=nothing.device)
    return Nodes(nothing, nobody, nobody, nobody, nobody.bool())


class Pending:
    """What waits, by the block at which it left."""

    def __init__(self) -> None:
        self.at: dict[int, Nodes] = {}

    def add(self, layer: int, nodes: Nodes) -> None:
        """``nodes`` left at ``layer``."""
        nodes = Nodes(nodes.x, nodes.utterance, nodes.slots, nodes.rows, torch.zeros_like(nodes.new))
        self.at[layer] = nodes.joined(self.at[layer]) if layer in self.at else nodes

    def take(self, layer: int, utterances: Tensor) -> Nodes | None:
        """Those at ``layer`` that belong to ``utterances`` (B,) bool; they wait no more. None for none."""
        if layer not in self.at:
            return None
        nodes = self.at.pop(layer)
        going = utterances[nodes.utterance]
        if not going.all():
            self.at[layer] = nodes[~going]
        return nodes[going] if going.any() else None

    def follow(self, kept: Tensor, utterance: Tensor, visible: Tensor) -> None:
        """The rows have changed; nodes from which none descends are forgotten.

        Args:
            kept: (B',) old places of the utterances that remain.
            utterance: (R,) of each row, new places.
            visible: (R,C) slots that each row sees.
        """
        for layer, nodes in list(self.at.items()):
            remains = nodes.utterance[:, None] == kept  # (N,B')
            owner = remains.to(torch.int8).argmax(dim=1)
            descends = visible[:, nodes.slots] & (utterance[:, None] == owner) & remains.any(dim=1)  # (R,N)
            moved = Nodes(nodes.x, owner, nodes.slots, descends.to(torch.int8).argmax(dim=0), nodes.new)
            self.at[layer] = moved[descends.any(dim=0)]
            if not len(self.at[layer]):
                del self.at[layer]

    def compact(self, order: Tensor) -> None:
        """Slots have moved: new slot i of utterance b is what was ``order`` (B,C')[b,i]."""
        for nodes in self.at.values():
            nodes.slots = (order[nodes.utterance] == nodes.slots[:, None]).to(torch.int8).argmax(dim=1)
