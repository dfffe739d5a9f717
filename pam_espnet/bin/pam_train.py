"""Train a prompt-aware speech LLM with ESPnet's trainer.

Takes all options of ESPnet's training commands (--config, --output_dir, --train_data_path_and_name_and_type,
--ngpu, --max_epoch, ...) and those of this project: --llm, --llm_conf, --frontend_conf, --model_conf,
--batching_conf, --lr_scale_conf, --init_trained, --checkpoint_steps. --help_all lists every one of them (slow: it
loads ESPnet). A killed run resumes (--resume true), at the last of its checkpoints, which --checkpoint_steps makes
every so many batches. At the end the averaged model is exported as model.safetensors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from pam_espnet.cli import run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    from pam_espnet.fileio import exclusive
    from pam_espnet.train.export import export_trained
    from pam_espnet.train.task import PaMTask

    if "--help_all" in argv:
        PaMTask.get_parser().print_help()
        return 0
    args = PaMTask.get_parser().parse_args(argv)
    first = (args.dist_rank or 0) == 0 and all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID"))
    # Other ranks share the first one's output directory; only the first writes there.
    with exclusive(Path(args.output_dir) / ".lock") if first else nullcontext():
        PaMTask.main(cmd=argv)
        if first and not args.dry_run and not args.collect_stats:
            export_trained(Path(args.output_dir), args.best_model_criterion)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
