"""Options of the warm start: which losses, how long and how fast; the course of its learning rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pam_espnet.config import check_number
from pam_espnet.data.tasks import task_spec
from pam_espnet.errors import ConfigError


@dataclass(frozen=True)
class WarmStartOptions:
    """How long and how fast."""

    losses: Mapping[str, str] = field(default_factory=lambda: {"asr": "ctc"})  # task -> "ctc" or "bag": what is fitted
    steps: int = 400  # of the optimizer
    # In the first n steps each utterance is encoded by one encoder, drawn at random. Mixed from the start, untrained
    # encoders drown the one that encodes words, and the loss stays on its plateau.
    single_steps: int = 0
    # Fit the weights of encoders and layers on the validation set, one step after n steps of everything else on the
    # training set (differentiable architecture search: Liu, Simonyan and Yang, ICLR 2019, first order). On the training
    # set the encoder wins that is best memorised. Where encoders compete, their losses on that set also say how often
    # each is drawn in the first steps, and the weights with which mixing begins. 0: all is fitted on the training set,
    # as the paper reads.
    held_out_every: int = 0
    lr: float = 2e-3  # peak of AdamW's learning rate: linear warm-up over a tenth of the steps, cosine to zero
    # Parameter-name prefix -> factor on the learning rate, laid over training's ``lr_scale_conf``.
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    max_utterances: int = 16  # limits of a batch (``data.batching``), of one GPU or global as ``batching_conf.limits``
    max_seconds: float = 120.0
    task_share: Mapping[str, float] = field(default_factory=dict)  # as ``batching_conf``'s, which is of training alone
    save_every: int = 100  # steps between checkpoints that a killed run resumes from
    report_every: int = 20  # steps between lines in the log

    def __post_init__(self) -> None:
        if not isinstance(self.losses, Mapping) or not self.losses:
            raise ConfigError(f"warm_start_conf.losses: {self.losses!r}; must name tasks, such as {{asr: ctc}}")
        for task, loss in self.losses.items():
            task_spec(task)
            if loss not in ("ctc", "bag"):
                raise ConfigError(f"warm_start_conf.losses.{task}: {loss!r}; choose ctc or bag")
        for task, share in self.task_share.items():
            task_spec(task)
            check_number(share, f"warm_start_conf.task_share.{task}", at_least=0)
        for name in ("steps", "save_every", "report_every", "max_utterances"):
            check_number(getattr(self, name), f"warm_start_conf.{name}", at_least=1, whole=True)
        check_number(self.lr, "warm_start_conf.lr", above=0)
        check_number(self.held_out_every, "warm_start_conf.held_out_every", at_least=0, whole=True)
        check_number(self.single_steps, "warm_start_conf.single_steps", at_least=0, at_most=self.steps, whole=True)


def rate(step: int, options: WarmStartOptions) -> float:
    """Learning-rate factor at ``step`` (from 0)."""
    warm = max(1, options.steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, options.steps - warm)))
