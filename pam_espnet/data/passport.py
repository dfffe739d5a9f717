"""``passport.json``: the source and the identity of every formatted utterance, and the reason of every skip."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json, write_json

PASSPORT_NAME = "passport.json"
FORMAT_HINT = "run stage 2, or python -m pam_espnet.bin.pam_format"


@dataclass
class Passport:
    """The passport of one formatted data directory.

    ``utterances[utt]`` has ``sha256`` (of the int16 samples), ``num_samples``, ``seconds``, ``source``,
    ``source_rate`` (Hz), and where it applies ``segment`` ([start, end] in seconds) and ``clipped`` (samples).
    ``skipped[utt]`` is ``"<class>: <detail>"``. ``tasks`` counts the utterances of each task.
    """

    sample_rate: int
    resampler: str
    created_by: str
    audio_format: str
    tasks: dict[str, int] = field(default_factory=dict)
    utterances: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, data_dir: str | Path) -> Passport:
        """Read ``<data_dir>/passport.json``.
        Raises DataError: the directory was not formatted, or the file is damaged."""
        path = Path(data_dir) / PASSPORT_NAME
        try:
            return cls(**read_json(path))
        except FileNotFoundError as error:
            raise DataError(path, "no such file: the data directory is not formatted", hint=FORMAT_HINT) from error
        except (JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise DataError(path, f"is not a passport ({error})", hint=FORMAT_HINT + " again") from error

    def save(self, data_dir: str | Path) -> None:
        """Write ``<data_dir>/passport.json``, atomically."""
        write_json(Path(data_dir) / PASSPORT_NAME, asdict(self))

    def restrict(self, tasks: dict[str, str]) -> Passport:
        """The passport of the utterances in ``tasks`` ({utterance: task}) alone; skips are not carried along."""
        utterances = {utt: self.utterances[utt] for utt in sorted(tasks) if utt in self.utterances}
        counts = dict(Counter(tasks[utt] for utt in utterances))
        return Passport(self.sample_rate, self.resampler, self.created_by, self.audio_format, counts, utterances)

    @property
    def seconds(self) -> float:
        """Total duration in seconds."""
        return sum(entry["num_samples"] for entry in self.utterances.values()) / self.sample_rate

    def audio_digest(self, utterances: Iterable[str]) -> str:
        """One SHA-256 over the names and samples of ``utterances``.
        Raises DataError: an utterance without a passport entry."""
        digest = hashlib.sha256()
        for utt in sorted(utterances):
            if utt not in self.utterances:
                raise DataError(PASSPORT_NAME, f"no entry for utterance {utt!r}", hint=FORMAT_HINT + " again")
            digest.update(f"{utt} {self.utterances[utt]['sha256']}\n".encode())
        return digest.hexdigest()

    def summary(self) -> str:
        """One paragraph: utterances, hours, tasks, skips by class, clipping."""
        tasks = ", ".join(f"{task} {count}" for task, count in self.tasks.items())
        text = f"{len(self.utterances)} utterances, {self.seconds / 3600:.2f} hours at {self.sample_rate} Hz ({tasks})"
        classes = Counter(reason.split(":")[0] for reason in self.skipped.values())
        skips = ", ".join(f"{n} {name}" for name, n in classes.most_common())
        text += f"; {len(self.skipped)} skipped: {skips}" if skips else "; none skipped"
        if clipped := sum("clipped" in entry for entry in self.utterances.values()):
            text += f"; {clipped} have clipped samples"
        if resampled := sum(entry["source_rate"] != self.sample_rate for entry in self.utterances.values()):
            text += f"; {resampled} resampled with {self.resampler}"
        return text + "."
