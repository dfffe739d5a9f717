"""Clips of a Hugging Face dataset with AudioCaps' audio, of the hub or local: those of the official CSVs, in archives.

Rows belong to a clip by youtube_id and start_time, by audiocap_id, or by the name of their file. Writes
``OUT/<split>/audio.<n>.ark`` with the bytes of the files as they are, and a journal; a second run continues where the
last one stopped. Captions are those of the CSVs: other ones in the dataset are counted, and that is said.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL), str(LOCAL.parents[3])]

from pam_espnet.cli import run_main  # noqa: E402
from pam_espnet.errors import DataError  # noqa: E402

if TYPE_CHECKING:
    from captions import Clip

    from pam_espnet.data.exchange.rows import Row

ARCHIVE_MB = 500


class Finder:
    """The clip that a row belongs to; rows of a clip that has its audio already add nothing."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.names: dict[str, Clip] = {}
        for clip in clips:
            dated = f"{clip.video}_{clip.start}"
            for name in (dated, f"Y{dated}", *clip.ids):
                self.names[name] = clip
            for name in (clip.video, f"Y{clip.video}"):
                self.names.setdefault(name, clip)
        self.found: set[str] = set()

    def find(self, row: Row) -> Clip | None:
        """The clip, by the columns that the row has."""
        values = row.values
        if "youtube_id" in values and "start_time" in values:
            return self.names.get(f"{values['youtube_id']}_{round(float(values['start_time']))}")
        if "audiocap_id" in values:
            return self.names.get(str(values["audiocap_id"]))
        audio = values.get("audio")
        return self.names.get(Path((isinstance(audio, dict) and audio.get("path")) or "").stem)

    def convert(self, row: Row) -> dict[str, Any]:
        """A record of the journal, see ``exchange.writer``."""
        from pam_espnet.data.tables import one_line

        clip, audio = self.find(row), row.values.get("audio")
        if clip is None:
            return {"what": "rows of no clip in the CSVs"}
        name = f"{clip.video}_{clip.start}"
        caption = one_line(str(row.values.get("caption") or "")).lower()
        other = {"other": caption} if caption and caption not in (text.lower() for text in clip.captions) else {}
        if name in self.found:
            return {"what": "rows of clips that are there already", **other}
        content = audio.get("bytes") if isinstance(audio, dict) else audio
        if not isinstance(content, bytes) or not content:
            return {"what": "rows without audio", **other}
        return {"what": "clips", "utt": name, "audio": content, **other}

    def remember(self, record: Any) -> None:
        """Take note of a clip that is in an archive."""
        if "utt" in record:
            self.found.add(record["utt"])


def collect(args: argparse.Namespace) -> None:
    """Read every split; print the sum of it.

    Raises:
        DataError: there is no such dataset, or no clip of the CSVs in it.
    """
    import hashlib

    from captions import read_release

    from pam_espnet.data.exchange.hub_datasets import open_splits
    from pam_espnet.data.exchange.writer import read_journal, run_journaled
    from pam_espnet.fileio import check_key

    clips = [clip for part in read_release(args.csv, args.version).values() for clip in part]
    finder = Finder(clips)
    names = hashlib.sha256("\n".join(sorted(f"{clip.video}_{clip.start}" for clip in clips)).encode()).hexdigest()
    name, _, revision = args.hf.partition("@")
    total: Counter[str] = Counter()
    others = 0
    for split, source in open_splits(name, revision=revision or None).items():
        folder = args.out / split
        key = {"source": name, "stamp": source.stamp, "clips": names}
        check_key(folder / "import.json", key, f"delete {args.out} to read it again, or name the commit: {name}@COMMIT")
        journal = run_journaled(
            source.read, finder.convert, folder, ARCHIVE_MB * 1e6, finder.remember, total=source.rows
        )
        for record in read_journal(journal):
            finder.remember(record)
            total[record.get("what", "")] += 1
            others += "other" in record
        licence = source.stamp.get("licence")
    del total[""]
    if not finder.found:
        raise DataError(
            name,
            f"has none of the {len(clips)} clips of the CSVs ({dict(total)})",
            hint="its rows need youtube_id and start_time, or audiocap_id, or files named so",
        )
    print(f"{args.hf}: " + ", ".join(f"{number} {what}" for what, number in total.most_common()))
    if others:
        print(f"  {others} rows have a caption that release {args.version} does not have; those of the CSVs are taken")
    print(f"  licence, by its card: {licence or 'none is stated'}; the recordings belong to who made the videos")


def main(argv: Sequence[str] | None = None) -> int:
    """Collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", type=int, required=True, help="release of the captions: 1 or 2")
    parser.add_argument("--csv", type=Path, required=True, help="folder with train.csv, val.csv, test.csv")
    parser.add_argument("--hf", required=True, help="owner/name of the hub, owner/name@commit, or local parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder to fill")
    collect(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
