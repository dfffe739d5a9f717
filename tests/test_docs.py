"""No broken links: in Markdown files, and in the pages of mkdocs.yml, which have one for each module."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
from services import unavailable

ROOT = Path(__file__).resolve().parents[1]

PATTERNS = ("*.md", "docs/*.md", "egs/*/pam1/*.md", "tests/*/*.md")
MARKDOWN = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a file."""
    headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(path: Path) -> None:
    for address in re.findall(r"\]\((?!\w+:)([^) ]+)\)", path.read_text(encoding="utf-8")):
        target, _, name = address.partition("#")
        found = path.parent / target if target else path
        assert found.exists(), address
        assert not name or name in anchors(found), address


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """mkdocs.yml and a folder for the pages."""
    if find_spec("mkdocs") is None:
        unavailable("docs", "mkdocs is not installed: tools/setup.sh --extras docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


def build(tree: Path) -> str | None:
    """Make the pages; what mkdocs wrote where it failed. (With --quiet it would not count warnings.)"""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else None


def broken_links(site: Path) -> list[str]:
    """Those to files and headings of the site; mkdocs does not look into what docstrings became."""
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"}
    names = {path: {"", *re.findall(r' id="([^"]+)"', text)} for path, text in pages.items()}
    broken = []
    for path, text in pages.items():
        for address in re.findall(r' (?:href|src)="(?!\w+:)([^"]+)"', text):
            target, _, name = unquote(address).partition("#")
            found = (path.parent / target).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            if not found.is_file() or name not in names.get(found, {""}):
                broken.append(f"{path.relative_to(site)}: {address}")
    return broken


@pytest.mark.services
def test_every_module_has_a_page_and_no_link_is_broken(tree: Path) -> None:
    for part in ("docs", "pam_espnet"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    assert build(tree) is None
    modules = {path.relative_to(tree).with_suffix("") for path in tree.rglob("pam_espnet/**/[a-z]*.py")}
    assert len(modules) > 100
    assert [name for name in modules if not (tree / "site/reference" / name / "index.html").is_file()] == []
    assert broken_links(tree / "site") == []


@pytest.mark.services
@pytest.mark.parametrize("wrong", ["[a file](absent.md)", "[a class][pam_espnet.Absent]", "[a heading](#absent)"])
def test_a_broken_link_is_noticed(tree: Path, wrong: str) -> None:
    for part, text in (("docs/index.md", "# A page\n"), ("pam_espnet/__init__.py", f'"""A package with {wrong}."""\n')):
        (tree / part).parent.mkdir()
        (tree / part).write_text(text, encoding="utf-8")
    assert "Absent" in (build(tree) or "") or "absent" in " ".join(broken_links(tree / "site"))
