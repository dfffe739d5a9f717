"""Reports side by side, from their JSON to a table of a README."""

import copy
from pathlib import Path
from typing import Any

import pytest

from pam_espnet.bin import pam_evidence
from pam_espnet.bin.pam_exit_compare import main
from pam_espnet.cli import run_main
from pam_espnet.early_exit.comparison import comparison
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import read_json, write_json

RECIPE = Path(__file__).parents[2] / "egs/mini/pam1"
COMMITTED = sorted(RECIPE.glob("exit/*/[A-Z]*.json"))


def outcome(threshold: float | None, found: float, precision: float, depth: float, speedup: float) -> dict[str, Any]:
    coverage = 0.0 if depth == 4 else 0.5
    return {"threshold": threshold, "coverage": coverage, "precision": precision, "mean_depth": depth,
            "speedup": speedup, "found": found}  # fmt: skip


def point(name: str, depth: float, wer: float) -> dict[str, Any]:
    return {"set": "test", "task": "asr", "point": name, "mean_depth": depth, "difference": {"wer": {"value": wer}},
            "timing": {"own": {"steps_cpu": depth}, "never": {"steps_cpu": 4.0}}}  # fmt: skip


PLAIN: dict[str, Any] = {
    "layers": [2, 3],
    "sets": {"test": {"asr": {
        "agreement": {"bare": {"all": [0, 0.25, 0.5, 1], "first": [0, 0.3, 0.6, 1], "later": None},
                      "mapped": {"all": [0.7, 0.8]}},
        "gates": {"gate": [outcome(0.5, 0.4, 0.8, 2.5, 1.4), outcome(0.9, 0.3, 0.96, 3.5, 1.1),
                           outcome(0.99, 0.1, 1, 4, 1)],
                  "patience 2": [outcome(None, 0.2, 0.5, 3.0, 1.2)]},
        "oracle": {"step": {"candidate blocks": {"first match": {"mean_depth": 2.2, "speedup": 1.5}}}},
    }}},
    "sweep": [point("never", 4, 0), point("gate", 3.5, 0.4), point("gate:0.5", 2.5, 1.7), point("gate:0.3", 2.0, 9)],
}  # fmt: skip


def test_tables_of_two_models(tmp_path: Path) -> None:
    joint = copy.deepcopy(PLAIN)
    joint["sweep"][1]["difference"]["wer"]["value"] = -1.0
    for name, one in (("plain", PLAIN), ("joint", joint)):
        write_json(tmp_path / f"{name}.json", one)
    reports = [f"{name}={tmp_path / name}.json" for name in ("plain", "joint")]
    assert run_main(main, ["--reports", *reports, "--set", "test", "--out", str(tmp_path / "exit")]) == 0
    blocks, gates, savings = (read_json(tmp_path / f"exit/{n}.json")["rows"] for n in ("BLOCKS", "GATES", "SAVINGS"))
    assert blocks[1]["block"] == "3" and blocks[1]["plain, as it is %"] == "50.0"
    assert (blocks[0]["joint, with its map %"], blocks[0]["joint, later piece %"]) == ("70.0", "–")
    assert gates[0]["plain, right block %"] == "40.0 (at 0.5)"
    assert gates[0]["plain, fastest at 95% precision"] == "3.5 blocks, 1.10x"
    assert (gates[1]["plain, right block %"], gates[1]["plain, fastest at 95% precision"]) == ("20.0", "none")
    assert gates[2]["joint, fastest at 95% precision"] == "2.2 blocks, 1.50x"
    gate, lower = "3.5 blocks (gate), steps 1.14x", "2.5 blocks (gate:0.5), steps 1.60x"
    assert [row["plain"] for row in savings] == ["none", gate, gate, lower]
    assert savings[0]["joint"] == gate
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: exit/GATES.json -->\n<!-- end -->\n")
    assert run_main(pam_evidence.main, ["--readme", str(readme)]) == 0
    assert "| patience 2 | 20.0 | none | 20.0 | none |" in readme.read_text()


def test_of_several_seeds_means_are_shown() -> None:
    other = copy.deepcopy(PLAIN)
    figures = other["sets"]["test"]["asr"]
    figures["agreement"] = {"bare": {"all": [0, 0.25, 0.6, 1], "first": [0, 0.3, 0.6, 1], "later": [0, 0, 1, 1]}}
    figures["gates"] = {"gate": [outcome(0.7, 0.2, 0.9, 2.0, 1.6)], "patience 2": [outcome(None, 0.1, 0.99, 2.0, 1.6)]}
    other["sweep"] = [point("never", 4, 0), point("gate", 2.5, 0.8), point("gate:0.5", 1.5, 0.1)]
    tables = comparison({"plain": [PLAIN, other]}, "test")
    row = tables["BLOCKS"][1]
    assert (row["plain, as it is %"], row["plain, later piece %"]) == ("55.0 (50.0 to 60.0)", "100.0")
    assert row["plain, with its map %"] == "80.0"
    gate, patience, oracle = tables["GATES"]
    assert gate["plain, right block %"] == "30.0 (20.0 to 40.0)"
    assert gate["plain, fastest at 95% precision"] == "3.5 blocks, 1.10x (1 of 2)"
    assert patience["plain, fastest at 95% precision"] == "2.0 blocks, 1.60x (1 of 2)"
    assert oracle["plain, fastest at 95% precision"] == "2.2 blocks, 1.50x"
    # gate:0.3 was decoded with one seed alone; gate loses 0.6 in the mean, gate:0.5 0.9
    lower = "2.0 blocks (gate:0.5), steps 2.00x"
    assert [one["plain"] for one in tables["SAVINGS"]] == ["none", "none", lower, lower]
    unswept = {**PLAIN, "sweep": [point("never", 4, 0)]}
    assert all(one["plain"] == "none" for one in comparison({"plain": [unswept]}, "test")["SAVINGS"])


def test_reports_without_a_sweep_have_no_savings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "plain.json", {**PLAIN, "sweep": []})
    args = ["--reports", f"plain={tmp_path / 'plain.json'}", "--set", "test", "--out", str(tmp_path)]
    assert run_main(main, [*args, "--tables", "GATES"]) == 0
    assert {path.name for path in tmp_path.glob("[A-Z]*.json")} == {"GATES.json"}
    with pytest.raises(SystemExit):
        main([*args, "--tables", "SAVINGS"])
    assert "--tables: SAVINGS not among BLOCKS, GATES" in capsys.readouterr().err


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_tables_are_those_of_the_committed_reports(path: Path) -> None:
    made = read_json(path)
    reports = {name: [read_json(RECIPE / file) for file in files] for name, files in made["reports"].items()}
    assert comparison(reports, made["set"])[path.stem] == made["rows"]


def test_reports_that_cannot_be_compared() -> None:
    other = {**PLAIN, "layers": [1, 3]}
    with pytest.raises(ConfigError, match=r"joint: candidate blocks \[1, 3\], but \[2, 3\] before; calibrate them"):
        comparison({"plain": [PLAIN], "joint": [other]}, "test")
    with pytest.raises(ConfigError, match="the report of plain has no recognition on dev"):
        comparison({"plain": [PLAIN]}, "dev")
    old = copy.deepcopy(PLAIN)
    del old["sets"]["test"]["asr"]["agreement"]["bare"]["first"]
    with pytest.raises(ConfigError, match="the report of plain is of an older version; make it again"):
        comparison({"plain": [PLAIN, old]}, "test")
