"""Encoders by name. A new one is one file beside this and one line here, or no line at all: ``my_module:MyEncoder``."""

import importlib
import inspect
from typing import Any

from pam_espnet.config import LAST_COMMIT
from pam_espnet.errors import ConfigError
from pam_espnet.frontend.encoders.base import AbsEncoder

_HERE = "pam_espnet.frontend.encoders"

# name -> "module:class"; imported when the encoder is built
ENCODERS: dict[str, str] = {
    "whisper": f"{_HERE}.whisper:WhisperEncoder",
    "hf_wave": f"{_HERE}.hf_wave:HFWaveEncoder",
    "ast": f"{_HERE}.ast:ASTEncoder",
    "yamnet": f"{_HERE}.yamnet:YAMNetEncoder",
    "pyannote": f"{_HERE}.pyannote:PyannoteEncoder",
}


def encoder_target(type: str) -> str:
    """The import path behind a registered name, or ``type`` itself where it is one.
    Raises ConfigError: unknown name."""
    if ":" in type:
        return type
    if type == "ge2e":
        raise ConfigError(f"type: encoder 'ge2e' is no longer supported; the last commit that had it is {LAST_COMMIT}")
    if type not in ENCODERS:
        raise ConfigError(
            f"type: unknown encoder {type!r}; known are {', '.join(sorted(ENCODERS))}, "
            "or an import path such as my_module:MyEncoder"
        )
    return ENCODERS[type]


def encoder_class(type: str) -> type[AbsEncoder]:
    """The class behind a registered name or an import path ``module:Class``.
    Raises ConfigError: unknown name, or an import path that leads nowhere or to something that is no encoder."""
    target = encoder_target(type)
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "install the package it is in, or put its file into the folder that you call this from"
        raise ConfigError(f"type: cannot import encoder {target}: {error}\n  -> {hint}") from error
    if not (inspect.isclass(found) and issubclass(found, AbsEncoder)):
        raise ConfigError(f"type: {target} is not a subclass of {AbsEncoder.__module__}.AbsEncoder")
    return found


def build_encoder(type: str, **options: Any) -> AbsEncoder:
    """A frozen encoder: ``type`` as for ``encoder_class``, options of its ``__init__`` (``path``, ``layers``, ...).
    Raises ConfigError: unknown type or option, missing model folder, layer out of range."""
    cls = encoder_class(type)
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        raise ConfigError(f"encoder {type}: {error}; it takes {inspect.signature(cls)}") from error
    return cls(**options)
