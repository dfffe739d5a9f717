"""The converters' command line: a module behind every format, the licence by file or as text, short errors."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from pam_espnet.bin.pam_convert import FORMATS, build_parser, main
from pam_espnet.cli import run_main


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_converter(name: str) -> None:
    convert = importlib.import_module(FORMATS[name]).convert
    assert list(inspect.signature(convert).parameters) == ["source", "out", "licence"]


def test_licence_by_file_or_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    from pam_espnet.convert import ge2e

    monkeypatch.setattr(ge2e, "convert", lambda source, out, licence: seen.append((source, out, licence)))
    (tmp_path / "LICENSE").write_text("Apache License\n")
    common = ["--format", "ge2e", "--source", "a.pt", "--out", "b", "--licence"]
    assert main([*common, str(tmp_path / "LICENSE")]) == 0
    assert main([*common, "Apache-2.0"]) == 0
    assert seen == [(Path("a.pt"), Path("b"), "Apache License\n"), (Path("a.pt"), Path("b"), "Apache-2.0")]


def test_user_error_has_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--format", "ct2-whisper", "--source", str(tmp_path / "absent.bin"), "--out", str(tmp_path / "out")]
    assert run_main(main, [*arguments, "--licence", "MIT"]) == 1
    error = capsys.readouterr().err
    assert "absent.bin" in error and "Traceback" not in error


def test_unknown_format_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--format", "tar", "--source", "a", "--out", "b", "--licence", "c"])
    assert "gguf-llama" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pam_espnet.bin.pam_convert import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
