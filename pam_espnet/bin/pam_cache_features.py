"""Run the frozen encoders once over the training and the validation set and keep their hidden states.

Writes <feats>/<encoder>/<set>/feats.scp (Kaldi ark, float32, (frames, layers x width)) and <feats>/<encoder>/spec.json.
The configuration is checked first. Resumable; a cache made with other weights, layers or audio is an error.
--ngpu, --processes and --num_nodes: as many processes share the utterances of each encoder.
"""

import sys
from collections.abc import Sequence
from datetime import timedelta

from pam_espnet.cli import chosen_device, run_main
from pam_espnet.train.experiment import Experiment, experiment_parser
from pam_espnet.train.launch import add_launch_options, chosen_ngpu, end, is_first, process_group, start


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = experiment_parser(__doc__, needed=("train", "valid", "feats", "exp"))
    parser.add_argument("--encoder", nargs="*", metavar="NAME", help="of the configuration (default: all it uses)")
    parser.add_argument("--rebuild", choices=("true", "false"), default="false", help="compute again what is there")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    add_launch_options(parser)
    args = parser.parse_args(words)
    experiment = Experiment.of(args)
    ngpu = chosen_ngpu(args, experiment.config)
    if (status := start(args, ngpu, "pam_espnet.bin.pam_cache_features", words)) is not None:
        return status
    from pam_espnet.config import used_encoders
    from pam_espnet.frontend.caching import cache_encoders

    first, device = is_first(), chosen_device(args.device)
    if first:
        experiment.begin()
    with process_group(device != "cpu", timedelta(days=30)):  # a share takes hours, and not all take as many
        for cache in cache_encoders(
            args.encoder or used_encoders(experiment.config),
            experiment.config["frontend_conf"],
            [args.train, args.valid],
            args.feats,
            rebuild=args.rebuild == "true",
            device=device,
        ):
            if first:
                print(f"{cache.scp}: {cache.num_layers} layers of width {cache.width}")
    return 0


if __name__ == "__main__":
    end(run_main(main))
