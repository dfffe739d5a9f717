"""Speed of the beam search, as ratios to transformers' ``generate`` on the same prefixes in the same run.

    generate      transformers' beam search; it copies the prefix for every hypothesis before it runs it
    espnet        ESPnet's own way with a causal LLM: ``generate`` on K copies of the utterance, so K * K rows
    uncached      this project's search, the whole sequence run anew for every token
    transformers  this project's search over transformers' cache (llm_conf.fused_decoding: false)
    fused         this project's search over fused blocks and a tree of hypotheses (the default)

Each way has a separate process, so that peak memory is its own too; the processes take turns, never two at once, and
rounds of the ways alternate, so that a machine that slows down slows them all. Medians are reported. Every way decodes
the same number of tokens (end tokens are switched off), and its best answers are compared with ``generate``'s before
anything is timed. Prefill is the time of a search of one token; a step is the rest, divided by its steps. What would
take too long, judged by the way's speed so far, is left out and named. Encoders are not part of it.

Prefixes are embeddings of running text, or with --exp and --data those of a trained experiment's utterances, the ones
whose length is nearest to what is asked for.

    python tests/benchmarks/decode.py --llm egs/mini/pam1/downloads/models/smollm2-135m-instruct --output decode.json

The output grows point by point: a run that was stopped, or one with other --prefix and --batch, adds what is missing.
A Markdown table is written beside it.
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

WAYS = ("generate", "espnet", "uncached", "transformers", "fused")
LONG = 60.0  # CPU seconds of a round of all ways above which one round is enough
TEXT = (
    "A speech model hears a recording, reads the question that is put to it, and answers in words. It may be asked who "
    "is talking, what is said, or which sounds are to be heard in the background, and it should say so in plain words. "
)


def main() -> None:
    """Measure what is missing in --output; print it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="folder of a Llama-type causal LLM")
    parser.add_argument("--exp", default="", help="experiment directory: its LoRA, real audio prefixes")
    parser.add_argument("--data", default="", help="with --exp: formatted data directory")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="which (all), base first")
    parser.add_argument("--prefix", type=int, nargs="+", default=[50, 100, 400], help="positions (50 100 400)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="utterances (1 8 32)")
    parser.add_argument("--beam", type=int, default=4, help="hypotheses per utterance (4)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to decode (24)")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each way (3)")
    parser.add_argument("--limit", type=float, default=60.0, help="CPU seconds that one search may take (60)")
    parser.add_argument("--profile", choices=WAYS, help="only: where this way's CPU time goes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--dtype", default="float32", help="precision of the LLM (float32)")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, read first if it is there")
    args = parser.parse_args()
    if bool(args.exp) != bool(args.data):
        parser.error("--exp and --data belong together")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    record = open_record(args)
    workers: dict[str, Worker] = {}
    try:
        for length in args.prefix:
            for batch in args.batch:
                prefixes = make_prefixes(args, length, batch)
                if prefixes is None:
                    print(f"prefix {length} batch {batch}: left out, the data has fewer utterances")
                elif args.profile:
                    profile(args, record, workers, length, batch, prefixes)
                elif any((row["prefix"], row["batch"]) == (length, batch) for row in record["rows"]):
                    print(f"prefix {length} batch {batch}: measured already")
                else:
                    measure(args, record, workers, length, batch, prefixes)
                args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                args.output.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    finally:
        for worker in workers.values():
            worker.close()


class Worker:
    """The process of one way."""

    def __init__(self, way: str, args: argparse.Namespace) -> None:
        command = [sys.executable, str(Path(__file__).with_name("decode_ways.py")), way]
        for name in ("llm", "exp", "beam", "threads", "dtype", "device"):
            command += [f"--{name}", str(getattr(args, name))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request, wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of a way died: {shlex.join(map(str, self.process.args))}")  # type: ignore[arg-type]
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def make_prefixes(args: argparse.Namespace, length: int, batch: int) -> Path | None:
    """A file with ``batch`` prefixes (P,D) of about ``length`` positions; None where there are fewer."""
    import torch

    folder = args.output.with_suffix(".prefixes")
    folder.mkdir(exist_ok=True)
    path = folder / f"{length}-{batch}.pt"
    if args.exp:
        everything = folder / "all.pt"
        if not everything.exists():
            torch.save(audio_prefixes(args), everything)
        found = sorted(torch.load(everything), key=lambda one: (abs(len(one) - length), len(one)))[:batch]
    else:
        from safetensors import safe_open
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(args.llm)(TEXT * 40)["input_ids"]
        with safe_open(str(Path(args.llm) / "model.safetensors"), "pt") as file:
            table = file.get_tensor("model.embed_tokens.weight").float()
        found = [table[torch.tensor(ids[17 * b : 17 * b + length])] for b in range(batch)]
    if len(found) < batch:
        return None
    torch.save([one.clone() for one in found], path)
    return path


def audio_prefixes(args: argparse.Namespace) -> list[Any]:
    """The prefixes (P,D) of all utterances of --data: prompt head, audio, prompt tail."""
    import torch

    from pam_espnet.data.datadir import DataDir
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.shards import read_wave
    from pam_espnet.decode.speech_llm import SpeechLLM

    model, data, found = SpeechLLM.load(args.exp, AnswerOptions()).model, DataDir.load(args.data), []
    for key in data.utterances:
        wave = torch.from_numpy(read_wave(data, key, model.frontend.sample_rate))
        with torch.no_grad():
            audio = model.audio_embeddings([data.prompt[key]], torch.tensor([len(wave)]), wave[None])
            found.append(model.build_inputs([data.prompt[key]], audio, None).embeds[0].clone())
    return found


def positions(way: str, length: int, batch: int, beam: int, tokens: int) -> int:
    """Positions that a search runs through the LLM."""
    steps = beam * (tokens - 1)
    if way == "generate":
        return batch * (beam * length + steps)
    if way == "espnet":
        return batch * beam * (beam * length + steps)
    if way == "uncached":
        return batch * (length + sum(beam * (length + step) for step in range(1, tokens)))
    return batch * (length + steps)


def measure(
    args: argparse.Namespace, record: dict[str, Any], workers: dict[str, Worker], length: int, batch: int, file: Path
) -> None:
    """One point of the table: rows of all ways into ``record``."""
    import torch

    lengths = [len(one) for one in torch.load(file)]
    search = {"do": "search", "prefixes": str(file)}
    speeds: dict[str, float] = record["speeds"]
    first: dict[str, dict[str, Any]] = {}
    for way in args.ways:
        count = positions(way, max(lengths), batch, args.beam, args.tokens)
        speed = speeds.get(way) or speeds.get(args.ways[0])
        if speed and count / speed > args.limit:
            reason = f"{way}: {count} positions, about {count / speed:.0f} CPU s a search at its last speed"
            record["left_out"].append({"prefix": length, "batch": batch, "reason": reason})
            print(f"prefix {length} batch {batch}: left out {reason}", flush=True)
            continue
        if way not in workers:
            workers[way] = Worker(way, args)
            workers[way].ask(**search, tokens=2)  # what is made at the first call is made now
        first[way] = workers[way].ask(**search, tokens=args.tokens)
        speeds[way] = count / first[way]["cpu"]
    rounds = args.rounds if sum(one["cpu"] for one in first.values()) < LONG else 1
    times: dict[str, dict[str, list[float]]] = {way: {"prefill": [], "total": [], "cpu": []} for way in first}
    for _ in range(rounds):
        for way, own in times.items():
            own["prefill"].append(workers[way].ask(**search, tokens=1)["wall"])
            found = workers[way].ask(**search, tokens=args.tokens)
            own["total"].append(found["wall"])
            own["cpu"].append(found["cpu"])
    base: dict[str, float] = {}
    for way, own in times.items():
        median = {key: statistics.median(values) for key, values in own.items()}
        median["step"] = (median["total"] - median["prefill"]) / (args.tokens - 1)
        base = base or median
        answers = zip(first[way]["answers"], next(iter(first.values()))["answers"], strict=True)
        row = {
            "prefix": length,
            "positions": [min(lengths), max(lengths)],
            "batch": batch,
            "way": way,
            "rounds": rounds,
            **median,
            "rest_bytes": first[way]["rest"],
            "peak_bytes": first[way]["peak"],
            "same_best": sum(a == b for a, b in answers),
            "faster": {key: base[key] / median[key] for key in ("total", "prefill", "step", "cpu")},
        }
        record["rows"].append(row)
        print(line(row), flush=True)


def profile(
    args: argparse.Namespace, record: dict[str, Any], workers: dict[str, Worker], length: int, batch: int, file: Path
) -> None:
    """Where the CPU time of ``args.profile`` goes, into ``record``; the profiler itself costs some."""
    if args.profile not in workers:
        workers[args.profile] = Worker(args.profile, args)
        workers[args.profile].ask(do="search", prefixes=str(file), tokens=2)
    found = workers[args.profile].ask(do="profile", prefixes=str(file), tokens=args.tokens)
    record["profiles"][f"{args.profile}, prefix {length}, batch {batch}"] = found
    print(json.dumps(found, indent=1))


def open_record(args: argparse.Namespace) -> dict[str, Any]:
    """What --output holds, or its beginning.

    Raises:
        SystemExit: it is of other options, code or versions.
    """
    from pam_espnet.cli import code_commit

    names = ("llm", "exp", "data", "beam", "tokens", "threads", "dtype", "device")
    head = {
        "options": {name: str(getattr(args, name)) for name in names},
        "commit": code_commit(),
        "cpu": cpu_model(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "espnet")},
        },
    }
    record: dict[str, Any] = {**head, "commands": [], "rows": [], "left_out": [], "profiles": {}, "speeds": {}}
    if args.output.exists():
        record = json.loads(args.output.read_text(encoding="utf-8"))
        if differ := [name for name in head if record[name] != head[name]]:
            raise SystemExit(f"{args.output}: {', '.join(differ)} differ; name another --output or remove it")
    record["commands"].append(shlex.join(["python", "tests/benchmarks/decode.py", *sys.argv[1:]]))
    return record


def cpu_model() -> str:
    """As the system names it."""
    path = Path("/proc/cpuinfo")
    names = [one.split(":")[1].strip() for one in path.read_text().splitlines() if one.startswith("model name")]
    return names[0] if names else platform.processor()


def line(row: dict[str, Any]) -> str:
    """One row as a row of the Markdown table."""
    low, high = row["positions"]
    faster, mib = row["faster"], 1 / 2**20
    cells = [
        f"{low}" if low == high else f"{low}-{high}",
        row["batch"],
        row["way"],
        f"{row['total']:.3f}",
        f"{row['prefill']:.3f}",
        f"{1000 * row['step']:.1f}",
        f"{row['cpu']:.3f}",
        *(f"{faster[key]:.2f}x" for key in ("total", "prefill", "step", "cpu")),
        f"{row['peak_bytes'] * mib:.0f}",
        f"{(row['peak_bytes'] - row['rest_bytes']) * mib:.0f}",
        f"{row['same_best']}/{row['batch']}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def markdown(record: dict[str, Any]) -> str:
    """Tables, how they were made, what was left out, profiles."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    options = ", ".join(f"{name} {value}" for name, value in record["options"].items() if value)
    parts = [
        f"{record['cpu']}; {versions}; commit {record['commit']}; {options}. Ratios: how many times faster than the "
        "first way of the same point. Peak memory is resident, weights included; 'above rest' is what one search "
        "adds.\n",
        "| prefix | batch | way | total s | prefill s | step ms | CPU s | total | prefill | step | CPU | peak MiB | "
        "above rest MiB | same best |\n|" + " --- |" * 14,
        *map(line, record["rows"]),
        "",
        *(f"Left out: prefix {one['prefix']}, batch {one['batch']}, {one['reason']}." for one in record["left_out"]),
    ]
    for name, found in record["profiles"].items():
        parts += [f"\nProfile of {name} ({found['seconds']:.2f} s):\n"]
        parts += ["| operator | calls | share |\n| --- | --- | --- |"]
        parts += [f"| {key} | {calls} | {share:.1%} |" for key, (calls, share) in found["operators"].items()]
        parts += [f"| outside of operators (Python) | | {found['outside']:.1%} |"]
    return "\n".join([*parts, "\nMade with:\n", "```", *record["commands"], "```", ""])


if __name__ == "__main__":
    main()
