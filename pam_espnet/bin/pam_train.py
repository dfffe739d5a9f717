"""Train a prompt-aware speech LLM with ESPnet's trainer.

The configuration is merged from --config and --set and checked before anything is computed. A killed run continues
when it is called again, from the last of its checkpoints (checkpoint_steps makes one every N batches). At the end
the averaged model is written as <exp>/model.safetensors.

Every option of ESPnet's trainer is a key of the configuration (--set max_epoch=3). Options that are not listed here are
ESPnet's own and go to it as they are (--resume false); --help_all lists them (slow: it loads ESPnet).

--ngpu N trains in N processes that share every batch, --num_nodes M in N on each of M nodes, through
torch.distributed.run (pam_espnet/train/launch.py). Limits of batches are per GPU; what that means for steps and
learning rate is in pam_espnet/train/scaling.py.
"""

import os
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main
from pam_espnet.errors import ConfigError
from pam_espnet.train.experiment import Experiment, experiment_parser
from pam_espnet.train.launch import add_launch_options, chosen_ngpu, start


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help_all" in words:
        from pam_espnet.train.task import PaMTask

        PaMTask.get_parser().print_help()
        return 0
    parser = experiment_parser(__doc__)
    add_launch_options(parser)
    args, espnet = parser.parse_known_args(words)
    if "--dist_launcher" in espnet:
        raise ConfigError("--dist_launcher: processes are started by torch.distributed.run\n  -> give --num_nodes")
    experiment = Experiment.of(args)
    ngpu = chosen_ngpu(args, experiment.config)
    if (status := start(args, ngpu, "pam_espnet.bin.pam_train", words)) is not None:
        return status
    rank, processes = (
        _given(espnet, f"--dist_{name}") or os.environ.get(name.upper()) for name in ("rank", "world_size")
    )
    _train(experiment, espnet, min(ngpu, 1), int(rank or 0) == 0, int(processes or 1))
    return 0


def _train(experiment: Experiment, espnet: Sequence[str], ngpu: int, first: bool, processes: int) -> None:
    with experiment.locked(first, processes) as given:
        from pam_espnet.train.export import export_trained
        from pam_espnet.train.scaling import scale
        from pam_espnet.train.task import PaMTask

        words = [*given, *([] if ngpu else ["--dist_backend", "gloo"]), *espnet]
        words += ["--ngpu", str(ngpu), "--multiprocessing_distributed", "false"]
        options = PaMTask.get_parser().parse_args(words)
        scale(options, processes)
        PaMTask.main(args=options)
        if first and not options.dry_run and not options.collect_stats:
            export_trained(experiment.exp, options.best_model_criterion)


def _given(words: Sequence[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


if __name__ == "__main__":
    sys.exit(run_main(main))
