"""Gain of drafts: greedy decoding of a test set with and without them, as ratios within one run.

Audio goes through the experiment's encoders once; what is timed is the LLM from the prefix's embeddings to the last
token, and the making of the drafts. On a CPU these are CPU seconds, so that other work on the machine does not count;
with one thread they are the wall clock of an idle machine. Ways, whose tokens are compared with the first one's:

    greedy       no drafts (beam_search with beam_size 1)
    prefix       the first token of greedy alone: the part of the time that no draft can save
    ctc          the CTC head's best path, verified together with the prefix (draft.kind: ctc)
    oracle       greedy's own answers as drafts: what drafts that are always right would be worth

Rounds of the ways alternate, so that a machine that slows down slows them all; medians over the rounds are reported.
"faster" is greedy's time over the way's; "steps" is the same for what comes on top of the time of ``prefix``.

    python tests/benchmarks/drafts.py --exp exp/pam_full --data dump/full/raw/test_asr --output drafts.json
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTHS = ((1, 3), (4, 7), (8, 1000))  # tokens of an answer, for the table by length


def main() -> None:
    """Print a table and, with --output, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, help="experiment directory with a CTC head")
    parser.add_argument("--data", required=True, help="formatted data directory of an ASR test set")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="utterances decoded together (1 8)")
    parser.add_argument("--most", type=int, default=8, help="tokens per draft (8)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length cap (64)")
    parser.add_argument("--task_vocabulary", action="store_true", help="cut the output layer, as the option does")
    parser.add_argument("--limit", type=int, default=0, help="only the first utterances (0: all)")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each way (3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--dtype", default="float32", help="precision of the LLM (float32)")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()

    import torch

    from pam_espnet.data.datadir import DataDir
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.shards import read_wave
    from pam_espnet.decode.speech_llm import SpeechLLM
    from pam_espnet.search.beam import beam_search
    from pam_espnet.search.drafts import DraftOptions, WholeAnswer, draft_search
    from pam_espnet.search.hypothesis import BeamOptions

    torch.set_num_threads(args.threads)
    search = BeamOptions(beam_size=1, max_new_tokens=args.max_new_tokens)
    options = AnswerOptions(beam=search, draft=DraftOptions("ctc", args.most), task_vocabulary=args.task_vocabulary)
    speech = SpeechLLM.load(args.exp, options, args.device, args.dtype)
    engine = speech.engine
    data = DataDir.load(args.data)
    chosen = data.utterances[: args.limit or None]
    waves = {key: read_wave(data, key, speech.model.frontend.sample_rate) for key in chosen}
    keys = sorted(waves, key=lambda key: (-len(waves[key]), key))

    def prepare(keys: list[str]) -> dict[str, Any]:
        """A batch up to the prefix's embeddings."""
        prompts = [data.prompt[key] for key in keys]
        audio = speech.encode([waves[key] for key in keys], prompts)
        inputs = speech.model.build_inputs(prompts, audio, None)
        tasks = [data.utt2task[key] for key in keys]
        return {"prefix": (inputs.embeds, inputs.prefix_lengths), "about": (tasks, audio), "keys": keys}

    answers: dict[str, list[int]] = {}  # greedy's

    def of_length(seconds: list[float], low: int, high: int) -> list[float]:
        """Those of utterances whose answer has ``low`` to ``high`` tokens."""
        return [one for one, key in zip(seconds, keys, strict=True) if low <= len(answers[key]) <= high]

    def greedy(batch: dict[str, Any], cap: int | None = None) -> Any:
        caps = None if cap is None else [cap] * len(batch["keys"])
        return beam_search(engine, *batch["prefix"], search, caps), []

    def drafted(kind: str) -> Callable[[dict[str, Any]], Any]:
        def run(batch: dict[str, Any]) -> Any:
            if kind == "oracle":
                drafts = [WholeAnswer(answers[key]) for key in batch["keys"]]
            else:
                drafts = speech.drafts(*batch["about"])
            return draft_search(engine, *batch["prefix"], search, drafts, args.most)

        return run

    ways: dict[str, Callable[[dict[str, Any]], Any]] = {
        "greedy": greedy,
        "prefix": lambda batch: greedy(batch, 1),
        "ctc": drafted("ctc"),
        "oracle": drafted("oracle"),
    }
    rows = []
    for size in args.batch:
        batches, seconds = [], []
        for start in range(0, len(keys), size):
            batch, taken = timed(prepare, keys[start : start + size], args.device)
            batches.append(batch)
            seconds.append(taken)
        seconds_audio = sum(seconds)
        times: dict[str, list[list[float]]] = {name: [[] for _ in range(args.rounds)] for name in ways}  # of batches
        same, counts = Counter(), {name: [] for name in ways}
        for at in range(args.rounds):
            for batch in batches:
                for name, way in ways.items():
                    (nbest, drafts), taken = timed(way, batch, args.device)
                    times[name][at].append(taken)
                    found = {key: one.tokens for key, (one,) in zip(batch["keys"], nbest, strict=True)}
                    if at == 0:
                        answers.update(found if name == "greedy" else {})
                        end = 1 if name == "prefix" else None
                        same[name] += sum(answers[key][:end] == tokens for key, tokens in found.items())
                        counts[name] += drafts
        tokens = sum(map(len, answers.values()))
        print(f"batch {size}: {len(keys)} utterances, {tokens} tokens; encoders and adapters {seconds_audio:.2f} s")
        for name in ways:
            row = {"way": name, "batch": size, "utterances": len(keys), "tokens": tokens, "same": same[name]}
            row.update({key: sum(vars(one)[key] for one in counts[name]) for key in ("proposed", "accepted", "passes")})
            if not counts[name]:  # without drafts: a pass per token
                row["passes"] = len(keys) if name == "prefix" else tokens
            row.update(ratios(times, name), seconds_audio=seconds_audio)
            if size == 1:
                row["by_length"] = {
                    f"{low}-{high} tokens": ratios(
                        {way: [of_length(one, low, high) for one in rounds] for way, rounds in times.items()}, name
                    )
                    for low, high in LENGTHS
                }
            print(describe(row), flush=True)
            rows.append(row)
    if args.output:
        record = {
            "options": {key: str(value) for key, value in vars(args).items() if key not in ("exp", "data", "output")},
            "experiment": Path(args.exp).name,
            "set": Path(args.data).name,
            "torch": torch.__version__,
            "rows": rows,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def timed(way: Callable[[Any], Any], batch: Any, device: str) -> tuple[Any, float]:
    """What it returns, and its seconds: of the CPU, or, on a GPU, of the wall clock."""
    import torch

    cuda = device.startswith("cuda")
    clock = time.perf_counter if cuda else time.process_time
    began = clock()
    found = way(batch)
    if cuda:
        torch.cuda.synchronize()
    return found, clock() - began


def ratios(times: dict[str, list[list[float]]], name: str) -> dict[str, float]:
    """Seconds of a way, and how much faster than greedy it is: as a whole, and behind the prefix."""
    total = {way: statistics.median(sum(one) for one in rounds) for way, rounds in times.items()}
    behind = {way: seconds - total["prefix"] for way, seconds in total.items()}
    found = {"seconds": total[name]}
    if total[name] > 0:
        found["faster"] = total["greedy"] / total[name]
    if behind[name] > 0:
        found["steps_faster"] = behind["greedy"] / behind[name]
    return found


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    accepted = f"{row['accepted']:4d} of {row['proposed']:4d} drafted" if row["proposed"] else " " * 20
    steps = f"{row['steps_faster']:5.2f}x" if "steps_faster" in row else "     -"
    lengths = "".join(
        f"  {length}: {found['faster']:.2f}x" for length, found in row.get("by_length", {}).items() if "faster" in found
    )
    return (
        f"  {row['way']:10s} {row['seconds']:7.2f} s  faster {row['faster']:5.2f}x  steps {steps}"
        f"  passes {row['passes']:4d}  {accepted}  same {row['same']}/{row['utterances']}{lengths}"
    )


if __name__ == "__main__":
    main()
