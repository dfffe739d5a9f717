"""Batches of training: which utterances, and when; length buckets, drawn again in every pass.

ESPnet's own samplers fix the batches once and shuffle their order; sorted by length they also separate the tasks
(counting clips all last five seconds). Here every pass shuffles the utterances, sorts by length only within a pool
of a few batches, and shuffles the batches, so that a batch mixes tasks at little padding. A plan is a pure function
of (durations, options, seed, pass): resuming needs no state but the step number.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pam_espnet.config import check_number
from pam_espnet.data.tasks import task_spec
from pam_espnet.errors import ConfigError


@dataclass(frozen=True)
class BatchingOptions:
    """How batches are made."""

    max_utterances: int = 8  # in a batch
    max_seconds: float = 80.0  # of padded audio in a batch: longest utterance times utterances
    # What both limits bound: per_gpu, the share of a batch that one process gets, so that more of them take larger
    # steps; or global, the whole batch, whatever the number of processes, as in version 0.1.
    limits: str = "per_gpu"
    pool: int = 8  # number of batches whose utterances are sorted by length together; 1 keeps batches random
    # Task name -> how often each of its utterances is seen in a pass: 1 = once, as those of tasks that are not named;
    # 0.5 = with probability one half; 2 = twice.
    task_share: Mapping[str, float] = field(default_factory=dict)
    # Instead of ``task_share``: tasks get shares of a pass in proportion to ``task_weights[task] * count **
    # task_exponent``. 1 takes the data as they are, 0 gives every task the same share (sampling with a temperature, its
    # inverse). A pass has as many utterances as there are.
    task_exponent: float | None = None
    task_weights: Mapping[str, float] = field(default_factory=dict)  # task name -> factor (default 1; 0 excludes it)
    # Task name -> count to compute with, such as its hours (default: the number of its utterances).
    task_counts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limits not in ("per_gpu", "global"):
            raise ConfigError(f"batching_conf.limits: {self.limits!r}; choose per_gpu or global")
        for name in ("max_utterances", "max_seconds", "pool"):
            check_number(getattr(self, name), f"batching_conf.{name}", above=0)
        for task, share in self.task_share.items():
            check_number(share, f"batching_conf.task_share.{task}", at_least=0)
        for task, weight in self.task_weights.items():
            check_number(weight, f"batching_conf.task_weights.{task}", at_least=0)
        for task, count in self.task_counts.items():
            check_number(count, f"batching_conf.task_counts.{task}", above=0)
        for task in (*self.task_share, *self.task_weights, *self.task_counts):
            task_spec(task)
        if self.task_exponent is None and (self.task_weights or self.task_counts):
            raise ConfigError("batching_conf: task_weights and task_counts need a task_exponent, such as 1.0")
        if self.task_exponent is not None and self.task_share:
            raise ConfigError("batching_conf: task_share and task_exponent set the same; give one")

    def sharing(self, world_size: int) -> int:
        """Over how many of ``world_size`` processes a batch is spread before the limits are applied to a share."""
        return world_size if self.limits == "per_gpu" else 1

    def describe_limits(self, world_size: int) -> str:
        """What a step takes at most, of one process and in all, for the log."""
        whole = self.sharing(world_size)
        one, everything = (
            f"{self.max_seconds * part:.4g} s and {self.max_utterances * part:.4g} utterances"
            for part in (whole / world_size, whole)
        )
        return f"a step takes at most {one} on each of {world_size} processes, {everything} on all together"


def times_seen(tasks: Mapping[str, str], options: BatchingOptions) -> dict[str, float]:
    """{task: how often each of its utterances is seen in a pass, on average}; ``tasks``: {utterance: task}."""
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
    """What a plan has of each task, for the log: ``asr 412 (41.2 %, 1.50 h), ...``."""
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
    """Batches of one pass over the training data; an utterance may appear more than once.

    Args:
        seconds: utterance -> duration, seconds.
        tasks: utterance -> task.
        number: which pass, from 0.
        world_size: ranks that share each batch, dealt out utterance by utterance; every batch has at least that many.
    """
    rng = random.Random(f"{seed}:{number}")
    shares = times_seen(tasks, options)
    keys: list[str] = []
    for key in sorted(seconds):
        share = shares[tasks[key]]
        keys += [key] * (int(share) + (rng.random() < share % 1))
    rng.shuffle(keys)
    share = options.sharing(world_size)
    size = options.max_utterances * share * options.pool
    batches: list[list[str]] = []
    for start in range(0, len(keys), size):
        batches += cut(sorted(keys[start : start + size], key=lambda k: (seconds[k], k)), seconds, options, share)
    batches = at_least(batches, world_size)
    rng.shuffle(batches)
    return batches


def cut(keys: list[str], seconds: Mapping[str, float], options: BatchingOptions, share: int = 1) -> list[list[str]]:
    """Cut ``keys``, in order of length, into batches; a longer utterance than the limits makes a separate batch.

    ``share`` > 1: of each batch the largest of ``share`` shares is within the limits, and every share has an utterance;
    for that the batch of the shortest may have one more per share than the limits allow.
    """
    batches: list[list[str]] = []
    longest = 0.0
    # For shares from the longest utterance on, so that what is left over at the end takes little memory elsewhere.
    for key in keys if share == 1 else reversed(keys):
        longest = max(longest, seconds[key])
        size = len(batches[-1]) // share + 1 if batches else 1  # of the largest share, with this utterance
        if not batches or size > options.max_utterances or (size > 1 and longest * size > options.max_seconds):
            batches.append([])
            longest = seconds[key]
        batches[-1].append(key)
    if share > 1:
        if len(batches) > 1 and len(batches[-1]) < share:
            batches[-2:] = [batches[-2] + batches[-1]]
        batches = [batch[::-1] for batch in reversed(batches)]
    return batches


def at_least(batches: list[list[str]], size: int) -> list[list[str]]:
    """Join neighbouring batches until each has ``size`` utterances, so that every rank has work.

    A joined batch may exceed the limits: an empty one would block the other ranks. Fewer than ``size``
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

    def passes() -> Iterator[list[str]]:
        empty = 0
        for number in itertools.count():
            plan = plan_pass(seconds, tasks, options, seed, number, world_size)
            empty = 0 if plan else empty + 1
            if empty > 100:
                raise ConfigError("no batch can be made: no utterances, or batching_conf gives all tasks a share of 0")
            yield from plan

    if batches_per_epoch is None:
        return plan_pass(seconds, tasks, options, seed, epoch - 1, world_size)
    first = (epoch - 1) * batches_per_epoch
    return list(itertools.islice(passes(), first, first + batches_per_epoch))
