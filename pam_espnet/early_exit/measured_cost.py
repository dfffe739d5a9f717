"""The cost model of a decoding step on one machine, fitted to steps that were timed there (``early_exit.step_times``).

Steps that exit at fixed blocks tell a block from the fill of a skipped one and from the rest only in sum. So the fill
and the output layer are timed alone, and least squares give the others; what such a split gets wrong cancels out in
the time of a whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PARTS = (1 / 2, 2 / 3, 5 / 6)  # of the blocks, after which steps exit


def exit_blocks(blocks: int) -> list[int]:
    """The fixed blocks at which steps are timed."""
    return sorted({min(max(1, round(part * blocks)), blocks - 1) for part in PARTS})


@dataclass(frozen=True)
class Steps:
    """Timed steps of one way to exit: milliseconds, blocks, and checks by linear gates and output layers, per step."""

    way: str
    milliseconds: float
    depth: float
    gates: float = 0.0
    heads: float = 0.0


@dataclass(frozen=True)
class MeasuredCost:
    """Milliseconds, each for all rows of a step together.

    Attributes:
        blocks: of the LLM.
        block: one block.
        fill: keys and values of one skipped block.
        output: final norm and output layer.
        gate: one check by a linear gate.
        head: one check that runs the output layer, for the best row of each utterance.
        constant: all else of a step: embeddings, launches, the search's bookkeeping.
    """

    blocks: int
    block: float
    fill: float
    output: float
    gate: float
    head: float
    constant: float

    @classmethod
    def fit(cls, steps: Sequence[Steps], blocks: int, output: float, fill: float) -> MeasuredCost:
        """Block, checks and constant by least squares; ``output`` and ``fill`` are known."""
        from scipy.optimize import nnls  # what costs less than the noise of the steps is not to come out below zero

        design = [[1.0, one.depth, one.gates, one.heads] for one in steps]
        rest = [one.milliseconds - output - (blocks - one.depth) * fill for one in steps]
        constant, block, gate, head = nnls(design, rest)[0].tolist()
        return cls(blocks, block, fill, output, gate, head, constant)

    def step(self, depth: float, gates: float = 0.0, heads: float = 0.0) -> float:
        """Milliseconds of a step of ``depth`` blocks and as many checks of either kind."""
        skipped = (self.blocks - depth) * self.fill
        return self.constant + self.output + depth * self.block + skipped + gates * self.gate + heads * self.head

    def speedup(self, depth: float, gates: float = 0.0, heads: float = 0.0) -> float:
        """A step at full depth against such a step."""
        return self.step(self.blocks) / self.step(depth, gates, heads)
