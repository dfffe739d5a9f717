"""The state of a static engine's rows, for searches that name rows themselves: each row is a cell of the (B,K) grid.

Utterances and rows that are dropped leave their cells behind: these are run with the others, and nobody reads them.

B utterances, K rows of each, N rows, W tokens that can be predicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pam_espnet.engine.static_memory import Memory, Shape
from pam_espnet.transfer import upload

if TYPE_CHECKING:
    from pam_espnet.engine.static import StaticEngine


class GridState:
    """See ``State``.

    Args:
        engine: whose passes run the rows.
        memory: with the prefixes run.
        lengths: B positions of each prefix.
        drafted: B tokens of each draft behind it; there is a row for the prefix and one for each of them.
    """

    def __init__(self, engine: StaticEngine, memory: Memory, lengths: Sequence[int], drafted: Sequence[int]) -> None:
        self.engine, self.memory = engine, memory
        self.used = memory.shape.prefix
        self.depth, self.gated = len(engine.blocks), False  # of the last pass; whether each utterance has its own
        # Of each row: its utterance, the cell of the last pass that it is or continues, its position.
        self.rows = [(b, k, lengths[b] - 1 + k) for b, more in enumerate(drafted) for k in range(1 + more)]

    @property
    def depths(self) -> list[int]:
        """(N) the block that each row's last logits came from."""
        depths = self.memory.depths.tolist() if self.gated else [self.depth] * len(self.memory.start)
        return [depths[b] for b, _, _ in self.rows]

    def select(self, rows: Sequence[int]) -> None:
        """See ``State``."""
        self.rows = [self.rows[row] for row in rows]

    def run(self, tokens: Tensor, chains: Sequence[int] | None = None) -> Tensor:
        """One pass over ``tokens`` (N',), one of each row or ``chains`` (N) of them -> logits (N',W)."""
        sizes = Counter(b for b, _, _ in self.rows)
        if chains is not None and max(sizes.values()) > 1:
            raise ValueError("drafts: one row of each utterance can be verified")
        self._make_room(max(sizes.values()) if chains is None else max(chains))
        memory, count = self.memory, self.memory.shape.rows
        parents, positions = np.zeros(memory.parents.shape, np.int64), np.zeros(len(memory.start), np.int64)
        cells, following = [], []
        ranks: Counter[int] = Counter()
        for row, (b, parent, position) in enumerate(self.rows):
            positions[b] = position + 1
            for k in range(1 if chains is None else chains[row]):
                rank = ranks[b]
                ranks[b] += 1
                parents[b, rank] = parent
                cells.append(b * count + rank)
                following.append((b, rank, position + 1 + k))
        if chains is not None:  # what follows in a chain that is shorter is never read
            parents[:] = parents[:, :1]
        done = [b not in sizes for b in range(len(positions))]
        index, first, following_at, ended = upload(memory.device, cells, parents.flatten(), positions, done)
        memory.parents.copy_(first.view_as(memory.parents))
        memory.next.copy_(following_at)
        memory.finished.copy_(ended)
        memory.tokens.view(-1)[index] = tokens
        logits = self.engine.step_pass(memory, "rows", lambda logits: logits, chains is not None)()
        exits = None if chains is not None else self.engine.exits
        self.depth = len(self.engine.blocks) if exits is None else exits.layers[0]
        self.gated = exits is not None and self.engine.gated
        self.rows, self.used = following, self.used + count
        return logits[index]

    def _make_room(self, rows: int) -> None:
        """Larger buffers, with what there is copied, where these are full."""
        old, shape = self.memory, self.memory.shape
        if rows <= shape.rows and self.used + shape.rows <= shape.slots:
            return
        size = max(rows, shape.rows)
        steps = 2 * -(-(self.used - shape.prefix + size) // size)
        new = self.engine.memory(Shape(shape.utterances, size, shape.prefix, steps))
        for name in ("keys", "values"):
            getattr(new, name)[:, :, :, : self.used] = getattr(old, name)[:, :, :, : self.used]
        new.visible.zero_()
        new.visible[:, : shape.rows, : self.used] = old.visible[:, :, : self.used]
        for name in ("start", "lengths", "used", "depths"):
            getattr(new, name).copy_(getattr(old, name))
        self.memory = new
