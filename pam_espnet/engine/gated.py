"""A step that gates may end before the last block: graphs of the blocks between candidates, and one byte to the host.

An utterance that has exited waits until all have: its rows are frozen, so that the blocks which follow make of them
the keys and values that ``fill`` would. The host only asks whether any is left.

B utterances, K rows of each, R = B * K, D width, W tokens that can be predicted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pam_espnet.engine.static_memory import Memory

if TYPE_CHECKING:
    from pam_espnet.engine.static import StaticEngine


@dataclass
class Rows:
    """What one graph of a step leaves for the next."""

    x: Tensor  # (R,D) in the blocks
    kept: Tensor  # (R,D) where they exited
    predicting: Tensor  # (R,D) what logits are read from
    slots: Tensor  # (R,)
    positions: Tensor  # (R,)
    exited: Tensor  # (B,) bool
    left: Tensor  # (1,) bool, whether any has not
    host: Tensor  # the same on the host


class GatedStep:
    """Callable: one step, see ``StaticEngine.step_pass``."""

    def __init__(self, engine: StaticEngine, memory: Memory, name: Hashable, finish: Callable[[Tensor], Any]) -> None:
        assert engine.exits is not None
        self.engine, self.memory, self.on_gpu = engine, memory, memory.device.type == "cuda"
        key = ("gated", engine.exits)
        if key not in memory.scratch:
            memory.scratch[key] = self._new_rows(), copy.copy(engine.exits)  # patience counts in buffers of its own
        self.rows, self.policy = memory.scratch[key]
        own = copy.copy(self)  # what graphs keep alive has no graphs itself: a cycle would outlive ``Memory.clear``
        ends = [*self.policy.layers, len(engine.blocks)]

        def captured(part: str, function: Callable[[], Any]) -> Callable[[], Any]:
            return engine.captured(memory, (part, engine.exits, *((name,) if part == "finish" else ())), function)

        self.chunks = [
            captured(f"blocks {first} to {last}", lambda first=first, last=last: own._chunk(first, last))  # type: ignore[misc]
            for first, last in zip([0, *ends], ends, strict=False)
        ]
        self.fills = [captured(f"fill from {end}", lambda end=end: own._fill(end)) for end in ends[:-1]]  # type: ignore[misc]
        self.finish = captured("finish", lambda: finish(own._logits()))

    def __call__(self) -> Any:
        """Run it."""
        rows = self.rows
        for chunk, fill in zip(self.chunks, [*self.fills, None], strict=True):
            chunk()
            if fill is None:
                break
            rows.host.copy_(rows.left, non_blocking=True)
            if self.on_gpu:
                torch.cuda.current_stream(self.memory.device).synchronize()
            if not rows.host[0]:
                fill()
                break
        return self.finish()

    def _new_rows(self) -> Rows:
        memory = self.memory
        count, width = len(memory.utterance), memory.embeds.shape[2]
        x, kept, predicting = (memory.embeds.new_zeros(count, width) for _ in range(3))
        slots, positions = (torch.zeros_like(memory.utterance) for _ in range(2))
        left = torch.ones(1, dtype=torch.bool, device=memory.device)
        host = torch.ones(1, dtype=torch.bool, pin_memory=self.on_gpu)
        return Rows(x, kept, predicting, slots, positions, torch.zeros_like(memory.finished), left, host)

    def _chunk(self, first: int, last: int) -> None:
        """The blocks behind ``first`` up to ``last``, then the gate of that one."""
        engine, memory, rows = self.engine, self.memory, self.rows
        if first == 0:
            slots, positions = memory.append(chained=False)
            rows.slots.copy_(slots)
            rows.positions.copy_(positions)
            rows.x.copy_(engine.embed(memory.tokens.flatten()))
            rows.exited.copy_(memory.finished)
            memory.depths.fill_(len(engine.blocks))
            self.policy.begin(len(rows.exited), memory.device)
        frozen = None if first == 0 else (self._of_rows(rows.exited), rows.kept)
        sums = engine.run_blocks(memory, rows.x, (rows.slots, rows.positions), first, last, frozen)
        engine.normed(rows.x, sums)  # now x is whole
        exiting = ~rows.exited
        if last < len(engine.blocks):
            best = rows.x.view(len(exiting), -1, rows.x.shape[1])[:, 0]  # of the best hypothesis
            every = torch.arange(len(exiting), device=memory.device)
            exiting = exiting & self.policy.decide(last, every, best)
            memory.depths.masked_fill_(exiting, last)
        turned = self._of_rows(exiting)[:, None]
        rows.kept.copy_(torch.where(turned, rows.x, rows.kept))
        rows.predicting.copy_(torch.where(turned, self.policy.mapped(last, rows.x), rows.predicting))
        rows.exited.logical_or_(exiting)
        rows.left.copy_((~rows.exited).any())

    def _fill(self, first: int) -> None:
        rows = self.rows
        self.engine.fill(self.memory, rows.kept, (rows.slots, rows.positions), first)

    def _logits(self) -> Tensor:
        normed = self.engine.normed(self.rows.predicting, None)
        return self.engine.ops.logits(normed, self.engine.output)

    def _of_rows(self, utterances: Tensor) -> Tensor:
        """(B,) -> (R,)."""
        return utterances.repeat_interleave(self.memory.shape.rows, output_size=len(self.memory.utterance))
