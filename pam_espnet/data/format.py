"""Formatted data directories: every utterance as a mono 16-bit file at one sample rate, with a passport.

Every finished utterance is noted in a journal, so a killed run continues where it stopped, and a second run does only
what changed at the source. Shape letter: N samples.
"""

import json
import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

import pam_espnet
from pam_espnet.config import check_number
from pam_espnet.data.audio import RESAMPLER, read_audio, resample
from pam_espnet.data.audio_ark import ARCHIVES, locate, pack
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.passport import PASSPORT_NAME, Passport
from pam_espnet.data.pcm import encode_audio, pcm16_sha256, to_pcm16, write_audio
from pam_espnet.data.tables import read_table, write_table
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.fileio import write_text

AUDIO_FORMATS = ("flac", "wav")
JOURNAL_NAME = ".passport.jsonl"
MISSING = "missing"  # optional table of a source: utterances that belong to the set and have no audio, with the reason
SILENCE_PEAK = 1e-4  # -80 dB of full scale: three steps of a 16-bit file
MAX_BEYOND = 0.03  # of the samples beyond full scale; a loud MP3 has fewer, float samples in another scale nearly all
SHOWN_SKIPS = 20
MAX_SKIPPED = 0.5  # more than this fraction means a wrong path or format, not a few bad files


@dataclass(frozen=True)
class Settings:
    """What a formatted file depends on besides its source; another value formats everything again."""

    sample_rate: int
    audio_format: str
    max_seconds: float
    min_seconds: float
    resampler: str = RESAMPLER


@dataclass(frozen=True)
class Job:
    """One utterance to format: value of wav.scp, piece in seconds (None: whole file), file to write (None: none)."""

    utt: str
    source: str
    start: float | None
    end: float | None
    target: str | None
    settings: Settings

    def stamp(self) -> dict[str, Any]:
        """Changes when the source does; a command counts by its text alone."""
        path = Path(locate(self.source)[0])
        stat = path.stat() if not self.source.endswith("|") and path.exists() else None
        size, time = (stat.st_size, stat.st_mtime_ns) if stat else (None, None)
        return {"source": self.source, "piece": [self.start, self.end], "size": size, "mtime_ns": time}


def format_data_dir(
    source: str | Path,
    target: str | Path,
    *,
    sample_rate: int = 16000,
    audio_format: str = "flac",
    max_seconds: float = 30.0,
    min_seconds: float = 0.1,
    jobs: int = 1,
    allow_pipes: bool = False,
    archive_mb: float = 0,
) -> Passport:
    """Write ``target`` (``dump/raw/<set>``) from ``source`` (``data/<set>``) and return its passport.

    ``target`` gets one audio file per utterance (``audio/<utt>.flac``; the paths in its ``wav.scp`` begin with
    ``target`` as it was given), the tables of ``source``, ``utt2num_samples`` and ``passport.json``, which lists the
    utterances that are skipped with the reason (see ``skip_reason``, ``MISSING``).

    Args:
        sample_rate: Hz; other rates are resampled, and the passport notes the original one.
        audio_format: "flac" or "wav", 16 bit either way.
        max_seconds, min_seconds: duration limits, inclusive.
        jobs: processes.
        allow_pipes: run ``wav.scp`` values that end in ``|`` (see ``read_audio``).
        archive_mb: put the same files into ``audio.<n>.ark`` of about N MB (see ``audio_ark``); 0: do not.

    Raises:
        DataError: the source is inconsistent, has pipes that were not allowed, or more than half is skipped.
        ConfigError: an option that cannot work.
    """
    if audio_format not in AUDIO_FORMATS:
        raise ConfigError(f"audio_format: {audio_format!r} is not one of {', '.join(AUDIO_FORMATS)}")
    check_number(sample_rate, "sample_rate", at_least=1, whole=True)
    check_number(jobs, "jobs", at_least=1, whole=True)
    check_number(archive_mb, "archive_mb", at_least=0)
    check_number(min_seconds, "min_seconds", at_least=0, below=max_seconds)
    data, target = DataDir.load(source), Path(target)
    if target.resolve() == data.path.resolve():
        raise ConfigError(f"target: {target} is the source; name another directory, such as dump/raw/{target.name}")
    if not allow_pipes and (pipes := [recording for recording, value in data.wav.items() if value.endswith("|")]):
        message = f"{pipes[0]!r}: the value is a command (it ends in '|')"
        raise DataError(data.path / "wav.scp", message, hint="pass --allow-pipes if you trust it")
    settings = Settings(sample_rate, audio_format, max_seconds, min_seconds)
    audio = target / "audio"
    (target if archive_mb else audio).mkdir(parents=True, exist_ok=True)
    files = {utt: None if archive_mb else str(audio / f"{utt}.{audio_format}") for utt in data.utterances}
    todo = [Job(utt, *data.source(utt), target=file, settings=settings) for utt, file in files.items()]
    records = _run_journaled(todo, target / JOURNAL_NAME, settings, jobs, archive_mb * 1e6)
    return _write_tables(data, target, settings, records)


def _run_journaled(
    todo: list[Job], journal: Path, settings: Settings, jobs: int, archive_bytes: float
) -> dict[str, dict[str, Any]]:
    """{utt: record} of all jobs, formatting only those whose record in the journal does not hold any more."""
    from tqdm import tqdm

    head = {"settings": asdict(settings)}
    old = _read_journal(journal, head)
    archives = {path.name for path in journal.parent.glob(ARCHIVES)}
    records = {}
    for job in todo:
        record = old.get(job.utt)
        if record is None or record["stamp"] != job.stamp():
            continue
        # what could not be read is tried again: the disk or this program may have been the reason
        reason = record.get("skipped", "")
        archive = record.get("ark", "").split(":")[0]
        there = Path(job.target).is_file() and not archive if job.target else archive in archives
        if (reason and not reason.startswith("unreadable")) or ("entry" in record and there):
            records[job.utt] = record
    audio = journal.parent / "audio"
    for leftover in (*audio.glob(".*.tmp-*"), *journal.parent.glob(".audio.*.tmp-*.ark")):  # of a killed run
        leftover.unlink()
    for utt in old.keys() - {job.utt for job in todo}:  # no longer in the source
        for suffix in AUDIO_FORMATS:
            (audio / f"{utt}.{suffix}").unlink(missing_ok=True)
    # written again, so that a line that a kill cut short is not continued by the next one
    write_text(journal, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (head, *records.values())))
    rest = [job for job in todo if job.utt not in records]
    if records:
        logging.info("%s: %d of %d utterances are formatted already", journal.parent, len(records), len(todo))
    done = pack(_run(rest, jobs), journal.parent, archive_bytes)
    with journal.open("a", encoding="utf-8") as file:
        for record in tqdm(done, total=len(rest), desc=f"format {journal.parent.name}", disable=not rest):
            records[record["utt"]] = record
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
    return records


def _run(rest: list[Job], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1 or len(rest) < 2:
        yield from map(format_one, rest)
        return
    # spawn: a forked copy of a process that has threads (torch, ffmpeg) can hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(rest)), mp_context=context) as pool:
        try:
            # in turns where the records hold audio, which would fill the memory before a slow disk
            for some in batched(rest, len(rest) if rest[0].target else 128 * jobs):
                yield from pool.map(format_one, some, chunksize=8)
        except BrokenProcessPool as error:
            hint = "run the same command again with fewer --jobs; what is done is kept"
            raise DataError(rest[0].target or rest[0].source, "a worker died (out of memory?)", hint=hint) from error


def _read_journal(path: Path, head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{utt: record} of an earlier run whose first line was ``head`` (the settings), or {}."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    records = {}
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed run
            continue
        if number == 0 and record != head:
            logging.info("%s: the settings changed; everything is formatted again", path.parent)
            return {}
        if "utt" in record:
            records[record["utt"]] = record
    return records


def format_one(job: Job) -> dict[str, Any]:
    """Format one utterance; returns its journal record, with ``entry`` (of the passport) or ``skipped`` (reason)."""
    record: dict[str, Any] = {"utt": job.utt, "stamp": job.stamp()}
    settings = job.settings
    try:
        # pipes were refused, or allowed, for the whole directory before any job was made
        wave, rate = read_audio(job.source, start=job.start, end=job.end, allow_pipes=True)
    except DataError as error:
        return record | {"skipped": f"unreadable: {str(error).splitlines()[0]}"}
    if reason := skip_reason(wave, rate, settings):
        return record | {"skipped": reason}
    samples, clipped = to_pcm16(resample(wave, rate, settings.sample_rate))
    if job.target:
        write_audio(job.target, samples, settings.sample_rate, settings.audio_format)
    else:
        record["audio"] = encode_audio(samples, settings.sample_rate, settings.audio_format)
    entry: dict[str, Any] = {
        "sha256": pcm16_sha256(samples),
        "num_samples": len(samples),
        "seconds": len(samples) / settings.sample_rate,
        "source": job.source,
        "source_rate": rate,
    }
    if job.start is not None:
        entry["segment"] = [job.start, job.end]
    if clipped:
        entry["clipped"] = clipped
    return record | {"entry": entry}


def read_formatted(path: str | Path, settings: Settings) -> np.ndarray:
    """One file (N,) float32 as ``format_data_dir`` would write it and ``read_audio`` read that back.
    Raises DataError: it would be skipped; gives the reason."""
    return as_formatted(path, *read_audio(path), settings)


def as_formatted(path: str | Path, wave: np.ndarray, rate: int, settings: Settings) -> np.ndarray:
    """What ``read_formatted`` makes of ``wave`` (N,) at ``rate`` Hz, read from ``path``; raises what it raises."""
    if reason := skip_reason(wave, rate, settings):
        hint = "name a recording with sound in it, within full scale and the limits of stage 2"
        raise DataError(path, reason, hint=hint)
    return to_pcm16(resample(wave, rate, settings.sample_rate))[0].astype(np.float32) / 32768


def skip_reason(wave: np.ndarray, rate: int, settings: Settings) -> str | None:
    """Why ``wave`` (N,) at ``rate`` Hz cannot be used, as ``"<class>: <detail>"``; None when it can."""
    if len(wave) == 0:
        return "empty: no samples"
    if bad := int(np.count_nonzero(~np.isfinite(wave))):
        return f"not finite: {bad} samples are NaN or infinite"
    seconds = len(wave) / rate
    if seconds > settings.max_seconds:
        return f"too long: {seconds:.2f} s is more than {settings.max_seconds:g} s"
    if seconds < settings.min_seconds:
        return f"too short: {seconds:.3f} s is less than {settings.min_seconds:g} s"
    peak = float(np.abs(wave).max())
    if (beyond := float(np.mean(np.abs(wave) > 1))) > MAX_BEYOND:
        scale = ", as in int16 scale (divide them by 32768)" if peak > 100 else ""
        return f"beyond full scale: {beyond:.0%} of the samples are outside [-1, 1], up to {peak:.3g}{scale}"
    if peak == 0:
        return "digital silence: all samples are zero"
    if peak < SILENCE_PEAK:
        return f"silent: peak {peak:.1e} is below {SILENCE_PEAK:g}"
    return None


def _write_tables(data: DataDir, target: Path, settings: Settings, records: dict[str, dict[str, Any]]) -> Passport:
    """Tables and passport of everything that was not skipped; the passport last, as the sign that all is there."""
    kept = {utt: records[utt]["entry"] for utt in data.utterances if "entry" in records[utt]}
    skipped = {utt: records[utt]["skipped"] for utt in data.utterances if "skipped" in records[utt]}
    if len(skipped) > MAX_SKIPPED * len(data):
        some = "".join(f"\n  {utt}: {reason}" for utt, reason in list(skipped.items())[:5])
        message = f"{len(skipped)} of {len(data)} utterances cannot be used, for example:{some}"
        raise DataError(data.path, message, hint="repair these recordings, or check wav.scp and --max_seconds")
    files = {utt: target / "audio" / f"{utt}.{settings.audio_format}" for utt in data.utterances}
    arks = {utt: str(target / records[utt]["ark"]) for utt in kept if "ark" in records[utt]}
    wav = {utt: str(files[utt]) for utt in kept} | arks
    for utt in skipped:  # files of an earlier run, when the utterance was still good
        files[utt].unlink(missing_ok=True)
    for utt, reason in list(skipped.items())[:SHOWN_SKIPS]:
        logging.warning("skipped %s: %s", utt, reason)
    if len(skipped) > SHOWN_SKIPS:
        logging.warning("... and %d more, listed in %s", len(skipped) - SHOWN_SKIPS, target / PASSPORT_NAME)
    formatted = replace(data.subset(kept), wav=wav, segments=None)
    formatted.save(target)
    write_table(target / "utt2num_samples", {utt: str(entry["num_samples"]) for utt, entry in kept.items()})
    missing = read_table(data.path / MISSING) if (data.path / MISSING).is_file() else {}
    if there := sorted(missing.keys() & data.text.keys()):
        message = f"{there[0]!r} is missing here, and in text there"
        raise DataError(data.path / MISSING, message, hint="make the data directory again (stage 1)")
    libraries = f"soundfile {soundfile.__version__}, libsndfile {soundfile.__libsndfile_version__}"
    passport = Passport(
        sample_rate=settings.sample_rate,
        resampler=settings.resampler,
        created_by=f"pam_espnet {pam_espnet.__version__}, {libraries}",
        audio_format=settings.audio_format,
        tasks=formatted.per_task(),
        utterances=kept,
        skipped=skipped | missing,
    )
    passport.save(target)
    # what an earlier run wrote and nothing names any more
    used, audio = {value.rpartition(":")[0] for value in arks.values()}, target / "audio"
    for path in (*target.glob(ARCHIVES), *(files[utt] for utt in (arks if audio.is_dir() else ()))):
        if str(path) not in used:
            path.unlink(missing_ok=True)
    return passport
