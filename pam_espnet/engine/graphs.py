"""CUDA graphs: a function without arguments, launched as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 2  # kernels are compiled, libraries take their workspace: neither can be captured


class Graphs:
    """Captures functions that read and write tensors made before, and nothing else that lasts.

    All share one pool of memory for what they make on the way: one runs after the other, and what one leaves there is
    never read by another.

    Args:
        device: on any but CUDA a function stays as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self.on else None
        self._stream = torch.cuda.Stream(device) if self.on else None

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """``function`` (run a few times first: its buffers must bear that) as a graph; what it returns is always the
        same tensor, overwritten by the next call."""
        if not self.on:
            return function
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that pin memory for loaders, may go on.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()

        def replay(keeps: Callable[[], Any] = function) -> Any:  # alive with the tensors that it refers to
            graph.replay()
            return result

        return replay
