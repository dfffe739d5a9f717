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
    """A model that answers, from an archive of ``pam_pack``, an unpacked one, or an experiment directory.

    ``pam_espnet.load("mine.zip", models={"llm": "models/smollm2"}).answer([wave], ["Transcribe the speech."])``;
    the options and errors are those of ``pam_espnet.packing.load.load``.
    """
    from pam_espnet.packing.load import load as load_packed

    return load_packed(path, **options)
