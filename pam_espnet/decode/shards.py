"""A data directory through a trained experiment: resumable, sharded, each utterance exactly once."""

import contextlib
import json
import logging
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pam_espnet.config import check_number
from pam_espnet.data.audio import read_audio
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.passport import Passport
from pam_espnet.data.tables import write_table
from pam_espnet.decode.answers import Answer, PartialAnswer
from pam_espnet.decode.batches import AUTO, CPU_BATCH, in_batches, read_batches
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import CheckpointError, ConfigError, DataError
from pam_espnet.fileio import MODEL_FILE, check_key, exclusive, read_json, sha256_file, write_json, write_text

JOURNAL = "journal.jsonl"
REFRESH = 0.5  # seconds between two updates of a progress bar within a batch
CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak of resident memory


@dataclass(frozen=True)
class DecodeOptions:
    """How a data directory is decoded."""

    batch_size: int | str = CPU_BATCH  # utterances decoded together; "auto": as many as fit
    audio: str = "on"  # or "zero": the waveform is set to zero, the control that shows what the audio contributes
    shard: int = 1  # decode the ``shard``-th (from 1) ...
    shards: int = 1  # ... of ``shards`` parts
    limit: int = 0  # at most this many utterances (0 = all); for trying things out

    def __post_init__(self) -> None:
        if self.audio not in ("on", "zero"):
            raise ConfigError(f"audio must be 'on' or 'zero', got {self.audio!r}")
        if self.batch_size != AUTO:
            check_number(self.batch_size, "batch_size", at_least=1, whole=True)
        check_number(self.limit, "limit", at_least=0, whole=True)
        if not 1 <= self.shard <= self.shards:
            raise ConfigError(f"shard {self.shard} of {self.shards}: counts from 1 to the number of shards")


def as_begun(options: DecodeOptions, out_dir: str | Path, device: str) -> DecodeOptions:
    """``options``, where "auto" is what the directory was begun with; in a new one it is a number on a CPU."""
    if options.batch_size != AUTO:
        return options
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    key = Path(out_dir) / "key.json"
    begun = read_json(key)["batch_size"] if key.exists() else AUTO if on_gpu else CPU_BATCH
    return replace(options, batch_size=begun)


def shard_keys(keys: Sequence[str], seconds: dict[str, float], shard: int, shards: int) -> list[str]:
    """The ``shard``-th part of ``keys``, longest first; the parts are disjoint and cover all keys."""
    ordered = sorted(keys, key=lambda k: (-seconds[k], k))
    return ordered[shard - 1 :: shards]


def decode_shard(model: SpeechLLM, data_dir: str | Path, out_dir: str | Path, options: DecodeOptions) -> Path:
    """Decode one shard into ``<out_dir>/split<shards>/<shard>/journal.jsonl``, one line per utterance.

    A killed run continues with the first batch that is not whole, and decodes it again: batches are the same ones in
    every run (those of "auto" are in ``batches.json`` beside it), so that the results are too, to the last digit.
    """
    data = DataDir.load(data_dir)
    passport = Passport.load(data_dir)
    if lost := [utt for utt in data.utterances if utt not in passport.utterances]:
        raise DataError(data_dir, f"{lost[0]!r} is not in its passport.json", hint="run stage 2 again")
    seconds = {utt: passport.utterances[utt]["seconds"] for utt in data.utterances}
    chosen = data.utterances[: options.limit or None]
    keys = shard_keys(chosen, seconds, options.shard, options.shards)
    journal = Path(out_dir) / f"split{options.shards}" / str(options.shard) / JOURNAL
    journal.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(journal.with_name(".lock")):
        return _decode_into(journal, model, data, keys, seconds, options)


def _decode_into(
    journal: Path,
    model: SpeechLLM,
    data: DataDir,
    keys: list[str],
    seconds: Mapping[str, float],
    options: DecodeOptions,
) -> Path:
    from tqdm import tqdm

    batches, resized = read_batches(journal.parent, model, keys, data.prompt, seconds, options.batch_size)
    reset_peak_memory(model.device)
    done = set(read_journal(journal))
    rate, kept = model.model.frontend.sample_rate, sum(len(batch) for batch in batches if done.issuperset(batch))
    with (
        open(journal, "a", encoding="utf-8") as file,
        tqdm(total=len(keys), initial=kept, desc=data.path.name, unit="utt") as bar,
    ):
        show = _show_steps(bar) if sys.stderr.isatty() else None  # a log file would fill up

        def lines(batch: list[str]) -> str:
            if done.issuperset(batch):
                return ""
            waves = [read_wave(data, key, rate) for key in batch]
            if options.audio == "zero":
                waves = [np.zeros_like(wave) for wave in waves]
            asked = [data.prompt[key] for key in batch], [data.utt2task[key] for key in batch]
            began = time.perf_counter()
            answers = model.answer(waves, *asked, on_partial=show)
            wall = time.perf_counter() - began
            return journal_lines(data, batch, [len(wave) / rate for wave in waves], answers, wall)

        for batch, text in in_batches(model, batches, lines, resized):
            file.write(text)
            file.flush()
            bar.set_postfix_str("", refresh=False)
            bar.update(len(batch) if text else 0)
    note_machine(journal, model)
    return journal


def journal_lines(
    data: DataDir, batch: Sequence[str], seconds: Sequence[float], answers: Sequence[Answer], wall: float
) -> str:
    """One JSON object per utterance of a batch that took ``wall`` seconds; ``seconds`` is each one's audio."""
    lines = []
    for key, length, answer in zip(batch, seconds, answers, strict=True):
        ranked = zip(answer.texts, answer.tokens, answer.scores, answer.depths, strict=True)
        line = {
            "utt": key,
            "task": data.utt2task[key],
            "prompt": data.prompt[key],
            "hypotheses": [dict(zip(("text", "tokens", "score", "depths"), one, strict=True)) for one in ranked],
            "seconds_audio": round(length, 4),
            "seconds_wall": wall / len(batch),
            "routing": answer.routing,
            "constraints": answer.constraints,
            "draft": answer.draft,
            "answer_log_probs": answer.answer_log_probs,
        }
        known = {name: value for name, value in line.items() if value is not None}
        lines.append(json.dumps(known, ensure_ascii=False) + "\n")
    return "".join(lines)


def note_machine(journal: Path, model: SpeechLLM) -> None:
    """Write ``machine.json`` beside a journal: it is whole, and this is what it was made on."""
    on_gpu = model.device.startswith("cuda")
    machine = {
        "peak_memory_bytes": peak_memory(model.device),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "dtype": model.engine.precision,
        "graphs": model.engine.graphs,
    }
    write_json(journal.with_name("machine.json"), machine)


def _show_steps(bar: Any) -> Callable[[list[PartialAnswer]], None]:
    """A callback that writes the step and the number of unfinished utterances behind a tqdm bar."""
    shown = time.monotonic()

    def show(partials: list[PartialAnswer]) -> None:
        nonlocal shown
        running = [one for one in partials if not one.done]
        if running and time.monotonic() - shown >= REFRESH:
            shown = time.monotonic()
            bar.set_postfix_str(f"token {len(running[0].tokens)}, {len(running)} running")

    return show


def merge_shards(
    data_dir: str | Path, out_dir: str | Path, options: DecodeOptions, run: dict[str, Any]
) -> dict[str, Any]:
    """Join all shards into ``text``, ``score``, ``nbest.jsonl`` and ``stats.json``, which keeps ``run``, too.
    Raises DataError: an utterance is missing or in two shards."""
    out_dir = Path(out_dir)
    expected = DataDir.load(data_dir).utterances[: options.limit or None]
    entries: dict[str, dict[str, Any]] = {}
    machines = []
    for shard in range(1, options.shards + 1):
        journal = out_dir / f"split{options.shards}" / str(shard) / JOURNAL
        for key, entry in read_journal(journal).items():
            if key in entries:
                raise DataError(journal, f"utterance {key!r} was decoded by two shards", hint="remove the directory")
            entries[key] = entry
        machine = journal.with_name("machine.json")
        if not machine.exists():
            raise DataError(machine, "this shard did not finish", hint="run stage 4 again; what is done is kept")
        machines.append(read_json(machine))
    if missing := [key for key in expected if key not in entries]:
        raise DataError(out_dir, f"{len(missing)} utterances were not decoded, first {missing[0]!r}", hint="stage 4")
    ordered = [entries[key] for key in expected]
    write_text(out_dir / "nbest.jsonl", "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in ordered))
    write_table(out_dir / "text", {e["utt"]: e["hypotheses"][0]["text"] for e in ordered})
    write_table(out_dir / "score", {e["utt"]: f"{e['hypotheses'][0]['score']:.6f}" for e in ordered})
    stats = {
        "seconds_audio": sum(e["seconds_audio"] for e in ordered),
        "seconds_wall": sum(e["seconds_wall"] for e in ordered),
        "tokens": sum(len(e["hypotheses"][0]["tokens"]) for e in ordered),
        "constraints": dict(sum((Counter(e["constraints"]) for e in ordered), Counter())),
        **({"drafts": drafts} if (drafts := _sum_drafts(ordered)) else {}),
        "peak_memory_bytes": max(machine["peak_memory_bytes"] for machine in machines),
        "batch_size": options.batch_size,
        "shards": options.shards,
        "audio": options.audio,
        **{key: machines[0][key] for key in ("device", "threads", "dtype")},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "espnet")},
        },
        **run,
    }
    write_json(out_dir / "stats.json", stats)
    return stats


def decoded_of(exp_dir: str | Path, data_dir: str | Path) -> dict[str, str]:
    """The part of a decode directory's ``key.json`` that names checkpoint and data.
    Raises CheckpointError: nothing was trained yet."""
    checkpoint, data = Path(exp_dir) / MODEL_FILE, DataDir.load(data_dir)
    if not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint}: no such checkpoint\n  -> train first: ./run.sh --stage 3 --stop_stage 3")
    return {
        "checkpoint_sha256": sha256_file(checkpoint),
        "audio_sha256": Passport.load(data_dir).audio_digest(data.utterances),
        "tables_sha256": data.digest(),
    }


def is_complete(
    exp_dir: str | Path, data_dir: str | Path, out_dir: str | Path, options: DecodeOptions, search: dict[str, Any]
) -> bool:
    """Whether ``out_dir`` holds all hypotheses of this very run; begins it where it is new.

    Raises:
        CheckpointError: nothing was trained yet.
        DataError: the directory belongs to another checkpoint, other data or other options.
    """
    key = {
        **decoded_of(exp_dir, data_dir),
        "search": search,
        "audio": options.audio,
        "batch_size": options.batch_size,
        "limit": options.limit,
    }
    check_key(
        Path(out_dir) / "key.json", key, f"remove it (rm -r {out_dir}) or decode under another name (--decode_tag)"
    )
    return (Path(out_dir) / "stats.json").exists()


def read_wave(data: DataDir, key: str, rate: int) -> np.ndarray:
    """The waveform (N,) of an utterance; DataError where it is not sampled at ``rate`` Hz."""
    source, start, end = data.source(key)
    wave, found = read_audio(source, start=start, end=end, key=None if data.segments else key)
    if found != rate:
        raise DataError(source, f"utterance {key!r} is sampled at {found} Hz, not {rate} Hz", hint="use dump/raw/...")
    return wave


def _sum_drafts(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By drafter: utterances, tokens of their answers, tokens drafted and accepted, passes of the LLM."""
    sums: dict[str, Counter[str]] = {}
    for entry in entries:
        if draft := entry.get("draft"):
            found = sums.setdefault(draft["drafter"], Counter())
            found.update({key: draft[key] for key in ("proposed", "accepted", "passes")})
            found.update({"utterances": 1, "tokens": len(entry["hypotheses"][0]["tokens"])})
    return {drafter: dict(found) for drafter, found in sums.items()}


def read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """Whole lines of a journal by utterance; a half line at its end (a killed run) is cut off."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole, _, rest = content.rpartition(b"\n")
    if rest:
        logging.warning(f"{path}: dropped a half-written line")
        with open(path, "r+b") as file:
            file.truncate(len(content) - len(rest))
    entries = {}
    for number, line in enumerate(whole.decode("utf-8").split("\n") if whole else [], 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(path, f"not JSON: {error}", line=number, hint="remove this shard") from error
        entries[entry["utt"]] = entry
    return entries


def reset_peak_memory(device: str) -> None:
    """So that the peak of one test set is not reported for the next one that the same process decodes."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        with contextlib.suppress(OSError):  # not allowed in every container: then the process's peak is reported
            CLEAR_REFS.write_text("5")


def peak_memory(device: str) -> int:
    """Bytes since the last reset, where the system can do that; else of the whole process."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    if CLEAR_REFS.exists():
        status = CLEAR_REFS.with_name("status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
