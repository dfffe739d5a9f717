"""tools/check_install.py: a good environment passes, each thing that is wrong is named with what to type."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def doctor(repo_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_install", repo_root / "tools/check_install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_install"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_this_environment(doctor: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("batch_size: 8\nresources: {disk_gb: 0.001, memory_gb: 0.1}\n")
    status = doctor.main(["--json", "--config", str(config), "--dir", str(tmp_path / "not/yet")])
    findings = json.loads(capsys.readouterr().out)
    assert status == 0, [finding for finding in findings if finding["status"] == "failed"]
    assert {finding["part"] for finding in findings} >= {"python", "packages", "torch", "audio", "disk", "memory"}
    disk = next(finding["message"] for finding in findings if finding["part"] == "disk")
    assert "0.001 GiB needed" in disk


def test_what_is_needed_and_not_there(doctor: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--need-disk-gb", "1e9", "--need-memory-gb", "1e9"]) == 1
    out = capsys.readouterr().out
    assert out.count("failed") >= 2 and "batch_size" in out and "not usable" in out


@pytest.mark.parametrize(
    ("version", "status"), [("3.11.9", "failed"), ("3.12.0", "ok"), ("3.13.5", "ok"), ("3.14.0", "failed")]
)
def test_python(doctor: ModuleType, version: str, status: str) -> None:
    finding = doctor.check_python(">=3.12,<3.14", version)
    assert finding.status == status
    assert (finding.hint != "") is (status == "failed")


def test_packages(doctor: ModuleType) -> None:
    declared = {"": ["pytest<1", "no-such-package-x", "pytest>=7"]}
    declared |= {"train": ["no-such-package-y>=2"], "demo": ["no-such-package-z"]}
    findings = doctor.check_packages(declared)
    assert [finding.status for finding in findings] == ["ok", "failed", "failed", "warning"]
    assert all(finding.hint for finding in findings[1:])
    assert "no-such-package-x" in findings[2].message and "'train'" in findings[3].message


@pytest.mark.parametrize("text", ["resources: 3", "resources: {disk: 3}", "resources: {disk_gb: much}", "[1", "- a"])
def test_configs_that_make_no_sense(doctor: ModuleType, tmp_path: Path, text: str) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit, match=r"x\.yaml"):
        doctor.read_needs(config)


def test_a_config_that_is_not_there(doctor: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="No such file"):
        doctor.read_needs(tmp_path / "x.yaml")
