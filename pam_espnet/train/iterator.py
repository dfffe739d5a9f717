"""ESPnet's preprocessor and iterator, and audio in archives: strings to arrays, and this project's plan of batches."""

import functools
import logging
import time
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.iterators.sequence_iter_factory import worker_init_fn
from espnet2.train.dataset import DATA_TYPES
from espnet2.train.preprocessor import AbsPreprocessor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pam_espnet.data.audio import read_audio
from pam_espnet.data.audio_ark import ARCHIVED_SOUND, locate
from pam_espnet.data.batching import BatchingOptions, at_least, cut, describe_seen, epoch_batches
from pam_espnet.data.kaldi_io import check_matrix
from pam_espnet.data.prompts import Wordings
from pam_espnet.data.tables import read_table
from pam_espnet.errors import ConfigError, DataError, PamError
from pam_espnet.llm.prompt_layout import answer_ids, check_answer_prefix, end_of_turn_id


def prompt_bytes(prompt: str) -> np.ndarray:
    """A prompt as a batch holds it: its UTF-8 bytes, int64."""
    return np.frombuffer(prompt.encode("utf-8"), dtype=np.uint8).astype(np.int64)


class ArchivedSound(UserDict[str, Any]):
    """The waves (N,) float32 of a ``wav.scp`` with archives; every reading process opens them for itself.
    Raises DataError: an archive that was cut is found at the start, other damage where it is read; names the line."""

    def __init__(self, scp: str) -> None:
        super().__init__(read_table(scp))
        self.scp = scp
        for key in {locate(value)[0]: key for key, value in self.data.items() if locate(value)[1] is not None}.values():
            self[key]  # the last of an archive

    def __getitem__(self, key: str) -> np.ndarray:
        try:
            return read_audio(self.data[key], key=key)[0]
        except DataError as error:
            line = list(self.data).index(key) + 1
            raise DataError(self.scp, f"{self.data[key]}: {error.message}", line=line, hint=error.hint) from error


DATA_TYPES[ARCHIVED_SOUND] = {"func": ArchivedSound, "kwargs": [], "help": ArchivedSound.__doc__}


class PaMPreprocessor(AbsPreprocessor):
    """Token ids of the answer, UTF-8 bytes of the prompt (lossless, whatever its length), index of the task.

    Args:
        tokenizer: the LLM's tokenizer; its vocabulary is never changed.
        tasks: task names in the model's order.
        train: part of ESPnet's contract.
        answer_prefix: as the LLM's, ``llm_conf.answer_prefix``.
    """

    def __init__(
        self, tokenizer: Any, tasks: Sequence[str], train: bool, answer_prefix: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(train)
        self.tokenizer = tokenizer
        self.tasks = list(tasks)
        self.end_id = end_of_turn_id(tokenizer)
        self.answer_prefix = check_answer_prefix(tokenizer, answer_prefix or {})

    def answer_ids(self, text: str, task: str) -> list[int]:
        """Token ids of an answer, with the end token."""
        return answer_ids(self.tokenizer, text, self.end_id, self.answer_prefix.get(task, ""))

    def __call__(self, uid: str, data: dict[str, Any]) -> dict[str, np.ndarray]:
        """Strings ``text``, ``prompt``, ``task`` become arrays; ``speech``, ``num_samples`` and ``feats_*`` are ones.
        Raises DataError: unknown task, an empty prompt or answer, or features of another kind than the cache writes."""
        data = dict(data)
        for name, value in data.items():
            if name.startswith("feats_"):
                check_matrix(value, f"utterance {uid!r}: {name}")
        task = str(data["task"]).strip()
        if task not in self.tasks:
            raise DataError("utt2task", f"utterance {uid!r}: unknown task {task!r}; known: {', '.join(self.tasks)}")
        for name in ("prompt", "text"):
            if not str(data[name]).strip():
                raise DataError(name, f"utterance {uid!r} has an empty {name}")
        data["task"] = np.array([self.tasks.index(task)], dtype=np.int64)
        data["prompt"] = prompt_bytes(str(data["prompt"]))
        data["text"] = np.array(self.answer_ids(str(data["text"]), task), dtype=np.int64)
        return data


@dataclass(frozen=True)
class FreshPrompts:
    """Wordings to draw from, ``wordings``: {task: ...}; ``prompts``: {utterance: prompt of the data directory}."""

    wordings: Mapping[str, Wordings]
    prompts: Mapping[str, str]
    tasks: Mapping[str, str]
    seed: int

    def check(self) -> None:
        """Find a prompt that no wording fits now, not hours later (DataError)."""
        for prompt, task in sorted({(prompt, self.tasks[utterance]) for utterance, prompt in self.prompts.items()}):
            if task in self.wordings:
                self.wordings[task].recognise(prompt)

    def draw(self, utterance: str, epoch: int) -> str:
        """The prompt of ``utterance`` in ``epoch``; that of the data directory where its task has no wordings."""
        prompt, wordings = self.prompts[utterance], self.wordings.get(self.tasks[utterance])
        return prompt if wordings is None else wordings.draw(prompt, utterance, self.seed, epoch)


class Reworded(Dataset):
    """``dataset`` with the prompts of ``epoch``, which depend on utterance, seed and epoch alone: neither on the number
    of processes that load data nor on where a resumed run continues."""

    def __init__(self, dataset: Any, prompts: FreshPrompts) -> None:
        self.dataset = dataset
        self.prompts = prompts
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers outlive epochs

    def __getitem__(self, utterance: str) -> tuple[str, dict[str, np.ndarray]]:
        key, data = self.dataset[utterance]
        return key, {**data, "prompt": prompt_bytes(self.prompts.draw(key, int(self.epoch)))}


@dataclass
class PaMIterFactory(AbsIterFactory):
    """Batches of each epoch; training epochs are slices of freshly shuffled passes, validation is in order. Workers of
    training are kept from epoch to epoch: nothing in them is random."""

    dataset: Any  # ESPnet's: keys -> arrays
    seconds: Mapping[str, float]  # of every utterance
    tasks: Mapping[str, str]
    options: BatchingOptions
    train: bool  # shuffle anew in every pass, or take every utterance once, shortest first
    seed: int
    batches_per_epoch: int | None  # length of a training epoch; None = one pass
    collate_fn: Callable[..., Any]
    num_workers: int = 0
    pin_memory: bool = False
    rank: int = 0
    world_size: int = 1  # each batch is dealt out over the ranks, utterance by utterance
    fresh_prompts: FreshPrompts | None = None  # where given, training draws the wordings anew in each epoch
    announce: bool = True  # whether the log has how much of each task is in an epoch
    _kept: Any = field(default=None, init=False)  # loader

    def batches(self, epoch: int) -> list[list[str]]:
        """This rank's share of the epoch's batches; the same number of batches on every rank, none empty."""
        if self.train:
            plan = epoch_batches(
                self.seconds, self.tasks, self.options, self.seed, epoch, self.batches_per_epoch, self.world_size
            )
            if self.announce and self.rank == 0:
                logging.info(f"epoch {epoch}, utterances per task: {describe_seen(plan, self.seconds, self.tasks)}")
        else:
            ordered = sorted(self.seconds, key=lambda k: (self.seconds[k], k))
            share = self.options.sharing(self.world_size)
            plan = at_least(cut(ordered, self.seconds, self.options, share), self.world_size)
        return [batch[self.rank :: self.world_size] for batch in plan]

    def build_iter(self, epoch: int, shuffle: bool | None = None) -> DataLoader:
        """The batches of ``epoch`` (from 1); ``shuffle`` is fixed by ``train`` and kept for ESPnet's contract."""
        loader: Any = self._kept or self._loader(epoch)
        if self.train and self.num_workers:
            self._kept = loader
        loader.batch_sampler[:] = self.batches(epoch)
        dataset = loader.dataset.dataset if self.num_workers else loader.dataset
        if isinstance(dataset, Reworded):
            dataset.epoch.fill_(epoch)
        return loader

    def _loader(self, epoch: int) -> DataLoader:
        prompts = self.fresh_prompts if self.train else None
        dataset = self.dataset if prompts is None else Reworded(self.dataset, prompts)
        return _Loader(
            dataset=_Caught(dataset) if self.num_workers else dataset,
            batch_sampler=[],
            persistent_workers=self.train and self.num_workers > 0,
            worker_init_fn=functools.partial(worker_init_fn, base_seed=epoch + self.seed),
            collate_fn=functools.partial(_collate, self.collate_fn) if self.num_workers else self.collate_fn,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )


class _Loader(DataLoader):
    """A ``DataLoader`` that ends with the error that a worker met in place of a batch."""

    waited = 0.0  # seconds until batches came, so far

    def __iter__(self) -> Any:
        if self._iterator is not None:  # workers begun anew, as in a resumed run, would draw their seed
            torch.empty((), dtype=torch.long).random_()
        return self._timed(super().__iter__())  # no generator itself: making the iterator draws the workers' seed now

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield _batch_or_error(batch)


def _batch_or_error(batch: Any) -> Any:
    if isinstance(batch, PamError):
        raise batch
    return batch


class _Caught(Dataset):
    """In a worker: the error about an utterance in its place; torch would give it back as another one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, utterance: str) -> Any:
        try:
            return self.dataset[utterance]
        except PamError as error:
            return error


def _collate(collate_fn: Callable[..., Any], utterances: Any) -> Any:
    """In a worker: a batch in shared memory. Left to the queue's own thread, a batch that does not fit would be lost
    with a line in the log, and training would block for ever."""
    if errors := [error for error in utterances if isinstance(error, PamError)]:
        return errors[0]
    batch = collate_fn(utterances)
    try:
        for value in batch[1].values():
            for tensor in value if isinstance(value, tuple) else [value]:
                if isinstance(tensor, Tensor):
                    tensor.share_memory_()
    except (OSError, RuntimeError) as error:
        return ConfigError(
            f"num_workers: a batch does not fit into the shared memory of this machine, /dev/shm ({error})\n"
            "  -> give the container more (docker run --shm-size 8g), or train without workers: --set num_workers=0"
        )
    return batch
