"""Train a prompt-aware speech LLM with ESPnet's trainer.

The configuration is merged from --config and --set and checked before anything is computed. A killed run continues
when it is called again, from the last of its checkpoints (checkpoint_steps makes one every N batches). At the end
the averaged model is written as <exp>/model.safetensors.

Every option of ESPnet's trainer is a key of the configuration (--set max_epoch=3). Options that are not listed here are
ESPnet's own and go to it as they are (--ngpu 2, --resume false); --help_all lists them (slow: it loads ESPnet).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from pam_espnet.cli import run_main
from pam_espnet.train.experiment import Experiment, experiment_parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help_all" in words:
        from pam_espnet.train.task import PaMTask

        PaMTask.get_parser().print_help()
        return 0
    args, espnet = experiment_parser(__doc__).parse_known_args(words)
    from pam_espnet.fileio import exclusive

    experiment = Experiment.of(args)
    first = _is_first_rank(espnet)
    # Other ranks share the first one's output directory; only the first writes there.
    with exclusive(experiment.exp / ".lock") if first else nullcontext():
        if first:
            experiment.begin()
        from pam_espnet.train.export import export_trained
        from pam_espnet.train.task import PaMTask

        command = [*experiment.arguments(), *espnet]
        options = PaMTask.get_parser().parse_args(command)
        PaMTask.main(cmd=command)
        if first and not options.dry_run and not options.collect_stats:
            export_trained(experiment.exp, options.best_model_criterion)
    return 0


def _is_first_rank(espnet: Sequence[str]) -> bool:
    """From the ranks that torchrun, Slurm or ESPnet's own option give."""
    given = espnet[espnet.index("--dist_rank") + 1] if "--dist_rank" in espnet else "0"
    return {os.environ.get("RANK", "0"), os.environ.get("SLURM_PROCID", "0"), given} == {"0"}


if __name__ == "__main__":
    sys.exit(run_main(main))
