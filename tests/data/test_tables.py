"""Tables: what is read back, and every way a table can be wrong."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_espnet.data.tables import one_line, read_keys, read_table, scan_table, write_table
from pam_espnet.errors import DataError

_character = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
_key = st.text(_character, min_size=1).filter(lambda key: key.split() == [key] and not key.startswith("\ufeff"))
_value = st.text(_character).map(str.strip).filter(lambda value: not set(value) & set("\r\n"))


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(_key, _value, min_size=1))
def test_round_trip(table: dict[str, str]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        write_table(path, table)
        assert read_table(path, allow_empty=True) == table
        keys = [line.split(b" ")[0] for line in path.read_bytes().removesuffix(b"\n").split(b"\n")]
        assert keys == sorted(keys)  # LC_ALL=C order


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_one_line_makes_any_text_a_value(text: str) -> None:
    with TemporaryDirectory() as folder:
        value = one_line(text.encode("utf-8", "ignore").decode())
        write_table(Path(folder) / "table", {"key": value})
        assert read_table(Path(folder) / "table", allow_empty=True) == {"key": value}


def test_values_keep_inner_white_space(tmp_path: Path) -> None:
    (tmp_path / "table").write_text("a\tone  two \nb three")
    assert read_table(tmp_path / "table") == {"a": "one  two", "b": "three"}


@pytest.mark.parametrize(
    ("content", "line", "message", "remedy"),
    [
        (None, None, "no such file", "write it"),
        (b"", None, "the file is empty", "write it again"),
        (b"a 1\nb\n", 2, "has no value", "write the value"),
        (b"a 1\nb   \n", 2, "has no value", "write the value"),
        (b"a 1\n\nb 2\n", 2, "empty line", "remove the line"),
        (b"a 1\n b 2\n", 2, "the key is empty", "put the key first"),
        (b"a 1\na 1\n", 2, "duplicate key 'a', first on line 1", "remove one"),
        (b"a 1\na 2\n", 2, "another value than on line 1", "decide which"),
        (b"b 1\na 2\n", 2, "not sorted: 'a' comes after 'b'", "fix_data_dir.py"),
        (b"a 1\nB 2\n", 2, "not sorted", "LC_ALL=C"),
        (b"a 1\nb caf\xe9\n", 2, "not UTF-8 (byte 0xe9 at column 6)", "iconv"),
        (b"a 1\r\nb 2\r\n", 1, "carriage return", "sed"),
        (b"\xef\xbb\xbfa 1\n", 1, "byte order mark", "sed"),
        (b"a 1\nb 2\r3\n", 2, "carriage returns within the line", "else remove them"),
        (b"a 1\rb 2\r", 1, "carriage returns within the line", "tr "),
        ("a 1\n".encode("utf-16"), 1, "not UTF-8", "iconv -f utf-16"),
        (b"a 1\nb 2\0\n", 2, "NUL byte", "write it again"),
    ],
)
def test_bad_table(tmp_path: Path, content: bytes | None, line: int | None, message: str, remedy: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert message in str(caught.value)
    assert caught.value.hint is not None and remedy in caught.value.hint


def test_scan_lists_all_problems_and_keeps_the_good_lines(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"b 1\na 2\nc\nb 1\nd \xff\ne 5\n")
    scan = scan_table(tmp_path / "text")
    assert [problem.line for problem in scan.problems] == [2, 3, 4, 5]
    assert scan.values == {"b": "1", "a": "2", "e": "5"}


def test_lists_of_keys_are_read_in_any_order_and_from_any_system(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes("\ufeff# both\r\nb x\r\n\r\n#1 y\ra\n".encode())
    assert read_keys(tmp_path / "list", {"a": 0, "#1": 0}) == ["b", "#1", "a"]  # a key may look like a comment
    (tmp_path / "list").write_bytes(b"a\n\xe9\n")
    with pytest.raises(DataError, match="list:2: not UTF-8"):
        read_keys(tmp_path / "list", {})
    with pytest.raises(DataError, match="cannot be read"):
        read_keys(tmp_path / "absent", {})


@pytest.mark.parametrize("key", ["", "a b", "a\tb", "\u2003", "a\0"])
def test_write_refuses_keys_it_could_not_read_back(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="rename the key"):
        write_table(tmp_path / "table", {key: "value"})


@pytest.mark.parametrize("value", [" a", "a ", "a\nb", "a\rb", "\u2003a", "a\0b"])
def test_write_refuses_values_it_could_not_read_back(tmp_path: Path, value: str) -> None:
    with pytest.raises(DataError, match="one_line"):
        write_table(tmp_path / "table", {"key": value})
    assert not (tmp_path / "table").exists()
