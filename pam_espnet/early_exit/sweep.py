"""Decode test sets at several exit points and at full depth, so that their times can be compared.

Every point has a decode directory, as ``bin/pam_decode.py`` would write it, and is scored as stage 5 does. Points take
turns batch by batch: the encoders run once, then every point and ``never`` answer the same batch, in an order that
rotates. So a machine that slows down slows all of them, and each point is compared with ``never`` on the very same
batches of the same run; times of different runs are not compared. A killed sweep continues with the batches that are
missing; a finished point is not decoded again.

    <out>/decode_<point>/<set>/timing/<run>.jsonl   a line per batch: seconds of wall clock and of CPU
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pam_espnet.data.datadir import DataDir
from pam_espnet.data.passport import Passport
from pam_espnet.decode.answers import Answer
from pam_espnet.decode.batches import in_batches, read_batches
from pam_espnet.decode.shards import (
    JOURNAL,
    DecodeOptions,
    as_begun,
    is_complete,
    journal_lines,
    merge_shards,
    note_machine,
    read_journal,
    read_wave,
    shard_keys,
)
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.engine.static import StaticEngine
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import exclusive, sha256_file
from pam_espnet.score.scoring import SCORES, score_directory

CLOCKS = ("search_wall", "search_cpu", "steps_wall", "steps_cpu")  # search: prefix, steps and bookkeeping


@dataclass(frozen=True)
class Point:
    """One way to exit; ``name`` is what the user typed, e.g. "gate:0.9"."""

    name: str
    exits: ExitOptions

    def directory(self, out: Path) -> Path:
        """Of its decodings."""
        return out / f"decode_{self.name.replace(':', '_')}"


NEVER = Point("never", ExitOptions())


def parse_point(name: str, layers: Sequence[int], calibration: str | Path | None) -> Point:
    """``never``, ``fixed:<block>``, ``gate[:<threshold>]``, ``confidence:<t>``, ``entropy:<t>``, ``patience:<n>``.

    Args:
        name: as above.
        layers: candidate blocks of all modes but fixed and gate.
        calibration: its maps apply in every mode.

    Raises ConfigError: not one of these, or a value that cannot be.
    """
    mode, _, value = name.partition(":")
    options: dict[str, Any] = {"calibration": None if calibration is None else str(calibration)}
    try:
        if name == "never":
            return NEVER
        if mode == "fixed":
            options |= {"layers": (int(value),)}
        elif mode == "gate":
            options |= {"threshold": float(value) if value else None}
        elif mode in ("confidence", "entropy"):
            options |= {"layers": tuple(layers), "threshold": float(value)}
        elif mode == "patience":
            options |= {"layers": tuple(layers), "patience": int(value)}
        else:
            raise ConfigError("write never, fixed:24, gate, gate:0.9, confidence:0.9, entropy:0.9, patience:2")
        return Point(name, ExitOptions(mode, **options))
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"--sweep {name}: {error}") from error


def default_points(layers: Sequence[int], calibrated: bool) -> list[str]:
    """A choice of points, by name: full depth, every candidate block, and each measure at a strict and a lax value."""
    gates = ["gate", "gate:0.8", "gate:0.5"] if calibrated else []
    measures = [f"{mode}:{at}" for mode in ("confidence", "entropy") for at in (0.9, 0.7)]
    return [NEVER.name, *(f"fixed:{layer}" for layer in layers), *gates, *measures]


class Runner:
    """Answers at one point, with the seconds of ``CLOCKS``."""

    def __init__(self, speech: SpeechLLM, point: Point) -> None:
        self.speech = speech.with_exits(point.exits)
        self.steps = [0.0, 0.0]  # seconds, wall and CPU
        engine = self.speech.engine
        if isinstance(engine, StaticEngine):
            make = engine.step_pass
            engine.step_pass = lambda *args: self._timed(make(*args))  # type: ignore[method-assign]
        else:
            engine.step = self._timed(engine.step)  # type: ignore[method-assign]

    def _timed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = self._now()
            result = step(*args)
            self.steps = [so_far + now - then for so_far, now, then in zip(self.steps, self._now(), began, strict=True)]
            return result

        return timed

    def _now(self) -> tuple[float, float]:
        if self.speech.device.startswith("cuda"):
            torch.cuda.synchronize(self.speech.device)
        return time.perf_counter(), time.process_time()

    def answer(self, batch: tuple[Any, Any, Any], audio: Any) -> tuple[list[Answer], dict[str, float]]:
        """Waveforms, prompts, tasks, and the waveforms' audio embeddings -> the answers, and the seconds."""
        if self.speech.engine.graphs:  # made when a shape is first met
            self.speech.answer(*batch, audio, score_answers=False)
        self.steps, began = [0.0, 0.0], self._now()
        answers = self.speech.answer(*batch, audio, score_answers=False)  # the search alone
        ended = self._now()
        times = (ended[0] - began[0], ended[1] - began[1], *self.steps)
        return answers, dict(zip(CLOCKS, times, strict=True))


def sweep(
    exp: str | Path,
    load: Callable[[], SpeechLLM],
    data_dirs: Sequence[str | Path],
    points: Sequence[Point],
    out: str | Path,
    search: Mapping[str, Any],
    run: Mapping[str, Any],
    options: DecodeOptions,
    device: str = "cpu",
) -> None:
    """Decode and score ``data_dirs`` at ``never`` and ``points``; see the module.

    Args:
        load: gives the model, always the same one, whose options but for the exit are those of every point; not called
            when everything is decoded.
        search, run: options of decoding and precision; command and commit; noted with every directory.
        device: of the model.

    Raises DataError: a decode directory belongs to another checkpoint, other data or other options.
    """
    out, given, points = Path(out), options, [NEVER, *(point for point in points if point != NEVER)]
    runners: dict[str, Runner] = {}
    for data_dir in data_dirs:
        name = Path(data_dir).name
        todo, options = [], as_begun(given, NEVER.directory(out) / name, device)
        for point in points:
            exits = json.loads(json.dumps(asdict(point.exits)))  # as a file gives it back
            if point.exits.calibration:  # by its contents, not by its name
                exits = {**exits, "calibration": None, "calibration_sha256": sha256_file(point.exits.calibration)}
            if not is_complete(exp, data_dir, point.directory(out) / name, options, {**search, "exit": exits}):
                todo.append(point)
        if todo:
            speech = load()
            runners |= {one.name: Runner(speech, one) for one in (NEVER, *todo) if one.name not in runners}
            with exclusive(out / ".lock"):
                _decode(speech, data_dir, todo, runners, out, options)
            for point in todo:
                note_machine(_journal(point, out, name), speech)
                merge_shards(data_dir, point.directory(out) / name, options, dict(run))
        for point in points:
            if not (point.directory(out) / name / SCORES).is_file():
                score_directory(point.directory(out) / name, data_dir)


def _journal(point: Point, out: Path, name: str) -> Path:
    return point.directory(out) / name / "split1" / "1" / JOURNAL


def _decode(
    speech: SpeechLLM,
    data_dir: str | Path,
    points: Sequence[Point],
    runners: Mapping[str, Runner],
    out: Path,
    options: DecodeOptions,
) -> None:
    from tqdm import tqdm

    data, passport, rate = DataDir.load(data_dir), Passport.load(data_dir), speech.model.frontend.sample_rate
    seconds = {key: passport.utterances[key]["seconds"] for key in data.utterances}
    keys = shard_keys(data.utterances, seconds, 1, 1)
    folder = _journal(NEVER, out, data.path.name).parent  # every point has these batches
    batches, resized = read_batches(folder, speech, keys, data.prompt, seconds, options.batch_size)
    done = {point.name: set(read_journal(_journal(point, out, data.path.name))) for point in points}
    run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}"
    number, warm = 0, False  # of the batch

    def in_turns(batch: list[str]) -> list[tuple[Point, str, str]]:
        """Points, in turns, with a line of timing and, where they lack the batch, of the journal."""
        nonlocal warm
        missing = [point for point in points if not done[point.name].issuperset(batch)]
        if not missing:
            return []
        waves, prompts = [read_wave(data, key, rate) for key in batch], [data.prompt[key] for key in batch]
        asked = (waves, prompts, [data.utt2task[key] for key in batch])
        if not warm:  # what is made once and kept would be charged to the first in turn
            runners[NEVER.name].answer(asked, speech.encode(waves, prompts))
            warm = True
        began = time.perf_counter()
        audio = speech.encode(waves, prompts)
        encoders = time.perf_counter() - began
        turns, found = [NEVER, *(point for point in missing if point != NEVER)], []
        for turn in range(len(turns)):
            point = turns[(turn + number) % len(turns)]
            answers, times = runners[point.name].answer(asked, audio)
            timing = {"batch": number, "utterances": len(batch), "encoders_wall": encoders, **times}
            lengths, wall = [len(wave) / rate for wave in waves], encoders + times["search_wall"]
            lines = journal_lines(data, batch, lengths, answers, wall) if point in missing else ""
            found.append((point, json.dumps(timing) + "\n", lines))
        return found

    turns = in_batches(speech, batches, in_turns, resized)
    for _, found in tqdm(turns, total=len(batches), desc=f"sweep {data.path.name}", unit="batch"):
        for point, timing, lines in found:
            _append(point.directory(out) / data.path.name / "timing" / f"{run}.jsonl", timing)
            _append(_journal(point, out, data.path.name), lines)
        number += 1


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def read_timing(own: str | Path, never: str | Path) -> dict[str, Any] | None:
    """Seconds of a point and of ``never`` on the batches that both decoded in the same runs of the program.

    Args:
        own, never: their decode directories of a test set.

    Returns:
        ``own`` and ``never`` (by ``CLOCKS``, and ``encoders_wall``), how many ``batches`` and ``runs``; None where they
        share no batch of a run.
    """
    left, right = _seconds(Path(own)), _seconds(Path(never))
    if not (shared := sorted(left.keys() & right.keys())):
        return None

    def sums(of: Mapping[tuple[str, int], Mapping[str, float]]) -> dict[str, float]:
        return {clock: sum(of[key][clock] for key in shared) for clock in (*CLOCKS, "encoders_wall")}

    batches, runs = {number for _, number in shared}, {run for run, _ in shared}
    return {"own": sums(left), "never": sums(right), "batches": len(batches), "runs": len(runs)}


def _seconds(directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    """(run, batch) -> its line; a half line, left by a killed run, is skipped."""
    found = {}
    for path in sorted((directory / "timing").glob("*.jsonl")):
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        for entry in map(json.loads, whole.splitlines()):
            found[path.stem, entry["batch"]] = entry
    return found
