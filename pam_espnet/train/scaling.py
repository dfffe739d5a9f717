"""What more processes change in a training: the rule, in one place.

With ``batching_conf.limits: per_gpu`` R processes take R times as much audio in a step (``data.batching``). Then

- an epoch stays as much audio: ``num_iters_per_epoch`` and the scheduler's steps are divided by R, rounded up, so that
  checkpoints, validation and warm-up come after the same hours of audio;
- the learning rate grows by ``lr_scaling``: ``sqrt`` (by the root of R: Malladi, Lyu, Panigrahi and Arora, "On the SDEs
  and Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022; Krizhevsky, arXiv 1404.5997, for the variance of
  gradients), ``linear`` (by R: Goyal et al., arXiv 1706.02677, for SGD with warm-up) or ``none``. ``auto``, the
  default, is linear for SGD and sqrt for all others, which divide by the gradient's size.

The warm start keeps to the same rules, with AdamW and ``warm_start_conf.steps`` and ``single_steps``.

Both rules hold until the batch is so large that gradients hardly differ between batches; where that is has to be tried.
Adam's betas and epsilon stay as they are. With ``limits: global``, and with one process, nothing changes.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from pam_espnet.data.batching import BatchingOptions
from pam_espnet.errors import ConfigError
from pam_espnet.train.experiment import read_options

_RULES = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}  # power of the number of processes
_STEPS = ("warmup_steps", "first_cycle_steps", "total_steps", "max_steps", "steps_per_epoch")  # of ESPnet's schedulers


def factors(config: Mapping[str, Any], processes: int, optim: str | None) -> tuple[int, float]:
    """How many times as much audio a step of ``processes`` processes takes; the factor on the rate of ``optim``.
    Raises ConfigError: a ``lr_scaling`` that there is not."""
    rule = config.get("lr_scaling") or "auto"
    if rule == "auto":
        rule = "linear" if optim in ("sgd", "asgd") else "sqrt"
    if rule not in _RULES:
        raise ConfigError(f"lr_scaling: {rule!r}; choose auto, {', '.join(_RULES)}")
    ratio = read_options(BatchingOptions, config, "batching_conf").sharing(processes)
    return ratio, ratio ** _RULES[rule]


def scaled(config: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """The entries of a training's options that ``processes`` processes change, with their new values.
    Raises as ``factors``."""
    ratio, growth = factors(config, processes, config.get("optim"))
    if ratio == 1:
        return {}
    changed: dict[str, Any] = {}
    if config.get("num_iters_per_epoch"):
        changed["num_iters_per_epoch"] = math.ceil(config["num_iters_per_epoch"] / ratio)
    schedule = dict(config.get("scheduler_conf") or {})
    schedule.update({name: math.ceil(schedule[name] / ratio) for name in _STEPS if schedule.get(name)})
    optim = dict(config.get("optim_conf") or {})
    if "lr" in optim:
        optim["lr"] = float(optim["lr"]) * growth
    return {**changed, "scheduler_conf": schedule, "optim_conf": optim}


def scale(options: Any, processes: int) -> None:
    """Change ESPnet's parsed options, a namespace, in place, and log what was changed."""
    config, log = vars(options), logging.getLogger()  # logging.info would set up a log before ESPnet does
    for name, value in scaled(config, processes).items():
        log.info(f"{processes} processes, lr_scaling {config['lr_scaling']}: {name} {config[name]} -> {value}")
        config[name] = value
