#!/usr/bin/env python3
"""Training on a GPU: a step of egs/librispeech/pam1 at its real size, with what makes it fast switched back one by one.

    python tests/benchmarks/gpu_training.py --output training.json            # one GPU, four minutes
    python tests/benchmarks/gpu_training.py --tiny --output tiny.json         # dry run of the program, on a CPU

Networks with random weights in the shapes of Whisper-large-v3, WavLM-large, wav2vec2-large and Qwen2.5-3B, options of
the recipe's conf/train.yaml; 24 utterances, 313 s of noise, answers of 3.5 tokens per second, a CTC head of 25,000
classes. A step is what ESPnet's trainer does with a batch that is ready: copy to the device, forward, backward,
clipping, AdamW; its learning rate is 0, so that all ways see the same weights. Trust ratios within a run.

    ms             of a step, the median of a few
    tokens_per_s   positions of the LLM's input, padding not counted
    share          of the card's operations per second in bfloat16; those of recomputation are not counted
    loss           of the answers, without dropout: ways differ by rounding

Parts are calls on the GPU's own clock: where it waits for the host in one, that is in it.

B utterances, N samples, L answer tokens.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

BEGAN = time.perf_counter()  # reading PyTorch counts
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/kit")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from benchmarks.gpu_clock import Clock  # noqa: E402
from benchmarks.gpu_rows import Row, Rows, begin  # noqa: E402
from espnet2.torch_utils.device_funcs import to_device  # noqa: E402
from random_encoders import LARGE, SMALL, random_weights  # noqa: E402
from random_llm import random_lm  # noqa: E402
from tiny_tokenizer import tiny_tokenizer  # noqa: E402
from torch.utils.data._utils.pin_memory import pin_memory  # noqa: E402
from transformers.models.wavlm.modeling_wavlm import WavLMAttention  # noqa: E402

from pam_espnet.config import resolve  # noqa: E402
from pam_espnet.data.tasks import TASKS  # noqa: E402
from pam_espnet.frontend.ctc_head import EmbeddingCTC  # noqa: E402
from pam_espnet.frontend.encoders.wavlm_attention import FusedWavLMAttention, fuse_attention  # noqa: E402
from pam_espnet.frontend.frontend import PaMFrontend  # noqa: E402
from pam_espnet.llm import llm as llm_module  # noqa: E402
from pam_espnet.llm.llm import LLM, needed_mask  # noqa: E402
from pam_espnet.llm.prompt_layout import end_of_turn_id  # noqa: E402
from pam_espnet.model import ESPnetPaMModel, choose_tf32  # noqa: E402
from pam_espnet.train.collate import PaMCollate  # noqa: E402
from pam_espnet.train.estimate import llm_operations  # noqa: E402
from pam_espnet.train.iterator import prompt_bytes  # noqa: E402
from pam_espnet.train.rates import PEAK, Rates  # noqa: E402

RECIPE = ROOT / "egs/librispeech/pam1/conf"


@dataclass(frozen=True)
class Way:
    """A step; the defaults are those of the recipe now, on a card on which nothing has to be recomputed."""

    name: str
    encoder_dtype: str = "auto"
    tf32: bool = True
    fused_wavlm: bool = True
    mask: bool = False  # of the padding, given to the LLM
    recompute: bool | int = False  # llm_conf.gradient_checkpointing
    dropout: float = 0.0  # of LoRA


NOW = Way("now")
BEFORE = Way("as in version 0.2", "float32", tf32=False, fused_wavlm=False, mask=True, recompute=True, dropout=0.05)
WAYS = (
    NOW,
    BEFORE,
    Way("every block recomputed", recompute=True),
    Way("every second block recomputed", recompute=2),
    Way("WavLM through transformers' attention", fused_wavlm=False),
    Way("with the mask", mask=True),
    Way("LoRA with dropout", dropout=0.05),
    Way("without TF32", tf32=False),
    Way("encoders in float32", "float32"),
)


def main() -> None:
    """Measure what there is time for; print it as it comes."""
    args, rows = begin(argparse.ArgumentParser(description=__doc__), BEGAN)
    bench = Bench(args.tiny, rows)
    rows.section("set-up", 5, args.limit / 2, bench.set_up)
    if not hasattr(bench, "model"):
        sys.exit("set-up failed")
    for way in WAYS:
        rows.section(way.name, 8, 40, partial(bench.rate, way))
        rows.section(f"{way.name}, parts", 4, 20, partial(bench.parts, way))
        if way in (NOW, BEFORE):
            rows.section(f"{way.name}, waits", 4, 20, partial(bench.waits, way))


class Bench:
    """A model, a batch, and the sections."""

    model: ESPnetPaMModel

    def __init__(self, tiny: bool, rows: Rows) -> None:
        self.tiny, self.rows, self.steps = tiny, rows, list[Row]()
        self.gpu, self.clock = torch.cuda.is_available(), Clock()
        self.device = "cuda" if self.gpu else "cpu"
        self.sizes: dict[str, tuple[int, ...]] = {**(SMALL if tiny else LARGE)}

    def set_up(self) -> None:
        config = resolve([RECIPE / "train.yaml", RECIPE / "fusion/pam.yaml"])
        conf, llm_conf = config["frontend_conf"], config["llm_conf"]
        for name, options in conf["encoders"].items():
            options |= {"path": name, **({"layers": [1, 2, 3]} if self.tiny else {})}  # a kind of random network
        torch.manual_seed(1)
        dtype = torch.bfloat16 if self.gpu else torch.float32
        lm = random_lm("tiny-qwen2" if self.tiny else "Qwen2.5-3B", self.device, dtype)
        lora = {**llm_conf["lora"], "dropout": BEFORE.dropout}  # or there is none to switch off
        llm = LLM(lm, tiny_tokenizer(), lora, NOW.recompute, llm_conf["prompt_position"])
        with random_weights(self.sizes, self.device):
            frontend = PaMFrontend(width=llm.width, prompt_width=llm.width, **conf)
        classes = 300 if self.tiny else 25000
        ctc = EmbeddingCTC(range(classes), llm.embed(torch.arange(classes, device=self.device)))
        weights = {name: config["model_conf"][name] for name in ("router_loss_weight", "ctc_weight")}
        model = ESPnetPaMModel(frontend, llm, tuple(TASKS), ctc, **weights).to(self.device).train()
        trained = model.trainable_parameters()
        self.optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=config["optim_conf"]["weight_decay"])
        collate = PaMCollate(llm.tokenizer, llm.system, conf["frame_rate"], frontend.sample_rate)
        self.batch = self.make_batch(classes, collate)
        counts = {"utterances": len(self.batch["text"]), "trained": sum(p.numel() for p in trained.values())}
        self.rows.add("set-up", **counts, encoders=str(frontend.encoder("whisper").dtype).removeprefix("torch."))
        self.model = model

    def make_batch(self, classes: int, collate: PaMCollate) -> dict[str, Any]:
        """As workers give it to the trainer."""
        seconds = torch.linspace(0.9, 1.1, 3) if self.tiny else torch.linspace(12.75, 13.33, 24)
        samples = (16000 * seconds).long()
        end, prompt = torch.tensor([end_of_turn_id(collate.tokenizer)]), prompt_bytes(TASKS["asr"].default_prompt)
        utterances = [
            ("", {
                "speech": 0.1 * torch.randn(size).numpy(), "num_samples": np.array([size]), "prompt": prompt,
                "text": torch.cat([torch.randint(5, classes, (int(3.5 * one),)), end]).numpy(),
                "task": np.array([list(TASKS).index("asr")]),
            })
            for one, size in zip(seconds.tolist(), samples.tolist(), strict=True)
        ]  # fmt: skip
        batch = collate(utterances)[1]
        return pin_memory(batch) if self.gpu else batch

    @contextmanager
    def using(self, way: Way) -> Iterator[None]:
        """Inside, a step goes that way."""
        llm, frontend = self.model.decoder, self.model.frontend
        self.optimizer.zero_grad()  # of a step that was broken off
        choose_tf32(way.tf32)
        frontend.encoder_dtype = way.encoder_dtype
        with random_weights(self.sizes, self.device):  # from bfloat16 to float32 they are made again
            frontend.to(self.device)
            for name in frontend.names:
                fuse_attention(frontend.encoder(name))
        for module in frontend.encoder("wavlm").modules():
            if type(module) is FusedWavLMAttention and not way.fused_wavlm:
                module.__class__ = WavLMAttention
        llm.lm.activation_checkpointing_disable()
        llm.recompute(way.recompute)
        for module in llm.lm.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = way.dropout
        self.model.train()
        with mock.patch.object(llm_module, "needed_mask", (lambda mask: mask) if way.mask else needed_mask):
            yield

    def step(self) -> None:
        """As in ESPnet's trainer."""
        loss, stats, weight = self.model(**to_device(self.batch, self.device))
        for value in (*stats.values(), weight):
            if value is not None:
                value.item()  # its reporter reads them all
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
        assert torch.isfinite(norm), norm  # which it asks, too
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rate(self, way: Way) -> None:
        """One row of the table of steps."""
        model, card = self.model, torch.cuda.get_device_name() if self.gpu else ""
        with self.using(way):
            with torch.no_grad():
                loss = float(model.eval()(**to_device(self.batch, self.device))[1]["loss_answer"])
            model.train()
            self.step()
            if self.gpu:
                torch.cuda.reset_peak_memory_stats()
            times: list[float] = []
            for _ in range(1 if self.tiny else 5):
                self.clock.watched("step", self.step)()
                times.append(self.clock.milliseconds()["step"])
            gib = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else 0.0
            counts = Rates(model, SimpleNamespace(waited=0.0))
            counts.add(self.batch)
        seconds = statistics.median(times) / 1000
        speed = (counts.operations + llm_operations(model.decoder.lm, counts.tokens, counts.targets)) / seconds
        row = self.rows.add(
            "step", way=way.name, ms=1000 * seconds, audio_s=counts.audio, audio_s_per_s=counts.audio / seconds,
            tokens_per_s=counts.tokens / seconds, peak_gib=gib, tflop_per_s=speed / 1e12,
            share=round(speed / PEAK[card], 4) if card in PEAK else None, loss=round(loss, 5),
        )  # fmt: skip
        self.steps.append(row)
        base = [one["ms"] for one in self.steps if one["way"] == BEFORE.name]
        for one in self.steps if base else ():
            one["over_version_0_2"] = round(base[0] / one["ms"], 2)

    def parts(self, way: Way) -> None:
        """Milliseconds of each part of one step."""
        model, names = self.model, self.model.frontend.names
        calls: list[tuple[str, Any, str]] = [(name, model.frontend.encoder(name), "forward") for name in names]
        calls += [("frontend", model.frontend, "forward"), ("layout", model, "build_inputs")]
        calls += [("llm_forward", model.decoder, "token_losses"), ("ctc", model.ctc, "loss")]
        calls += [("backward", torch.Tensor, "backward"), ("optimizer", self.optimizer, "step")]
        with self.using(way), ExitStack() as stack:
            for name, thing, method in calls:
                watched = self.clock.watched(name, getattr(thing, method))
                stack.enter_context(mock.patch.object(thing, method, watched))
            self.clock.watched("whole", self.step)()
            found = self.clock.milliseconds()
        whole, frontend = found.pop("whole"), found.pop("frontend")
        adapters = frontend - sum(found[name] for name in names)
        rest = whole - adapters - sum(found.values())
        self.rows.add("parts, ms", way=way.name, **found, adapters=adapters, rest=rest, whole=whole)

    def waits(self, way: Way) -> None:
        """How often the host waits for the device in a step, and the lines of code that make it wait."""
        with self.using(way), warnings.catch_warnings(record=True) as caught, ExitStack() as stack:
            warnings.simplefilter("always")
            if self.gpu:
                torch.cuda.set_sync_debug_mode("warn")
                stack.callback(torch.cuda.set_sync_debug_mode, "default")
            self.step()
        found = [one for one in caught if "synchronizing" in str(one.message)]
        places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found)
        said = ", ".join(f"{place} {count}" for place, count in places.most_common(20))
        self.rows.add("host synchronisations", way=way.name, of_a_step=len(found) if self.gpu else None, places=said)


if __name__ == "__main__":
    main()
