"""Recipe commands in READMEs and in docs/ are those that the recipes take: each is run as it stands, as a dry run."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READMES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("egs/*/pam1/README.md")),
    *(ROOT / "egs/mini/pam1" / name for name in ("TRAINING.md", "EXPERTS.md", "EARLY_EXIT.md")),
    *sorted(ROOT.glob("docs/*.md")),
]


def commands(readme: Path) -> list[tuple[Path, list[str]]]:
    """(folder, words) of the recipe commands in code blocks and in line, without their comments."""
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(\./[^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    found = []
    for line in lines:
        if match := re.match(r"(?:\./)?(egs/\w+/pam1/)?(?:\./)?(run\w*\.sh)\b(.*)", " ".join(line.split())):
            folder = ROOT / match[1] if match[1] else readme.parent
            if folder in (ROOT, ROOT / "docs"):  # these name any recipe there
                folder = ROOT / "egs/mini/pam1"
            found.append((folder, [f"./{match[2]}", *shlex.split(match[3], comments=True)]))
    return found


CASES = [
    pytest.param(folder, words, id=f"{readme.relative_to(ROOT)}-{number}")
    for readme in READMES
    for number, (folder, words) in enumerate(commands(readme))
]


def test_they_are_found() -> None:
    for readme in READMES:
        assert len(commands(readme)) >= (0 if readme.parent.name == "docs" else 1), readme
    assert sum(folder == ROOT / "egs/mini/pam1" for folder, _ in (case.values for case in CASES)) >= 8


@pytest.mark.parametrize(("folder", "words"), CASES)
def test_the_recipe_takes_it(folder: Path, words: list[str]) -> None:
    command = words if "--help" in words else [*words, "--dry_run", "true"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    assert done.stdout
