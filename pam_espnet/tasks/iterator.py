"""ESPnet's iterator contract over this project's batches (``data.batching``)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.iterators.sequence_iter_factory import worker_init_fn
from torch.utils.data import DataLoader

from pam_espnet.data.batching import BatchingOptions, at_least, cut, epoch_batches


class PaMIterFactory(AbsIterFactory):
    """A ``DataLoader`` per epoch; training epochs are slices of freshly shuffled passes, validation is in order.

    Args:
        dataset: ESPnet's dataset (keys -> arrays).
        seconds, tasks: duration (seconds) and task of every utterance.
        options: limits of a batch.
        train: shuffle anew in every pass, or take every utterance once, shortest first.
        batches_per_epoch: length of a training epoch; None = one pass.
        rank, world_size: each batch is dealt out over the ranks, utterance by utterance.
    """

    def __init__(
        self,
        dataset: Any,
        seconds: Mapping[str, float],
        tasks: Mapping[str, str],
        options: BatchingOptions,
        *,
        train: bool,
        seed: int,
        batches_per_epoch: int | None,
        collate_fn: Callable[..., Any],
        num_workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset = dataset
        self.seconds = seconds
        self.tasks = tasks
        self.options = options
        self.train = train
        self.seed = seed
        self.batches_per_epoch = batches_per_epoch
        self.rank = rank
        self.world_size = world_size
        self.loader_options: dict[str, Any] = {
            "collate_fn": collate_fn,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
        }

    def batches(self, epoch: int) -> list[list[str]]:
        """This rank's share of the epoch's batches; the same number of batches on every rank, none empty."""
        if self.train:
            plan = epoch_batches(
                self.seconds, self.tasks, self.options, self.seed, epoch, self.batches_per_epoch, self.world_size
            )
        else:
            ordered = sorted(self.seconds, key=lambda k: (self.seconds[k], k))
            plan = at_least(cut(ordered, self.seconds, self.options), self.world_size)
        return [batch[self.rank :: self.world_size] for batch in plan]

    def build_iter(self, epoch: int, shuffle: bool | None = None) -> DataLoader:
        """The batches of ``epoch`` (from 1); ``shuffle`` is fixed by ``train`` and kept for ESPnet's contract."""
        return DataLoader(
            dataset=self.dataset,
            batch_sampler=self.batches(epoch),
            worker_init_fn=functools.partial(worker_init_fn, base_seed=epoch + self.seed),
            **self.loader_options,
        )
