"""The engine for Llama-type LLMs on buffers of fixed shape, whose passes are captured as CUDA graphs.

An eager step is some hundred launches of small kernels, which the host cannot issue as fast as a GPU runs them; a graph
is one. The passes are functions of a ``Memory`` alone: on a CPU they run as they are. The search may also run them
itself, with what it adds to them (``search.static_beam``): then nothing comes back to the host but what was chosen.

B utterances, K rows of each, R = B * K, P prefix positions, N rows of a state, W tokens that can be predicted, D width,
A attention heads, E size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pam_espnet.engine.exits import ExitOptions
from pam_espnet.engine.gated import GatedStep
from pam_espnet.engine.graphs import Graphs
from pam_espnet.engine.grid import GridState
from pam_espnet.engine.llama import Block, LlamaEngine
from pam_espnet.engine.ops import operations
from pam_espnet.engine.static_memory import Memory, Shape
from pam_espnet.transfer import upload

PREFIX_ROWS = 8192  # positions of prefixes that are run together
CAPTURED_ROWS = 1024  # positions up to which a GPU waits for the host to launch a prefix's kernels
KEPT = 1 / 8  # of a GPU's memory, for buffers that may be needed again
KEPT_ON_CPU = 2**30  # bytes
ROOM = (4, 64)  # rows and steps behind a prefix, where nobody knows yet how many there will be


class StaticEngine(LlamaEngine):
    """See ``Engine``.

    Args:
        engine: an engine of the same LLM, whose weights are shared.
        batch_invariant: on CUDA, use products whose rows do not depend on how many there are.

    Attributes:
        prefix_rows: most positions of prefixes that are run together; 1 runs every utterance by itself.
    """

    graphs = True

    def __init__(self, engine: LlamaEngine, batch_invariant: bool = True) -> None:
        self.__dict__ |= engine.__dict__
        llm = engine.llm
        self.vocabulary = len(llm.lm.get_output_embeddings().weight) if self.ids is None else len(self.ids)  # W
        self.ops = operations(llm.device, batch_invariant)
        self.prefix_rows = PREFIX_ROWS
        self._graphs = Graphs(llm.device)
        self._memories: dict[Shape, Memory] = {}  # the one used last comes last
        self._most_kept = KEPT_ON_CPU
        if self._graphs.on:
            self._most_kept = int(KEPT * torch.cuda.get_device_properties(llm.device).total_memory)

    def with_exits(self, options: ExitOptions) -> StaticEngine:
        """See ``Engine``; buffers are shared."""
        engine = super().with_exits(options)
        assert isinstance(engine, StaticEngine)
        if (exits := engine.exits) is not None:  # the policy's products are the engine's
            exits.norm = lambda hidden: self.normed(hidden.contiguous(), None)
            exits.head = lambda normed: self.ops.logits(normed, self.output)
            exits.log_probs = partial(self.log_probs, temperature=torch.ones(1, device=self.llm.device))
            if exits.calibration is not None:
                exits.calibration = replace(exits.calibration, product=self.ops.logits)
        return engine

    @property
    def gated(self) -> bool:
        """Whether the host must ask, during a step, if an utterance is still in the blocks."""
        return self.exits is not None and self.exits.options.mode != "fixed"

    def log_probs(self, logits: Tensor, temperature: float | Tensor) -> Tensor:
        """See ``Engine``; on CUDA torch's own may depend on where in memory a row begins."""
        divisor = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device).view(1)
        return logits / divisor - self.ops.logsumexp(logits, divisor)

    def release(self) -> None:
        """See ``Engine``."""
        for memory in self._memories.values():
            memory.clear()
        self._memories.clear()
        self._graphs.renew()

    # ---- buffers and graphs -----------------------------------------------------------------------------------------

    def memory(self, shape: Shape) -> Memory:
        """The buffers of a shape, made when they are first asked for; the few that were used last are kept."""
        memory = self._memories.pop(shape, None)
        if memory is None:
            while self._memories and sum(one.nbytes for one in self._memories.values()) > self._most_kept:
                self._memories.pop(next(iter(self._memories))).clear()
            memory = self._new_memory(shape)
        self._memories[shape] = memory
        return memory

    def _new_memory(self, shape: Shape) -> Memory:
        form, dtype = self.shape, self.llm.dtype
        positions = torch.arange(shape.prefix + shape.steps + shape.rows, device=self.llm.device)
        like = torch.empty(0, dtype=dtype, device=self.llm.device)
        half = form.head // 2  # rounded to the LLM's precision, as transformers does it
        cos, sin = (table[0, :, :half].float().contiguous() for table in self._rotary_embedding(like, positions[None]))
        return Memory(shape, len(self.blocks), form.kv_heads, form.head, self.llm.width, cos, sin, dtype)

    def captured(self, memory: Memory, name: Hashable, function: Callable[[], Any]) -> Callable[[], Any]:
        """``function`` as a graph that stays with ``memory``; it is run a few times when it is first asked for."""
        key = (name, self.prefix_rows)
        if key not in memory.graphs:
            with memory.kept():
                memory.graphs[key] = self._graphs.capture(function)
        return memory.graphs[key]

    def prefix_pass(
        self, memory: Memory, name: Hashable, finish: Callable[[Tensor], Any], behind: int = 1
    ) -> Callable[[], Any]:
        """``run_prefix``, then ``finish`` on its logits, as a graph where it is short enough to need one."""

        def run() -> Any:
            return finish(self.run_prefix(memory, behind))

        long = memory.shape.utterances * memory.shape.prefix > CAPTURED_ROWS
        return run if long else self.captured(memory, ("prefix", name, behind), run)

    def step_pass(
        self, memory: Memory, name: Hashable, finish: Callable[[Tensor], Any], chained: bool = False
    ) -> Callable[[], Any]:
        """One step of all rows, as graphs; returns what ``finish`` makes of its logits (R,W), which is part of them."""
        if self.gated and not chained:
            return GatedStep(self, memory, name, finish)
        return self.captured(memory, (name, chained, self.exits), lambda: finish(self.run_rows(memory, chained)))

    # ---- what is captured -------------------------------------------------------------------------------------------

    def run_prefix(self, memory: Memory, behind: int) -> Tensor:
        """All prefixes through all blocks -> logits (B*behind,W) at the last position of each and behind its draft's
        first ``behind`` - 1 tokens."""
        memory.begin(behind > 1)
        count, each = memory.shape.utterances, max(1, self.prefix_rows // memory.shape.prefix)
        parts = [self._some_prefixes(memory, slice(at, min(at + each, count)), behind) for at in range(0, count, each)]
        return self.ops.logits(torch.cat(parts), self.output)

    def _some_prefixes(self, memory: Memory, which: slice, behind: int) -> Tensor:
        count, most, device = which.stop - which.start, memory.shape.prefix, memory.device
        positions = torch.arange(most, device=device).repeat(count)
        utterance = torch.arange(count, device=device).repeat_interleave(most)
        x = memory.embeds[which].flatten(0, 1).clone()  # (B'*P,D); padding is run with the rest
        ahead = torch.arange(behind, device=device) - 1
        last = (memory.start[which, None] + ahead).minimum(memory.lengths[which, None] - 1)  # (B',behind)
        wanted = (last + most * torch.arange(count, device=device)[:, None]).flatten()
        sums = None
        for block in self.blocks:
            keys, values = memory.keys[block.index][which], memory.values[block.index][which]
            query = self._heads(memory, block, x, sums, positions, utterance, positions, keys, values, True)
            grid = query.view(count, most, *query.shape[1:])
            attended = self.ops.attend_prefix(grid, keys[:, :, :most], values[:, :, :most], self.scale).flatten(0, 1)
            if block is self.blocks[-1]:  # only these positions predict
                x, attended = x[wanted], attended[wanted]
            sums = self._network(block, x, attended, True)
        return self.normed(x, sums)

    def run_rows(self, memory: Memory, chained: bool) -> Tensor:
        """One more token of every row through the blocks -> logits (R,W); at a fixed exit, through those before it."""
        exits = None if chained else self.exits
        depth = len(self.blocks) if exits is None else exits.layers[0]
        x, place = self.embed(memory.tokens.flatten()), memory.append(chained)
        sums = self.run_blocks(memory, x, place, 0, depth)
        normed = self.normed(x, sums)
        if exits is not None:
            self.fill(memory, x, place, depth)
            memory.depths.fill_(depth)
            normed = normed if exits.calibration is None else self.normed(exits.mapped(depth, x), None)
        return self.ops.logits(normed, self.output)

    def run_blocks(
        self, memory: Memory, x: Tensor, place: tuple[Tensor, Tensor], first: int, last: int, frozen: Any = None
    ) -> Any:
        """Rows ``x`` (R,D), changed in place, through some blocks -> the sums that are still to be added to them.

        Args:
            place: slots and positions (R,).
            first, last: the blocks, from 0, the last not included.
            frozen: rows (R,) bool and their states (R,D): all blocks read these rows as they are.
        """
        sums: Any = None
        for block in self.blocks[first:last]:
            keys, values, (slots, positions) = memory.keys[block.index], memory.values[block.index], place
            if frozen is not None:
                self.ops.add_norm(x, sums, block.norm, self.shape.eps)
                torch.where(frozen[0][:, None], frozen[1], x, out=x)
                sums = None
            query = self._heads(memory, block, x, sums, positions, memory.utterance, slots, keys, values, False)
            attended = self.ops.attend(
                query, keys, values, memory.visible, memory.lengths, memory.shape.prefix, memory.used, self.scale
            )
            sums = self._network(block, x, attended, False)
        return sums

    def normed(self, x: Tensor, sums: Any) -> Tensor:
        """Sums are added to rows (R,D) in place -> the final norm of them."""
        return self.ops.add_norm(x, sums, self._final_norm, self.shape.eps)

    def fill(self, memory: Memory, x: Tensor, place: tuple[Tensor, Tensor], first: int) -> None:
        """Keys and values that the blocks from ``first`` make of rows (R,D) that exited before: later steps attend to
        them, too."""
        for block in self.blocks[first:]:
            normed = self.ops.add_norm(x, None, block.norm, self.shape.eps)
            assert block.kv is not None
            sums = self.ops.product(normed, block.kv, False, like=block.qkv)
            cells = place[1], memory.utterance, place[0], memory.keys[block.index], memory.values[block.index]
            self.ops.turn_write(sums, block, memory.cos, memory.sin, *cells)

    def _heads(
        self, memory: Memory, block: Block, x: Tensor, sums: Any, positions: Tensor, utterance: Tensor, slots: Tensor,
        keys: Tensor, values: Tensor, many: bool,
    ) -> Tensor:  # fmt: skip
        normed = self.ops.add_norm(x, sums, block.norm, self.shape.eps)
        sums = self.ops.product(normed, block.qkv, many)
        return self.ops.turn_write(
            sums, block, memory.cos, memory.sin, positions, utterance, slots, keys, values
        )  # (R,A,E)

    def _network(self, block: Block, x: Tensor, attended: Tensor, many: bool) -> Any:
        normed = self.ops.add_norm(x, self.ops.product(attended, block.out, many), block.mid_norm, self.shape.eps)
        gated = self.ops.gate(self.ops.product(normed, block.gate_up, many))
        return self.ops.product(gated, block.down, many)

    # ---- the interface of every engine ------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(
        self, prefix: Tensor, lengths: Tensor, drafts: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, Any]:
        """See ``Engine``."""
        drafted = [len(draft) for draft in drafts] if drafts is not None else [0] * len(lengths)
        behind, counts = 1 + max(drafted), lengths.tolist()
        longest = max(have + more for have, more in zip(counts, drafted, strict=True))
        memory = self.memory(Shape.holding(len(counts), max(ROOM[0], behind), longest, ROOM[1]))
        self.load(memory, prefix, counts, drafts)
        logits = self.prefix_pass(memory, "rows", lambda logits: logits, behind)()
        cells = [b * behind + k for b, more in enumerate(drafted) for k in range(1 + more)]
        state = GridState(self, memory, counts, drafted)
        (index,) = upload(logits.device, cells)
        return logits[index], state

    def load(
        self,
        memory: Memory,
        prefix: Tensor,
        lengths: Sequence[int],
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Prefixes (B',P',D) of ``lengths`` positions, and drafts behind them, into the buffers."""
        count, most = len(lengths), max(lengths)
        memory.embeds.zero_()  # padding is run with the rest, and zero times no number is no number
        memory.embeds[:count, :most].copy_(prefix[:, :most])
        spare = memory.shape.utterances - count
        start, drafted = [*lengths, *[1] * spare], [*(drafts or [()] * count), *[()] * spare]
        ends = [size + len(draft) for size, draft in zip(start, drafted, strict=True)]
        rows = enumerate(zip(start, ends, strict=True))
        cells = [b * memory.shape.prefix + at for b, (size, end) in rows for at in range(size, end)]
        read = [token for draft in drafted for token in draft]
        starts, lasts, index, tokens = upload(memory.device, start, ends, cells, read)
        memory.start.copy_(starts)
        memory.lengths.copy_(lasts)
        if read:
            memory.embeds.view(-1, memory.embeds.shape[2])[index] = self.embed(tokens).to(memory.embeds)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: Any, chained: Any = None) -> Tensor:
        """See ``Engine``."""
        return state.run(tokens) if isinstance(state, GridState) else super().step(tokens, state, chained)

    @torch.no_grad()
    def verify(self, tokens: Tensor, lengths: Sequence[int], state: Any) -> Tensor:
        """See ``Engine``."""
        if isinstance(state, GridState):
            return state.run(tokens, lengths)
        return super().verify(tokens, lengths, state)
