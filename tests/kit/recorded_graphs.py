"""CUDA graphs played on a CPU: operations are recorded once, and replayed on the same tensors without Python.

What a replay does not redo shows as on a GPU: numbers that came from the host stay what they were when they were
recorded. Reading a tensor on the host, which no capture allows, is refused. All graphs share their memory: what one
makes on the way, and nobody holds when its recording ends, is overwritten before another is replayed.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from pam_espnet.engine.graphs import WARM_UPS, Graphs

HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "item")
POISON = 77  # of whole numbers; floats become NaN


def place(tensor: Tensor) -> int:
    """Where its numbers lie; 0 for packed weights, which are nobody's buffer."""
    return 0 if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Keeps every operation with aliases of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: list[tuple[weakref.ref[Tensor], Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in HOST or "unique" in name:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if name == "index" and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1]):
            raise RuntimeError("operation not permitted when stream is capturing: a bool index has any number of rows")
        aliases, more = (
            tree_map_only(Tensor, lambda one: one if one.is_mkldnn else one.detach(), part)
            for part in (args, kwargs or {})
        )
        result = func(*args, **(kwargs or {}))
        outs = [one for one in tree_flatten(result)[0] if isinstance(one, Tensor)]
        ins = {place(one) for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)}
        kept = [one.detach() for one in outs]
        self.steps.append((func, aliases, more, kept))
        for one, alias in zip(outs, kept, strict=True):
            if place(one) not in ins:
                self.made.append((weakref.ref(one), alias))
        return result

    def replay(self) -> None:
        """The operations again; what is no view and was not changed in place is written where it was."""
        for func, args, kwargs, kept in self.steps:
            found = [one for one in tree_flatten(func(*args, **kwargs))[0] if isinstance(one, Tensor)]
            for one, target in zip(found, kept, strict=True):
                if one.numel() and one.data_ptr() != target.data_ptr():
                    target.copy_(one)


class RecordedGraphs(Graphs):
    """See ``Graphs``."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.replays = 0
        self._free: list[Tensor] = []  # of all recordings

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """See ``Graphs``."""
        for _ in range(WARM_UPS):
            function()
        with Recorder() as recorder:
            result = function()
        gc.collect()
        alive = [one for one in (ref() for ref, _ in recorder.made) if one is not None]
        held = {place(one) for one in alive}
        own = [alias for _, alias in recorder.made if place(alias) not in held]

        def replay() -> Any:
            self.replays += 1
            for one in self._free:  # another graph, or this one the last time, has left something else there
                one.fill_(torch.nan if one.is_floating_point() else POISON % 2 if one.dtype == torch.bool else POISON)
            recorder.replay()
            return result

        self._free += own
        return replay
