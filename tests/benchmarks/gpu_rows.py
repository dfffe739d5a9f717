"""Rows of a benchmark whose time is limited: sections that may fail or be left out, JSON after every row, a table."""

import argparse
import gc
import json
import platform
import shlex
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


class Late(BaseException):
    """A section has no time left."""


def _late(*_: object) -> None:
    raise Late("took too long")


class Rows:
    """What was measured so far, in ``output`` (JSON) and beside it as Markdown.

    Args:
        limit: seconds for all of it, from now on.
        only: sections whose name contains this word; "" for all.
        about: facts about the run, written with the rows.
    """

    def __init__(self, output: Path, limit: float, only: str, about: Row) -> None:
        self.output, self.limit, self.only, self.began = output, limit, only, time.perf_counter()
        self.record: dict[str, Any] = {**about, "rows": [], "left_out": [], "errors": []}
        signal.signal(signal.SIGALRM, _late)
        self.save()

    def left(self) -> float:
        """Seconds."""
        return self.limit - (time.perf_counter() - self.began)

    def add(self, what: str, **row: Any) -> Row:
        """One row of the table ``what``; printed and saved at once."""
        found: Row = {"what": what, **row, "at_s": round(self.limit - self.left(), 1)}
        self.record["rows"].append(found)
        self.save()
        print(" ".join(f"{name}={_short(value)}" for name, value in found.items()), flush=True)
        return found

    def section(self, name: str, needs: float, most: float, function: Callable[[], Any]) -> None:
        """Run ``function`` if ``needs`` seconds are left, for at most ``most``; what goes wrong in it is recorded."""
        if self.only and self.only not in name and name != "set-up":
            return
        if self.left() < needs:
            self.record["left_out"].append(f"{name}: {self.left():.0f} s left, it may take {needs:.0f}")
            print(f"left out: {self.record['left_out'][-1]}", flush=True)
            return self.save()
        signal.setitimer(signal.ITIMER_REAL, max(1.0, min(most, self.left() - 2)))
        try:
            function()
        except (Exception, Late) as error:
            trace = "".join(traceback.format_exception(error)[-3:])[-1500:]
            said = f"{type(error).__name__}: {error}"[:600]
            self.record["errors"].append({"section": name, "error": said, "trace": trace})
            print(f"error in {name}: {error!r}\n{trace}", flush=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.save()
        return None

    def save(self) -> None:
        """The record as JSON, its tables as Markdown; ratios are those of the rows that there are."""
        compare(self.record["rows"])
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.record, indent=1, default=str) + "\n", encoding="utf-8")
        self.output.with_suffix(".md").write_text(markdown(self.record), encoding="utf-8")


def begin(parser: argparse.ArgumentParser, began: float) -> tuple[argparse.Namespace, Rows]:
    """The arguments of a benchmark, its own and those of all, and its empty rows.

    Args:
        began: when the program began, by ``time.perf_counter``; the limit counts from there.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="JSON; a Markdown table is written beside it")
    parser.add_argument("--limit", type=float, help="seconds for all of it (235; 1800 in a dry run)")
    parser.add_argument("--only", default="", help="only sections whose name contains this")
    parser.add_argument("--tests", type=Path, help="results of tests/gpu, one JSON a line, to be put into the output")
    parser.add_argument("--tiny", action="store_true", help="tiny models: a dry run")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        sys.exit("no CUDA GPU here; --tiny runs the program with tiny models on a CPU")
    args.limit = args.limit or (1800.0 if args.tiny else 235.0)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()}), dry run"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "triton"))
    about = {"card": card, "versions": versions, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    about |= read_tests(args.tests)
    return args, Rows(args.output, args.limit - (time.perf_counter() - began), args.only, about)


def read_tests(file: Path | None) -> Row:
    """How the tests ended, in words and one by one, from what ``tests/gpu/conftest.py`` wrote; nothing without it."""
    if file is None or not file.is_file():
        return {}
    tests: list[Row] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    counts = Counter(test["outcome"] for test in tests)
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    if failed := [test["test"] for test in tests if test["outcome"] == "failed"]:
        said += f" ({', '.join(failed)})"
    return {"tests": said, "test_results": tests}


def compare(rows: list[Row]) -> None:
    """Into each row of a search, how many times faster it is than ``generate`` on the same prefixes."""
    steps = [row for row in rows if "ms_step" in row]
    bases = {_point(row): row for row in steps if row["way"] == "generate"}
    for row in steps:
        if (base := bases.get(_point(row))) is not None:
            row["x_generate_step"] = round(base["ms_step"] / row["ms_step"], 2) if row["ms_step"] > 0 else None
            row["x_generate_all"] = round(base["ms_all"] / row["ms_all"], 2)


def _point(row: Row) -> tuple[Any, ...]:
    return row["batch"], row["prefix"], row["beam"]


def markdown(record: Row) -> str:
    """One table for each kind of row, in the order in which they were measured."""
    rows: list[Row] = record["rows"]
    heads = [f"{key}: {value}" for key, value in record.items() if isinstance(value, str | int | float)]
    lines = ["; ".join(heads), ""]
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [{k: v for k, v in row.items() if k not in ("what", "at_s")} for row in rows if row["what"] == what]
        names = list(dict.fromkeys(name for row in own for name in row))
        lines += [f"**{what}**", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [f"| {' | '.join(_short(row.get(name, '')) for name in names)} |" for row in own]
        lines.append("")
    lines += [f"left out: {one}" for one in record["left_out"]]
    lines += [f"error in {one['section']}: {one['error']}" for one in record["errors"]]
    return "\n".join(lines).rstrip() + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
