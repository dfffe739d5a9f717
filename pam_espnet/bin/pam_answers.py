"""A model's answers to every prompt about some test recordings, right or wrong, as JSON of a table in READMEs.

    python -m pam_espnet.bin.pam_answers --model exp/pam_quick --utterances dump/quick/raw/test_asr/UTT \
        dump/quick/raw/test_count/UTT --out ANSWERS.json

The prompts are the default ones of the model's tasks. `pam_evidence --readme README.md` writes the table between
<!-- table: ANSWERS.json --> and <!-- end -->.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.bin.pam_inference import add_model_options, load_model
from pam_espnet.cli import run_main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--utterances", required=True, nargs="+", type=Path, metavar="SET/UTT", help="formatted set/key"
    )
    parser.add_argument("--tasks", nargs="+", default=["asr", "count", "caption"], help="(asr count caption)")
    parser.add_argument("--out", required=True, type=Path, help="JSON file")
    add_model_options(parser, max_seconds=None)
    args = parser.parse_args(argv)
    from pam_espnet.data.datadir import DataDir
    from pam_espnet.data.tasks import task_spec
    from pam_espnet.decode.shards import read_wave
    from pam_espnet.errors import DataError
    from pam_espnet.fileio import write_json

    prompts = {task: task_spec(task).default_prompt for task in args.tasks}
    sets = {folder: DataDir.load(folder) for folder in {path.parent for path in args.utterances}}
    for path in args.utterances:
        if path.name not in sets[path.parent].text:
            raise DataError(path.parent, f"has no utterance {path.name!r}", hint="name one of its text")
    model, rows = load_model(args), []
    for path in args.utterances:
        data, key = sets[path.parent], path.name
        wave = read_wave(data, key, model.model.frontend.sample_rate)
        answers = model.answer([wave] * len(prompts), [*prompts.values()], [*prompts])
        right = {"prompt": data.prompt[key], "answer": data.text[key]}
        asked = {prompt: one.texts[0] for prompt, one in zip(prompts.values(), answers, strict=True)}
        rows.append({"recording": f"{path.parent.name}/{key}", "right": right, "answers": asked})
    write_json(args.out, {"model": args.model, "rows": rows})
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
