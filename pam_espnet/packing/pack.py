"""An experiment becomes one file.

    manifest.json       versions, models, how it was decoded, the SHA-256 of every member
    config.yaml         how it was trained, without the machine's paths
    model.safetensors   what was trained
    decode.yaml         how it was decoded
    ctc_tokens.txt      tokens of the training answers, where there was a warm start
    exit.safetensors    calibration of early exit, with exit.json, where there is one
    RESULTS.md, results.json and the pictures they show
    LICENSES.md         what is known about licences
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import pam_espnet
from pam_espnet.config import load_yaml, merge
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.errors import CheckpointError, DataError
from pam_espnet.fileio import MODEL_FILE, read_json, read_trained, sha256_file
from pam_espnet.packing import models as pretrained
from pam_espnet.packing.archive import write_archive
from pam_espnet.packing.decoding_options import DEFAULT_DECODING, UsedOptions, read_used_options
from pam_espnet.packing.licences import licence_notes

CONFIG, DECODE, CTC_TOKENS, CALIBRATION = "config.yaml", "decode.yaml", "ctc_tokens.txt", "exit.safetensors"
PACKAGES = ("espnet", "peft", "torch", "transformers")
# Paths of the machine it was trained on; loading needs none of them.
_PATHS = re.compile(r".*_data_path_and_name_and_type|.*_shape_file|output_dir|config|init_.*|pretrain_path|required")


def pack(exp_dir: str | Path, archive: str | Path, decoding: str = DEFAULT_DECODING) -> dict[str, Any]:
    """Write the experiment to ``archive`` and return its manifest.

    Args:
        exp_dir: experiment directory, trained, decoded and scored; relative paths in its configuration start here or
            at the recipe's folder.
        archive: file to write, a zip.
        decoding: name of the decode directory whose options the archive answers with.

    Raises:
        CheckpointError: the weights are missing, damaged, or not those that were decoded and scored with.
        ConfigError: a model that is not on this machine.
        DataError: a stage that was not run.
    """
    exp = Path(exp_dir)
    recipe = recipe_of(exp)
    config = load_yaml(exp / CONFIG)
    read_trained(exp / MODEL_FILE)  # whole?
    used = read_used_options(exp, decoding)
    checkpoint_sha256 = sha256_file(exp / MODEL_FILE)
    members: dict[str, Path | bytes] = {MODEL_FILE: exp / MODEL_FILE, **_results(exp, checkpoint_sha256)}
    if used.checkpoint_sha256 != checkpoint_sha256:
        raise CheckpointError(
            f"{exp / MODEL_FILE}: decode_{decoding} was made with other weights\n"
            f"  -> remove it (rm -r {exp / f'decode_{decoding}'}) and run stages 4 and 5 again"
        )
    found = []
    llm_revision = (config.get("llm_conf") or {}).get("revision")
    for name, path in pretrained.paths_of(config).items():
        root, commit = pretrained.find(path, recipe, llm_revision if name == pretrained.LLM else None)
        found.append((pretrained.describe(name, path, root, commit, recipe), root))
    models = [model for model, _ in found]
    portable, texts = _portable(config, recipe)
    portable = pretrained.with_paths(portable, {model.name: model.source for model in models})
    options, calibration = _calibrated(exp, used, recipe)
    members |= {CONFIG: _yaml(portable), DECODE: _yaml(options), **texts, **calibration}
    members["LICENSES.md"] = licence_notes(found, recipe).encode()
    about = {
        "experiment": exp.resolve().name,
        "recipe": None if recipe is None else pretrained.recipe_name(recipe),
        "versions": {"pam_espnet": pam_espnet.__version__, **{name: version(name) for name in PACKAGES}},
        "decoding": {"name": decoding, "options": DECODE, "dtype": used.dtype},
        "models": [model.to_dict() for model in models],
    }
    return write_archive(archive, members, about)


def recipe_of(exp: Path) -> Path | None:
    """The recipe's folder, where ``exp`` is ``<recipe>/exp/<tag>``."""
    folder = exp.resolve().parent.parent
    return folder if (folder / "run.sh").is_file() else None


def resolve_file(path: str | Path, *folders: Path | None) -> Path:
    """``path`` from here, or from the first of ``folders`` in which it exists; as it is where it exists in none."""
    for candidate in (Path(path), *(folder / path for folder in folders if folder is not None)):
        if candidate.is_file():
            return candidate
    return Path(path)


def _yaml(value: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True).encode()


def _results(exp: Path, checkpoint_sha256: str) -> dict[str, Path | bytes]:
    """The score table and its pictures; CheckpointError where it is of other weights."""
    report, record = exp / "RESULTS.md", exp / "results.json"
    for path in (report, record):
        if not path.is_file():
            raise DataError(path, "no such file: nothing was scored yet", hint="./run.sh --stage 5")
    scored = read_json(record).get("checkpoint", {}).get("sha256", checkpoint_sha256)
    if scored != checkpoint_sha256:
        raise CheckpointError(f"{record}: scores of other weights than {exp / MODEL_FILE}\n  -> ./run.sh --stage 4")
    pictures = re.findall(r"\]\(([\w.-]+\.png)\)", report.read_text(encoding="utf-8"))
    return {path.name: path for path in (report, record, *(exp / name for name in pictures)) if path.is_file()}


def _portable(config: Mapping[str, Any], recipe: Path | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The configuration without the machine's paths, and the small files that it needs, as members."""
    kept = {key: value for key, value in config.items() if not _PATHS.fullmatch(key)}
    members: dict[str, bytes] = {}
    if tokens := (config.get("model_conf") or {}).get("ctc_tokens"):
        path = resolve_file(tokens, recipe)
        if not path.is_file():
            raise DataError(path, "no such file, but model_conf.ctc_tokens names it", hint="./run.sh --stage 3")
        members[CTC_TOKENS] = path.read_bytes()
        kept = merge(kept, {"model_conf": {"ctc_tokens": CTC_TOKENS}})
    template = (config.get("llm_conf") or {}).get("chat_template")
    if template and "\n" not in template and (path := resolve_file(template, recipe)).is_file():
        kept = merge(kept, {"llm_conf": {"chat_template": path.read_text(encoding="utf-8")}})
    return kept, members


def _calibrated(exp: Path, used: UsedOptions, recipe: Path | None) -> tuple[dict[str, Any], dict[str, Path | bytes]]:
    """The options of decoding with early exit's file by its name in the archive, and that file as a member.

    A calibration that decoding did not use goes along all the same, for whoever wants to.
    """
    options = dict(used.options)
    AnswerOptions.from_dict(options, "key.json")
    members: dict[str, Path | bytes] = {}
    given = (options.get("exit") or {}).get("calibration")
    path = exp / CALIBRATION if given is None else resolve_file(given, recipe)
    if given is not None:
        if not path.is_file() or sha256_file(path) != used.calibration_sha256:
            message = "not the calibration of early exit that was decoded with, or missing"
            raise DataError(path, message, hint="decode again with the one there is: ./run.sh --stage 4")
        options = merge(options, {"exit": {"calibration": CALIBRATION}})
    if path.is_file():
        members[CALIBRATION] = path
        if (judged := path.with_suffix(".json")).is_file():
            members["exit.json"] = judged
    return options, members
