"""How large a training step's batches are: of formatted data by the sampler's own plan, or of the limits alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pam_espnet.data.batching import BatchingOptions, plan_pass
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.passport import Passport

TEMPLATE_TOKENS = 20  # a chat template's turn marks and role names, assumed
CHARACTERS_PER_TOKEN = 4  # of English text, assumed: no tokenizer is run


@dataclass(frozen=True)
class Batch:
    """One process's share of a batch.

    Attributes:
        seconds: audio, padding included.
        frames: audio embeddings, padding included.
        positions: of the LLM's input, padding included: audio embeddings and text.
        longest: positions of the longest utterance.
        targets: answer tokens.
    """

    seconds: float
    frames: float
    positions: float
    longest: float
    targets: float


@dataclass(frozen=True)
class Batches:
    """The largest batch (for memory), the mean one (for time), and how many make a pass (None without data)."""

    largest: Batch
    mean: Batch
    per_pass: int | None


def text_tokens(characters: float) -> float:
    """Tokens of a text, roughly."""
    return characters / CHARACTERS_PER_TOKEN + 1


def of_limits(
    options: BatchingOptions, frame_rate: float, ranks: int, prompt: float = 40, answer: float = 80
) -> Batches:
    """Without data: full batches of equal utterances, with so many characters of prompt and answer each."""
    count = options.max_utterances / ranks
    seconds = options.max_seconds / options.max_utterances
    targets = text_tokens(answer)
    longest = seconds * frame_rate + TEMPLATE_TOKENS + text_tokens(prompt) + targets
    batch = Batch(count * seconds, count * seconds * frame_rate, count * longest, longest, count * targets)
    return Batches(batch, batch, None)


def of_data(data_dir: str | Path, options: BatchingOptions, frame_rate: float, ranks: int, seed: int = 1) -> Batches:
    """Batches of the first pass over a formatted data directory, as training will make them.

    Raises:
        DataError: the directory is not formatted.
    """
    data, passport = DataDir.load(data_dir), Passport.load(data_dir)
    seconds = {utt: passport.utterances[utt]["num_samples"] / passport.sample_rate for utt in data.utterances}
    targets = {utt: text_tokens(len(data.text[utt])) for utt in seconds}
    text = {utt: TEMPLATE_TOKENS + text_tokens(len(data.prompt[utt])) + targets[utt] for utt in seconds}
    plan = plan_pass(seconds, data.utt2task, options, seed, 0, ranks)
    if not plan:
        return of_limits(options, frame_rate, ranks)
    shares = [_share(utts[::ranks], seconds, text, targets, frame_rate) for utts in plan]
    largest = max(shares, key=lambda batch: batch.positions)
    names = ("seconds", "frames", "positions", "longest", "targets")
    mean = Batch(*(sum(getattr(share, name) for share in shares) / len(shares) for name in names))
    return Batches(largest, mean, len(plan))


def _share(
    utts: Sequence[str],
    seconds: Mapping[str, float],
    text: Mapping[str, float],
    targets: Mapping[str, float],
    frame_rate: float,
) -> Batch:
    size, longest = len(utts), max(seconds[utt] for utt in utts)
    positions = max(seconds[utt] * frame_rate + text[utt] for utt in utts)
    answers = sum(targets[utt] for utt in utts)
    return Batch(size * longest, size * longest * frame_rate, size * positions, positions, answers)


def total_steps(config: Mapping[str, Any], per_pass: int | None) -> int | None:
    """Training steps of the configured epochs; None where an epoch is a pass over data that is not there."""
    each = config.get("num_iters_per_epoch") or per_pass
    return int(config["max_epoch"]) * int(each) if each and config.get("max_epoch") else None
