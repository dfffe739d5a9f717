"""Check a configuration and estimate memory, disk and time of its training; no weights of transformers are loaded.

Prints the parameters of each part (frozen and trained, exact), the memory of a step, the size of the feature cache
(with --feats) and the time at measured rates; pam_espnet/train/estimate.py has where they come from. A part whose
config.json is on this machine neither in a folder nor in Hugging Face's cache is "unknown", unless --fetch true may get
the file. With --exp, --train and --valid the experiment begins: what it depends on is noted, as training does.
"""

import os
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main
from pam_espnet.train.experiment import Experiment, check_config, experiment_parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = experiment_parser(__doc__, needed=())
    parser.add_argument("--ngpu", type=int, default=0, help="GPUs of all nodes (default: 0 = CPU)")
    parser.add_argument("--num_nodes", type=int, default=1, help="nodes that these are in (default: 1)")
    parser.add_argument("--fetch", choices=("true", "false"), default="false", help="get a missing config.json")
    args = parser.parse_args(argv)
    if args.exp and not (args.train and args.valid):
        parser.error("--exp needs --train and --valid")
    if args.fetch == "false":
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: a hub out of reach costs no time
    experiment = Experiment.of(args)
    if args.exp:
        experiment.begin()
        if (args.exp / "model.safetensors").exists():
            return 0  # trained already
    else:
        check_config(experiment.config)
    from pam_espnet.train.estimate import estimate

    cached = args.feats is not None
    print(estimate(experiment.config, args.train, args.valid, cached, args.ngpu, args.num_nodes), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
