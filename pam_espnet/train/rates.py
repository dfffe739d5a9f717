"""Rates of training, summed over all processes: audio, tokens and operations per second, padding, waiting, memory.

Everything is counted on the host from lengths, so a step waits for nothing. Processes exchange their counts once per
line in the log.
"""

import resource
import time
from collections.abc import Mapping
from typing import Any

import torch

from pam_espnet.processes import gathered
from pam_espnet.train.estimate import llm_operations

# Operations per second in bfloat16, sums in float32, matrices without sparsity, by the name that torch gives a card
# (NVIDIA's data sheets of A100, H100 and H200, which state twice as much "with sparsity" for the last two; the
# whitepaper of the Ada architecture for RTX 4090, 165.2). The name in full: a part of a card (MIG) has another one.
PEAK = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


class Rates:
    """Counts of this process since the last line.

    Args:
        model: the ``ESPnetPaMModel``; its ``step_size`` is read after each step.
        loader: of ``PaMIterFactory``; its ``waited`` is read.
    """

    def __init__(self, model: Any, loader: Any) -> None:
        self.model = model
        self.loader = loader
        self._encoding: float | None = None  # operations of the encoders for a second of audio
        self._begin()

    def _begin(self) -> None:
        self.audio, self.padded_audio, self.operations = 0.0, 0.0, 0.0  # seconds, seconds, of the encoders
        self.tokens, self.padded_tokens, self.targets = 0, 0, 0
        self.begun, self.waited = time.perf_counter(), self.loader.waited

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count a step that is done; ``batch``: on the host, as the model takes it."""
        samples = batch["num_samples"]
        seconds = sum(samples) / self.model.frontend.sample_rate
        self.audio += seconds
        self.padded_audio += len(samples) * max(samples) / self.model.frontend.sample_rate
        for name, number in zip(("tokens", "padded_tokens", "targets"), self.model.step_size, strict=True):
            setattr(self, name, getattr(self, name) + number)
        if "speech" in batch:  # else the encoders' hidden states come from the cache
            self.operations += seconds * self._encoder_operations()

    def _encoder_operations(self) -> float:
        if self._encoding is None:
            frontend = self.model.frontend
            sizes = {name: sum(p.numel() for p in frontend.encoder(name).parameters()) for name in frontend.fusion.used}
            self._encoding = sum(2 * size * frontend.specs[name].frame_rate for name, size in sizes.items())
        return self._encoding

    def since_last(self) -> tuple[str, str]:
        """The rate for a progress bar, and a line of all of them, since the last call; every process calls it.

        Tokens are positions of the LLM's input (prompt, audio, answer). Operations are those of LLM and encoders for
        what is no padding, each once: recomputation is none.
        """
        spent, peak, on_cuda = time.perf_counter() - self.begun, None, self.model.decoder.device.type == "cuda"
        if on_cuda:
            memory = torch.cuda.max_memory_allocated() / 2**30
            peak = PEAK.get(torch.cuda.get_device_name())
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
        operations = self.operations + llm_operations(self.model.decoder.lm, self.tokens, self.targets)
        own = (self.audio, self.padded_audio, self.tokens, self.padded_tokens, operations)
        rows = gathered((*own, spent, self.loader.waited - self.waited, memory))
        self._begin()
        audio, padded_audio, tokens, padded_tokens, operations, _, waited, _ = map(sum, zip(*rows, strict=True))
        seconds, memory = (max(row[i] for row in rows) for i in (5, 7))
        share = f" ({operations / seconds / peak / len(rows):.1%} of {len(rows)} x {peak / 1e12:.0f})" if peak else ""
        rate = f"{audio / seconds:.1f} s of audio/s"
        return rate, (
            f"{rate}, {tokens / seconds:.0f} tokens/s, padding {1 - audio / padded_audio:.1%} of audio and "
            f"{1 - tokens / max(padded_tokens, 1):.1%} of tokens, waiting for data {waited / seconds / len(rows):.1%}, "
            f"at most {memory:.2f} GiB of {'GPU ' if on_cuda else ''}memory, "
            f"{operations / seconds / 1e12:.3g} TFLOP/s{share}"
        )
