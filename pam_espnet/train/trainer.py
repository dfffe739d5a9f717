"""ESPnet's trainer, with what a killed run needs: checkpoints that survive the kill, a curve, a progress bar.

ESPnet writes ``checkpoint.pth`` in place once per epoch; after a kill in the middle it is half a file. A copy of the
last whole one is kept beside it, and resuming falls back to the copy. ESPnet seeds random numbers per epoch and batches
are a function of the epoch, so a resumed run repeats the unbroken one, from its last step checkpoint on. Of more than
two processes to the last digit only with ``unused_parameters: true``: DDP lays gradients out anew after its first step
otherwise, and sums of more than two terms are rounded in another order.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from espnet2.train.reporter import aggregate
from espnet2.train.trainer import Trainer, TrainerOptions
from espnet2.utils.build_dataclass import build_dataclass
from torch import nn

from pam_espnet.config import check_number
from pam_espnet.errors import CheckpointError, ConfigError
from pam_espnet.fileio import atomic_path, write_text
from pam_espnet.processes import first_process
from pam_espnet.train.rates import Rates
from pam_espnet.train.step_checkpoint import DIRECTORY, ResumableEpoch, disk_errors
from pam_espnet.train.training_state import Training

CHECKPOINT = "checkpoint.pth"
PREVIOUS = "checkpoint.previous.pth"
CURVE = "curve.jsonl"
PROGRESS = "progress.txt"
_PATIENCE = 30  # updates in a row without a finite gradient; fewer may be mixed precision that looks for its scale
_WHAT_TO_TRY = (
    "  -> no model was written; give another --tag and a lower optim_conf.lr, more scheduler_conf.warmup_steps, or a "
    "smaller grad_clip"
)
_DAMAGED = (RuntimeError, EOFError, pickle.UnpicklingError, OSError)


@dataclasses.dataclass
class PaMTrainerOptions(TrainerOptions):
    """ESPnet's options and ``checkpoint_steps``: batches between two step checkpoints, 0 for none."""

    checkpoint_steps: int


class PaMTrainer(Trainer):
    """ESPnet's ``Trainer`` with safe resuming, ``curve.jsonl`` and ``progress.txt`` in the output directory."""

    @classmethod
    def build_options(cls, args: argparse.Namespace) -> PaMTrainerOptions:
        """The trainer's share of the command line; ConfigError for a negative ``checkpoint_steps``."""
        check_number(args.checkpoint_steps, "checkpoint_steps", at_least=0, whole=True)
        return build_dataclass(PaMTrainerOptions, args)

    @classmethod
    def run(cls, *, trainer_options: PaMTrainerOptions, **others: Any) -> None:
        """ESPnet's whole training; step checkpoints are gone when it ends.
        Raises:
            CheckpointError: a file could not be written, as on a full disk; names it and what to do.
            ConfigError: a step does not fit into the GPU's memory; names the option to change.
        """
        output_dir = Path(trainer_options.output_dir)
        model = others["model"]
        trainer_options.unused_parameters |= model.leaves_unused
        # What all processes have alike is not sent: buffers in every step, frozen weights before the first.
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, model.alike_names())
        try:
            with disk_errors(output_dir):  # ESPnet writes its files in place; the copy of the epoch before is whole
                super().run(trainer_options=trainer_options, **others)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"the GPU's memory is too small for a step: {error}\n{_less_memory(model)}") from error
        if first_process():
            shutil.rmtree(output_dir / DIRECTORY, ignore_errors=True)

    @staticmethod
    def resume(checkpoint: str | Path, **options: Any) -> None:
        """Resume from ``checkpoint``, or from the copy of the epoch before when it is damaged.
        Raises CheckpointError: both are damaged, or the checkpoint does not fit the model."""
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
        # After a kill between ESPnet's two writes the epoch's own file is missing or cut; averaging needs it.
        states = torch.load(checkpoint, map_location="cpu", weights_only=True)
        own = checkpoint.with_name(f"{states['reporter']['epoch']}epoch.pth")
        if not _loads(own):
            with atomic_path(own) as tmp:
                torch.save(states["model"], tmp)

    @classmethod
    def train_one_epoch(cls, model: Any, iterator: Any, reporter: Any, options: Any, **others: Any) -> bool:
        """One epoch of ESPnet's loop, from its last step checkpoint, with the checkpoint before it kept and its curve
        written after it."""
        output_dir = Path(options.output_dir)
        if first_process() and (output_dir / CHECKPOINT).exists():
            _copy(output_dir / CHECKPOINT, output_dir / PREVIOUS)
        optimizers = others["optimizers"]
        for optimizer in optimizers:
            optimizer.zero_grad()  # of an incomplete group of accum_grad batches: no checkpoint holds gradients

        def write_curve() -> None:
            _write_curve(output_dir / CURVE, reporter, "train", options.log_interval or 10)

        training = Training(model, optimizers, others["schedulers"], others["scaler"], reporter)
        epoch = ResumableEpoch(
            iterator,
            output_dir / DIRECTORY,
            training,
            interval=-(-options.checkpoint_steps // options.accum_grad) * options.accum_grad,
            resume=options.resume,
            before_save=write_curve,
        )
        steps = _Steps(epoch, reporter, options, optimizers, Rates(training.bare_model, iterator))
        super().train_one_epoch(model=model, iterator=steps, reporter=reporter, options=options, **others)
        if first_process():
            write_curve()
        # ESPnet's answer covers the steps of this process only; it would end training as if all were well.
        if not options.no_forward_run and not steps.finite_updates():
            if reporter.count < options.accum_grad:
                raise ConfigError(f"accum_grad: {options.accum_grad}, but an epoch has {reporter.count} batches")
            raise ConfigError(steps.diverged())
        return False

    @classmethod
    def validate_one_epoch(
        cls, model: Any, iterator: Iterable[Any], reporter: Any, options: Any, **others: Any
    ) -> None:
        """ESPnet's validation; its mean goes to the curve as one line.

        Raises ConfigError: the loss is not finite after the last epoch, or the criterion by which epochs are chosen is
        not among the figures; there would be no model, or one that answers nothing.
        """
        super().validate_one_epoch(model=model, iterator=iterator, reporter=reporter, options=options, **others)
        phase, key, _ = options.best_model_criterion[0]
        if phase == "valid" and reporter.stats and key not in reporter.stats:
            raise ConfigError(f"best_model_criterion: validation has no {key!r}; it has {', '.join(reporter.stats)}")
        if reporter.epoch == options.max_epoch and "loss" in reporter.stats:
            loss = float(aggregate(reporter.stats["loss"]))
            if not math.isfinite(loss):
                epochs = f"epoch {reporter.epoch} of {options.max_epoch}"
                raise ConfigError(f"training diverged in {epochs}: the validation loss is {loss}\n{_WHAT_TO_TRY}")
        if first_process():
            _write_curve(Path(options.output_dir) / CURVE, reporter, "valid", None)


@dataclasses.dataclass
class _Steps:
    """An iterable over batches: with a tqdm bar over all epochs, written to a file that a shell can follow, and an end
    when training has diverged (gradients are the same on all ranks, so all of them end)."""

    epoch: ResumableEpoch
    reporter: Any
    options: Any
    optimizers: Any
    rates: Rates

    def __len__(self) -> int:
        return len(self.epoch)

    def __iter__(self) -> Iterator[Any]:
        from tqdm import tqdm

        size, number, first = len(self), self.reporter.epoch, first_process()
        interval = self.options.log_interval or max(size // 20, 10)  # as ESPnet's
        path = Path(self.options.output_dir) / PROGRESS if first else os.devnull
        with open(path, "a", encoding="utf-8") as file:
            bar = tqdm(
                total=size * self.options.max_epoch,
                initial=size * (number - 1) + self.epoch.done,
                desc=f"train, epoch {number}/{self.options.max_epoch}",
                unit="step",
                file=file,
                mininterval=2.0,
                dynamic_ncols=False,
                ncols=100,
                disable=not first,
            )
            with bar:
                for done, batch in enumerate(self.epoch, 1):
                    yield batch
                    self.rates.add(batch[1])
                    if done % interval == 0:  # on all ranks, behind ESPnet's own line
                        rate, line = self.rates.since_last()
                        last = self.reporter.count
                        logging.info(f"{number}epoch:train:{last - interval + 1}-{last}batch: {line}")
                        bar.set_postfix_str(rate, refresh=False)
                    bar.update()
                    patience = _PATIENCE * self.options.accum_grad
                    if self.reporter.count >= patience and not self.finite_updates(patience):
                        raise ConfigError(self.diverged())

    def finite_updates(self, last: int = 0) -> list[int]:
        """Which of this epoch's ``last`` batches (0: all), from 1, updated the model by finite gradients."""
        norms = self.reporter.stats.get("grad_norm", [])[-last:]
        return [step for step, norm in enumerate(norms, 1) if math.isfinite(norm.value)]

    def diverged(self) -> str:
        """The message: where, the loss, the learning rate, what to try."""
        since = max(self.finite_updates(), default=0) + 1
        loss = self.reporter.stats["loss"][-1].value
        rate = max(group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups)
        return (
            f"training diverged in epoch {self.reporter.epoch} of {self.options.max_epoch}: no finite gradient since "
            f"step {since} of {len(self)}; loss {loss:.4g}, learning rate {rate:.3g}\n{_WHAT_TO_TRY}"
        )


def _less_memory(model: Any) -> str:
    """What to set after a step that did not fit."""
    if (every := model.decoder.gradient_checkpointing) == 1:
        return "  -> give another --tag and a smaller batching_conf.max_seconds"
    more = "true" if every in (2, 3) else every // 2 or 2
    return f"  -> give another --tag and --set llm_conf.gradient_checkpointing={more}, where it is {every} now"


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
