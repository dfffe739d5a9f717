"""Packages: a trained, decoded and scored experiment as a folder or one zip file, and models loaded from them.

    manifest.json       versions, pretrained models, how it was decoded, SHA-256 of every other file
    config.yaml         training configuration, without the machine's paths
    model.safetensors   trained weights
    decode.yaml         decoding options
    ctc_tokens.txt      token ids of the training answers, where there was a warm start
    exit.safetensors    calibration of early exit, where there is one
    RESULTS.md, results.json and their pictures
    card.yaml           what it was trained on, for the model card, where the recipe has conf/card.yaml
    licences/           READMEs and licence files of the recipe and, in a folder each, of the pretrained models
    models/             pretrained models by name, if asked for, those whose licences allow it

Other pretrained models are not in it: the manifest names each by id and commit, or by folder, with the SHA-256 of its
files.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import pam_espnet
from pam_espnet.cli import chosen_device
from pam_espnet.config import load_yaml, merge, write_config
from pam_espnet.data.archives import ANEW, extract_zip
from pam_espnet.data.hub import fetch_listed, hub_folder, is_hub_id
from pam_espnet.data.pretrained import HERE, SHAREABLE, check_files, copy_model, copy_notes, describe, find
from pam_espnet.errors import CheckpointError, ConfigError, DataError
from pam_espnet.fileio import MODEL_FILE, atomic_path, read_json, read_trained, sha256_file, whole_folder, write_json

if TYPE_CHECKING:
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.speech_llm import SpeechLLM

FORMAT = 1  # goes up when older code cannot read what newer code writes
MANIFEST, CONFIG, DECODE, CTC_TOKENS = "manifest.json", "config.yaml", "decode.yaml", "ctc_tokens.txt"
CALIBRATION, CARD = "exit.safetensors", "card.yaml"
MODELS = "models"  # folder of the pretrained models that are in a package
LLM = "llm"  # name of that pretrained model; encoders have theirs in the configuration
GET_AGAIN = "copy the package again, or pack the experiment again"
ELSEWHERE = "free some space, or name a folder that can be written: TMPDIR=DIR before the command"
# Paths of the machine it was trained on; loading needs none of them.
_PATHS = re.compile(r".*_data_path_and_name_and_type|.*_shape_file|output_dir|config|init_.*|pretrain_path|required")


class Decoding(NamedTuple):
    """How answers were decoded: options as in ``conf/decode.yaml``, the LLM's precision (None: as trained), SHA-256 of
    the calibration of early exit and of the weights."""

    options: Mapping[str, Any]
    dtype: str | None = None
    calibration_sha256: str | None = None
    checkpoint_sha256: str | None = None


def load(
    path: str | Path,
    models: Mapping[str, str | Path] | None = None,
    options: AnswerOptions | Mapping[str, Any] | str | Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    revision: str | None = None,
) -> SpeechLLM:
    """A model that answers as its decode directory does.

    Args:
        path: a package (zip file or folder), an experiment directory, or, where there is no such path, ``org/name`` of
            a package on the Hugging Face hub. No code comes from there: encoders by import path must be installed.
        models: name ("llm", or an encoder's) -> folder of that pretrained model. Others are looked for where the recipe
            has them, seen from here; ids of a package are fetched at their commit.
        options: of decoding: a YAML file, a mapping like it, or an ``AnswerOptions``; None: those of the package, or of
            the experiment's ``decode_beam``.
        device: "cpu", "cuda", "cuda:N" or "auto".
        dtype: precision of the LLM, see ``SpeechLLM.load``; None: as packed or decoded, or (an experiment with other
            ``options``) as trained.
        revision: branch, tag or commit on the hub; None: the newest commit.

    Raises:
        DataError: a package that is damaged or unsafe, or cannot be unpacked.
        ConfigError: no such device; models that are missing or other ones; options that cannot work; what the hub or
            its cache refuses.
        CheckpointError: weights that are missing, damaged, or do not fit.
    """
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.speech_llm import SpeechLLM

    path, device = Path(path), chosen_device(device)
    if not os.path.exists(path):  # False also for what is too long to be a path
        if not is_hub_id(str(path)):
            raise ConfigError(f"{path}: no such package or experiment directory")
        repo, path = path, fetch_listed(str(path), revision, MANIFEST)
        logging.info(f"{repo}: commit {path.name}")
    elif revision is not None:
        raise ConfigError(f"{path} is on this machine: a revision is for ids of the Hugging Face hub")
    with _opened(path) as folder:
        recipe = _recipe_of(folder)
        if (folder / MANIFEST).is_file():
            config, used = _read_package(folder, path, models or {})
        elif (folder / CONFIG).is_file():
            config, used = _read_experiment(folder, recipe, models or {}, as_decoded=options is None)
        else:
            raise ConfigError(f"{path}: has neither {MANIFEST} (a package) nor {CONFIG} (an experiment)")
        if tokens := (config.get("model_conf") or {}).get("ctc_tokens"):
            config = merge(config, {"model_conf": {"ctc_tokens": str(find(tokens, folder, HERE, recipe))}})
        folders = (folder, HERE, recipe) if options is None else (HERE, folder, recipe)
        if options is None:
            options = AnswerOptions.from_dict(used.options, f"{path}: decoding options")
        elif isinstance(options, Mapping):
            options = AnswerOptions.from_dict(options, "options")
        elif not isinstance(options, AnswerOptions):
            options = AnswerOptions.from_dict(load_yaml(options), options)
        if options.exit.calibration:
            calibration = str(find(options.exit.calibration, *folders))
            options = replace(options, exit=replace(options.exit, calibration=calibration))
        return SpeechLLM.load(folder, options, device, dtype or used.dtype, config)


@contextmanager
def _opened(path: Path) -> Iterator[Path]:
    """The folder ``path``, or a temporary one that holds the zip file ``path``."""
    if path.is_dir():
        yield path
        return
    with ExitStack() as stack:
        try:
            tmp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pam_package_")))
            extract_zip(path, tmp, limit=100 * path.stat().st_size)
        except OSError as error:
            raise DataError(path, f"cannot be unpacked: {error.strerror}", hint=ELSEWHERE) from error
        except DataError as error:  # damaged, or too little space
            raise DataError(path, error.message, hint=GET_AGAIN if error.hint == ANEW else ELSEWHERE) from error
        # A package that was zipped again may be one folder down.
        found = [*tmp.glob(MANIFEST), *sorted(tmp.glob(f"*/{MANIFEST}"))]
        if not found:
            raise DataError(path, f"is no package of pam_pack: it has no {MANIFEST}", hint=GET_AGAIN)
        yield found[0].parent


def _read_package(folder: Path, source: Path, given: Mapping[str, str | Path]) -> tuple[dict[str, Any], Decoding]:
    """Configuration with paths of this machine, and how it was decoded; every file's SHA-256 is checked.
    Raises DataError (about ``source``), ConfigError: see ``load``."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != FORMAT:
            message = f"has format {manifest['format']}, this version reads {FORMAT}"
            raise DataError(source, message, hint="use the version that packed it")
        members = {str(name): str(entry["sha256"]) for name, entry in manifest["members"].items()}
        models = [
            (one["name"], one["source"], one["revision"], dict(one["files"]), one["get"]) for one in manifest["models"]
        ]
        options, dtype = manifest["decoding"]["options"], manifest["decoding"]["dtype"]
        if unlisted := {CONFIG, MODEL_FILE, options} - set(members):
            raise KeyError(*unlisted)
        versions = {name: manifest["versions"][name] for name in ("torch", "transformers")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(source, f"{MANIFEST} is no manifest of pam_pack ({error!r})", hint=GET_AGAIN) from error
    for name, expected in members.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:  # files of the hub's cache are links
            raise DataError(source, f"unsafe member {name!r}", hint=GET_AGAIN)
        if not (folder / name).is_file():
            raise DataError(source, f"member {name}: missing, though the manifest lists it", hint=GET_AGAIN)
        if sha256_file(folder / name) != expected:
            raise DataError(source, f"member {name}: changed, its SHA-256 is not the manifest's", hint=GET_AGAIN)
    if other := [f"{name} {was}" for name, was in versions.items() if was != version(name)]:
        logging.warning(f"packed with {', '.join(other)}; with other versions answers may differ in rare cases")
    _check_names(given, [name for name, *_ in models], source)
    paths, problems = {}, []
    for name, path, revision, files, get in models:
        try:
            root, packed = Path(given.get(name, path)), [f"{MODELS}/{name}/{file}" for file in files]
            if name not in given and files and members.keys() >= set(packed):
                single = [*files] == [Path(path).name]  # a model that is one file, not a folder
                root = folder / (packed[0] if single else f"{MODELS}/{name}")
            elif name not in given and revision is not None:
                root = hub_folder(path, revision, allow_patterns=list(files))
            check_files(root, files)
            paths[name] = str(root)
        except ConfigError as error:
            expected = "".join(f"\n  {file}: SHA-256 {digest}" for file, digest in files.items())
            problems.append(
                f"model {name!r} ({path}): {error}; expected{expected}\n  get it {get}\n"
                f'  -> name its folder: --models {name}=DIR, or load(..., models={{"{name}": DIR}})'
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return _with_paths(load_yaml(folder / CONFIG), paths), Decoding(load_yaml(folder / options), dtype)


def _read_experiment(
    exp: Path, recipe: Path | None, given: Mapping[str, str | Path], as_decoded: bool
) -> tuple[dict[str, Any], Decoding]:
    """Configuration with paths seen from here (they begin at the recipe), and how it was decoded."""
    config = load_yaml(exp / CONFIG)
    known = _paths_of(config)
    _check_names(given, list(known), exp / CONFIG)
    config = _with_paths(config, {name: str(given.get(name, find(path, HERE, recipe))) for name, path in known.items()})
    if as_decoded and (exp / "decode_beam").is_dir():
        return config, _read_decoding(exp, "beam")
    if as_decoded:
        logging.warning(f"{exp} has no decode_beam: default decoding options")
    return config, Decoding({})


def save(exp_dir: str | Path, out: str | Path, decoding: str = "beam", with_models: bool = False) -> dict[str, Any]:
    """Write an experiment as a package; returns its manifest. The same experiment gives the same bytes.

    Args:
        exp_dir: trained, decoded and scored; relative paths in its configuration begin here or at the recipe's folder.
        out: a file that ends in .zip, or a folder.
        decoding: the package answers as ``decode_<decoding>`` was made.
        with_models: put pretrained models into it, those whose licences are known to allow it.

    Raises:
        CheckpointError: the weights are missing, damaged, or not those that were decoded and scored with.
        ConfigError: a model that is not on this machine; ``out`` is a folder of something else.
        DataError: a stage that was not run.
    """
    exp, out = Path(exp_dir), Path(out)
    if out.suffix.lower() == ".zip":
        with tempfile.TemporaryDirectory() as tmp:
            manifest = save(exp, Path(tmp) / "package", decoding, with_models)
            _write_zip(Path(tmp) / "package", out)
        return manifest
    if out.exists() and not (out / MANIFEST).is_file():
        raise ConfigError(f"{out}: exists and is no package; name a new folder, or a file that ends in .zip")
    recipe, config, report = _recipe_of(exp), load_yaml(exp / CONFIG), exp / "RESULTS.md"
    read_trained(exp / MODEL_FILE)  # whole?
    for path in (report, exp / "results.json"):
        if not path.is_file():
            raise DataError(path, "no such file: nothing was scored yet", hint="./run.sh --stage 5")
    used, weights = _read_decoding(exp, decoding), sha256_file(exp / MODEL_FILE)
    scored = read_json(exp / "results.json").get("checkpoint", {}).get("sha256", weights)
    for sha256, what in ((scored, "results.json"), (used.checkpoint_sha256, f"decode_{decoding}")):
        if sha256 != weights:
            hint = f"rm -r {exp}/decode_{decoding}, then run stages 4 and 5 again"
            raise CheckpointError(f"{exp / MODEL_FILE}: {what} was made with other weights\n  -> {hint}")
    text = report.read_text(encoding="utf-8")
    pictures = [path for path in sorted(exp.glob("*.png")) if f"({path.name})" in text]
    packages = ("espnet", "peft", "torch", "transformers")
    with whole_folder(out) as folder:
        for path in (exp / MODEL_FILE, report, exp / "results.json", *pictures):
            shutil.copyfile(path, folder / path.name)
        copy_notes(recipe, folder / "licences")
        if recipe is not None and (recipe / "conf" / CARD).is_file():
            shutil.copyfile(recipe / "conf" / CARD, folder / CARD)
        models = []
        for name, given in _paths_of(config).items():
            revision = (config.get("llm_conf") or {}).get("revision") if name == LLM else None
            model, root = describe(name, given, recipe, revision)
            models.append(model)
            copy_notes(root, folder / "licences" / name)
            if with_models and model["licence"] in SHAREABLE:
                copy_model(root, model["files"], folder / MODELS / name)
        config = _with_paths(config, {model["name"]: model["source"] for model in models})
        write_config(_portable(config, recipe, folder), folder / CONFIG)
        write_config(_with_calibration(used, exp, recipe, folder), folder / DECODE)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            "experiment": exp.resolve().name,
            "versions": {"pam_espnet": pam_espnet.__version__, **{name: version(name) for name in packages}},
            "decoding": {"name": decoding, "options": DECODE, "dtype": used.dtype},
            "models": models,
            "members": {path.relative_to(folder).as_posix(): {"sha256": sha256_file(path)} for path in files},
        }
        write_json(folder / MANIFEST, manifest)
    return manifest


def _write_zip(folder: Path, out: Path) -> None:
    """A package's folder as a zip file, uncompressed (weights would not shrink), in fixed order with fixed times."""
    with atomic_path(out) as tmp, zipfile.ZipFile(tmp, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))  # zip's first time
            info.external_attr = 0o100644 << 16  # a file that all may read
            info.file_size = path.stat().st_size
            with archive.open(info, "w") as target, open(path, "rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)


def _read_decoding(exp: Path, name: str) -> Decoding:
    """How ``<exp>/decode_<name>`` was made, by the ``key.json`` of its sets; it must be the same in all of them."""
    folder = exp / f"decode_{name}"
    keys = [read_json(path) for path in sorted(folder.glob("*/key.json"))]
    if not keys:
        there = ", ".join(sorted(path.name for path in exp.glob("decode_*"))) or "none"
        raise DataError(folder, f"no decoded sets here (there are: {there})", hint="decode first: ./run.sh --stage 4")
    for part in ("search", "checkpoint_sha256"):
        if any(key[part] != keys[0][part] for key in keys):
            hint = f"decode all sets alike: rm -r {folder}, then ./run.sh --stage 4"
            raise DataError(folder, f"its sets were decoded with different {part}", hint=hint)
    options = dict(keys[0]["search"])
    dtype, calibration = options.pop("dtype", None), options.pop("exit_calibration_sha256", None)
    return Decoding(options, dtype, calibration, keys[0]["checkpoint_sha256"])


def _portable(config: Mapping[str, Any], recipe: Path | None, folder: Path) -> dict[str, Any]:
    """``config`` without the machine's paths; its list of tokens is copied to ``folder``, its chat template is text."""
    kept = {name: value for name, value in config.items() if not _PATHS.fullmatch(name)}
    if tokens := (config.get("model_conf") or {}).get("ctc_tokens"):
        path = find(tokens, HERE, recipe)
        if not path.is_file():
            raise DataError(path, "no such file, but model_conf.ctc_tokens names it", hint="./run.sh --stage 3")
        shutil.copyfile(path, folder / CTC_TOKENS)
        kept = merge(kept, {"model_conf": {"ctc_tokens": CTC_TOKENS}})
    template = (config.get("llm_conf") or {}).get("chat_template")
    if template and "\n" not in template and (path := find(template, HERE, recipe)).is_file():
        kept = merge(kept, {"llm_conf": {"chat_template": path.read_text(encoding="utf-8")}})
    return kept


def _with_calibration(used: Decoding, exp: Path, recipe: Path | None, folder: Path) -> dict[str, Any]:
    """The options with the calibration of early exit copied to ``folder``; one that was not decoded with, too."""
    given = (used.options.get("exit") or {}).get("calibration")
    path = find(given or exp / CALIBRATION, HERE, recipe)
    if given and not (path.is_file() and sha256_file(path) == used.calibration_sha256):
        message = "not the calibration of early exit that was decoded with, or missing"
        raise DataError(path, message, hint="decode again with the one there is: ./run.sh --stage 4")
    if path.is_file():
        shutil.copyfile(path, folder / CALIBRATION)
    return merge(used.options, {"exit": {"calibration": CALIBRATION}}) if given else dict(used.options)


def _recipe_of(exp: Path) -> Path | None:
    """The recipe's folder, where ``exp`` is ``<recipe>/exp/<tag>``."""
    folder = exp.resolve().parent.parent
    return folder if (folder / "run.sh").is_file() else None


def _paths_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> path or id of every pretrained model in a configuration; encoders without one are left out."""
    encoders = (config.get("frontend_conf") or {}).get("encoders") or {}
    if LLM in encoders:
        raise ConfigError(f"frontend_conf.encoders: {LLM!r} stands for the LLM; give the encoder another name")
    if not config.get("llm"):
        raise ConfigError("config key 'llm' is missing")
    return {LLM: str(config["llm"])} | {name: str(one["path"]) for name, one in encoders.items() if one.get("path")}


def _with_paths(config: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """``config`` with other paths of its models."""
    encoders = {name: {"path": path} for name, path in paths.items() if name != LLM}
    return merge(config, {"llm": paths[LLM], "frontend_conf": {"encoders": encoders}})


def _check_names(given: Mapping[str, Any], known: list[str], source: Path) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"models: there is no {unknown[0]!r} in {source}; it has {', '.join(known)}")
