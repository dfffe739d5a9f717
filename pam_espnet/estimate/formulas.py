"""Memory, disk and arithmetic of a training step, as pure functions of shapes.

P positions of the LLM's input, D its width, F inner width of its feed-forward networks, Q and K widths of queries and
of keys (and values), A heads, V vocabulary, H layers and W width of an encoder, T its frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pam_espnet.estimate.batches import Batch
from pam_espnet.estimate.parts import LLMShape
from pam_espnet.frontend.encoders.base import AbsEncoder

# States that an optimiser keeps per trained parameter, float32.
_OPTIMISER_STATES = {
    "adam": 2,
    "adamw": 2,
    "radam": 2,
    "adamax": 2,
    "sgd": 1,
    "adagrad": 1,
    "rmsprop": 1,
    "adadelta": 2,
}


def optimiser_bytes(trained: int, optim: str) -> int:
    """Gradients and optimiser states of ``trained`` float32 parameters; two states where the optimiser is not known."""
    return 4 * trained * (1 + _OPTIMISER_STATES.get(optim, 2))


def llm_activation_bytes(llm: LLMShape, batch: Batch, checkpointing: bool) -> float:
    """What the LLM keeps for the backward pass, in bytes.

    Per position and block, counted from a Llama-type block with LoRA: ``6 D + 2 Q + 2 K + 4 F`` elements in the LLM's
    precision (inputs and outputs of the norms, of attention, of the gated feed-forward network, the residual stream),
    and two float32 copies of D inside the norms; where attention is not fused, also ``2 A`` elements per pair of
    positions. With gradient checkpointing a block keeps its input alone (D elements), and one block at a time has all.
    The answer tokens' logits come on top: V numbers in the LLM's precision and three times in float32 (a copy, the
    log-softmax, the gradient). The idea of counting: Korthikanti et al., arXiv 2205.05198.
    """
    elements = 6 * llm.width + 2 * llm.query_width + 2 * llm.value_width + 4 * llm.inner_width
    if not llm.fused_attention:
        elements += int(2 * llm.heads * batch.longest)
    block = batch.positions * (elements * llm.element_bytes + 2 * 4 * llm.width)
    kept = llm.blocks * block
    if checkpointing:
        kept = llm.blocks * batch.positions * llm.width * llm.element_bytes + block
    return kept + batch.targets * llm.vocab * (llm.element_bytes + 3 * 4)


def frontend_activation_bytes(encoders: Mapping[str, AbsEncoder], width: int, batch: Batch) -> float:
    """What adapters and mixture keep, in bytes: float32, per encoder ``T (2 H W + 2 W)`` numbers for the layers and
    their normalised copies, the mixture and its stacked copy; ``5 D`` numbers per audio embedding behind it."""
    numbers = 0.0
    for encoder in encoders.values():
        frames = batch.seconds * encoder.frame_rate
        numbers += frames * encoder.width * (2 * encoder.num_layers + 2) + 5 * width * batch.frames
    return 4 * numbers


def encoder_pass_bytes(encoder: AbsEncoder, batch: Batch) -> float:
    """What a frozen encoder holds while it runs (no gradients), in bytes: float32, all hidden states up to the highest
    that is emitted, four times the width for the block at work; for models on raw waveforms also three copies of the
    first convolution's output, the longest sequence they have."""
    frames = batch.seconds * encoder.frame_rate
    numbers = frames * encoder.width * (max(encoder.layers) + 1 + 4)
    own: Any = getattr(getattr(encoder, "model", None), "config", None)
    if getattr(own, "conv_stride", None):
        numbers += 3 * own.conv_dim[0] * batch.seconds * encoder.sample_rate / own.conv_stride[0]
    return 4 * numbers


def cache_bytes(encoder: AbsEncoder, samples: Mapping[str, int]) -> int:
    """Size of the feature cache's archives, exactly: a float32 matrix (T, H W) per utterance, and Kaldi's header.

    Args:
        encoder: with or without weights.
        samples: utterance -> number of samples.
    """
    if not samples:
        return 0
    frames = int(encoder.output_lengths(torch.tensor(list(samples.values()))).sum())
    # "<key> \0BFM \4<rows>\4<columns>"
    headers = sum(len(utt.encode()) + 1 + 2 + 3 + 5 + 5 for utt in samples)
    return 4 * frames * encoder.num_layers * encoder.width + headers


def llm_flop(llm: LLMShape, batch: Batch, checkpointing: bool) -> float:
    """Floating-point operations of the LLM in one training step.

    Forward: two per parameter of a block and position, ``4 Q`` per pair of positions (half of them, being causal), two
    per number of the output layer and answer token. Backward: the same again for the inputs' gradients (the weights
    are frozen), and LoRA's own gradients. With checkpointing the blocks' forward pass is done twice.
    """
    weights = 2 * (llm.block_params + llm.lora_params) * batch.positions
    attention = llm.blocks * 2 * llm.query_width * batch.positions * batch.longest
    passes = 3 if checkpointing else 2
    lora = 2 * llm.lora_params * batch.positions
    return passes * (weights + attention) + lora + 2 * 2 * llm.width * llm.vocab * batch.targets


def frontend_flop(trained: int, batch: Batch) -> float:
    """Of adapters and fusion: six per trained parameter and audio embedding (forward and both gradients)."""
    return 6.0 * trained * batch.frames


def encoder_flop(encoders: Iterable[AbsEncoder], seconds: float) -> float:
    """Of frozen encoders: two per parameter and frame. Convolutions at a higher rate are counted at the frames' rate,
    and attention is left out, so this is too little for models that begin with a waveform."""
    return sum(2.0 * sum(p.numel() for p in e.parameters()) * seconds * e.frame_rate for e in encoders)


def text_of(number: float, unit: str = "B") -> str:
    """``1234567890`` -> ``"1.23 GB"``."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}"


def duration(seconds: float) -> str:
    """``5400`` -> ``"1.5 h"``."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
