"""Decode with ESPnet's own ASR models that pam_asr_train trained: espnet2.bin.asr_inference, which then knows their
frontend. All options are ESPnet's; no LLM is loaded.
"""

import sys
from collections.abc import Sequence

from pam_espnet.cli import espnet_options, run_main


def main(argv: Sequence[str] | None = None) -> int:
    options = espnet_options(__doc__, argv)
    from espnet2.bin import asr_inference

    import pam_espnet.train.espnet_asr  # noqa: F401 (registers frontend: pam)

    asr_inference.main(cmd=options)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
