"""Fusions by name. A new one is one class and one line here."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from pam_espnet.config import check_options, drop_removed
from pam_espnet.errors import ConfigError
from pam_espnet.frontend.fusion.base import AbsFusion, FusionInputs
from pam_espnet.frontend.fusion.controls import AverageFusion, ConcatFusion, SingleFusion, StaticFusion
from pam_espnet.frontend.fusion.pam import PaMFusion

FUSIONS: dict[str, type[AbsFusion]] = {
    "pam": PaMFusion,
    "average": AverageFusion,
    "concat": ConcatFusion,
    "static": StaticFusion,
    "single": SingleFusion,
}
REMOVED = {"temperature": 1.0}  # of PaM's router


def build_fusion(
    type: str, *, num_layers: Sequence[int], width: int, prompt_width: int, names: Sequence[str], **options: Any
) -> AbsFusion:
    """The fusion ``type``, a key of ``FUSIONS``, with its own options; other arguments as in FusionInputs.
    Raises ConfigError: unknown type or option, or an option out of its range."""
    if type not in FUSIONS:
        raise ConfigError(f"fusion: unknown {type!r}; choose one of {', '.join(FUSIONS)}")
    inputs = FusionInputs(tuple(num_layers), width, prompt_width, tuple(names))
    build = partial(FUSIONS[type], inputs)  # its parameters are the options alone
    options = drop_removed(options, REMOVED if type == "pam" else {}, "frontend_conf.fusion_conf")
    check_options(options, "frontend_conf.fusion_conf", build)
    return build(**options)
