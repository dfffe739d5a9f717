"""The page on a free port of loopback, in threads of the test."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from services import unavailable

if TYPE_CHECKING:
    from pam_espnet.demo.answering import Answering
    from pam_espnet.errors import PamError

EXIT = {"beam_size": 3, "max_new_tokens": 12, "exit": {"mode": "confidence", "layers": [1], "threshold": 0.1}}


def require_gradio() -> None:
    """Skip a test, or fail it, where gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        unavailable("gradio", "gradio is not installed: tools/setup.sh --extras demo")


@contextmanager
def showing(models: Mapping[str, Answering | PamError], max_seconds: float = 30.0) -> Iterator[str]:
    """The URL of the page with these models; it is closed afterwards, they are not."""
    from pam_espnet.demo.page import LAUNCH, build_page

    page = build_page(models, max_seconds)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    try:
        yield url
    finally:
        page.close(verbose=False)
