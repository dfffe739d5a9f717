"""The estimate as text: parameters, memory, cache on disk, time, each with how it was reckoned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pam_espnet.data.batching import BatchingOptions
from pam_espnet.data.passport import Passport
from pam_espnet.errors import ConfigError
from pam_espnet.estimate import formulas
from pam_espnet.estimate.batches import Batches, of_data, of_limits, total_steps
from pam_espnet.estimate.formulas import duration, text_of
from pam_espnet.estimate.parts import ModelParts, model_parts


@dataclass(frozen=True)
class Assumptions:
    """What the configuration does not say.

    Attributes:
        ngpu: GPUs that share a batch; 0 = CPU.
        use_cache: whether encoders are run once, before training, and their hidden states kept.
        tflops: sustained speed of the LLM and what is trained, 10^12 operations per second and device.
        encoder_tflops: the same of the encoders, which compute in float32.
    """

    ngpu: int
    use_cache: bool
    tflops: float
    encoder_tflops: float

    def __post_init__(self) -> None:
        if self.tflops <= 0 or self.encoder_tflops <= 0:
            raise ConfigError("--tflops and --encoder_tflops must be above 0")


def estimate(config: Mapping[str, Any], data_dirs: Sequence[str | Path], assumed: Assumptions) -> str:
    """The estimate of a resolved configuration, for people to read.

    Args:
        config: as for ``build.build_model``, with ``batching_conf``, ``max_epoch`` and ``num_iters_per_epoch``.
        data_dirs: formatted data directories; the first is trained on, all of them are cached. May be empty.
        assumed: see there.

    Raises:
        ConfigError: values that no training would accept.
        DataError: a data directory that is not formatted.
    """
    try:
        options = BatchingOptions(**(config.get("batching_conf") or {}))
    except TypeError as error:
        raise ConfigError(f"batching_conf: {error}") from error
    ranks = max(1, assumed.ngpu)
    frame_rate = float((config.get("frontend_conf") or {}).get("frame_rate", 12.5))
    found = model_parts(config, cuda=assumed.ngpu > 0)
    if data_dirs:
        batches = of_data(data_dirs[0], options, frame_rate, ranks, int(config.get("seed", 1)))
    else:
        batches = of_limits(options, frame_rate, ranks)
    lines = ["Estimate, reckoned from the configuration; nothing here was measured.", ""]
    lines += _parameters(found)
    lines += _memory(config, found, batches, assumed)
    if assumed.use_cache:
        lines += _disk(found, data_dirs)
    lines += _time(config, found, batches, data_dirs, assumed)
    return "\n".join(lines) + "\n"


def _checkpointing(config: Mapping[str, Any]) -> bool:
    return bool((config.get("llm_conf") or {}).get("gradient_checkpointing", False))


def _parameters(found: ModelParts) -> list[str]:
    lines = [f"{'parameters':24}{'frozen':>16}{'trained':>16}{'weights':>12}"]
    for part in found.parts:
        lines.append(f"  {part.name:22}{part.frozen:16,}{part.trained:16,}{text_of(part.bytes):>12}")
    return [*lines, *(f"  unknown: {line}" for line in found.unknown), ""]


def _memory(config: Mapping[str, Any], found: ModelParts, batches: Batches, assumed: Assumptions) -> list[str]:
    trained = sum(part.trained for part in found.parts)
    loaded = [part for part in found.parts if not (assumed.use_cache and part.name.startswith("encoder "))]
    checkpointing = _checkpointing(config)
    optim = str(config.get("optim", "adadelta"))
    rows: list[tuple[str, float]] = [
        ("weights" + (" (encoders are not loaded: cached)" if assumed.use_cache else ""), sum(p.bytes for p in loaded))
    ]
    rows.append((f"gradients and states of {optim}", formulas.optimiser_bytes(trained, optim)))
    batch = batches.largest
    if found.llm is not None:
        how = "with" if checkpointing else "without"
        kept = formulas.llm_activation_bytes(found.llm, batch, checkpointing)
        rows.append((f"activations of the LLM, {how} gradient checkpointing", kept))
        rows.append(
            (
                "activations of adapters and fusion",
                formulas.frontend_activation_bytes(found.encoders, found.llm.width, batch),
            )
        )
    if found.encoders and not assumed.use_cache:
        one = max(formulas.encoder_pass_bytes(encoder, batch) for encoder in found.encoders.values())
        rows.append(("the widest encoder at work", one))
    place = "each GPU" if assumed.ngpu else "this process"
    lines = [f"memory of {place}, for {batch.seconds:.0f} s of audio and {batch.positions:.0f} positions in a step"]
    lines += [f"  {name:54}{text_of(size):>10}" for name, size in rows]
    lines.append(f"  {'together':54}{text_of(sum(size for _, size in rows)):>10}")
    note = "at least; parts above are unknown" if found.unknown else "libraries and fragments come on top"
    return [*lines, f"  ({note})", ""]


def _disk(found: ModelParts, data_dirs: Sequence[str | Path]) -> list[str]:
    lines = ["feature cache on disk"]
    if not data_dirs:
        per_hour = sum(4 * e.num_layers * e.width * e.frame_rate * 3600 for e in found.encoders.values())
        return [*lines, f"  {text_of(per_hour)} per hour of audio (--data gives the whole)", ""]
    samples = {}
    for folder in data_dirs:
        passport = Passport.load(folder)
        samples[str(folder)] = {utt: int(entry["num_samples"]) for utt, entry in passport.utterances.items()}
    total = 0
    for name, encoder in found.encoders.items():
        size = sum(formulas.cache_bytes(encoder, counts) for counts in samples.values())
        total += size
        rate = f"{encoder.frame_rate:g} Hz x {encoder.num_layers} layers x {encoder.width} x 4 bytes"
        lines.append(f"  {name:14}{rate:40}{text_of(size):>10}")
    return [*lines, f"  {'together':54}{text_of(total):>10}", ""]


def _time(
    config: Mapping[str, Any],
    found: ModelParts,
    batches: Batches,
    data_dirs: Sequence[str | Path],
    assumed: Assumptions,
) -> list[str]:
    if found.llm is None:
        return ["time: unknown, as the LLM is"]
    checkpointing = _checkpointing(config)
    fusion = sum(part.trained for part in found.parts if part.name in ("adapters", "fusion and gain"))
    step = formulas.llm_flop(found.llm, batches.mean, checkpointing) + formulas.frontend_flop(fusion, batches.mean)
    seconds = step / (assumed.tflops * 1e12)
    lines = [f"arithmetic of a step: {text_of(step, 'FLOP')} for the LLM, adapters and fusion"]
    listening = formulas.encoder_flop(found.encoders.values(), 1.0)
    if not assumed.use_cache:
        own = listening * batches.mean.seconds
        lines[0] += f", {text_of(own, 'FLOP')} for the encoders"
        seconds += own / (assumed.encoder_tflops * 1e12)
    speeds = f"at an assumed {assumed.tflops:g} TFLOP/s, encoders {assumed.encoder_tflops:g} TFLOP/s"
    steps = total_steps(config, batches.per_pass)
    if steps is None:
        lines.append(f"time: {duration(seconds)} per step {speeds} (the number of steps depends on the data)")
    else:
        lines.append(f"time: {steps} steps, {duration(steps * seconds)} {speeds}")
    if assumed.use_cache and data_dirs:
        audio = sum(Passport.load(folder).seconds for folder in data_dirs)
        spent = listening * audio / (assumed.encoder_tflops * 1e12 * max(1, assumed.ngpu))
        lines.append(f"      the feature cache before it, {duration(spent)}, if encoders share the devices evenly")
    lines.append("      (warm start, validation and decoding are not in it; --tflops changes the assumed speed)")
    return lines
