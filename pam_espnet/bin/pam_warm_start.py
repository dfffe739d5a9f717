"""CTC warm start of the adapters in the LLM's embedding space.

Reads warm_start_conf of the configuration; writes <exp>/warm_start.safetensors, which pam_train starts from through
--init_trained, its token types (model_conf.ctc_tokens) and warm_start.jsonl. A killed run continues when it
is called again. Options that are not listed here are ESPnet's, as for pam_train, and so is what --ngpu, --processes and
--num_nodes mean (pam_espnet/train/scaling.py: fewer steps at a higher rate where limits are per GPU).
"""

import logging
import sys
from collections.abc import Sequence

from pam_espnet.cli import run_main
from pam_espnet.train.experiment import Experiment, experiment_parser
from pam_espnet.train.launch import add_launch_options, chosen_ngpu, end, is_first, process_group, start


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = experiment_parser(__doc__)
    add_launch_options(parser)
    args, espnet = parser.parse_known_args(words)
    experiment = Experiment.of(args)
    ngpu = chosen_ngpu(args, experiment.config)
    if (status := start(args, ngpu, "pam_espnet.bin.pam_warm_start", words)) is not None:
        return status
    first = is_first()
    with experiment.locked(first) as given:
        from pam_espnet.train.task import PaMTask
        from pam_espnet.train.warm_start import run

        options = PaMTask.get_parser().parse_args([*given, *espnet, "--ngpu", str(min(ngpu, 1))])
        if first:
            logging.getLogger().setLevel(options.log_level)
        with process_group(ngpu > 0):
            path = run(options)
        if first:
            print(path)
    return 0


if __name__ == "__main__":
    end(run_main(main))
