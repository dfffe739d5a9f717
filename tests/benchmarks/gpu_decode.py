#!/usr/bin/env python3
"""Decoding on a GPU: how near it comes to what the memory's speed allows, against transformers' ``generate``.

    python tests/benchmarks/gpu_decode.py --output gpu_decode.json             # one GPU, four minutes
    python tests/benchmarks/gpu_decode.py --tiny --output tiny.json            # dry run of the program, on a CPU

An LLM of Qwen2.5-3B's shape with random weights in bfloat16; prefixes of 100 positions, beam 4, 48 tokens where a row
says nothing else. Rows come most telling first, are saved as they come, and are left out when time is up; a section
that fails is recorded, and the next one begins. Host timings drift: trust ratios within a run.

    ms_step        (a search of all tokens - a search of one) / (tokens - 1), best of a few
    share          of the memory's speed: bytes that a step must read, at the measured bandwidth, over ms_step
    x_generate_*   how many times faster than ``generate`` (dynamic cache) on the same prefixes
    mib            of the GPU beside the weights
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()  # reading PyTorch counts
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/kit")]

import torch  # noqa: E402
from benchmarks import gpu_products, gpu_recordings  # noqa: E402
from benchmarks.gpu_rows import Rows, begin  # noqa: E402
from benchmarks.gpu_searches import Searches  # noqa: E402
from random_llm import random_prefix  # noqa: E402

from pam_espnet.engine.exits import ExitOptions  # noqa: E402
from pam_espnet.search.beam import beam_search  # noqa: E402
from pam_espnet.search.constraints import AnswerSet, NoRepeatNgram  # noqa: E402
from pam_espnet.search.hypothesis import BeamOptions  # noqa: E402

BATCHES = (1, 32, 8)


def main() -> None:
    """Measure what there is time for; print it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of every answer (48; few in a dry run)")
    args, rows = begin(parser, BEGAN)
    args.tokens = min(args.tokens, 6) if args.tiny else args.tokens
    Bench(args, rows).run()


class Bench:
    """All sections."""

    def __init__(self, args: argparse.Namespace, rows: Rows) -> None:
        self.args, self.rows = args, rows
        self.prefix, self.batches = (20, (1, 3, 2)) if args.tiny else (100, BATCHES)
        self.speed = 0.0  # of the memory, bytes per second
        self.s: Searches

    def run(self) -> None:
        """In the order of what they tell."""
        go = self.rows.section
        go("set-up", 5, self.args.limit / 2, self.set_up)
        if not hasattr(self, "s"):
            sys.exit("set-up failed")
        for batch in self.batches:
            go(f"graphs, batch {batch}", 8, 45, partial(self.ours, "graphs", batch))
            go(f"generate, batch {batch}", 8, 40, partial(self.transformers, "generate", batch))
        go("invariance", 10, 40, self.invariance)
        go("prefixes", 8, 40, self.prefixes)
        for batch in self.batches[:2]:
            go(f"any products, batch {batch}", 6, 30, partial(self.ours, "graphs, any products", batch))
        go("peak memory", 10, 50, self.peak_memory)
        go("options", 10, 40, self.options)
        go("exits", 8, 40, self.exits)
        for batch in self.batches:
            go(f"eager, batch {batch}", 6, 30, partial(self.ours, "eager", batch))
        go("recordings", 25, 60, self.recordings)
        go("greedy", 6, 30, self.greedy)
        go("products", 8, 30, partial(gpu_products.measure, self.s, self.rows, self.speed))
        for beam in (1, 4):
            static: dict[str, Any] = {"cache_implementation": "static"}
            plain, compiled = static | {"disable_compile": True}, static
            name = f"generate, static, beam {beam}"
            go(name, 8, 40, partial(self.transformers, "generate, static", 1, beam=beam, **plain))
            way = "generate, static, compiled"
            go(f"{name}, compiled", 30, 80, partial(self.transformers, way, 1, beam, **compiled))
        self.rows.save()

    def set_up(self) -> None:
        self.s = Searches(self.args.tiny, self.args.tokens)
        self.speed = self.s.bandwidth()
        made = self.s.milliseconds(lambda: self.s.engine("graphs"))
        floor = 1000 * self.s.step_bytes(1, 0, 0) / self.speed
        self.rows.add("card", copy_gb_s=self.speed / 1e9, weights_ms=floor, engine_s=made / 1000)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def ours(self, way: str, batch: int, prefix: int = 0, beam: int = 4, table: str = "search", **more: Any) -> Any:
        """A row of one of this project's ways."""
        engine, prefix = more.pop("engine", None) or self.s.engine(way.split(";")[0]), prefix or self.prefix
        engine.release()
        found = self.s.measure(self.s.search(engine, batch, prefix, beam, **more))
        return self.row(table, way, batch, prefix, beam, found)

    def transformers(self, way: str, batch: int, beam: int = 4, prefix: int = 0, **more: Any) -> Any:
        """A row of ``generate``."""
        prefix = prefix or self.prefix
        found = self.s.measure(self.s.generate(batch, prefix, beam, **more), rounds=2)
        return self.row("search", way, batch, prefix, beam, found)

    def row(self, table: str, way: str, batch: int, prefix: int, beam: int, found: dict[str, float]) -> Any:
        floor = 1000 * self.s.step_bytes(batch, prefix, beam) / self.speed
        share = round(floor / found["ms_step"], 3) if found["ms_step"] > 0 else None
        return self.rows.add(table, way=way, batch=batch, prefix=prefix, beam=beam, **found, share=share)

    def greedy(self) -> None:
        for batch in self.batches[:2]:
            self.ours("graphs", batch, beam=1)
            self.transformers("generate", batch, beam=1)

    # ---- invariance and prefixes ------------------------------------------------------------------------------------

    def invariance(self) -> None:
        """The same utterance alone, among 8 and among 32 of other lengths."""
        spread = [37, 120, 64, 200, 9, 100, 150, 33] * (1 if self.args.tiny else 4)
        inputs = random_prefix(self.s.llm, spread)
        options = self.s.options(self.args.tokens, 4)
        for way in ("graphs", "graphs; prefixes one by one", "graphs, any products", "eager"):
            engine = self.s.engine(way.split(";")[0])
            with _prefix_rows(engine, 1 if "one by one" in way else None):

                def search(count: int, engine: Any = engine) -> Any:
                    prefix, lengths = inputs[0][:count, : max(spread[:count])], inputs[1][:count]
                    return beam_search(engine, prefix, lengths, options)[0]

                alone = search(1)
                found: dict[str, Any] = {"repeatable": search(1) == alone}
                for count in sorted({len(spread) // 4, len(spread)}):
                    among = search(count)
                    pairs = list(zip(alone[0].tokens, among[0].tokens, strict=False))
                    first = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
                    logs = zip(alone[0].log_probs[:first], among[0].log_probs[:first], strict=True)
                    found[f"bit_for_bit_{count}"] = among == alone
                    found[f"same_tokens_{count}"] = [one.tokens for one in among] == [one.tokens for one in alone]
                    found[f"log_probs_differ_{count}"] = max((abs(a - b) for a, b in logs), default=0.0)
                self.rows.add("invariance", way=way, **found)

    def prefixes(self) -> None:
        """A search of one token: invariant products in tiles, one utterance after the other, any products."""
        one, many = self.batches[:2]
        for batch, prefix in ((many, self.prefix), (one, self.prefix), (many, 4 * self.prefix)):
            base = None
            for way in ("graphs, any products", "graphs", "graphs; one by one", "eager"):
                engine = self.s.engine(way.split(";")[0])
                with _prefix_rows(engine, 1 if "one by one" in way else None):
                    run = self.s.search(engine, batch, prefix, 4)
                    run(1)
                    found = min(self.s.milliseconds(lambda run=run: run(1)) for _ in range(4))
                    base = base or found
                    over = round(found / base, 3)
                    self.rows.add("prefix", way=way, batch=batch, prefix=prefix, ms=found, over_any_products=over)

    def peak_memory(self) -> None:
        """Prefixes of four times the length."""
        batch, prefix = self.batches[1], 4 * self.prefix
        ours = self.ours("graphs", batch, prefix)["mib"]
        theirs = self.transformers("generate", batch, prefix=prefix)["mib"]
        over = round(ours / theirs, 3) if theirs else None
        self.rows.add("peak memory", prefix=prefix, batch=batch, graphs_mib=ours, generate_mib=theirs, ratio=over)

    # ---- options, exits ---------------------------------------------------------------------------------------------

    def options(self) -> None:
        """What rules and CTC add to a step."""
        from pam_espnet.search.ctc import CTCOptions, CTCTable, token_classes

        generator = torch.Generator().manual_seed(1)
        tokens, ends = self.args.tokens, self.s.llm.eos_ids
        answers = [torch.randint(5, 400, (tokens - 1,), generator=generator).tolist() for _ in range(12)]
        size = 1000 if self.s.gpu else 100  # token types of the head
        frames = torch.randn(150, 1 + size, generator=generator).mul(3).log_softmax(-1).to(self.s.device)
        classes = token_classes({5 + n: n for n in range(1, 1 + size)}, ends, self.s.llm.vocab_size)

        def table(batch: int) -> CTCTable:
            lengths, covered = torch.full((batch,), 150), torch.ones(batch, dtype=torch.bool)
            return CTCTable.of(frames.expand(batch, -1, -1), lengths, covered, classes, CTCOptions(0.3))

        closed = BeamOptions(beam_size=4, nbest=4, max_new_tokens=tokens)
        for batch in self.batches[:2]:
            cases: dict[str, dict[str, Any]] = {
                "plain": {},
                "n-gram guard": {"constraints": lambda: [NoRepeatNgram(3)]},
                "answer set": {"constraints": lambda: [AnswerSet(answers, ends)], "options": closed},
                "CTC": {"ctc": partial(table, batch)},
            }
            plain = 0.0
            for name, more in cases.items():
                row = self.ours(f"graphs; {name}", batch, table="options", **more)
                plain = plain or row["ms_step"]
                row["over_plain"] = round(row["ms_step"] / plain, 3)
        self.rows.save()

    def exits(self) -> None:
        """At fixed blocks; and gates at all three that nothing passes."""
        blocks = self.s.llm.num_layers
        layers = tuple(sorted({max(1, blocks * part // 6) for part in (3, 4, 5)}))
        cases = {f"exit at block {one} of {blocks}": ExitOptions("fixed", (one,)) for one in layers}
        cases["checked at each of them, none exits"] = ExitOptions("confidence", layers, threshold=1.0)
        for batch in self.batches[:2]:
            full = 0.0
            for name, chosen in {"full depth": ExitOptions(), **cases}.items():
                engine = self.s.engine("graphs").with_exits(chosen)
                row = self.ours(f"graphs; {name}", batch, table="early exit", engine=engine)
                full = full or row["ms_step"]
                row["x_full_depth"] = round(full / row["ms_step"], 3)
        self.rows.save()

    def recordings(self) -> None:
        self.s.drop()
        gpu_recordings.measure(self.s, self.rows, self.args.tiny)


@contextmanager
def _prefix_rows(engine: Any, rows: int | None) -> Iterator[None]:
    """Inside, an engine runs prefixes of that many positions together; None: as it would."""
    if rows is None:
        yield
        return
    before, engine.prefix_rows = engine.prefix_rows, rows
    try:
        yield
    finally:
        engine.prefix_rows = before


if __name__ == "__main__":
    main()
