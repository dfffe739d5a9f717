"""Answer prompts about recordings over HTTP, as OpenAI's clients send them.

    python -m pam_espnet.bin.pam_serve --model mine.zip
    curl http://127.0.0.1:8000/v1/audio/transcriptions -F model=mine -F file=@clip.wav

/v1/audio/transcriptions transcribes; /v1/chat/completions takes any prompt with an input_audio part. Requests that
come together are decoded together, which changes no answer. Needs tools/setup.sh --extras serve. This machine alone is
served unless --host is given; what leaves it should go through a proxy with TLS. SIGTERM and Ctrl-C stop the server
when the requests that it has are answered.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.bin.pam_inference import MIN_SECONDS, add_model_options, load_model
from pam_espnet.cli import run_main
from pam_espnet.config import check_number
from pam_espnet.errors import ConfigError

MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, max_seconds=600.0)
    parser.add_argument("--name", help="of the model, which clients give (default: --model without folder and .zip)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 is all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--key_file", type=Path, help="its one line is the key that clients must send (default: none)")
    parser.add_argument("--max_mb", type=float, default=25, help="largest request in MiB (default: 25)")
    parser.add_argument("--places", type=int, default=64, help="requests at once; others get status 429 (default: 64)")
    parser.add_argument("--upload_timeout", type=float, default=60, help="seconds to send a request (default: 60)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds until its answer is sent (default: 120)")
    args = parser.parse_args(argv)
    check_number(args.port, "--port", at_least=0, at_most=65535, whole=True)
    check_number(args.places, "--places", at_least=1, whole=True)
    for name in ("max_mb", "upload_timeout", "timeout"):
        check_number(getattr(args, name), f"--{name}", above=0)
    check_number(args.max_seconds, "--max_seconds", above=MIN_SECONDS)
    key = None if args.key_file is None else read_key(args.key_file)
    try:  # before a model is loaded for nothing
        from pam_espnet.serve.limits import Limits
        from pam_espnet.serve.server import build_server
    except ImportError as error:
        raise ConfigError(f"the server needs more packages ({error})\n  -> tools/setup.sh --extras serve") from error

    limits = Limits(int(args.max_mb * MIB), args.max_seconds, args.places, args.upload_timeout, args.timeout)
    name = args.name or Path(args.model).resolve().name.removesuffix(".zip")
    server = build_server(load_model(args), name, limits, key, args.host, args.port)
    if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        logging.warning("anyone who reaches %s may ask: --key_file FILE asks for a key", args.host)
    for signum in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has stopped
        signal.signal(signum, lambda *_: None)
    server.run()
    return 0


def read_key(path: Path) -> str:
    """The key in a file. Raises ConfigError: no such file, or no key in it."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--key_file {path}: cannot be read: {error}") from error
    if not key.isascii() or len(key.split()) != 1:
        raise ConfigError(f"--key_file {path}: must hold one word of ASCII letters\n  -> openssl rand -hex 32 > {path}")
    return key


if __name__ == "__main__":
    sys.exit(run_main(main))
