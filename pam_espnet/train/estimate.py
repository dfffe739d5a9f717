"""Estimate of what a training will need: parameters (exact), memory, disk for cached features, and time.

Parameters are counted on shapes without weights, built from each model's config.json. Time is the arithmetic counted
here divided by rates that were measured; what they are extrapolated to stands beside them.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from humanfriendly import format_size, format_timespan

from pam_espnet.config import used_encoders
from pam_espnet.data.batching import BatchingOptions, plan_pass
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.passport import Passport
from pam_espnet.frontend.encoder_spec import EncoderSpec
from pam_espnet.frontend.encoders.base import layer_dtype, model_folder_or_id
from pam_espnet.frontend.encoders.registry import build_encoder, encoder_class
from pam_espnet.frontend.frontend import PaMFrontend
from pam_espnet.llm.llm import recomputed_every
from pam_espnet.llm.quantize import BITS, elements
from pam_espnet.train.experiment import bare_llm, read_options
from pam_espnet.train.scaling import scaled

# Operations per second, as ``step_seconds`` counts them. GPU: a step of egs/librispeech/pam1 (313 s of audio) on an
# NVIDIA H200: Whisper-large-v3, WavLM-large, wav2vec2-large in float32 (without TF32) 1198 ms, in bfloat16 218 ms;
# Qwen2.5-3B in bfloat16 401 ms. Whole steps took more: 1650 ms, with encoders in bfloat16 805 to 890.
# CPU: a step of egs/mini/pam1 on two cores, 4.7 s in float32 (AVX2) and 1.5 s in bfloat16 (AVX-512).
_GPU = {"llm": 246e12}
_GPU_ENCODERS = {torch.float32: 33e12, torch.bfloat16: 182e12}
_CPU = {torch.float32: 0.09e12, torch.bfloat16: 0.3e12}
_SHARED = 0.47  # the part of a step that GPUs divide where limits are global: 8 H200 do 1.7 times the work of one
# Of a GPU's free memory, what an estimate may fill to count as fitting: of that step, with nothing recomputed, 46 GiB
# were measured where 39 are computed (without LoRA's dropout and the CTC head), and passes differ in their batches.
_FILLED = 0.8
_TEMPLATE_TOKENS, _CHARACTERS_PER_TOKEN = 20, 4  # of a chat template, of English text: assumed, no tokenizer is run


@dataclass(frozen=True)
class Batch:
    """Of a batch, padding included: seconds of audio, positions of the LLM's input, answer tokens."""

    seconds: float
    positions: float
    targets: float


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder: its parameters, held in ``dtype``, and what its convolutions hold for a second of audio."""

    spec: EncoderSpec
    params: int
    dtype: torch.dtype
    convolutions: float = 0.0  # elements

    @property
    def bytes_per_second(self) -> float:
        """What it needs at work for a second of audio: all hidden states up to the highest one, four times the width
        for the block at work, and for the layer mix a copy in float32."""
        state = self.spec.frame_rate * self.spec.width
        copies = 0 if self.dtype == torch.float32 else 4 * self.spec.num_layers * state
        return self.dtype.itemsize * (state * (max(self.spec.layers) + 5) + self.convolutions) + copies


def estimate(
    config: Mapping[str, Any], train: Path | None, valid: Path | None, cached: bool, ngpu: int, num_nodes: int = 1
) -> str:
    """The estimate, for people to read.

    Args:
        config: merged configuration.
        train, valid: formatted data directories; None: batches are as large as they may be.
        cached: whether encoders are run once, before training.
        ngpu: GPUs of all nodes, which share every batch; 0: CPU.
        num_nodes: nodes that these are in.
    """
    shard = (config.get("llm_conf") or {}).get("shard")
    shards = max(1, ngpu // num_nodes if shard == "node" else ngpu if shard else 1)
    encoders, lm, unknown = {}, None, []
    for name in used_encoders(config):
        try:
            encoders[name] = encoder_shape(name, config["frontend_conf"], ngpu > 0)
        except OSError as error:
            unknown.append(f"encoder {name} ({_short(error)})")
    try:
        lm = bare_llm(config, ngpu > 0)
    except OSError as error:
        unknown.append(f"LLM {config['llm']} ({_short(error)})")
    parts = parameters(config, lm, encoders, not unknown, shards)
    lines = ["Estimate from the configuration; time from rates measured elsewhere (pam_espnet/train/estimate.py)", ""]
    lines.append(f"{'parameters':34}{'frozen':>16}{'trained':>14}{'weights':>10}")
    lines += [f"  {name:32}{frozen:16,}{own:14,}{format_size(size):>10}" for name, (frozen, own, size) in parts.items()]
    lines += [f"  unknown: {line}" for line in unknown]
    largest = max(batches(config, train, max(1, ngpu)), key=lambda batch: batch.positions)
    memory = step_bytes(config, lm, encoders, parts, largest, cached, shards)
    where = f"each of {ngpu} GPUs" if ngpu else "this process"
    lines += ["", f"memory of {where}, for {largest.seconds:.0f} s and {largest.positions:.0f} positions in a step"]
    lines += [f"  {name:62}{format_size(size):>10}" for name, size in memory.items()]
    lines += [f"  {'together; libraries and fragments come on top':62}{format_size(sum(memory.values())):>10}", ""]
    hours = sum(Passport.load(path).seconds for path in (train, valid) if path) / 3600
    rates = _GPU_ENCODERS if ngpu else _CPU
    encoding = sum(2 * e.params * e.spec.frame_rate / rates[e.dtype] for e in encoders.values())  # two per parameter
    if cached:
        per_hour = sum(4 * 3600 * e.spec.frame_rate * e.spec.num_layers * e.spec.width for e in encoders.values())
        spent = format_timespan(encoding * 3600 * hours / max(1, ngpu), max_units=2)
        whole = f", {format_size(per_hour * hours)} and {spent} for these {hours:.1f} hours" if hours else ""
        lines.append(f"feature cache: {format_size(per_hour)} per hour of audio{whole}")
    if lm is None:
        return "\n".join([*lines, "time: unknown, as the LLM is"]) + "\n"
    share = read_options(BatchingOptions, config, "batching_conf").sharing(max(1, ngpu))
    plan = batches(config, train, share)
    step = step_seconds(config, lm, plan, ngpu, 0.0 if cached else encoding)
    per_epoch = {**config, **scaled(config, max(1, ngpu))}.get("num_iters_per_epoch")
    steps = int(config.get("max_epoch") or 1) * int(per_epoch or len(plan))
    source = "one, without the exchange of gradients," if share > 1 else "1 and 8,"
    machine = "an H200" if ngpu == 1 else f"{ngpu} H200, extrapolated from {source}" if ngpu else "two CPU cores"
    spent = format_timespan(steps * step, max_units=2)
    lines.append(f"time: {steps} steps, {spent}, at {machine} as measured; scale it to other machines")
    lines.append("      (of encoders and LLM alone: whole steps took up to 1.4 times as long where they were measured;")
    lines.append("      warm start, validation and decoding are not in it)")
    return "\n".join(lines) + "\n"


def fitting_checkpointing(config: Mapping[str, Any], train: Path, cached: bool, ranks: int, free: float) -> int:
    """N of ``llm_conf.gradient_checkpointing`` for the least recomputation with which the largest batch of the first
    pass fits into ``free`` bytes of an empty GPU; 1 where nothing fits. Other arguments as in ``estimate``."""
    encoders = {name: encoder_shape(name, config["frontend_conf"], cuda=True) for name in used_encoders(config)}
    lm = bare_llm(config, cuda=True)
    parts = parameters(config, lm, encoders, complete=True)
    largest = max(batches(config, train, ranks), key=lambda batch: batch.positions)
    for every in (0, *range(lm.config.num_hidden_layers, 0, -1)):
        tried = {**config, "llm_conf": {**config["llm_conf"], "gradient_checkpointing": every}}
        needed = sum(step_bytes(tried, lm, encoders, parts, largest, cached).values())
        if needed <= _FILLED * free:
            break
    logging.info(
        f"llm_conf.gradient_checkpointing: auto is {every} (0: no block is recomputed, N: every N-th one); of "
        f"{format_size(free)} the largest batch then needs about {format_size(needed)}. A resumed run chooses anew: "
        "results depend on it by rounding alone"
    )
    return every


def encoder_shape(name: str, frontend_conf: Mapping[str, Any], cuda: bool = False) -> Encoder:
    """An encoder without its weights; converted models and a user's own are loaded, they are small. ``cuda``: in the
    precision in which a GPU computes it.
    Raises OSError: an id whose configuration is not on this machine."""
    from transformers import AutoConfig, AutoModel

    options = frontend_conf["encoders"][name]
    kind, choice = options["type"], frontend_conf.get("encoder_dtype", "auto")
    if choice == "auto" and cuda and encoder_class(kind).runs_in_bfloat16:
        choice = "bfloat16"  # perhaps another machine's GPU
    dtype = layer_dtype(choice, encoder_class(kind), "cpu")
    if kind not in ("whisper", "hf_wave", "ast"):
        encoder = build_encoder(**options)
        params = sum(p.numel() for p in encoder.parameters())
        spec = EncoderSpec.of(name, encoder)
        return Encoder(spec, params, dtype)
    own = AutoConfig.from_pretrained(model_folder_or_id(options["path"]))
    layers = tuple(options.get("layers") or range(own.num_hidden_layers + 1))
    with torch.device("meta"):
        model = AutoModel.from_config(own)
    convolutions = 0.0
    if kind == "whisper":
        model, rate = model.encoder, 50.0
    elif kind == "ast":
        rate = 100.0 / own.time_stride
        model.layers = model.layers[: max(layers)]
    else:
        rate = 16000 / math.prod(own.conv_stride)
        model.adapter = None
        model.encoder.layers = model.encoder.layers[: max(layers) + 1]
        convolutions = 3 * own.conv_dim[0] * 16000 / own.conv_stride[0]  # its longest sequence, three copies
    spec = EncoderSpec(name, 16000, rate, own.hidden_size, len(layers), layers)
    return Encoder(spec, sum(p.numel() for p in model.parameters()), dtype, convolutions)


def parameters(
    config: Mapping[str, Any], lm: Any, encoders: Mapping[str, Encoder], complete: bool, shards: int = 1
) -> dict[str, tuple[int, int, int]]:
    """Part -> (frozen parameters, trained parameters, bytes in each process, of which ``shards`` share the LLM's
    blocks); adapters and fusion where all other parts are known."""
    parts = {}
    if lm is not None:
        lora = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in lm.parameters()) - lora
        whole = frozen - sum(p.numel() for p in _blocks(lm))
        parts["LLM"] = (frozen, 0, whole * lm.dtype.itemsize + math.ceil(block_bytes(config, lm) / shards))
        if lora:
            parts["LoRA"] = (0, lora, 4 * lora)
    for name, encoder in encoders.items():
        parts[f"encoder {name}"] = (encoder.params, 0, encoder.dtype.itemsize * encoder.params)
    if complete:
        width = lm.config.hidden_size
        specs = {name: encoder.spec for name, encoder in encoders.items()}
        with torch.device("meta"):
            frontend = PaMFrontend(width=width, prompt_width=width, **{**config["frontend_conf"], "specs": specs})
        size = sum(p.numel() for p in frontend.parameters())
        if (config.get("model_conf") or {}).get("ctc_tokens"):
            size += width + frontend.fusion.num_experts  # blank and temperatures
        parts["adapters, fusion, CTC head"] = (0, size, 4 * size)
    return parts


def block_bytes(config: Mapping[str, Any], lm: Any) -> float:
    """Of the frozen weights in the LLM's blocks; with ``llm_conf.quantize`` matrices have 4 bits and their scales."""
    size = lm.dtype.itemsize
    matrix = BITS / 8 if (config.get("llm_conf") or {}).get("quantize") else size
    return sum(p.numel() * (matrix if p.dim() > 1 else size) for p in _blocks(lm))


def _blocks(lm: Any) -> list[torch.nn.Parameter]:
    layers = getattr(lm.base_model, "layers", None)  # another name in a few families, which can be neither
    return [p for p in layers.parameters() if not p.requires_grad] if layers is not None else []


def batches(config: Mapping[str, Any], train: Path | None, ranks: int) -> list[Batch]:
    """One process's share of each batch of the first pass; without data one batch at its limits."""
    options = read_options(BatchingOptions, config, "batching_conf")
    frame_rate = float(config["frontend_conf"].get("frame_rate", 12.5))
    if train is None:
        part = options.sharing(ranks) / ranks
        seconds, size = options.max_seconds * part, options.max_utterances * part
        return [Batch(seconds, seconds * frame_rate + size * (_TEMPLATE_TOKENS + 30), size * 20)]
    data, passport = DataDir.load(train), Passport.load(train)
    seconds_of = {utt: passport.utterances[utt]["num_samples"] / passport.sample_rate for utt in data.utterances}
    tokens = {utt: len(data.text[utt]) / _CHARACTERS_PER_TOKEN + 1 for utt in seconds_of}
    positions = {
        utt: seconds * frame_rate + _TEMPLATE_TOKENS + len(data.prompt[utt]) / _CHARACTERS_PER_TOKEN + tokens[utt]
        for utt, seconds in seconds_of.items()
    }
    plan = plan_pass(seconds_of, data.utt2task, options, int(config.get("seed", 1)), 0, ranks)
    padded = [
        (len(utts) * max(seconds_of[u] for u in utts), len(utts) * max(positions[u] for u in utts), utts)
        for utts in (batch[::ranks] for batch in plan)
    ]
    shares = [Batch(seconds, size, sum(tokens[utt] for utt in utts)) for seconds, size, utts in padded]
    return shares or batches(config, None, ranks)


def llm_activation_bytes(lm: Any, batch: Batch, checkpointing: int) -> float:
    """What a Llama-type LLM with LoRA keeps for the backward pass, in bytes.

    Per position and block ``6 D + 2 Q + 2 K + 4 F`` elements in the LLM's precision and two float32 copies of D (D
    width, F inner width, Q and K widths of queries and keys); where every ``checkpointing``-th block is recomputed (0:
    none), D of these, and one of them at a time has all. Answer tokens have V logits, three times also in float32.
    After Korthikanti et al., arXiv 2205.05198.
    """
    own, size = lm.config, lm.dtype.itemsize
    head = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    queries, keys = own.num_attention_heads * head, (own.num_key_value_heads or own.num_attention_heads) * head
    elements = 6 * own.hidden_size + 2 * queries + 2 * keys + 4 * own.intermediate_size
    block = batch.positions * (elements * size + 8 * own.hidden_size)
    blocks = own.num_hidden_layers
    again = -(-blocks // checkpointing) if checkpointing else 0
    kept = (blocks - again) * block + again * batch.positions * own.hidden_size * size + (block if again else 0)
    return kept + batch.targets * own.vocab_size * (size + 12)


def step_bytes(
    config: Mapping[str, Any],
    lm: Any,
    encoders: Mapping[str, Encoder],
    parts: Mapping[str, tuple[int, int, int]],
    batch: Batch,
    cached: bool,
    shards: int = 1,
) -> dict[str, float]:
    """What a training step holds, in bytes."""
    trained = sum(own for _, own, _ in parts.values())
    loaded = [size for name, (_, _, size) in parts.items() if not (cached and name.startswith("encoder "))]
    rows = {"weights" + (" (encoders are cached)" if cached else ""): float(sum(loaded))}
    rows["gradients and the optimiser's states"] = 4.0 * trained * (2 if config.get("optim") == "sgd" else 3)
    if lm is not None and shards > 1:
        rows["two gathered blocks of the LLM"] = 2 * block_bytes(config, lm) / lm.config.num_hidden_layers
    if lm is not None and hasattr(lm.config, "intermediate_size"):
        auto = (config.get("llm_conf") or {}).get("gradient_checkpointing") == "auto"
        name = "activations of the LLM" + (", nothing recomputed (auto: as much as fits)" if auto else "")
        rows[name] = llm_activation_bytes(lm, batch, _checkpointing(config))
    if encoders and not cached:
        rows["the widest encoder at work"] = batch.seconds * max(e.bytes_per_second for e in encoders.values())
    return rows


def step_seconds(config: Mapping[str, Any], lm: Any, plan: list[Batch], ngpu: int, encoding: float) -> float:
    """The mean time of a step; ``plan``: batches within the limits, shares of them where these are per GPU;
    ``encoding``: seconds that the encoders need for a second of audio."""
    seconds, positions, targets = (
        sum(getattr(batch, key) for batch in plan) / len(plan) for key in ("seconds", "positions", "targets")
    )
    every = _checkpointing(config)
    llm = llm_operations(lm, positions, targets, recomputed=1 / every if every else 0)
    alone = llm / (_GPU["llm"] if ngpu else _CPU[lm.dtype]) + encoding * seconds
    over = max(1, ngpu) / read_options(BatchingOptions, config, "batching_conf").sharing(max(1, ngpu))
    return alone * (1 - _SHARED + _SHARED / over)


def llm_operations(lm: Any, positions: float, targets: float, recomputed: float = 0) -> float:
    """Of a step of a frozen LLM: two per parameter of its blocks and position, forward and for inputs' gradients,
    once more in the part ``recomputed`` of the blocks; the output layer for ``targets``. Attention's are left out."""
    outside = {id(lm.get_input_embeddings().weight), id(lm.get_output_embeddings().weight)}
    in_blocks = sum(elements(p) for p in lm.parameters() if id(p) not in outside)
    passes = 2 + recomputed
    return passes * 2 * in_blocks * positions + 4 * lm.config.hidden_size * lm.config.vocab_size * targets


def _checkpointing(config: Mapping[str, Any]) -> int:
    return recomputed_every((config.get("llm_conf") or {}).get("gradient_checkpointing"))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:100]
