"""Batches over ranks: every utterance once, as many batches on every rank, none empty."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pam_espnet.data.batching import BatchingOptions
from pam_espnet.data.prompts import Wordings
from pam_espnet.errors import DataError
from pam_espnet.train.iterator import FreshPrompts, PaMIterFactory, prompt_bytes

PROMPTS = Path(__file__).resolve().parents[2] / "egs/librispeech/pam1/conf/prompts/asr.txt"

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


class Stored:
    """A dataset whose entries have a prompt already."""

    def __getitem__(self, utterance: str) -> tuple[str, dict[str, np.ndarray]]:
        return utterance, {"prompt": prompt_bytes("Say it."), "text": np.array([1]), "pid": os.getpid()}


def pairs_alone(utterances: list[Any]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """A batch of ESPnet's shape, without tensors."""
    return utterances, {}


def factory(train: bool = True, workers: int = 0, rank: int = 0, ranks: int = 1, files: bool = True) -> PaMIterFactory:
    """Batches of four, with wordings from a file or those of the data."""
    wordings = {"asr": Wordings(PROMPTS)} if files else {}
    return PaMIterFactory(
        dataset=Stored(),
        seconds=SECONDS,
        tasks=TASKS,
        options=BatchingOptions(max_utterances=4),
        train=train,
        seed=0,
        batches_per_epoch=None,
        collate_fn=pairs_alone,
        num_workers=workers,
        rank=rank,
        world_size=ranks,
        fresh_prompts=FreshPrompts(wordings, dict.fromkeys(SECONDS, "Transcribe the speech."), TASKS, 0),
    )


def read(made: PaMIterFactory, epoch: int) -> dict[str, str]:
    """{utterance: prompt} of one epoch."""
    pairs = [pair for batch, _ in made.build_iter(epoch) for pair in batch]
    assert all(data["text"] == [1] for _, data in pairs)
    return {utterance: data["prompt"].astype(np.uint8).tobytes().decode() for utterance, data in pairs}


def asked(epoch: int, **options: Any) -> dict[str, str]:
    return read(factory(**options), epoch)


def test_prompts_are_drawn_anew_in_every_epoch_by_any_number_of_workers() -> None:
    first = asked(1, train=True)
    assert len(set(first.values())) > 3 and set(first.values()) <= set(Wordings(PROMPTS).prompts)
    assert asked(2, train=True) != first and asked(1, train=True) == first
    assert asked(1, train=True, workers=2) == first
    assert asked(1, train=True, rank=0, ranks=2) | asked(1, train=True, rank=1, ranks=2) == first
    assert set(asked(1, train=False).values()) == {"Say it."}  # validation asks what the data say
    assert set(asked(1, train=True, files=False).values()) == {"Transcribe the speech."}


def test_a_prompt_that_no_wording_fits_is_found_before_training() -> None:
    fresh = FreshPrompts({"asr": Wordings(PROMPTS)}, dict.fromkeys(SECONDS, "Write down what is said."), TASKS, 0)
    fresh.check()
    with pytest.raises(DataError, match="no wording for the prompt 'Sing"):
        FreshPrompts({"asr": Wordings(PROMPTS)}, {"utt00": "Sing."}, TASKS, 0).check()


def test_workers_are_kept_and_nothing_else_changes() -> None:
    """They read what new ones read, in every epoch, and leave the same random state; those of validation end."""
    random: dict[int, list[torch.Tensor]] = {0: [], 2: []}
    for workers, states in random.items():
        made = factory(workers=workers)
        torch.manual_seed(0)
        for epoch in (1, 2, 3):
            assert read(made, epoch) == asked(epoch)
            states.append(torch.get_rng_state())
    assert all(torch.equal(one, other) for one, other in zip(*random.values(), strict=True))
    for train in (True, False):
        made = factory(train=train, workers=2)
        pids = [{data["pid"] for batch, _ in made.build_iter(epoch) for _, data in batch} for epoch in (1, 2)]
        assert (pids[0] == pids[1]) is train and len(pids[0]) == 2
