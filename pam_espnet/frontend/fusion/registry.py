"""Fusions by name. A new one is one class and one line here."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.fusion.base import AbsFusion
from pam_espnet.frontend.fusion.controls import AverageFusion, ConcatFusion, SingleFusion, StaticFusion
from pam_espnet.frontend.fusion.pam import PaMFusion

FUSIONS: dict[str, type[AbsFusion]] = {
    "pam": PaMFusion,
    "average": AverageFusion,
    "concat": ConcatFusion,
    "static": StaticFusion,
    "single": SingleFusion,
}


def build_fusion(
    type: str, *, num_layers: Sequence[int], width: int, prompt_width: int, names: Sequence[str], **options: Any
) -> AbsFusion:
    """Build a fusion.

    Args:
        type: a key of ``FUSIONS``.
        num_layers, width, prompt_width, names: see AbsFusion.
        options: the fusion's own.

    Raises:
        ConfigError: unknown type or option, or an option out of its range.
    """
    if type not in FUSIONS:
        raise ConfigError(f"fusion: unknown {type!r}; choose one of {', '.join(FUSIONS)}")
    cls = FUSIONS[type]
    known = [name for name in inspect.signature(cls).parameters if name not in inspect.signature(AbsFusion).parameters]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"fusion_conf: {type} has no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}"
        )
    return cls(num_layers, width, prompt_width, names, **options)
