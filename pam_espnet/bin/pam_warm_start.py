"""CTC warm start of the adapters in the LLM's embedding space; takes the options of pam_train.py.

Reads warm_start_conf of --config; writes <output_dir>/warm_start.safetensors, which training starts from through
--init_trained, the token types it knows (model_conf.ctc_tokens) and warm_start.jsonl. Resumable.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    from pam_espnet.fileio import exclusive
    from pam_espnet.train.task import PaMTask
    from pam_espnet.train.warm_start import run

    args = PaMTask.get_parser().parse_args(argv)
    logging.getLogger().setLevel(args.log_level)
    with exclusive(Path(args.output_dir) / ".lock"):
        print(run(args))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
