"""Fetch AudioCaps clips with yt-dlp: ten seconds of each video, several at a time, politely.

Writes ``OUT/<youtube_id>_<start>.flac`` and a journal, ``OUT/fetch.jsonl``. A second run continues where the last one
stopped: clips that are there are kept, clips whose video is gone are not asked for again (delete the journal to do so).
When the server asks to slow down, all downloads wait, twice as long each time. yt-dlp and ffmpeg must be on PATH;
yt-dlp's own configuration (cookies, proxy) applies.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL), str(LOCAL.parents[3])]

from pam_espnet.cli import run_main  # noqa: E402
from pam_espnet.config import check_number  # noqa: E402
from pam_espnet.errors import ConfigError, DataError  # noqa: E402

if TYPE_CHECKING:
    from captions import Clip

JOURNAL = "fetch.jsonl"
SHORTEST = 1.0  # seconds; less was not worth a clip
TRIES = 2  # per clip
TIMEOUT = 600.0  # seconds per download
PAUSE = 60.0  # seconds to wait when the server asks to slow down; doubles with each such request in a row
PATIENCE = 6  # such requests in a row after which it gives up
# yt-dlp's messages when the server refuses more requests; anything else is about the one video.
SLOW_DOWN = re.compile(r"HTTP Error 429|Too Many Requests|rate.?limit|not a bot|try again later", re.IGNORECASE)
# Its messages about a video that is not available for good.
GONE = re.compile(
    r"video unavailable|private video|has been removed|no longer available|account .{0,40}terminated|copyright"
    r"|not available in your country|not made this video available in your country|blocked it"
    r"|confirm your age|members-only|this video is not available",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Outcome:
    """What became of one clip: ``ok``, ``gone`` (not to be asked for again) or ``failed`` (may work another time)."""

    name: str  # <youtube_id>_<start>
    status: str
    reason: str = ""


class Pace:
    """When the next download may begin: ``interval`` seconds after the last, later after a complaint of the server."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.complaints = 0
        self.given_up = threading.Event()
        self._lock = threading.Lock()
        self._next = time.monotonic()
        self._complained = time.monotonic()

    def wait(self) -> float:
        """Sleep until it is this worker's turn; returns when that was, for ``complain``."""
        while not self.given_up.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self.interval
                    return now
                left = self._next - now
            self.given_up.wait(left)
        return time.monotonic()

    def complain(self, started: float) -> None:
        """The server asked to slow down. For downloads that began before the last complaint, it is the same one."""
        with self._lock:
            if started < self._complained:
                return
            self._complained = time.monotonic()
            self.complaints += 1
            if self.complaints > PATIENCE:
                self.given_up.set()
                return
            pause = PAUSE * 2 ** (self.complaints - 1)
            self._next = max(self._next, self._complained + pause)
        print(f"fetch: asked to slow down; waiting {pause:.0f} s", flush=True)

    def praise(self) -> None:
        """A download went well."""
        with self._lock:
            self.complaints = 0


def command(clip: Clip, out: Path) -> list[str]:
    """The call of yt-dlp that writes ``out`` (a .flac) from ten seconds of the clip's video."""
    from captions import CLIP_SECONDS

    options = "--no-playlist --no-progress --force-overwrites --socket-timeout 30 --retries 3 --format bestaudio/best"
    section = f"*{clip.start}-{clip.start + CLIP_SECONDS}"
    target = f"{str(out.with_suffix('')).replace('%', '%%')}.%(ext)s"
    return [
        *["yt-dlp", *options.split(), "--extract-audio", "--audio-format", "flac"],
        *["--download-sections", section, "--output", target, f"https://www.youtube.com/watch?v={clip.video}"],
    ]


def fetch_one(clip: Clip, out: Path, pace: Pace) -> Outcome:
    """Fetch one clip to ``out/<youtube_id>_<start>.flac``; at most ``TRIES`` times, complaints not counted."""
    name = f"{clip.video}_{clip.start}"
    part = out / ".part" / f"{name}.flac"
    reason, tries = "", TRIES
    while tries > 0:
        started = pace.wait()
        if pace.given_up.is_set():
            return Outcome(name, "failed", "the server asked to slow down, again and again")
        part.unlink(missing_ok=True)  # what another try left
        try:
            done = subprocess.run(
                command(clip, part), capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
                timeout=TIMEOUT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            reason, tries = f"took longer than {TIMEOUT:.0f} s", tries - 1
            continue
        if done.returncode == 0:
            problem = _problem(part)
            if not problem:
                part.replace(out / part.name)
                pace.praise()
                return Outcome(name, "ok")
            reason, tries = problem, tries - 1
            continue
        reason = _last_error(done.stderr)
        if SLOW_DOWN.search(done.stderr):
            pace.complain(started)
        elif GONE.search(done.stderr):
            return Outcome(name, "gone", reason)
        else:
            tries -= 1
    return Outcome(name, "failed", reason)


def _problem(path: Path) -> str:
    """Why a fetched file is no clip, or ""."""
    import soundfile

    if not path.is_file():
        return "yt-dlp left no file"
    try:
        seconds = soundfile.info(path).duration
    except soundfile.LibsndfileError as error:
        return f"what was fetched cannot be read: {error.error_string}"
    return "" if seconds >= SHORTEST else f"what was fetched is {seconds:.2f} s long: the video ends before"


def _last_error(text: str) -> str:
    """The last line that yt-dlp calls an error, without the video's name; else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line] or lines or ["no message"]
    line = re.sub(r"\x1b\[[0-9;]*m", "", errors[-1]).partition("ERROR:")[2].strip() or errors[-1]
    return re.sub(r"^\[[^\]]*\] \S+: ", "", line)[:200]


def read_journal(folder: str | Path) -> dict[str, Outcome]:
    """Clip name -> its last outcome; a half line that a killed run left is skipped."""
    path = Path(folder) / JOURNAL
    if not path.is_file():
        return {}
    outcomes = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue
        outcomes[entry.name] = entry
    return outcomes


def read_outcomes(folder: str | Path) -> dict[str, str]:
    """Clip name -> why it could not be fetched into ``folder``."""
    return {name: entry.reason for name, entry in read_journal(folder).items() if entry.status != "ok"}


def fetch(args: argparse.Namespace) -> None:
    """Fetch what is in no folder; print the sum of it.

    Raises:
        ConfigError: yt-dlp or ffmpeg is not there, or an option out of range.
        DataError: the server kept asking to slow down.
    """
    from captions import read_release
    from clips import find_clip, index_clips
    from tqdm import tqdm

    check_number(args.jobs, "--jobs", at_least=1)
    check_number(args.interval, "--interval", at_least=0)
    for program, how in (("yt-dlp", "python -m pip install yt-dlp"), ("ffmpeg", "apt install ffmpeg")):
        if shutil.which(program) is None:
            raise ConfigError(f"--fetch true needs {program}, which is not on PATH\n  -> {how}")
    clips = {f"{c.video}_{c.start}": c for part in read_release(args.csv, args.version).values() for c in part}
    (args.out / ".part").mkdir(parents=True, exist_ok=True)
    have = index_clips(args.audio, args.hosted)
    known = read_journal(args.out)
    todo = {}
    for name, clip in clips.items():
        gone = name in known and known[name].status == "gone"
        if not gone and not (args.out / f"{name}.flac").is_file() and find_clip(clip, have) is None:
            todo[name] = clip
    print(f"fetch: {len(clips)} clips, {len(todo)} to fetch, {args.jobs} at a time, one every {args.interval:g} s")
    pace = Pace(args.interval)
    counts = dict.fromkeys(("ok", "gone", "failed"), 0)
    with (
        open(args.out / JOURNAL, "a", encoding="utf-8") as journal,
        ThreadPoolExecutor(args.jobs) as pool,
        tqdm(total=len(todo), desc="fetch", unit="clip", disable=not todo) as bar,
    ):
        journal.write("\n")  # ends a half line that a killed run may have left
        futures = [pool.submit(fetch_one, clip, args.out, pace) for clip in todo.values()]
        try:
            for future in as_completed(futures):
                outcome = future.result()
                counts[outcome.status] += 1
                journal.write(json.dumps(outcome.__dict__, ensure_ascii=False) + "\n")
                journal.flush()
                bar.update()
        except KeyboardInterrupt:
            pace.given_up.set()  # or the workers would go through the rest of the list
            raise
    print(f"fetch: {counts['ok']} fetched, {counts['gone']} gone, {counts['failed']} failed; {args.out / JOURNAL}")
    if pace.given_up.is_set():
        raise DataError(
            args.out,
            f"the server asked to slow down {pace.complaints} times in a row",
            hint="run the same command again in some hours (it continues), with a longer --fetch_interval",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", type=int, required=True, help="release of the captions: 1 or 2")
    parser.add_argument("--csv", type=Path, required=True, help="folder with train.csv, val.csv, test.csv")
    parser.add_argument("--audio", type=Path, nargs="*", default=[], help="folders whose clips need not be fetched")
    parser.add_argument("--hosted", type=Path, help="what hosted.py filled: need not be fetched, either")
    parser.add_argument("--out", type=Path, required=True, help="folder to fill")
    parser.add_argument("--jobs", type=int, default=2, help="downloads at a time (2)")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two starts (5)")
    fetch(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
