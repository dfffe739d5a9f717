"""Batches: every utterance as often as its share says, within the limits, the same for the same seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_espnet.data.batching import BatchingOptions, cut, epoch_batches, plan_pass
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


def test_an_overlong_utterance_stands_alone() -> None:
    seconds = {"a": 1.0, "b": 100.0, "c": 1.0}
    assert cut(["a", "b", "c"], seconds, BatchingOptions(max_seconds=10)) == [["a"], ["b"], ["c"]]


def test_every_rank_gets_work() -> None:
    batches = plan_pass(SECONDS, TASKS, BatchingOptions(max_utterances=3), 0, 0, world_size=2)
    assert batches and all(len(batch) >= 2 for batch in batches)


def test_options_out_of_range_are_refused() -> None:
    for wrong in ({"max_utterances": 0}, {"max_seconds": -1.0}, {"pool": 0}, {"task_share": {"asr": -1.0}}):
        with pytest.raises(ConfigError, match="batching_conf"):
            BatchingOptions(**wrong)
    with pytest.raises(ConfigError, match="no batch"):
        epoch_batches(SECONDS, TASKS, BatchingOptions(task_share={"asr": 0, "count": 0}), 0, 1, 5)
