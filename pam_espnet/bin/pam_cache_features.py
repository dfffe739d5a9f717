"""Run the frozen encoders once over the training and the validation set and keep their hidden states.

Writes <feats>/<encoder>/<set>/feats.scp (Kaldi ark, float32, (frames, layers x width)) and <feats>/<encoder>/spec.json.
The configuration is checked first. Resumable; a cache made with other weights, layers or audio is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pam_espnet.cli import chosen_device, run_main
from pam_espnet.train.experiment import Experiment, experiment_parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = experiment_parser(__doc__, needed=("train", "valid", "feats", "exp"))
    parser.add_argument("--encoder", nargs="*", metavar="NAME", help="of the configuration (default: all it uses)")
    parser.add_argument("--jobs", type=int, default=1, help="encoders at a time, with a thread each (default: 1)")
    parser.add_argument("--rebuild", choices=("true", "false"), default="false", help="compute again what is there")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    args = parser.parse_args(argv)
    from pam_espnet.config import used_encoders
    from pam_espnet.frontend.caching import cache_encoders

    experiment = Experiment.of(args)
    experiment.begin()
    for cache in cache_encoders(
        args.encoder or used_encoders(experiment.config),
        experiment.config["frontend_conf"],
        [args.train, args.valid],
        args.feats,
        rebuild=args.rebuild == "true",
        device=chosen_device(args.device),
        jobs=args.jobs,
    ):
        print(f"{cache.scp}: {cache.num_layers} layers of width {cache.width}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
