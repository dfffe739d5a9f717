"""How long calls take on a device's own clock; the GPU is not made to wait between them."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """Events on CUDA, else the host's clock."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        self.calls: list[tuple[str, Any, Any]] = []  # name, begin, end

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose calls are noted by ``name``."""

        def run(*args: Any, **options: Any) -> Any:
            begin = self._now()
            result = function(*args, **options)
            self.calls.append((name, begin, self._now()))
            return result

        return run

    def _now(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        """Of all calls by name since this was asked last; waits until the device is done."""
        if self.gpu:
            torch.cuda.synchronize()
        found: Counter[str] = Counter()
        for name, begin, end in self.calls:
            found[name] += begin.elapsed_time(end) if self.gpu else 1000 * (end - begin)
        self.calls.clear()
        return dict(found)
