"""Answer prompts about recordings in a web browser: upload or record, ask, and see what the answer is made of.

    python -m pam_espnet.bin.pam_demo --model mine.zip
    python -m pam_espnet.bin.pam_demo --model exp/pam_quick exp/single_whisper_quick

Beside the answer, as it grows: the weight of each encoder and of its layers, other answers with their probability, the
block of the LLM that predicted each token where early exit is on (--config), the spectrogram.

Needs gradio (tools/setup.sh --extras demo). The page is served to this machine alone unless --host is given; it
asks for no password. Recordings are treated as by pam_inference. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pam_espnet.bin.pam_inference import add_model_options, load_model
from pam_espnet.cli import run_main
from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError, PamError

if TYPE_CHECKING:
    from pam_espnet.demo.answering import Answering


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, several=True)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 is all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    args = parser.parse_args(argv)
    check_number(args.port, "--port", at_least=1, at_most=65535, whole=True)
    try:  # before a model is loaded for nothing
        from pam_espnet.demo.page import LAUNCH, build_page
    except ImportError as error:
        raise ConfigError(f"the demo needs gradio ({error})\n  -> tools/setup.sh --extras demo") from error
    with loaded_models(args) as models:
        page = build_page(models, args.max_seconds)
        for signum in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs that ignore the first
            signal.signal(signum, signal.default_int_handler)
        try:
            page.launch(server_name=args.host, server_port=args.port, **LAUNCH)
        except OSError as error:
            raise ConfigError(f"--host {args.host} --port {args.port}: cannot be served at: {error}") from error
    return 0


@contextmanager
def loaded_models(args: argparse.Namespace) -> Iterator[dict[str, Answering | PamError]]:
    """Name -> model, or why it cannot be loaded; they are closed afterwards. Raises PamError: none of them can be."""
    from pam_espnet.demo.answering import Answering

    models: dict[str, Answering | PamError] = {}
    with ExitStack() as stack:
        for number, path in enumerate(args.model, 1):
            name = Path(path).resolve().name.removesuffix(".zip")
            name = f"{name} ({number})" if name in models else name
            try:
                speech = load_model(argparse.Namespace(**{**vars(args), "model": path}))
            except PamError as error:
                if len(args.model) == 1:
                    raise
                logging.warning("%s", error)
                models[name] = error
            else:
                models[name] = answering = Answering(speech, args.max_seconds)
                stack.callback(answering.close)
        if all(isinstance(model, PamError) for model in models.values()):
            raise ConfigError("no model could be loaded:\n" + "\n".join(map(str, models.values())))
        yield models


if __name__ == "__main__":
    sys.exit(run_main(main))
