"""Step checkpoints: a killed epoch continues at its last checkpoint, and computes what the unbroken one computes.

    <directory>/epoch<e>_step<s>/
        model.safetensors   trained tensors
        training.pth        optimizers, schedulers, statistics of the epoch so far, random states of every process
        position.json       epoch, step, and what the position is counted in; SHA-256 of the other two

The steps of an epoch are counted in batches. A checkpoint is made in a temporary directory that is renamed, and the
one before it is kept: after any kill a whole one is there. Once ESPnet has saved the epoch they are removed. Only the
first process of a distributed run writes and chooses; the others follow, or stop with the same error.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from pam_espnet.errors import CheckpointError
from pam_espnet.fileio import (
    DISK_ERRORS,
    MODEL_FILE,
    load_strict,
    read_json,
    read_trained,
    save_trained,
    sha256_file,
    whole_folder,
    write_json,
)
from pam_espnet.processes import agree, first_process, gathered
from pam_espnet.train.training_state import Training, random_state, set_random_state

DIRECTORY = "step_checkpoint"
STATE_FILE = "training.pth"
POSITION_FILE = "position.json"
KEPT = 2  # the newest, and one to fall back to
_TORCH_WRITER = ("PytorchStreamWriter failed", "unexpected pos")  # torch.save's messages on a full disk
_NAME = re.compile(r"epoch(\d+)_step(\d+)")


class ResumableEpoch:
    """The batches of an epoch after its last checkpoint, with a new one after every few of them: when the consumer asks
    for the next batch, it is through with the one before.

    Args:
        loader: ``DataLoader`` whose ``batch_sampler`` is the list of all batches of the epoch.
        directory: of the checkpoints.
        training: what is saved; restored here at once when there is a checkpoint of this epoch.
        interval: batches between two checkpoints; 0 makes none.
        resume: look for a checkpoint of this epoch. All others are removed in any case.
        before_save: called in the first process before each checkpoint.

    Raises CheckpointError: the checkpoint does not fit the model, or its epoch has other batches.
    """

    def __init__(
        self,
        loader: Any,
        directory: Path,
        training: Training,
        interval: int,
        resume: bool,
        before_save: Callable[[], None],
    ) -> None:
        self.loader = loader
        self.size = len(loader)
        self.directory = directory
        self.training = training
        self.interval = interval
        self.before_save = before_save
        self.done = 0
        self._random: dict[str, Any] | None = None
        plan = json.dumps(loader.batch_sampler).encode()
        self._position = {
            "epoch": training.reporter.epoch,
            "processes": dist.get_world_size() if dist.is_initialized() else 1,
            "batches": hashlib.sha256(plan).hexdigest(),
        }
        found, problem = agree(self._choose(resume) if first_process() else (None, None))
        if problem is not None:
            raise CheckpointError(problem)
        if found is not None:
            self._restore(found)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        if self._random is not None:  # now, because making the iterator has drawn the workers' seed
            set_random_state(self._random)
        for batch in batches:
            yield batch
            self.done += 1
            if self.interval and self.done % self.interval == 0:
                self._save()

    def _choose(self, resume: bool) -> tuple[Path | None, str | None]:
        """The newest whole checkpoint of this epoch, or why there is one and it cannot be used. Removes the others."""
        epoch = self._position["epoch"]
        found = sorted(_checkpoints(self.directory))
        usable = [path for number, _, path in found if resume and number == epoch]
        for stale in {path for _, _, path in found} - set(usable):
            _remove(stale)
        for partial in self.directory.glob(".*"):  # of a process that was killed while it wrote or removed one
            shutil.rmtree(partial)
        for path in reversed(usable):
            if damage := _damage(path):
                logging.warning(f"{path} is damaged ({damage}): continuing from what was saved before it")
                _remove(path)
                continue
            position = read_json(path / POSITION_FILE)
            if changed := [name for name, value in self._position.items() if position.get(name) != value]:
                return None, (
                    f"{path}: was made with other {' and '.join(changed)} in this epoch (the data, batching_conf, the "
                    "seed or the number of processes has changed)\n"
                    f"  -> change them back, or remove {self.directory} to begin epoch {epoch} again"
                )
            return path, None
        if usable:
            logging.warning(f"no step checkpoint of epoch {epoch} is whole: beginning the epoch again")
        return None, None

    def _restore(self, path: Path) -> None:
        load_strict(self.training.bare_model, read_trained(path / MODEL_FILE), path / MODEL_FILE)
        state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
        try:
            self.training.load_rest(state)
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path / STATE_FILE} does not fit this configuration: {error}\n"
                f"  -> change it back, or remove {self.directory} to begin epoch {self._position['epoch']} again"
            ) from error
        self._random = state["random"][dist.get_rank() if dist.is_initialized() else 0]
        self.done = read_json(path / POSITION_FILE)["step"]
        del self.loader.batch_sampler[: self.done]  # not loaded only to be skipped
        logging.info(f"resumed epoch {self._position['epoch']} at step {self.done} of {self.size} from {path}")

    def _save(self) -> None:
        drawn, problem = gathered(random_state()), None
        path = self.directory / f"epoch{self._position['epoch']}_step{self.done}"
        if first_process():
            try:
                self.before_save()
                self._write(path, {**self.training.rest(), "random": drawn})
            except (OSError, RuntimeError, SafetensorError) as error:
                problem = write_problem(error, path)
                if problem is None:
                    raise
        if (problem := agree(problem)) is not None:
            raise CheckpointError(problem)

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        with whole_folder(path) as tmp:
            save_trained(self.training.trained(), tmp / MODEL_FILE)
            torch.save(state, tmp / STATE_FILE)
            sums = {name: sha256_file(tmp / name) for name in (MODEL_FILE, STATE_FILE)}
            write_json(tmp / POSITION_FILE, {**self._position, "step": self.done, "sha256": sums})
            for name in (*sums, POSITION_FILE):
                with open(tmp / name, "rb") as file:
                    os.fsync(file.fileno())  # a full disk may show only now
        for _, _, old in sorted(_checkpoints(self.directory))[:-KEPT]:
            _remove(old)


def write_problem(error: BaseException, path: Path) -> str | None:
    """The message for an ``error`` in writing ``path``; None: it is another kind of error."""
    if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TORCH_WRITER):
        return None
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free / 1e6
    return (
        f"{path}: cannot be written ({error}); {free:.0f} MB are free there\n"
        "  -> free disk space, then run the same command again: it continues from the last whole checkpoint"
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What a full or read-only disk causes in the block becomes a CheckpointError about ``path``."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = write_problem(error, path)
        if problem is None or (isinstance(error, OSError) and error.errno not in DISK_ERRORS):
            raise
        raise CheckpointError(problem) from error


def _checkpoints(directory: Path) -> list[tuple[int, int, Path]]:
    """(epoch, step, path) of every checkpoint in ``directory``; a temporary one is none."""
    found = [(_NAME.fullmatch(path.name), path) for path in directory.glob("epoch*")]
    return [(int(match[1]), int(match[2]), path) for match, path in found if match]


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        sums = read_json(path / POSITION_FILE)["sha256"]
        for name in (MODEL_FILE, STATE_FILE):
            if sha256_file(path / name) != sums[name]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def _remove(path: Path) -> None:
    """Remove a directory; after a kill on the way no half of it has its name."""
    doomed = path.with_name(f".{path.name}.removed")
    os.replace(path, doomed)
    shutil.rmtree(doomed)
