"""Beam search over a static engine: the device chooses, the host keeps the books and says when to stop.

The host reads a few bytes per candidate while the next step runs; it asks for one step more than it has read, which is
in vain at the end of a batch. With constraints, or gates that wait for utterances, the device waits for the host.

B utterances, K hypotheses of each, P prefix positions, D width, C candidates of each utterance.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pam_espnet.engine.static import StaticEngine
from pam_espnet.engine.static_memory import Memory, Shape
from pam_espnet.search.choose import Board
from pam_espnet.search.constraints import Constraint, Rule, combine, count_fired, find_rules
from pam_espnet.search.ctc import CTCTable
from pam_espnet.search.hypothesis import BeamOptions, Candidate, Partial, UtteranceBeam

FRAMES = 64  # of CTC: buffers hold a multiple


class _Records:
    """What was chosen, on its way to the host."""

    def __init__(self, board: Board, on_gpu: bool) -> None:
        self.parts = (board.record, board.best, board.depths)
        self.host = [torch.empty_like(part, device="cpu", pin_memory=on_gpu) for part in self.parts]
        self.events = [torch.cuda.Event() for _ in range(len(board.record))] if on_gpu else []

    def send(self, at: int) -> None:
        """Ask for those of step ``at``."""
        for there, here in zip(self.parts, self.host, strict=True):
            here[at].copy_(there[at], non_blocking=True)
        if self.events:
            self.events[at].record(torch.cuda.current_stream(self.parts[0].device))

    def receive(self, at: int) -> list[Tensor]:
        """Wait for them: record (B,C,FIELDS), most likely tokens (B,K), depths (B,)."""
        if self.events:
            self.events[at].synchronize()
        return [here[at] for here in self.host]


@torch.no_grad()
def static_beam_search(
    engine: StaticEngine,
    prefix: Tensor,
    prefix_lengths: Tensor,
    options: BeamOptions,
    eos_ids: Sequence[int],
    beams: Sequence[UtteranceBeam],
    on_partial: Callable[[list[Partial]], None] | None = None,
    constraints: Sequence[Constraint] = (),
    ctc: CTCTable | None = None,
) -> None:
    """As ``search.beam.beam_search``, on ``beams``, one of each utterance."""
    size, lengths = options.beam_size, prefix_lengths.tolist()
    steps = max(beam.max_new_tokens for beam in beams) - 1  # the prefix predicts the first token
    memory = engine.memory(Shape.holding(len(beams), size, max(lengths), max(1, steps)))
    reach = max(2, 1 + len(eos_ids)) * size
    board, records, first, step = _passes(engine, memory, tuple(eos_ids), reach, bool(constraints), ctc, options)
    engine.load(memory, prefix, lengths)
    waits = bool(constraints) or engine.gated
    rules: dict[int, dict[Constraint, Rule]] = {}  # row -> those that apply
    if constraints:
        rules = _set_rules(board, beams, constraints)
    first()
    records.send(0)
    launched = at = 0
    active = list(beams)
    while True:
        if not waits and launched < steps:
            launched += 1
            step()
            records.send(launched)
        record, best, depths = (part.numpy() for part in records.receive(at))
        values = record[..., 0].view("float32").tolist()
        tokens, parents = record[..., 1].tolist(), record[..., 2].tolist()
        for beam in active:
            b = beam.utterance
            for k in range(len(beam.running) if rules else 0):
                count_fired(rules.get(b * size + k, {}), b, int(best[b, k]))
            beam.advance(_candidates(beam, values[b], tokens[b], parents[b], int(depths[b])))
        if on_partial is not None:
            on_partial([beam.partial() for beam in active])
        active = [beam for beam in active if not beam.done]
        if not active:
            return
        at += 1
        if launched < at:
            if constraints:
                rules = _set_rules(board, active, constraints)
            if waits:
                done = torch.ones(len(memory.finished), dtype=torch.bool)
                done[[beam.utterance for beam in active]] = False
                memory.finished.copy_(done, non_blocking=True)
            launched += 1
            step()
            records.send(launched)


def _passes(
    engine: StaticEngine,
    memory: Memory,
    eos_ids: tuple[int, ...],
    reach: int,
    constrained: bool,
    ctc: CTCTable | None,
    options: BeamOptions,
) -> tuple[Board, _Records, Callable[[], None], Callable[[], None]]:
    """Buffers of the search, and the functions that run the prefix and a step and choose."""
    classes, frames, most = (0, 0, 0) if ctc is None else (*ctc.log_probs.shape[1:], ctc.candidates)
    frames = -(-frames // FRAMES) * FRAMES
    name = ("beam", eos_ids, reach, constrained, classes, frames, most)
    if name not in memory.scratch:
        table = None if ctc is None else CTCTable.empty(ctc, memory.shape.utterances, frames)
        board = Board(memory, engine.ops, eos_ids, reach, engine.vocabulary, constrained, table)
        memory.scratch[name] = board, _Records(board, memory.device.type == "cuda")
    board, records = memory.scratch[name]
    if ctc is not None and board.ctc is not None:
        board.ctc.load(ctc)
    board.begin(options)
    memory.begin(chained=False)
    graphs, began = len(memory.graphs), time.perf_counter()
    first = engine.prefix_pass(memory, name, board.first)
    step = engine.step_pass(memory, name, board.following)
    if len(memory.graphs) > graphs:
        shape, seconds = memory.shape, time.perf_counter() - began
        logging.info(
            f"decoding: graphs for {shape.utterances} x {shape.rows} hypotheses, {shape.prefix} positions and "
            f"{shape.steps} steps made in {seconds:.1f} s"
        )
    board.begin(options)
    return board, records, first, step


def _set_rules(
    board: Board, beams: Sequence[UtteranceBeam], constraints: Sequence[Constraint]
) -> dict[int, dict[Constraint, Rule]]:
    """Row -> the rules that apply to what follows it; the device has them combined."""
    found = {
        beam.utterance * board.memory.shape.rows + k: find_rules(constraints, beam.utterance, hypothesis.tokens)
        for beam in beams
        for k, hypothesis in enumerate(beam.running)
    }
    board.rule([combine(found[row].values()) if row in found else None for row in range(len(board.memory.utterance))])
    return found


def _candidates(
    beam: UtteranceBeam, values: Sequence[float], tokens: Sequence[int], parents: Sequence[int], depth: int
) -> list[Candidate]:
    """An utterance's record; rows that no hypothesis is in come last."""
    running = beam.running
    found = zip(values, tokens, parents, strict=True)
    return [
        Candidate(running[parent].score + value, parent, token, value, depth)
        for value, token, parent in found
        if parent < len(running)
    ]
