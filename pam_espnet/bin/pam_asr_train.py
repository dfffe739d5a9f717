"""Train ESPnet's own ASR models on the mixture of encoders: espnet2.bin.asr_train with one frontend more.

    frontend: pam
    frontend_conf:
        encoders:
            whisper: {type: whisper, path: downloads/models/whisper-tiny.en, layers: [2, 3, 4]}
            wavlm: {type: hf_wave, path: microsoft/wavlm-base-plus, layers: [6, 9, 12]}
        fusion: static

All options are ESPnet's (--config conf/train_asr.yaml --output_dir exp/asr ...); those of frontend_conf are listed in
pam_espnet/train/espnet_frontend.py.
"""

import sys
from collections.abc import Sequence

from pam_espnet.cli import espnet_options, run_main


def main(argv: Sequence[str] | None = None) -> int:
    options = espnet_options(__doc__, argv)
    from pam_espnet.train.espnet_asr import PaMASRTask

    PaMASRTask.main(cmd=options)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
