"""Batches: every utterance as often as its share, within the limits, the same for the same seed."""

import hashlib
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_espnet.data.batching import BatchingOptions, cut, describe_seen, epoch_batches, plan_pass, times_seen
from pam_espnet.errors import ConfigError

SECONDS = {f"utt{i:03d}": 0.5 + (i * 37 % 50) / 10 for i in range(100)}
TASKS = {utt: ("asr", "count")[i % 2] for i, utt in enumerate(SECONDS)}


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 9), seconds=st.floats(1, 40), pool=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_pass_takes_every_utterance_once_within_the_limits(size: int, seconds: float, pool: int, seed: int) -> None:
    options = BatchingOptions(max_utterances=size, max_seconds=seconds, pool=pool)
    batches = plan_pass(SECONDS, TASKS, options, seed, 0)
    assert Counter(utt for batch in batches for utt in batch) == Counter(list(SECONDS))
    for batch in batches:
        assert len(batch) <= size
        assert len(batch) == 1 or max(SECONDS[utt] for utt in batch) * len(batch) <= seconds


def test_passes_differ_and_repeat_with_the_seed() -> None:
    options = BatchingOptions()
    assert plan_pass(SECONDS, TASKS, options, 1, 0) == plan_pass(SECONDS, TASKS, options, 1, 0)
    assert plan_pass(SECONDS, TASKS, options, 1, 0) != plan_pass(SECONDS, TASKS, options, 1, 1)
    assert plan_pass(SECONDS, TASKS, options, 1, 0) != plan_pass(SECONDS, TASKS, options, 2, 0)


def test_epochs_are_slices_of_the_passes() -> None:
    options = BatchingOptions()
    passes = [batch for number in range(4) for batch in plan_pass(SECONDS, TASKS, options, 3, number)]
    epochs = [batch for epoch in range(1, 6) for batch in epoch_batches(SECONDS, TASKS, options, 3, epoch, 7)]
    assert epochs == passes[: 5 * 7]
    assert epoch_batches(SECONDS, TASKS, options, 3, 2, None) == plan_pass(SECONDS, TASKS, options, 3, 1)


def test_task_shares() -> None:
    options = BatchingOptions(task_share={"asr": 2.0, "count": 0.0})
    seen = Counter(utt for batch in plan_pass(SECONDS, TASKS, options, 0, 0) for utt in batch)
    assert seen == {utt: 2 for utt, task in TASKS.items() if task == "asr"}
    half = BatchingOptions(task_share={"asr": 0.5})
    seen = Counter(TASKS[u] for n in range(40) for batch in plan_pass(SECONDS, TASKS, half, 0, n) for u in batch)
    assert seen["count"] == 40 * 50
    assert 0.4 < seen["asr"] / seen["count"] < 0.6


BIG = {utt: "asr" if i < 80 else ("count", "verify")[i % 2] for i, utt in enumerate(SECONDS)}  # 80, 10, 10


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"task_exponent": 1.0}, {"asr": 0.8, "count": 0.1, "verify": 0.1}),
        ({"task_exponent": 0.0}, {"asr": 1 / 3, "count": 1 / 3, "verify": 1 / 3}),
        ({"task_exponent": 0.5}, {"asr": 2 ** 1.5 / (2 ** 1.5 + 2), "count": 1 / (2 ** 1.5 + 2)}),
        ({"task_exponent": 1.0, "task_weights": {"asr": 0.5, "count": 2, "verify": 0}}, {"asr": 2 / 3, "verify": 0}),
        ({"task_exponent": 1.0, "task_counts": {"asr": 10.0}}, {"asr": 1 / 3, "count": 1 / 3}),
    ],
)  # fmt: skip
def test_weights_and_an_exponent_set_the_shares_of_the_tasks(options: dict, shares: dict[str, float]) -> None:
    """share = weight * count ** exponent, over their sum; by the plans, not by the formula alone."""
    chosen = BatchingOptions(**options)
    plans = [plan_pass(SECONDS, BIG, chosen, 0, number) for number in range(40)]
    seen = Counter(BIG[utt] for plan in plans for batch in plan for utt in batch)
    assert sum(seen.values()) == pytest.approx(40 * 100, rel=0.03)
    for task, share in shares.items():
        assert times_seen(BIG, chosen)[task] * Counter(BIG.values())[task] / 100 == pytest.approx(share, abs=1e-6)
        assert seen[task] / sum(seen.values()) == pytest.approx(share, abs=0.02)


def test_equal_shares_give_equal_plans() -> None:
    """The data as they are, written in two ways; the same seed, the same plan; another pass, another one."""
    as_they_are = BatchingOptions(task_exponent=1.0)
    assert plan_pass(SECONDS, BIG, as_they_are, 4, 2) == plan_pass(SECONDS, BIG, BatchingOptions(), 4, 2)
    half = BatchingOptions(task_exponent=0.5, task_weights={"count": 3.0})
    assert plan_pass(SECONDS, BIG, half, 4, 2) == plan_pass(dict(reversed(SECONDS.items())), BIG, half, 4, 2)
    assert plan_pass(SECONDS, BIG, half, 4, 2) != plan_pass(SECONDS, BIG, half, 4, 3)
    passes = [batch for number in range(3) for batch in plan_pass(SECONDS, BIG, half, 4, number)]
    assert epoch_batches(SECONDS, BIG, half, 4, 2, 7) == passes[7:14]


def test_plans_of_the_mini_recipe_stay_what_they_are() -> None:
    """Its published figures were made with these plans."""
    tasks = {utt: ("asr", "count", "caption")[i % 3] for i, utt in enumerate(SECONDS)}
    options = BatchingOptions(max_utterances=12, max_seconds=90, pool=8, task_share={"count": 0.5})
    plans = json.dumps([epoch_batches(SECONDS, tasks, options, 1, epoch, 5) for epoch in range(1, 9)])
    assert (
        hashlib.sha256(plans.encode()).hexdigest() == "da8a9a8b14657e658549d3d4559959081911800c61de329ee6c734e2b6b92b2e"
    )


def test_counts_and_hours_of_a_plan() -> None:
    plan = [["utt000", "utt001"], ["utt002", "utt000"]]
    seconds = {"utt000": 1800.0, "utt001": 360.0, "utt002": 0.0}
    assert describe_seen(plan, seconds, TASKS) == "asr 3 (75.0%, 1.00 h), count 1 (25.0%, 0.10 h)"


def test_an_overlong_utterance_makes_a_separate_batch() -> None:
    seconds = {"a": 1.0, "b": 100.0, "c": 1.0}
    assert cut(["a", "b", "c"], seconds, BatchingOptions(max_seconds=10)) == [["a"], ["b"], ["c"]]


def test_every_rank_gets_work() -> None:
    batches = plan_pass(SECONDS, TASKS, BatchingOptions(max_utterances=3), 0, 0, world_size=2)
    assert batches and all(len(batch) >= 2 for batch in batches)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 5), limit=st.floats(6, 40), pool=st.integers(1, 4), ranks=st.integers(1, 8))
def test_limits_are_those_of_one_rank(size: int, limit: float, pool: int, ranks: int) -> None:
    """Of its share of a batch; but for the shortest utterances, and for the last of a pass, which may be too few."""
    options = BatchingOptions(max_utterances=size, max_seconds=limit, pool=pool)
    for index, batch in enumerate(cut(sorted(SECONDS, key=SECONDS.__getitem__), SECONDS, options, ranks)):
        share = len(batch[::ranks]) - (index == 0 and ranks > 1)  # the largest
        assert share <= size
        assert share <= 1 or max(SECONDS[utt] for utt in batch) * share <= limit
    batches = plan_pass(SECONDS, TASKS, options, 0, 0, ranks)
    assert Counter(utt for batch in batches for utt in batch) == Counter(list(SECONDS))
    assert all(ranks <= len(batch) <= (size + 2) * ranks for batch in batches)


def test_global_limits_are_those_of_the_whole_batch() -> None:
    whole = BatchingOptions(max_utterances=8, max_seconds=1000, limits="global")
    each = BatchingOptions(max_utterances=4, max_seconds=1000, pool=8)
    assert plan_pass(SECONDS, TASKS, whole, 0, 0, 2) == plan_pass(SECONDS, TASKS, whole, 0, 0)
    even = dict(list(SECONDS.items())[:96])  # nothing is left over
    assert plan_pass(even, TASKS, whole, 0, 0, 2) == plan_pass(even, TASKS, each, 0, 0, 2)
    assert "125 s and 1 utterances on each of 8 processes, 1000 s and 8 utterances on all" in whole.describe_limits(8)
    assert "1000 s and 4 utterances on each of 8 processes, 8000 s and 32" in each.describe_limits(8)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="limits: 'gpu'; choose per_gpu or global"):
        BatchingOptions(limits="gpu")
    for wrong in ({"max_utterances": 0}, {"max_seconds": -1.0}, {"pool": 0}, {"task_share": {"asr": -1.0}}):
        with pytest.raises(ConfigError, match="batching_conf"):
            BatchingOptions(**wrong)
    for wrong, message in (
        ({"task_weights": {"asr": 1.0}}, "need a task_exponent"),
        ({"task_exponent": 1.0, "task_share": {"asr": 1.0}}, "give one"),
        ({"task_exponent": 1.0, "task_weights": {"asr": -1.0}}, "at least 0"),
        ({"task_exponent": 1.0, "task_counts": {"asr": 0.0}}, "above 0"),
        ({"task_share": {"cuont": 1.0}}, "unknown task 'cuont'"),
        ({"task_exponent": 1.0, "task_weights": {"cuont": 1.0}}, "unknown task 'cuont'"),
    ):
        with pytest.raises(ConfigError, match=message):
            BatchingOptions(**wrong)
    nothing = BatchingOptions(task_exponent=1.0, task_weights={"asr": 0.0, "count": 0.0})
    with pytest.raises(ConfigError, match="no batch"):
        epoch_batches(SECONDS, TASKS, nothing, 0, 1, 5)
    with pytest.raises(ConfigError, match="no batch"):
        epoch_batches(SECONDS, TASKS, BatchingOptions(task_share={"asr": 0, "count": 0}), 0, 1, 5)
