"""Masks on encoder frames in training: short spans of time and single values are set to zero.

With a quarter of an hour of speech the adapters memorise the training transcripts; masking part of the input delays
that. Time masks follow SpecAugment (Park et al., Interspeech 2019), applied to hidden states because the encoders are
frozen and run once.

Dimension letters: B utterances, T encoder frames, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.config import check_number


@dataclass(frozen=True)
class MaskOptions:
    """Amount of masking in training; none by default."""

    span: float = 0.0  # longest time mask, seconds; each is drawn uniformly from 0 to it
    every: float = 2.0  # one time mask per this many seconds of audio (rounded up)
    dropout: float = 0.0  # probability of masking a single value

    def __post_init__(self) -> None:
        check_number(self.span, "mask_conf.span", at_least=0)
        check_number(self.every, "mask_conf.every", above=0)
        check_number(self.dropout, "mask_conf.dropout", at_least=0, below=1)


def draw_spans(seconds: Tensor, longest: float, options: MaskOptions) -> Tensor:
    """Time masks (B, masks, 2) as start and end in seconds, for utterances of ``seconds`` (B,), ``longest`` at most.

    They are the same for all encoders, so that none fills in another. Utterances with fewer masks than others get
    empty ones. A mask covers at most a third of an utterance.
    """
    most = max(1, math.ceil(longest / options.every))
    count = torch.ceil(seconds / options.every)[:, None]
    widest = torch.clamp(seconds / 3, max=options.span)[:, None]
    width = torch.rand(len(seconds), most, device=seconds.device) * widest
    width = width * (torch.arange(most, device=seconds.device) < count)
    start = torch.rand_like(width) * (seconds[:, None] - width)
    return torch.stack([start, start + width], dim=-1)


def hide(hidden: Tensor, frame_rate: float, spans: Tensor, dropout: float) -> Tensor:
    """``hidden`` (B,T,D) with the spans (B, masks, 2; seconds) set to zero, every layer's mean, and dropout."""
    time = (torch.arange(hidden.shape[1], device=hidden.device) + 0.5) / frame_rate
    inside = (time >= spans[..., :1]) & (time < spans[..., 1:])
    return F.dropout(hidden.masked_fill(inside.any(dim=1)[..., None], 0.0), dropout)
