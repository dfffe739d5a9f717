"""Scores and versions as ESPnet's RESULTS.md has them: its block of environments, a table for each error rate.

Columns: sentences (Snt), words or characters (Wrd); in percent of those: correct, substituted, deleted, inserted, all
errors; in percent of the sentences: those with an error (S.Err). ESPnet has no intervals, so there are none.
"""

import json
import time
from collections.abc import Sequence

from pam_espnet.cli import commit_date
from pam_espnet.score.report import Decoding, table
from pam_espnet.score.result import METRICS
from pam_espnet.score.scoring import UTT_SCORES

_HEAD = ("dataset", "Snt", "Wrd", "Corr", "Sub", "Del", "Ins", "Err", "S.Err")
_VERSIONS = {"python": "python", "espnet": "espnet", "torch": "pytorch"}  # here and in ESPnet


def espnet_section(decodings: Sequence[Decoding]) -> str:
    """Markdown; "" where no test set has an error rate. The versions and the commit are the first decoding's."""
    tables: dict[str, list[list[str]]] = {}
    for decoding in decodings:
        for task, metrics in decoding.scores["tasks"].items():
            for metric, entry in metrics.items():
                if "substitutions" in entry:
                    tables.setdefault(metric, []).append(_row(decoding, task, metric, entry))
    if not tables:
        return ""
    shown = [f"### {METRICS[metric].label}\n\n{table(_HEAD, rows)}" for metric, rows in tables.items()]
    return "\n".join(["## As ESPnet reports it\n", f"### Environments\n\n{_environments(decodings[0])}", *shown])


def _row(decoding: Decoding, task: str, metric: str, entry: dict[str, int]) -> list[str]:
    lines = map(json.loads, (decoding.path / UTT_SCORES).read_text(encoding="utf-8").split("\n")[:-1])
    wrong = sum(line["task"] == task and line[metric][0] > 0 for line in lines)
    length = entry.get("words", entry.get("characters", 0))
    parts = [entry[part] for part in ("substitutions", "deletions", "insertions")]
    counts = [length - parts[0] - parts[1], *parts, sum(parts)]
    shares = [(count, length) for count in counts] + [(wrong, entry["n"])]
    percent = [f"{100 * count / of:.1f}" if of else "–" for count, of in shares]
    return [f"{decoding.path.parent.name}/{decoding.set}", str(entry["n"]), str(length), *percent]


def _environments(decoding: Decoding) -> str:
    """The time of now, and what is known of the code that decoded."""
    versions, commit = decoding.stats.get("versions") or {}, decoding.stats.get("commit")
    lines = [f"- date: `{time.strftime('%a %b %d %H:%M:%S %Z %Y')}`"]
    for name, title in _VERSIONS.items():
        if name in versions:
            lines.append(f"- {title} version: `{'' if name == 'python' else f'{title} '}{versions[name]}`")
    if commit:
        lines.append(f"- Git hash: `{commit}`")
        if date := commit_date(commit):
            lines.append(f"  - Commit date: `{date}`")
    return "\n".join(lines) + "\n"
