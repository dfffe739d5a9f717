"""ESPnet's trainer, with what a killed run needs: a checkpoint that survives the kill, a curve, a progress bar.

ESPnet writes ``checkpoint.pth`` in place once per epoch; a kill in the middle leaves half a file. A copy of the last
whole one is kept beside it, and resuming falls back to the copy. Random numbers are seeded per epoch by ESPnet and
batches are a function of the epoch, so a resumed run repeats the unbroken one.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from espnet2.train.reporter import aggregate
from espnet2.train.trainer import Trainer

from pam_espnet.errors import CheckpointError
from pam_espnet.fileio import atomic_path, write_text

CHECKPOINT = "checkpoint.pth"
PREVIOUS = "checkpoint.previous.pth"
CURVE = "curve.jsonl"
PROGRESS = "progress.txt"
_DAMAGED = (RuntimeError, EOFError, pickle.UnpicklingError, OSError)


class PaMTrainer(Trainer):
    """ESPnet's ``Trainer`` with safe resuming, ``curve.jsonl`` and ``progress.txt`` in the output directory."""

    @staticmethod
    def resume(checkpoint: str | Path, **options: Any) -> None:
        """Resume from ``checkpoint``, or from the copy of the epoch before when it is damaged.

        Raises:
            CheckpointError: both are damaged, or the checkpoint does not fit the model.
        """
        checkpoint = Path(checkpoint)
        previous = checkpoint.with_name(PREVIOUS)
        if not _loads(checkpoint):
            if not previous.exists():  # killed while the first epoch was saved
                logging.warning(f"{checkpoint} is damaged and the first one of its run: training from the start")
                return
            if not _loads(previous):
                raise CheckpointError(
                    f"{checkpoint} is damaged and there is no whole {PREVIOUS}\n"
                    f"  -> remove {checkpoint} to train from the start"
                )
            logging.warning(f"{checkpoint} is damaged (killed while it was written?): resuming from {previous}")
            _copy(previous, checkpoint)
        try:
            Trainer.resume(checkpoint=checkpoint, **options)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{checkpoint} does not fit this configuration: {error}\n"
                "  -> give another --tag, or remove the experiment directory to train from the start"
            ) from error
        # A kill between ESPnet's two writes leaves the epoch's own file missing or cut; averaging needs it.
        states = torch.load(checkpoint, map_location="cpu", weights_only=True)
        own = checkpoint.with_name(f"{states['reporter']['epoch']}epoch.pth")
        if not _loads(own):
            with atomic_path(own) as tmp:
                torch.save(states["model"], tmp)

    @classmethod
    def train_one_epoch(cls, model: Any, iterator: Iterable[Any], reporter: Any, options: Any, **others: Any) -> bool:
        """One epoch of ESPnet's loop, with the checkpoint before it kept and its curve written after it."""
        output_dir = Path(options.output_dir)
        first_rank = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if first_rank and (output_dir / CHECKPOINT).exists():
            _copy(output_dir / CHECKPOINT, output_dir / PREVIOUS)
        steps: Iterable[Any] = _Progress(iterator, reporter, options) if first_rank else iterator
        invalid = super().train_one_epoch(model=model, iterator=steps, reporter=reporter, options=options, **others)
        if first_rank:
            _write_curve(output_dir / CURVE, reporter, "train", options.log_interval or 10)
        return invalid

    @classmethod
    def validate_one_epoch(
        cls, model: Any, iterator: Iterable[Any], reporter: Any, options: Any, **others: Any
    ) -> None:
        """ESPnet's validation; its mean goes to the curve as one line."""
        super().validate_one_epoch(model=model, iterator=iterator, reporter=reporter, options=options, **others)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            _write_curve(Path(options.output_dir) / CURVE, reporter, "valid", None)


class _Progress:
    """An iterable over batches with a tqdm bar over all epochs, written to a file that a shell can follow."""

    def __init__(self, iterator: Iterable[Any], reporter: Any, options: Any) -> None:
        self.iterator = iterator
        self.reporter = reporter
        self.options = options

    def __len__(self) -> int:
        return len(self.iterator)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        from tqdm import tqdm

        size, epoch = len(self), self.reporter.epoch
        with open(Path(self.options.output_dir) / PROGRESS, "a", encoding="utf-8") as file:
            bar = tqdm(
                total=size * self.options.max_epoch,
                initial=size * (epoch - 1),
                desc=f"train, epoch {epoch}/{self.options.max_epoch}",
                unit="step",
                file=file,
                mininterval=2.0,
                dynamic_ncols=False,
                ncols=100,
            )
            with bar:
                for batch in self.iterator:
                    yield batch
                    bar.update()


def _loads(path: Path) -> bool:
    """Whether ``path`` is a whole file that ``torch.load`` reads."""
    if not path.is_file():
        return False
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _DAMAGED:
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as tmp:
        shutil.copyfile(source, tmp)


def _write_curve(path: Path, reporter: Any, split: str, interval: int | None) -> None:
    """Append the means over every ``interval`` steps of this epoch (None: over all), replacing lines of an earlier,
    broken run of the same epoch."""
    epoch, count = reporter.epoch, reporter.count
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if (entry := json.loads(line))["epoch"] < epoch or entry["split"] != split]
    kept = [line for line in kept if json.loads(line)["epoch"] <= epoch]
    # ESPnet counts validation batches apart; a validation line stands at the training step it was made at.
    trained = [json.loads(line)["step"] for line in kept if json.loads(line)["split"] == "train"]
    start = reporter.total_count - count if split == "train" else max(trained, default=0) - count
    interval = interval or max(count, 1)
    for first in range(0, count, interval):
        last = min(first + interval, count)
        entry = {"step": start + last, "epoch": epoch, "split": split}
        for key, values in reporter.stats.items():
            mean = float(aggregate(values[first:last]))
            if math.isfinite(mean) and not key.endswith("_time"):
                entry[key] = round(mean, 6)
        kept.append(json.dumps(entry))
    write_text(path, "".join(f"{line}\n" for line in kept))
