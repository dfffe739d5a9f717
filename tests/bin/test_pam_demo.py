"""The command of the page: its options, the models that it loads."""

import argparse
import sys
import threading
from pathlib import Path

import pytest

from pam_espnet.bin.pam_demo import loaded_models, main
from pam_espnet.demo.answering import Answering
from pam_espnet.errors import ConfigError


def options(*models: Path | str) -> argparse.Namespace:
    empty = {"models": [], "config": None, "device": "cpu", "dtype": None, "threads": 0, "revision": None}
    return argparse.Namespace(model=[*map(str, models)], max_seconds=30.0, **empty)


def test_without_gradio_the_error_names_how_to_get_it(exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pam_espnet.demo.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"tools/setup\.sh --extras demo"):
        main(["--model", str(exp)])


def test_the_port_is_checked_before_a_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match="--port"):
        main(["--model", "none", "--port", "70000"])


def test_models_stand_side_by_side_and_one_that_is_missing_costs_no_other(exp: Path) -> None:
    before = threading.active_count()
    with loaded_models(options(exp, "nowhere", exp)) as models:
        assert [*models] == [exp.name, "nowhere", f"{exp.name} (3)"]
        assert isinstance(models[exp.name], Answering) and isinstance(models[f"{exp.name} (3)"], Answering)
        assert str(models["nowhere"]).startswith("nowhere: no such package")
        assert threading.active_count() == before + 2
    assert threading.active_count() == before, "their threads have ended"


def test_without_any_model_the_command_ends(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^nowhere: no such package"), loaded_models(options("nowhere")):
        pass
    both = options("nowhere", tmp_path)
    with pytest.raises(ConfigError, match="(?s)nowhere: no such package.*" + tmp_path.name), loaded_models(both):
        pass
