"""Merging configurations."""

from pathlib import Path

import pytest

from pam_espnet.config import (
    add_specs,
    check_number,
    drop_removed,
    load_yaml,
    merge,
    parse_change,
    resolve,
    used_encoders,
    write_config,
)
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.fileio import write_json


def test_mappings_merge_lists_replace_null_removes() -> None:
    base = {"a": {"b": 1, "c": 2}, "list": [1, 2], "gone": 3}
    over = {"a": {"c": 5, "d": {"e": None, "f": 1}}, "list": [9], "gone": None}
    assert merge(base, over) == {"a": {"b": 1, "c": 5, "d": {"f": 1}}, "list": [9]}
    assert base["a"] == {"b": 1, "c": 2}


def test_changes_are_yaml_values() -> None:
    assert parse_change("a.b=3e-4") == {"a": {"b": 3e-4}} and parse_change("a=-1E3") == {"a": -1000.0}
    assert parse_change("a.b=[1, 2]") == {"a": {"b": [1, 2]}}
    assert parse_change("x=null") == {"x": None}
    with pytest.raises(ConfigError, match="not YAML"):
        parse_change("a=[1")
    for wrong in ("novalue", "=1", "a..b=1"):
        with pytest.raises(ConfigError, match="key"):
            parse_change(wrong)


def test_resolve_and_write(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: {y: 1}\nz: 2\n")
    (tmp_path / "b.yaml").write_text("x: {y: 3}\n")
    config = resolve([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["x.w=true"])
    assert config == {"x": {"y": 3, "w": True}, "z": 2}
    assert write_config(config, tmp_path / "c.yaml") and not write_config(config, tmp_path / "c.yaml")
    assert load_yaml(tmp_path / "c.yaml") == config


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml:2: not valid YAML"):
        load_yaml(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_yaml(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("a: 1\nb: 2\na: 3\n", 1, 3),
        ("x:\n  a: 1\n  'a': 2\n", 2, 3),
        ("x: [{a: 1,\n a: 1}]", 1, 2),
        ("{a: 1, a: 1}", 1, 1),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path, text: str, first: int, second: int) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"a\.yaml:{second}: .*'a' was given in line {first} already"):
        load_yaml(tmp_path / "a.yaml")


def test_merge_keys_of_yaml_are_no_repetition(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\n")
    assert load_yaml(tmp_path / "a.yaml")["y"] == {"a": 1, "b": 3}


def test_encodings_of_configuration_files(tmp_path: Path) -> None:
    """A byte order mark is no part of the first key; another encoding than UTF-8 is named with its line."""
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfbeam_size: 2\r\nprompt: caf\xc3\xa9\r\n")
    assert load_yaml(tmp_path / "bom.yaml") == {"beam_size": 2, "prompt": "caf\xe9"}
    (tmp_path / "latin.yaml").write_bytes(b"beam_size: 2\nprompt: caf\xe9\n")
    with pytest.raises(DataError, match=r"latin\.yaml:2: is not UTF-8 \(byte 0xe9\)"):
        load_yaml(tmp_path / "latin.yaml")
    (tmp_path / "wide.yaml").write_bytes("beam_size: 2\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"wide\.yaml:1: is not UTF-8"):
        load_yaml(tmp_path / "wide.yaml")


def test_numbers_within_limits() -> None:
    check_number(1, "n", at_least=1, whole=True)
    check_number(0.5, "p", at_least=0, below=1)
    for value in (0, 1.5, True, "1", None, float("nan")):
        with pytest.raises(ConfigError, match=r"n: .*; must be a whole number, at least 1"):
            check_number(value, "n", at_least=1, whole=True)
    for value in (1, -0.1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"p: .*; must be a number, at least 0 and below 1"):
            check_number(value, "p", at_least=0, below=1)


def test_used_encoders_and_specs(tmp_path: Path) -> None:
    config = {"frontend_conf": {"encoders": {"a": {"type": "x"}, "b": {"type": "y"}}, "fusion": "pam"}}
    assert used_encoders(config) == ["a", "b"]
    single = merge(config, {"frontend_conf": {"fusion": "single", "fusion_conf": {"encoder": "b"}}})
    assert used_encoders(single) == ["b"]
    write_json(tmp_path / "a" / "spec.json", {"width": 3})
    assert add_specs(config, tmp_path)["frontend_conf"]["specs"] == {"a": {"width": 3}}
    with pytest.raises(ConfigError, match="none given"):
        used_encoders({})


def test_removed_options_are_accepted_where_they_changed_nothing() -> None:
    removed = {"compile": False, "fill": "propagate"}
    assert drop_removed({"compile": False, "fill": None, "beam_size": 2}, removed, "") == {"beam_size": 2}
    with pytest.raises(ConfigError, match=r"exit\.fill: 'map' is no longer supported; .* 6d6c31d"):
        drop_removed({"fill": "map"}, removed, "exit")
