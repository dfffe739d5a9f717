"""CTC warm start of the adapters in the LLM's embedding space.

Reads warm_start_conf of the configuration; writes <exp>/warm_start.safetensors, which pam_train starts from through
--init_trained, its token types (model_conf.ctc_tokens) and warm_start.jsonl. A killed run continues when it
is called again. Options that are not listed here are ESPnet's, as for pam_train (--ngpu 1).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main
from pam_espnet.train.experiment import Experiment, experiment_parser


def main(argv: Sequence[str] | None = None) -> int:
    args, espnet = experiment_parser(__doc__).parse_known_args(argv)
    from pam_espnet.fileio import exclusive

    experiment = Experiment.of(args)
    with exclusive(experiment.exp / ".lock"):
        experiment.begin()
        from pam_espnet.train.task import PaMTask
        from pam_espnet.train.warm_start import run

        options = PaMTask.get_parser().parse_args([*experiment.arguments(), *espnet])
        logging.getLogger().setLevel(options.log_level)
        print(run(options))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
