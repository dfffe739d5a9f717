"""A model that answers, from an archive, an unpacked archive or an experiment directory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pam_espnet.config import load_yaml, merge
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.packing import models as pretrained
from pam_espnet.packing.archive import MANIFEST, read_manifest, unpacked
from pam_espnet.packing.decoding_options import DEFAULT_DECODING, UsedOptions, read_used_options
from pam_espnet.packing.pack import CONFIG, recipe_of, resolve_file


def load(
    path: str | Path,
    models: Mapping[str, str | Path] | None = None,
    options: AnswerOptions | Mapping[str, Any] | str | Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    cache: str | Path | None = None,
) -> SpeechLLM:
    """Load what answers; it answers as its decode directory does.

    Args:
        path: an archive of ``pam_pack``, the folder of an unpacked one, or an experiment directory.
        models: name ("llm", or an encoder's) -> folder of that pretrained model on this machine. What is not named is
            looked for where the recipe has it, seen from here; ids of an archive are fetched at their commit.
        options: of decoding: a YAML file, a mapping like it, or an ``AnswerOptions``; None: those that it was packed
            with, or that ``decode_beam`` of the experiment was made with.
        device: "cpu", "cuda", ...
        dtype: precision of the LLM, see ``SpeechLLM.load``; None: the one it was packed or decoded with; of an
            experiment with other ``options``, as it was trained.
        cache: where an archive is unpacked (default: beside it).

    Raises:
        DataError: a damaged archive, members that would land outside, files that are not what the manifest says.
        ConfigError: models that are missing or other ones; options that cannot work.
        CheckpointError: weights that are missing, damaged, or do not fit.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such archive or experiment directory")
    folder = unpacked(path, cache) if path.is_file() else path
    if (folder / MANIFEST).is_file():
        config, used = _from_archive(folder, models or {})
    elif (folder / CONFIG).is_file():
        config, used = _from_experiment(folder, models or {}, options is None)
    else:
        raise ConfigError(f"{path}: has neither {MANIFEST} (an unpacked archive) nor {CONFIG} (an experiment)")
    answers = _answer_options(options, used, folder)
    return SpeechLLM.load(folder, answers, device, used.dtype if dtype is None else dtype, config)


def _from_archive(folder: Path, given: Mapping[str, str | Path]) -> tuple[dict[str, Any], UsedOptions]:
    """Its configuration with paths of this machine, and how it was decoded."""
    manifest = read_manifest(folder)
    try:
        models = [pretrained.PretrainedModel.from_dict(values) for values in manifest["models"]]
        decoding, versions = manifest["decoding"], manifest["versions"]
        options, dtype = load_yaml(folder / decoding["options"]), decoding["dtype"]
    except (KeyError, TypeError) as error:
        raise DataError(folder / MANIFEST, f"incomplete: {error!r}", hint="pack the experiment again") from error
    if other := [f"{name} {was}" for name in ("torch", "transformers") if (was := versions[name]) != version(name)]:
        logging.warning(f"packed with {', '.join(other)}; with other versions answers may differ in rare cases")
    paths = pretrained.place(models, given)
    config = _with_tokens(pretrained.with_paths(load_yaml(folder / CONFIG), paths), folder)
    return config, UsedOptions(options, dtype)


def _from_experiment(
    folder: Path, given: Mapping[str, str | Path], as_decoded: bool
) -> tuple[dict[str, Any], UsedOptions]:
    config = load_yaml(folder / CONFIG)
    known = pretrained.paths_of(config)
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"models: there is no {unknown[0]!r} in {folder / CONFIG}; it has {', '.join(known)}")
    recipe = recipe_of(folder)
    paths = {name: str(path) for name, path in given.items()}
    for name, path in known.items():  # paths start at the recipe's folder, wherever this runs
        if name not in paths and not Path(path).exists() and recipe is not None and (recipe / path).exists():
            paths[name] = str(recipe / path)
    config = _with_tokens(pretrained.with_paths(config, paths), recipe, folder)
    if not as_decoded:
        return config, UsedOptions()
    if not (folder / f"decode_{DEFAULT_DECODING}").is_dir():
        logging.warning(f"{folder} has no decode_{DEFAULT_DECODING}: default options of decoding")
        return config, UsedOptions()
    return config, read_used_options(folder)


def _with_tokens(config: dict[str, Any], *folders: Path | None) -> dict[str, Any]:
    """The file of the warm start's tokens, where it is seen from here."""
    tokens = (config.get("model_conf") or {}).get("ctc_tokens")
    if not tokens:
        return config
    return merge(config, {"model_conf": {"ctc_tokens": str(resolve_file(tokens, *folders))}})


def _answer_options(
    given: AnswerOptions | Mapping[str, Any] | str | Path | None, used: UsedOptions, folder: Path
) -> AnswerOptions:
    if isinstance(given, AnswerOptions):
        return given
    if given is None:
        values, source = dict(used.options), f"{folder}: options of decoding"
    elif isinstance(given, Mapping):
        values, source = dict(given), "options"
    else:
        values, source = load_yaml(given), str(given)
    early = values.get("exit")
    if isinstance(early, Mapping) and early.get("calibration"):
        found = resolve_file(early["calibration"], folder, recipe_of(folder))
        values = merge(values, {"exit": {"calibration": str(found)}})
    return AnswerOptions.from_dict(values, source)
