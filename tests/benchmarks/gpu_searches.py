"""The ways of searching that ``gpu_decode.py`` compares, and their clocks.

    generate             transformers, dynamic cache: the base of all ratios
    generate, static     transformers, static cache; *compiled*: its step through torch.compile, its default on CUDA
    eager                this project's engine, kernel by kernel
    graphs               the same on fixed buffers, in CUDA graphs; batch-invariant
    graphs, any products batch_invariant: false

B utterances, K hypotheses of each, P prefix positions.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from random_llm import random_llm, random_prefix

from pam_espnet.engine.engine import make_engine
from pam_espnet.search.beam import beam_search
from pam_espnet.search.hypothesis import BeamOptions

ENGINES: dict[str, dict[str, Any]] = {
    "graphs": {"graphs": "on"},
    "graphs, any products": {"graphs": "on", "batch_invariant": False},
    "eager": {"graphs": "off"},
}
SHAPE = "Qwen2.5-3B"
MIB = 1 << 20


class Searches:
    """One LLM with random weights, and engines of it.

    Args:
        tiny: a tiny LLM, on a CPU where there is no GPU.
        tokens: of every answer.
    """

    def __init__(self, tiny: bool, tokens: int) -> None:
        self.gpu, self.tokens = torch.cuda.is_available(), tokens
        self.device = "cuda" if self.gpu else "cpu"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.llm = random_llm("tiny-qwen2" if tiny else SHAPE, self.device, self.dtype)
        self.engines: dict[str, Any] = {}

    def engine(self, way: str) -> Any:
        """Made when it is first asked for; others go where memory is short."""
        if way not in self.engines:
            if self.gpu and torch.cuda.mem_get_info()[0] < 3 * sum(p.nbytes for p in self.llm.parameters()):
                self.drop()
            self.engines[way] = make_engine(self.llm, **ENGINES[way])
            if self.engines[way].graphs != way.startswith("graphs"):
                raise RuntimeError(f"{way}: the engine does not use graphs as it was asked to")
        return self.engines[way]

    def drop(self) -> None:
        """Free all engines."""
        for engine in self.engines.values():
            engine.release()
        self.engines.clear()
        self.tidy()

    def tidy(self) -> None:
        """Give back what nothing uses."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def options(self, tokens: int, beam: int) -> BeamOptions:
        """Exactly ``tokens`` tokens."""
        return BeamOptions(beam_size=beam, nbest=beam, max_new_tokens=tokens, min_new_tokens=tokens)

    def search(self, engine: Any, batch: int, prefix: int, beam: int, **more: Any) -> Callable[[int], Any]:
        """A search of a number of tokens; ``more`` goes to ``beam_search``, functions are called for each search."""
        inputs = random_prefix(self.llm, [prefix] * batch)

        def run(tokens: int) -> Any:
            made = {name: value() if callable(value) else value for name, value in more.items()}
            options = made.pop("options", None) or self.options(tokens, beam)
            caps = [tokens] * batch if "options" in more else None
            return beam_search(engine, *inputs, options, caps, **made)

        return run

    def generate(self, batch: int, prefix: int, beam: int, **more: Any) -> Callable[[int], Any]:
        """The same by transformers. Fewer than ``self.tokens`` tokens stop early, with a cache for all of them."""
        from transformers import StoppingCriteriaList

        embeds, _ = random_prefix(self.llm, [prefix] * batch)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device)

        def run(tokens: int) -> Any:
            def enough(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                return torch.full((len(ids),), ids.shape[1] >= tokens, device=ids.device)

            found = self.llm.lm.generate(
                inputs_embeds=embeds, attention_mask=mask, do_sample=False, num_beams=beam,
                max_new_tokens=self.tokens, min_new_tokens=self.tokens, eos_token_id=2, pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([enough]), **more,
            )  # fmt: skip
            assert found.shape[1] == tokens, (found.shape, tokens)
            return found

        return run

    # ---- clocks -----------------------------------------------------------------------------------------------------

    def milliseconds(self, function: Callable[[], Any]) -> float:
        """Wall time until the device is done."""
        self.wait()
        began = time.perf_counter()
        function()
        self.wait()
        return 1000 * (time.perf_counter() - began)

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def peak(self, function: Callable[[], Any]) -> float:
        """MiB of the GPU that it needs beside what is held already."""
        self.tidy()
        if not self.gpu:
            function()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    @torch.no_grad()
    def measure(self, run: Callable[[int], Any], rounds: int = 3) -> dict[str, float]:
        """Milliseconds of a step, of the prefix (a search of one token) and of all; the first search apart."""
        first: list[float] = []
        mib = self.peak(lambda: first.append(self.milliseconds(lambda: run(self.tokens))))
        run(1)
        ones = min(self.milliseconds(lambda: run(1)) for _ in range(rounds))
        whole = min(self.milliseconds(lambda: run(self.tokens)) for _ in range(rounds))
        step = (whole - ones) / (self.tokens - 1)
        found = {"ms_step": step, "ms_prefix": ones, "ms_all": whole, "first_s": first[0] / 1000, "mib": mib}
        return {name: round(value, 3) for name, value in found.items()}

    # ---- what a step must read --------------------------------------------------------------------------------------

    def bandwidth(self) -> float:
        """Bytes per second of a copy, read and written."""
        size = (1 << 31) if self.gpu else (1 << 25)
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_(0, 255)
        target = torch.empty_like(source)

        def copies() -> None:
            for _ in range(5):
                target.copy_(source)

        copies()
        return 2 * 5 * size / (min(self.milliseconds(copies) for _ in range(4)) / 1000)

    def step_bytes(self, batch: int, prefix: int, beam: int) -> int:
        """Weights of all blocks, output layer, keys and values of an average step, each read once."""
        engine = next(iter(self.engines.values())) if self.engines else self.engine("graphs")
        layers = [one for block in engine.blocks for one in (block.qkv, block.out, block.gate_up, block.down)]
        weights = sum(one.nbytes for one in [*layers, engine.output])
        positions = batch * (prefix + beam * self.tokens // 2)
        head = engine.shape.kv_heads * engine.shape.head * self.dtype.itemsize
        return weights + 2 * positions * head * len(engine.blocks)
