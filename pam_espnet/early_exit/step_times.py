"""Times of decoding steps on this machine: at full depth, with exits at fixed blocks, with checks that do not open.

Plain beam searches of a fixed number of tokens take turns, round by round, so that a machine that slows down slows all
of them; medians count. A step is a search without the time of a one-token search, divided by its steps: what decoding
really runs, CUDA graphs and bookkeeping included.

B utterances, K hypotheses of each, R = B*K rows, P prefix positions, D width.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pam_espnet.early_exit.measured_cost import MeasuredCost, Steps, exit_blocks
from pam_espnet.engine.calibration import Calibration
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.engine.llama import LlamaEngine
from pam_espnet.engine.static import StaticEngine
from pam_espnet.engine.static_memory import Shape
from pam_espnet.errors import ConfigError
from pam_espnet.search.beam import beam_search
from pam_espnet.search.hypothesis import BeamOptions

FEWEST, MOST = 4, 24  # tokens of a search
ROUNDS = 5  # at most
REPEATS = 10  # of what is timed alone


@torch.no_grad()
def measure(
    engine: LlamaEngine,
    prefix: Tensor,
    lengths: Tensor,
    options: BeamOptions,
    limit: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[MeasuredCost, list[Steps], dict[str, int]]:
    """Time steps of an engine at full depth and of the same engine with exits.

    Args:
        prefix: (B,P,D) embeddings, right-padded.
        lengths: (B,) valid positions.
        options: of the search, but for its lengths.
        limit: seconds that all of it should take.
        clock: gives seconds.

    Returns:
        the costs, what they were fitted to, and how many ``rounds`` and ``tokens`` there were.

    Raises ConfigError: the limit is too low for one round.
    """

    def search(way: LlamaEngine, tokens: int) -> list[int]:  # the depths of its steps
        nbest = beam_search(way, prefix, lengths, replace(options, min_new_tokens=tokens, max_new_tokens=tokens))
        return [depth for hypotheses in nbest for depth in hypotheses[0].depths[1:]]

    def now() -> float:
        if prefix.is_cuda:
            torch.cuda.synchronize(prefix.device)
        return clock()

    def seconds(run: Callable[[], object]) -> float:
        start = now()
        run()
        return now() - start

    began, blocks = now(), len(engine.blocks)
    tokens = _tokens(lambda count: seconds(partial(search, engine, count)), len(exit_blocks(blocks)) + 4, limit)
    ways = _ways(engine)
    depths = {name: search(way, tokens) for name, way in ways.items()}  # also makes what is made once and kept
    runs: dict[str, Callable[[], Any]] = {name: partial(search, way, tokens) for name, way in ways.items()}
    runs |= {"prefix": partial(search, engine, 1), **_alone(engine, len(lengths), options.beam_size)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    rounds, took = 0, 0.0
    while not rounds or (rounds < ROUNDS and now() - began + took <= limit):
        start, names = now(), list(runs)
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            times[name].append(seconds(runs[name]))
        rounds, took = rounds + 1, now() - start
    median = {name: 1000 * statistics.median(values) for name, values in times.items()}
    steps = []
    for name, own in depths.items():
        policy, milliseconds = ways[name].exits, (median[name] - median["prefix"]) / (tokens - 1)
        checks = sum(block <= one for one in own for block in policy.layers) / len(own) if policy else 0.0
        asked = {"gate": (checks, 0.0), "confidence": (0.0, checks)}.get(name, (0.0, 0.0))
        steps.append(Steps(name, milliseconds, statistics.mean(own), *asked))
    engine.release()  # also the graphs of exits that nobody will ask for again
    cost = MeasuredCost.fit(steps, blocks, median["output"] / REPEATS, median["fill"] / REPEATS / blocks)
    return cost, steps, {"rounds": rounds, "tokens": tokens}


def _tokens(seconds: Callable[[int], float], searches: int, limit: float) -> int:
    """How many tokens a search may have for about three rounds of ``searches`` to fit into ``limit``; ``seconds``: of
    a search at full depth, by its tokens."""
    two = seconds(2)  # this one also makes what is made once and kept
    two = seconds(2) if two < limit else two
    if (needed := 2 * searches * two) > limit:
        raise ConfigError(f"--measure_cost {limit:g}: too short, on this machine it takes about {needed:.0f} s")
    one = seconds(1)
    longest = (limit / 4 - searches * one) / (searches * max(two - one, 1e-6))
    return max(FEWEST, min(MOST, 1 + int(longest)))


def _ways(engine: LlamaEngine) -> dict[str, LlamaEngine]:
    """The engine with all exits that are timed. Gates of zeros give one half, which does not open; an output layer may
    by chance be sure enough to exit, which the depths of the steps show."""
    blocks, fixed = len(engine.blocks), exit_blocks(len(engine.blocks))
    options = {f"fixed:{block}": ExitOptions("fixed", (block,)) for block in fixed}
    options["confidence"] = ExitOptions("confidence", tuple(fixed), threshold=1.0)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "gates.safetensors"
        asked = tuple(range(1, blocks, 2))  # many, as one costs little
        Calibration(asked, None, torch.zeros(len(asked), engine.llm.width + 1), None).save(path, {})
        options["gate"] = ExitOptions("gate", threshold=1.0, calibration=str(path))
        return {"never": engine, **{name: engine.with_exits(one) for name, one in options.items()}}


def _alone(engine: LlamaEngine, utterances: int, beam_size: int) -> dict[str, Callable[[], Any]]:
    """``REPEATS`` times the output layer, and the fill of all blocks, for the R rows of a step."""

    def repeat(run: Callable[[], Any]) -> None:
        for _ in range(REPEATS):
            run()

    if isinstance(engine, StaticEngine):
        memory = engine.memory(Shape.holding(utterances, beam_size, 1, 1))
        x, zeros = engine.embed(memory.tokens.flatten()), torch.zeros_like(memory.utterance)
        runs: dict[str, Callable[[], Any]] = {
            "output": lambda: engine.ops.logits(engine.normed(x, None), engine.output),
            "fill": lambda: engine.fill(memory, x, (zeros, zeros), 0),
        }
        return {name: engine.captured(memory, name, partial(repeat, run)) for name, run in runs.items()}
    shape, rows = engine.shape, torch.arange(utterances * beam_size, device=engine.llm.device)
    x = engine.embed(torch.zeros_like(rows))  # (R,D)
    turn = x.new_ones(len(rows), 1, shape.head)
    memories = x.new_zeros(2, utterances, shape.kv_heads, beam_size, shape.head)  # of keys, of values

    def fill() -> None:
        for block in engine.blocks:
            for kept, made in zip(memories, block.skip(x, (turn, turn)), strict=True):
                kept[rows // beam_size, :, rows % beam_size] = made

    return {"output": partial(repeat, lambda: engine.logits(engine.norm(x))), "fill": partial(repeat, fill)}
