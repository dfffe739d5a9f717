"""Processes that begin with ESPnet imported, which takes seconds: forked from one that has trained nothing."""

import multiprocessing
from functools import cache
from multiprocessing.context import ForkServerContext

PRELOAD = ("pam_espnet.train.task", "pam_espnet.bin.pam_train", "peft", "peft.utils.transformers_weight_conversion")


@cache
def warm_processes() -> ForkServerContext:
    """The context that starts them. Its server is the one of this process of pytest, and imports once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "tiny_model"])
    return context
