"""What is known about the licences of what an archive builds on; what nobody stated is said to be unknown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.packing.models import PretrainedModel, is_licence, recipe_name


def licence_notes(models: Sequence[tuple[PretrainedModel, Path]], recipe: Path | None) -> str:
    """Markdown: the recipe's own words on licences, then each model's licence text from its folder.

    Args:
        models: each with its folder or file.
        recipe: folder with the README.md that is quoted, if there is one.
    """
    parts = [
        "# Licences",
        "The trained weights in this archive are derived from the models and recordings below; nobody has stated a "
        "licence for them. The models and recordings themselves are not in the archive. The code that made it, "
        "PaM-ESPnet, is under Apache-2.0.",
    ]
    readme = None if recipe is None else recipe / "README.md"
    quoted = mentions(readme.read_text(encoding="utf-8")) if readme is not None and readme.is_file() else []
    if recipe is not None and quoted:
        parts += [f"## What the README of {recipe_name(recipe)} says", *quoted]
    else:
        parts += ["## Recordings", "Unknown: no README of a recipe states the licences of what this was trained on."]
    for model, root in models:
        parts += [f"## {model.name}: {model.source}", *_of_model(model, root)]
    return "\n\n".join(parts) + "\n"


def mentions(text: str) -> list[str]:
    """The paragraphs and tables of a Markdown text that speak of licences."""
    blocks = (block.strip("\n") for block in re.split(r"\n\s*\n", text))
    return [block for block in blocks if re.search(r"licen[cs]e", block, re.IGNORECASE) and not block.startswith("#")]


def _of_model(model: PretrainedModel, root: Path) -> list[str]:
    folder = root if root.is_dir() else root.parent
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and is_licence(path)] if root.is_dir() else []
    if found:
        return [f"Its {path.name}:\n\n```\n{path.read_text(encoding='utf-8').strip()}\n```" for path in found]
    card = folder / "README.md"
    stated = re.search(r"^license:[ \t]*(\S.*)$", card.read_text("utf-8"), re.MULTILINE) if card.is_file() else None
    if stated:
        return [f"Its model card says: {stated.group(1).strip()}"]
    where = f"; see https://huggingface.co/{model.source}" if model.revision is not None else ""
    return [f"Unknown: its files state none{where}."]
