"""CUDA graphs: a function without arguments, launched as one."""

import logging
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

    def renew(self) -> None:
        """After the last graph was dropped: free memory is given back, and the next one begins another pool."""
        if self.on:
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """``function`` (run a few times first: its buffers must bear that) as a graph; what it returns is always the
        same tensor, overwritten by the next call. Where it cannot be captured it stays a function, and the log says so.

        Raises torch.OutOfMemoryError.
        """
        if not self.on:
            return function
        assert self._stream is not None
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    function()
        finally:
            current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as those that pin memory for loaders, may go on.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # torch does not, where ending the capture is what failed
            if out_of_memory(error):
                raise torch.OutOfMemoryError(str(error)) from error
            logging.warning(f"graphs: a pass is launched kernel by kernel, which is slower: {error}")
            self._pool = torch.cuda.graph_pool_handle()
            return function

        def replay(keeps: Callable[[], Any] = function) -> Any:  # alive with the tensors that it refers to
            graph.replay()
            return result

        return replay


def out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory was too small, by torch's own error or by those of CUDA, cuBLAS and Triton."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text
