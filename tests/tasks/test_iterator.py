"""Batches over ranks: every utterance once, as many batches on every rank, none empty."""

from __future__ import annotations

import pytest

from pam_espnet.data.batching import BatchingOptions
from pam_espnet.tasks.iterator import PaMIterFactory

SECONDS = {f"utt{i:02d}": 1.0 + i % 7 for i in range(29)}
TASKS = dict.fromkeys(SECONDS, "asr")


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("max_seconds", [100.0, 5.0])  # at 5 s most batches are single utterances
def test_ranks_share_the_batches(train: bool, world_size: int, max_seconds: float) -> None:
    ranks = [
        PaMIterFactory(
            dataset=None,
            seconds=SECONDS,
            tasks=TASKS,
            options=BatchingOptions(max_utterances=4, max_seconds=max_seconds),
            train=train,
            seed=0,
            batches_per_epoch=None,
            collate_fn=list,
            rank=rank,
            world_size=world_size,
        ).batches(1)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch for batches in ranks for batch in batches)
    seen = sorted(utt for batches in ranks for batch in batches for utt in batch)
    assert seen == sorted(SECONDS)
