"""Packages: a trained, decoded and scored experiment as a folder or one zip file, and models loaded from them.

    manifest.json       versions, pretrained models, how it was decoded, SHA-256 of every other file
    config.yaml         training configuration, without the machine's paths
    model.safetensors   trained weights
    decode.yaml         decoding options
    ctc_tokens.txt      token ids of the training answers, where there was a warm start
    exit.safetensors    calibration of early exit, with exit.json, where there is one
    RESULTS.md, results.json and their pictures
    licences/           READMEs and licence files of the recipe and, in a folder each, of the pretrained models

Pretrained models are not in it: the manifest names each by id and commit, or by folder, with the SHA-256 of its files.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pam_espnet
from pam_espnet.cli import chosen_device
from pam_espnet.config import load_yaml, merge, write_config
from pam_espnet.data.archives import ANEW, extract_zip
from pam_espnet.errors import CheckpointError, ConfigError, DataError
from pam_espnet.fileio import MODEL_FILE, atomic_path, read_json, read_trained, sha256_file, whole_folder, write_json

if TYPE_CHECKING:
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.speech_llm import SpeechLLM

FORMAT = 1  # goes up when older code cannot read what newer code writes
MANIFEST, CONFIG, DECODE, CTC_TOKENS = "manifest.json", "config.yaml", "decode.yaml", "ctc_tokens.txt"
CALIBRATION = "exit.safetensors"
LLM = "llm"  # name of that pretrained model; encoders have theirs in the configuration
GET_AGAIN = "copy the package again, or pack the experiment again"
# Paths of the machine it was trained on; loading needs none of them.
_PATHS = re.compile(r".*_data_path_and_name_and_type|.*_shape_file|output_dir|config|init_.*|pretrain_path|required")
_NOTES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "README", "PROVENANCE")  # beginnings of names, in any case
_OTHER_WEIGHTS = (".bin", ".h5", ".msgpack", ".onnx", ".ot")  # not read where there are safetensors


def load(
    path: str | Path,
    models: Mapping[str, str | Path] | None = None,
    options: AnswerOptions | Mapping[str, Any] | str | Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> SpeechLLM:
    """A model that answers as its decode directory does.

    Args:
        path: a package (zip file or folder), or an experiment directory.
        models: name ("llm", or an encoder's) -> folder of that pretrained model on this machine. Others are looked for
            where the recipe has them, seen from here; ids of a package are fetched at their commit.
        options: of decoding: a YAML file, a mapping like it, or an ``AnswerOptions``; None: those that it was packed
            with, or that ``decode_beam`` of the experiment was made with.
        device: "cpu", "cuda", "cuda:N" or "auto".
        dtype: precision of the LLM, see ``SpeechLLM.load``; None: the one it was packed or decoded with; of an
            experiment with other ``options``, as it was trained.

    Raises:
        DataError: a damaged package, unsafe members, files that differ from the manifest, no disk to unpack it to.
        ConfigError: no such device; models that are missing or other ones; options that cannot work.
        CheckpointError: weights that are missing, damaged, or do not fit.
    """
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.speech_llm import SpeechLLM

    path, device = Path(path), chosen_device(device)
    if not path.exists():
        raise ConfigError(f"{path}: no such package or experiment directory")
    with _opened(path) as folder:
        recipe = _recipe_of(folder)
        if (folder / MANIFEST).is_file():
            config, search = _read_package(folder, path, models or {})
        elif (folder / CONFIG).is_file():
            config, search = _read_experiment(folder, recipe, models or {}, as_decoded=options is None)
        else:
            raise ConfigError(f"{path}: has neither {MANIFEST} (a package) nor {CONFIG} (an experiment)")
        if tokens := (config.get("model_conf") or {}).get("ctc_tokens"):
            config = merge(config, {"model_conf": {"ctc_tokens": str(_find(tokens, folder, recipe))}})
        decoded_dtype, source = search.pop("dtype", None), f"{path}: decoding options"
        if not isinstance(options, AnswerOptions):
            if isinstance(options, Mapping):
                search, source = dict(options), "options"
            elif options is not None:
                search, source = load_yaml(options), str(options)
            if calibration := _calibration_of(search):
                search = merge(search, {"exit": {"calibration": str(_find(calibration, folder, recipe))}})
            options = AnswerOptions.from_dict(search, source)
        return SpeechLLM.load(folder, options, device, dtype or decoded_dtype, config)


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
            hint = "make room, or name a folder that can be written: TMPDIR=DIR before the command"
            raise DataError(path, f"cannot be unpacked: {error.strerror}", hint=hint) from error
        except DataError as error:
            raise DataError(path, error.message, hint=GET_AGAIN if error.hint == ANEW else error.hint) from error
        # A package that was zipped again may be one folder down.
        found = [*tmp.glob(MANIFEST), *sorted(tmp.glob(f"*/{MANIFEST}"))]
        if not found:
            raise DataError(path, f"is no package of pam_pack: it has no {MANIFEST}", hint=GET_AGAIN)
        yield found[0].parent


def _read_package(folder: Path, source: Path, given: Mapping[str, str | Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration with paths of this machine, decoding options with dtype; every file's SHA-256 is checked.

    Raises:
        DataError: about ``source``: another format, or a file that is missing, unsafe or was changed.
        ConfigError: pretrained models that are missing or other ones, with what to type.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] != FORMAT:
            message = f"has format {manifest['format']}, this version reads {FORMAT}"
            raise DataError(source, message, hint="use the version that packed it")
        members = {str(name): str(entry["sha256"]) for name, entry in manifest["members"].items()}
        models = [[one[key] for key in ("name", "source", "revision", "files", "get")] for one in manifest["models"]]
        options, dtype = manifest["decoding"]["options"], manifest["decoding"]["dtype"]
        versions = {name: manifest["versions"][name] for name in ("torch", "transformers")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(source, f"{MANIFEST} is no manifest of pam_pack ({error!r})", hint=GET_AGAIN) from error
    for name, expected in members.items():
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
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
            root = Path(given.get(name, path))
            if name not in given and revision is not None:
                root = _hub_folder(path, revision, allow_patterns=list(files))
            _check_model(root, files)
            paths[name] = str(root)
        except ConfigError as error:
            expected = "".join(f"\n  {file}: SHA-256 {digest}" for file, digest in files.items())
            problems.append(
                f"model {name!r} ({path}): {error}; expected{expected}\n  get it {get}\n"
                f'  -> say where it is: --models {name}=DIR, or load(..., models={{"{name}": DIR}})'
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return _with_paths(load_yaml(folder / CONFIG), paths), {**load_yaml(folder / options), "dtype": dtype}


def _read_experiment(
    exp: Path, recipe: Path | None, given: Mapping[str, str | Path], as_decoded: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration with paths seen from here (they begin at the recipe), decoding options with dtype."""
    config = load_yaml(exp / CONFIG)
    known = _paths_of(config)
    _check_names(given, list(known), exp / CONFIG)
    config = _with_paths(config, {name: str(given.get(name, _find(path, recipe))) for name, path in known.items()})
    if as_decoded and (exp / "decode_beam").is_dir():
        search = _decoding_key(exp, "beam")["search"]
        search.pop("exit_calibration_sha256", None)
        return config, search
    if as_decoded:
        logging.warning(f"{exp} has no decode_beam: default decoding options")
    return config, {}


def save(exp_dir: str | Path, out: str | Path, decoding: str = "beam") -> dict[str, Any]:
    """Write an experiment as a package; returns its manifest. The same experiment gives the same bytes.

    Args:
        exp_dir: experiment directory, trained, decoded and scored; relative paths in its configuration start here or
            at the recipe's folder.
        out: a file that ends in .zip, or a folder.
        decoding: the package answers as ``decode_<decoding>`` was made.

    Raises:
        CheckpointError: the weights are missing, damaged, or not those that were decoded and scored with.
        ConfigError: a model that is not on this machine; ``out`` is a folder of something else.
        DataError: a stage that was not run.
    """
    exp, out = Path(exp_dir), Path(out)
    if out.suffix == ".zip":
        with tempfile.TemporaryDirectory() as tmp:
            manifest = save(exp, Path(tmp) / "package", decoding)
            _write_zip(Path(tmp) / "package", out)
        return manifest
    if out.exists() and not (out / MANIFEST).is_file():
        raise ConfigError(f"{out}: exists and is no package; name a new folder, or a file that ends in .zip")
    recipe, config, report = _recipe_of(exp), load_yaml(exp / CONFIG), exp / "RESULTS.md"
    read_trained(exp / MODEL_FILE)  # whole?
    for path in (report, exp / "results.json"):
        if not path.is_file():
            raise DataError(path, "no such file: nothing was scored yet", hint="./run.sh --stage 5")
    key, weights = _decoding_key(exp, decoding), sha256_file(exp / MODEL_FILE)
    scored = read_json(exp / "results.json").get("checkpoint", {}).get("sha256", weights)
    for used, what in ((scored, "results.json"), (key["checkpoint_sha256"], f"decode_{decoding}")):
        if used != weights:
            hint = f"rm -r {exp}/decode_{decoding}, then run stages 4 and 5 again"
            raise CheckpointError(f"{exp / MODEL_FILE}: {what} was made with other weights\n  -> {hint}")
    text = report.read_text(encoding="utf-8")
    pictures = [path for path in sorted(exp.glob("*.png")) if f"({path.name})" in text]
    packages = ("espnet", "peft", "torch", "transformers")
    dtype = key["search"].pop("dtype", None)
    with whole_folder(out) as folder:
        for path in (exp / MODEL_FILE, report, exp / "results.json", *pictures):
            shutil.copyfile(path, folder / path.name)
        _copy_notes(recipe, folder / "licences")
        models = []
        for name, given in _paths_of(config).items():
            revision = (config.get("llm_conf") or {}).get("revision") if name == LLM else None
            model, root = _describe(name, given, recipe, revision)
            models.append(model)
            _copy_notes(root, folder / "licences" / name)
        config = _with_paths(config, {model["name"]: model["source"] for model in models})
        write_config(_portable(config, recipe, folder), folder / CONFIG)
        write_config(_with_calibration(key["search"], exp, recipe, folder), folder / DECODE)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            "experiment": exp.resolve().name,
            "versions": {"pam_espnet": pam_espnet.__version__, **{name: version(name) for name in packages}},
            "decoding": {"name": decoding, "options": DECODE, "dtype": dtype},
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
            info.create_system, info.external_attr = 3, 0o100644 << 16  # a file that all may read
            info.file_size = path.stat().st_size
            with archive.open(info, "w") as target, open(path, "rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)


def _decoding_key(exp: Path, name: str) -> dict[str, Any]:
    """What ``<exp>/decode_<name>`` was made with (its ``key.json``), which must be the same in all its sets."""
    folder = exp / f"decode_{name}"
    keys = [read_json(path) for path in sorted(folder.glob("*/key.json"))]
    if not keys:
        there = ", ".join(sorted(path.name for path in exp.glob("decode_*"))) or "none"
        raise DataError(folder, f"no decoded sets here (there are: {there})", hint="decode first: ./run.sh --stage 4")
    for part in ("search", "checkpoint_sha256"):
        if any(key[part] != keys[0][part] for key in keys):
            hint = f"decode all sets alike: rm -r {folder}, then ./run.sh --stage 4"
            raise DataError(folder, f"its sets were decoded with different {part}", hint=hint)
    return keys[0]


def _portable(config: Mapping[str, Any], recipe: Path | None, folder: Path) -> dict[str, Any]:
    """``config`` without the machine's paths; its list of tokens is copied to ``folder``, its chat template is text."""
    kept = {name: value for name, value in config.items() if not _PATHS.fullmatch(name)}
    if tokens := (config.get("model_conf") or {}).get("ctc_tokens"):
        path = _find(tokens, recipe)
        if not path.is_file():
            raise DataError(path, "no such file, but model_conf.ctc_tokens names it", hint="./run.sh --stage 3")
        shutil.copyfile(path, folder / CTC_TOKENS)
        kept = merge(kept, {"model_conf": {"ctc_tokens": CTC_TOKENS}})
    template = (config.get("llm_conf") or {}).get("chat_template")
    if template and "\n" not in template and (path := _find(template, recipe)).is_file():
        kept = merge(kept, {"llm_conf": {"chat_template": path.read_text(encoding="utf-8")}})
    return kept


def _with_calibration(search: dict[str, Any], exp: Path, recipe: Path | None, folder: Path) -> dict[str, Any]:
    """``search`` with the calibration of early exit copied to ``folder``; one that was not decoded with, too."""
    digest, given = search.pop("exit_calibration_sha256", None), _calibration_of(search)
    path = exp / CALIBRATION if given is None else _find(given, recipe)
    if given is not None and not (path.is_file() and sha256_file(path) == digest):
        message = "not the calibration of early exit that was decoded with, or missing"
        raise DataError(path, message, hint="decode again with the one there is: ./run.sh --stage 4")
    for file, name in ((path, CALIBRATION), (path.with_suffix(".json"), "exit.json")):
        if path.is_file() and file.is_file():
            shutil.copyfile(file, folder / name)
    return search if given is None else merge(search, {"exit": {"calibration": CALIBRATION}})


def _calibration_of(search: Mapping[str, Any]) -> str | None:
    early = search.get("exit")
    return early.get("calibration") if isinstance(early, Mapping) else None


def _recipe_of(exp: Path) -> Path | None:
    """The recipe's folder, where ``exp`` is ``<recipe>/exp/<tag>``."""
    folder = exp.resolve().parent.parent
    return folder if (folder / "run.sh").is_file() else None


def _find(path: str | Path, *folders: Path | None) -> Path:
    """``path`` from here, or from the first of ``folders`` in which it exists; as it is where it exists in none."""
    candidates = (Path(path), *(folder / path for folder in folders if folder is not None))
    return next((candidate for candidate in candidates if candidate.exists()), Path(path))


def _copy_notes(root: Path | None, folder: Path) -> None:
    """Copy licence files and READMEs that are directly in the folder ``root``."""
    for path in root.iterdir() if root is not None and root.is_dir() else ():
        if path.is_file() and path.name.upper().startswith(_NOTES):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / path.name)


# ---- pretrained models ----------------------------------------------------------------------------------------------


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
    return merge(config, {"llm": paths[LLM], **({"frontend_conf": {"encoders": encoders}} if encoders else {})})


def _check_names(given: Mapping[str, Any], known: list[str], source: Path) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"models: there is no {unknown[0]!r} in {source}; it has {', '.join(known)}")


def _check_model(root: Path, files: Mapping[str, str]) -> None:
    """Raises ConfigError where the folder or file ``root`` does not hold ``files`` (name -> SHA-256)."""
    for name, expected in files.items():
        path = root if root.is_file() and len(files) == 1 else root / name
        if not path.is_file():
            raise ConfigError(f"there is no {path if root.exists() else root}")
        if (found := sha256_file(path)) != expected:
            raise ConfigError(f"{path} is another one: its SHA-256 is {found}")


def _hub_folder(model_id: str, revision: str | None, **options: Any) -> Path:
    """The folder of a Hugging Face id in the local cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, revision=revision, **options))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model_id}: no such folder, and not from the Hugging Face hub: {error}") from error


def _describe(name: str, path_or_id: str, recipe: Path | None, revision: str | None) -> tuple[dict[str, Any], Path]:
    """A model's entry in the manifest, and its folder or file on this machine."""
    root, commit, given = _find(path_or_id, recipe), None, Path(path_or_id)
    source, get = path_or_id, "from whoever packed this; its source was not noted"
    if not root.exists():
        root = _hub_folder(path_or_id, revision, local_files_only=True)
        commit, get = root.name, f"from https://huggingface.co/{path_or_id}/tree/{root.name}; loading fetches it"
    elif given.is_absolute() or ".." in given.parts:
        source = given.name
    elif recipe is not None and given.parts[0] == "downloads":
        get = f"in {'/'.join(recipe.resolve().parts[-3:])}: ./run.sh --stage 1 --stop_stage 1 makes {source}"
    base = root.parent if root.is_file() else root
    files = {path.relative_to(base).as_posix(): sha256_file(path) for path in _model_files(root)}
    return {"name": name, "source": source, "revision": commit, "files": files, "get": get}, root


def _model_files(root: Path) -> list[Path]:
    """Files that decide what a model computes: all visible ones but licences, and one format of weights."""
    if root.is_file():
        return [root]
    found = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.upper().startswith(_NOTES)]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    safe = any(path.suffix == ".safetensors" for path in found)
    return [path for path in found if not (safe and path.name.removesuffix(".index.json").endswith(_OTHER_WEIGHTS))]
