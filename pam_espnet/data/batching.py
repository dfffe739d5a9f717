"""Which utterances are trained on together, and when: length buckets, drawn anew in every pass.

ESPnet's own samplers fix the batches once and shuffle their order; sorted by length they also separate the tasks
(counting clips all last five seconds). Here every pass shuffles the utterances, sorts by length only within a pool
of a few batches, and shuffles the batches, so that a batch mixes tasks at little padding. A plan is a pure function
of (durations, options, seed, pass): resuming needs no state but the step number.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pam_espnet.data.tasks import task_spec
from pam_espnet.errors import ConfigError


@dataclass(frozen=True)
class BatchingOptions:
    """How batches are made.

    Attributes:
        max_utterances: utterances in a batch, over all ranks.
        max_seconds: padded audio in a batch (longest utterance times utterances), seconds.
        pool: number of batches whose utterances are sorted by length together; 1 keeps batches random.
        task_share: task name -> how often each of its utterances is seen in a pass (1 = once; 0.5 = with
            probability one half; 2 = twice). Tasks not named: once.
        task_exponent: instead of ``task_share``: tasks get shares of a pass in proportion to
            ``task_weights[task] * count ** task_exponent``. 1 takes the data as they are, 0 gives every task the same
            share, values between them draw large tasks less and small ones more often (sampling with a temperature,
            its inverse). A pass has as many utterances as there are.
        task_weights: with ``task_exponent``: task name -> factor; tasks not named: 1, and 0 leaves a task out.
        task_counts: with ``task_exponent``: task name -> the count to compute with, such as its hours; tasks not
            named: the number of their utterances.
    """

    max_utterances: int = 8
    max_seconds: float = 80.0
    pool: int = 8
    task_share: Mapping[str, float] = field(default_factory=dict)
    task_exponent: float | None = None
    task_weights: Mapping[str, float] = field(default_factory=dict)
    task_counts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_utterances", "max_seconds", "pool"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"batching_conf.{name} must be positive, got {getattr(self, name)}")
        if any(share < 0 for share in self.task_share.values()):
            raise ConfigError(f"batching_conf.task_share must not be negative: {dict(self.task_share)}")
        if self.task_exponent is None:
            if self.task_weights or self.task_counts:
                raise ConfigError("batching_conf: task_weights and task_counts need a task_exponent, such as 1.0")
            return
        if self.task_share:
            raise ConfigError("batching_conf: task_share and task_exponent are two ways to say the same; give one")
        for task in (*self.task_weights, *self.task_counts):
            task_spec(task)
        if any(weight < 0 for weight in self.task_weights.values()):
            raise ConfigError(f"batching_conf.task_weights must not be negative: {dict(self.task_weights)}")
        if any(count <= 0 for count in self.task_counts.values()):
            raise ConfigError(f"batching_conf.task_counts must be positive: {dict(self.task_counts)}")


def times_seen(tasks: Mapping[str, str], options: BatchingOptions) -> dict[str, float]:
    """{task: how often each of its utterances is seen in a pass, on average}, for every task of ``tasks``.

    Args:
        tasks: utterance -> task.
        options: see ``BatchingOptions``.
    """
    counts = Counter(tasks.values())
    if options.task_exponent is None:
        return {task: options.task_share.get(task, 1.0) for task in sorted(counts)}
    weights = {
        task: options.task_weights.get(task, 1.0) * options.task_counts.get(task, count) ** options.task_exponent
        for task, count in sorted(counts.items())
    }
    total = sum(weights.values())
    # rounded, or "as the data are" would be one utterance in 2 ** 50 less
    return {task: round(len(tasks) * w / total / counts[task], 9) if w else 0.0 for task, w in weights.items()}


def describe_seen(plan: list[list[str]], seconds: Mapping[str, float], tasks: Mapping[str, str]) -> str:
    """What a plan shows of each task, for the log: ``asr 412 (41.2 %, 1.50 h), ...``."""
    seen = [key for batch in plan for key in batch]
    counts = Counter(tasks[key] for key in seen)
    hours = {task: sum(seconds[key] for key in seen if tasks[key] == task) / 3600 for task in counts}
    return ", ".join(f"{task} {n} ({n / len(seen):.1%}, {hours[task]:.2f} h)" for task, n in sorted(counts.items()))



def plan_pass(
    seconds: Mapping[str, float],
    tasks: Mapping[str, str],
    options: BatchingOptions,
    seed: int,
    number: int,
    world_size: int = 1,
) -> list[list[str]]:
    """Batches of one pass over the training data.

    Args:
        seconds: utterance -> duration, seconds.
        tasks: utterance -> task.
        options: see ``BatchingOptions``.
        seed: of the experiment.
        number: which pass, from 0.
        world_size: ranks that share each batch; every batch has at least that many utterances.

    Returns:
        lists of utterance ids; an utterance whose task's share is above one may appear more than once.
    """
    rng = random.Random(f"{seed}:{number}")
    shares = times_seen(tasks, options)
    keys: list[str] = []
    for key in sorted(seconds):
        share = shares[tasks[key]]
        keys += [key] * (int(share) + (rng.random() < share % 1))
    rng.shuffle(keys)
    size = options.max_utterances * options.pool
    batches: list[list[str]] = []
    for start in range(0, len(keys), size):
        batches += cut(sorted(keys[start : start + size], key=lambda k: (seconds[k], k)), seconds, options)
    batches = at_least(batches, world_size)
    rng.shuffle(batches)
    return batches


def cut(keys: list[str], seconds: Mapping[str, float], options: BatchingOptions) -> list[list[str]]:
    """Cut ``keys``, in their order, into batches within the limits; a longer utterance makes a batch of its own."""
    batches: list[list[str]] = []
    longest = 0.0
    for key in keys:
        longest = max(longest, seconds[key])
        full = batches and (
            len(batches[-1]) >= options.max_utterances or longest * (len(batches[-1]) + 1) > options.max_seconds
        )
        if not batches or full:
            batches.append([])
            longest = seconds[key]
        batches[-1].append(key)
    return batches


def at_least(batches: list[list[str]], size: int) -> list[list[str]]:
    """Join neighbouring batches until each has ``size`` utterances, so that no rank is left without work.

    A joined batch may exceed the limits: an empty rank would make the others wait for ever. Fewer than ``size``
    utterances in all give no batch.
    """
    joined: list[list[str]] = []
    for batch in batches:
        if joined and len(joined[-1]) < size:
            joined[-1] = joined[-1] + batch
        else:
            joined.append(batch)
    if len(joined) > 1 and len(joined[-1]) < size:
        joined[-2:] = [joined[-2] + joined[-1]]
    return [batch for batch in joined if len(batch) >= size]


def epoch_batches(
    seconds: Mapping[str, float],
    tasks: Mapping[str, str],
    options: BatchingOptions,
    seed: int,
    epoch: int,
    batches_per_epoch: int | None,
    world_size: int = 1,
) -> list[list[str]]:
    """Batches of one epoch: one pass, or the epoch's slice of the endless sequence of passes.

    Args:
        epoch: from 1, as ESPnet counts.
        batches_per_epoch: None = a pass is an epoch.
    """
    if batches_per_epoch is None:
        return plan_pass(seconds, tasks, options, seed, epoch - 1, world_size)
    first = (epoch - 1) * batches_per_epoch
    batches: list[list[str]] = []
    skipped = 0
    for plan in _passes(seconds, tasks, options, seed, world_size):
        if skipped + len(plan) <= first:
            skipped += len(plan)
            continue
        batches += plan[max(0, first - skipped) :]
        skipped = max(skipped + len(plan), first)
        if len(batches) >= batches_per_epoch:
            return batches[:batches_per_epoch]
    raise AssertionError("unreachable: passes never end")


def _passes(
    seconds: Mapping[str, float], tasks: Mapping[str, str], options: BatchingOptions, seed: int, world_size: int
) -> Iterator[list[list[str]]]:
    number = empty = 0
    while True:
        plan = plan_pass(seconds, tasks, options, seed, number, world_size)
        empty = 0 if plan else empty + 1
        if empty > 100:
            raise ConfigError("no batch can be made: no utterances, or batching_conf gives all tasks a share of 0")
        yield plan
        number += 1
