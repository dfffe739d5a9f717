"""Decode test sets at several exit points and at full depth, so that their times can be compared.

Every point has a decode directory of its own, as ``bin/pam_decode.py`` would write it, and is scored as stage 5 does.
Points take turns batch by batch: the encoders run once, then every point and ``never`` answer the same batch, in an
order that rotates. So a machine that slows down slows all of them, and each point is compared with ``never`` on the
very same batches of the same run; times of different runs are not compared. A killed sweep goes on with the batches
that are missing; a finished point is not decoded again.

    <out>/decode_<point>/<set>/timing/<run>.jsonl   a line per batch: seconds of wall clock and of CPU
"""

from __future__ import annotations

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
from pam_espnet.decode.shards import (
    JOURNAL,
    DecodeOptions,
    is_complete,
    journal_lines,
    merge_shards,
    note_machine,
    read_journal,
    read_wave,
    shard_keys,
)
from pam_espnet.decode.speech_llm import Answer, SpeechLLM
from pam_espnet.engine.engine import Engine
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import exclusive, sha256_file
from pam_espnet.frontend.frontend import AudioEmbeddings
from pam_espnet.score.scoring import SCORES, score_directory

CLOCKS = ("search_wall", "search_cpu", "steps_wall", "steps_cpu")  # search: prefix, steps and bookkeeping


@dataclass(frozen=True)
class Point:
    """One way to leave; ``name`` is what the user typed, e.g. "gate:0.9"."""

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

    Raises:
        ConfigError: not one of these, or a value that cannot be.
    """
    mode, _, value = name.partition(":")
    file = None if calibration is None else str(calibration)
    try:
        if mode == "never" and not value:
            return NEVER
        if mode == "gate":
            return Point(name, ExitOptions(mode, threshold=float(value) if value else None, calibration=file))
        if mode == "fixed":
            return Point(name, ExitOptions(mode, (int(value),), calibration=file))
        if mode in ("confidence", "entropy"):
            return Point(name, ExitOptions(mode, tuple(layers), threshold=float(value), calibration=file))
        if mode == "patience":
            return Point(name, ExitOptions(mode, tuple(layers), patience=int(value), calibration=file))
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"--sweep {name}: {error}") from error
    raise ConfigError(f"--sweep {name}: write never, fixed:24, gate, gate:0.9, confidence:0.9, entropy:0.9, patience:2")


def default_points(layers: Sequence[int], calibrated: bool) -> list[str]:
    """A choice of points, by name: full depth, every candidate block, and each measure at a strict and a lax value."""
    gates = ["gate", "gate:0.8", "gate:0.5"] if calibrated else []
    measures = [f"{mode}:{at}" for mode in ("confidence", "entropy") for at in (0.9, 0.7)]
    return [NEVER.name, *(f"fixed:{layer}" for layer in layers), *gates, *measures]


def _now(device: torch.device) -> tuple[float, float]:
    """Seconds on the wall clock and of the process's CPU time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


class Runner:
    """Answers at one point, and says what that took."""

    def __init__(self, speech: SpeechLLM, point: Point) -> None:
        self.speech = speech.with_exits(point.exits)
        self.engine: Engine = self.speech.engine
        self.wall = self.cpu = 0.0  # seconds in steps
        step = self.engine.step

        def timed(*args: Any) -> Any:
            began = self._now()
            logits = step(*args)
            ended = self._now()
            self.wall += ended[0] - began[0]
            self.cpu += ended[1] - began[1]
            return logits

        self.engine.step = timed  # type: ignore[method-assign, assignment]

    def _now(self) -> tuple[float, float]:
        return _now(self.engine.llm.device)

    def answer(
        self, waves: Sequence[Any], prompts: Sequence[str], tasks: Sequence[str], audio: AudioEmbeddings
    ) -> tuple[list[Answer], dict[str, float]]:
        """The answers, and the seconds of ``CLOCKS``."""
        self.wall = self.cpu = 0.0
        began = self._now()
        answers = self.speech.answer(waves, prompts, tasks, audio=audio, score_answers=False)  # the search alone
        ended = self._now()
        times = (ended[0] - began[0], ended[1] - began[1], self.wall, self.cpu)
        return answers, dict(zip(CLOCKS, times, strict=True))


def sweep(
    exp: str | Path,
    load: Callable[[], SpeechLLM],
    data_dirs: Sequence[str | Path],
    points: Sequence[Point],
    out: str | Path,
    search: Mapping[str, Any],
    run: Mapping[str, Any],
    options: DecodeOptions | None = None,
) -> None:
    """Decode and score ``data_dirs`` at ``never`` and ``points``; see the module.

    Args:
        exp: experiment directory.
        load: gives its model, always the same one; not called when everything is decoded. Its options, but for the
            exit, are those of every point.
        data_dirs: formatted data directories.
        points: ``never`` may be among them.
        out: where the decode directories are made.
        search: the options of decoding and precision, noted with every directory.
        run: command and commit, noted too.
        options: batch size.

    Raises:
        DataError: a decode directory belongs to another checkpoint, other data or other options.
    """
    options, out = options or DecodeOptions(), Path(out)
    points = [NEVER, *(point for point in points if point != NEVER)]
    runners: dict[str, Runner] = {}
    for data_dir in data_dirs:
        name = Path(data_dir).name
        todo = []
        for point in points:
            exits = json.loads(json.dumps(asdict(point.exits)))  # as a file gives it back
            if point.exits.calibration:  # by its contents, not by its name
                exits = {**exits, "calibration": None, "calibration_sha256": sha256_file(point.exits.calibration)}
            noted = {**search, "exit": exits}
            if not is_complete(exp, data_dir, point.directory(out) / name, options, noted):
                todo.append(point)
        if todo:
            speech = load()
            for point in (NEVER, *todo):
                if point.name not in runners:
                    runners[point.name] = Runner(speech, point)
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
    keys = shard_keys(data.utterances, {k: passport.utterances[k]["seconds"] for k in data.utterances}, 1, 1)
    batches = [keys[start : start + options.batch_size] for start in range(0, len(keys), options.batch_size)]
    done = {point.name: set(read_journal(_journal(point, out, data.path.name))) for point in points}
    run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}"
    warm = False
    for number, batch in enumerate(tqdm(batches, desc=f"sweep {data.path.name}", unit="batch")):
        missing = [point for point in points if not done[point.name].issuperset(batch)]
        if not missing:
            continue
        waves = [read_wave(data, key, rate) for key in batch]
        prompts, tasks = [data.prompt[key] for key in batch], [data.utt2task[key] for key in batch]
        if not warm:  # what is made once and kept would be charged to the first in turn
            runners[NEVER.name].answer(waves, prompts, tasks, speech.encode(waves, prompts))
            warm = True
        began = time.perf_counter()
        audio = speech.encode(waves, prompts)
        heard = time.perf_counter() - began
        turns = [NEVER, *(point for point in missing if point != NEVER)]
        for turn in range(len(turns)):
            point = turns[(turn + number) % len(turns)]
            answers, seconds = runners[point.name].answer(waves, prompts, tasks, audio)
            _append(
                point.directory(out) / data.path.name / "timing" / f"{run}.jsonl",
                json.dumps({"batch": number, "utterances": len(batch), "encoders_wall": heard, **seconds}) + "\n",
            )
            if point in missing:
                lines = [len(wave) / rate for wave in waves]
                wall = heard + seconds["search_wall"]
                _append(_journal(point, out, data.path.name), journal_lines(data, batch, lines, answers, wall))


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


@dataclass(frozen=True)
class Timing:
    """Seconds of a point and of ``never`` on the batches that both decoded in the same runs.

    Attributes:
        own, never: by ``CLOCKS``, and ``encoders_wall``.
        batches: how many.
        runs: in how many runs of the program.
    """

    own: dict[str, float]
    never: dict[str, float]
    batches: int
    runs: int


def read_timing(own: str | Path, never: str | Path) -> Timing | None:
    """From two decode directories of a test set; None where they share no batch of a run."""
    left, right = _seconds(Path(own)), _seconds(Path(never))
    if not (shared := sorted(left.keys() & right.keys())):
        return None
    clocks = (*CLOCKS, "encoders_wall")
    return Timing(
        own={clock: sum(left[key][clock] for key in shared) for clock in clocks},
        never={clock: sum(right[key][clock] for key in shared) for clock in clocks},
        batches=len({number for _, number in shared}),
        runs=len({run for run, _ in shared}),
    )


def _seconds(directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    """(run, batch) -> its line; a half line, left by a killed run, is skipped."""
    found = {}
    for path in sorted((directory / "timing").glob("*.jsonl")):
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        for line in whole.splitlines():
            entry = json.loads(line)
            found[path.stem, entry["batch"]] = entry
    return found
