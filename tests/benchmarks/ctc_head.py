"""Word error rate of a model's CTC head alone beside that of its decoding: whether the LLM is worth its steps.

The head's answer is its best path, the best class of every frame; both answers have the same audio embeddings. In the
recipe's folder, after stage 4:

    python ../../../tests/benchmarks/ctc_head.py --exp exp/pam_quick \\
        --data dump/quick/raw/test_asr dump/quick/raw/test_voices

Prints for each data directory both rates and their difference, paired over utterances.
"""

import argparse
from pathlib import Path


def main() -> None:
    """Print a line for each data directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, help="experiment directory")
    parser.add_argument("--data", required=True, nargs="+", help="data directories that were decoded")
    parser.add_argument("--decode", default="decode_beam", help="folder of the decoding in the experiment directory")
    args = parser.parse_args()

    import torch
    from tqdm import tqdm

    from pam_espnet.data.datadir import validate
    from pam_espnet.data.tables import read_table
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.shards import read_wave
    from pam_espnet.decode.speech_llm import SpeechLLM
    from pam_espnet.score.intervals import bootstrap, bootstrap_difference
    from pam_espnet.score.result import METRICS
    from pam_espnet.score.wer import score_wer

    torch.set_num_threads(1)
    speech = SpeechLLM.load(args.exp, AnswerOptions())
    if speech.model.ctc is None or "asr" not in speech.ctc_tasks:
        parser.error(f"--exp: {args.exp} has no CTC head of transcripts")
    show = METRICS["wer"].show
    for folder in map(Path, args.data):
        data = validate(folder)
        keys = [key for key in data.utterances if data.utt2task[key] == "asr"]
        if not keys:
            parser.error(f"--data: {folder} has no transcripts")
        decoded = read_table(Path(args.exp) / args.decode / folder.name / "text")
        head = {}
        for key in tqdm(keys, desc=folder.name, unit="utterance"):
            wave = read_wave(data, key, speech.model.frontend.sample_rate)
            (draft,) = speech.drafts(["asr"], speech.encode([wave], [data.prompt[key]]))
            assert draft is not None  # the head covers the task
            head[key] = speech.text(draft.draft)
        references = {key: data.text[key] for key in keys}
        alone, both = (
            score_wer(references, {key: answers[key] for key in keys}).metrics["wer"] for answers in (head, decoded)
        )
        difference = show(bootstrap_difference(alone, both), sign=True)
        print(f"{folder.name}: CTC head {show(bootstrap(alone))}, decoding {show(bootstrap(both))} ({difference})")


if __name__ == "__main__":
    main()
