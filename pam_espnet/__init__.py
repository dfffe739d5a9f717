"""Prompt-aware speech LLMs as ESPnet-style recipes.

Nothing heavy is imported here: ``import pam_espnet`` costs no torch, no transformers and no espnet.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pam_espnet.decode.speech_llm import SpeechLLM

__version__ = "0.2.0"


def load(path: str | Path, **options: Any) -> SpeechLLM:
    """A model that answers, from a package of ``pam_pack`` (zip file, folder, or ``org/name`` of the Hugging Face hub)
    or an experiment directory.

    ``pam_espnet.load("mine.zip", models={"llm": "models/smollm2"}).answer([wave], ["Transcribe the speech."])``;
    ``.transcribe("talk.mp3")`` for a file of any length. Options and errors are those of ``pam_espnet.package.load``.
    """
    from pam_espnet.package import load as load_package

    return load_package(path, **options)
