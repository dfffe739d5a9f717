"""The pretrained models that an experiment builds on: which ones exactly, and where they are on this machine.

They are not part of an archive. It names each by its Hugging Face id and commit, or by its folder, and by the SHA-256
of the files that decide what it computes: weights, configuration, tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pam_espnet.config import merge
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import read_json, sha256_file

LLM = "llm"
PROVENANCE = "provenance.json"  # of converted models, see convert.common
# In the order in which transformers looks for weights; the converted models have the first.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DESCRIBING = {".json", ".txt", ".model", ".jinja"}  # suffixes of configurations and tokenizers


@dataclass(frozen=True)
class PretrainedModel:
    """A frozen model that an experiment was trained with.

    Attributes:
        name: ``llm``, or the encoder's name in the configuration.
        source: Hugging Face id, or the folder or file, relative to the recipe where it lies in there.
        revision: commit of an id; None for a folder or file.
        files: path within the folder -> SHA-256.
        get: how to come by it.
        made_from: what it was converted from, by its own record; empty where it has none.
    """

    name: str
    source: str
    revision: str | None
    files: Mapping[str, str]
    get: str
    made_from: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PretrainedModel:
        """From what ``to_dict`` gave.

        Raises:
            ConfigError: keys missing or unknown, or a file outside the model's folder.
        """
        try:
            model = cls(**values)
        except TypeError as error:
            raise ConfigError(f"models: {error}") from error
        for name in model.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ConfigError(f"models: {model.name}: unsafe file name {name!r}")
        return model

    def problem(self, root: Path) -> str | None:
        """What is wrong with the model in ``root``, a folder or a single file; None: it is this one."""
        for name, expected in self.files.items():
            path = root if root.is_file() and len(self.files) == 1 else root / name
            if not path.is_file():
                return f"there is no file {path}"
            if (found := sha256_file(path)) != expected:
                return f"{path} is another one: its SHA-256 is {found}, not {expected}"
        return None


def paths_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> path or id of every pretrained model in an experiment's configuration; encoders without one are left out.

    Raises:
        ConfigError: no LLM, or an encoder that is named like it.
    """
    encoders = (config.get("frontend_conf") or {}).get("encoders") or {}
    if LLM in encoders:
        raise ConfigError(f"frontend_conf.encoders: {LLM!r} stands for the LLM; give the encoder another name")
    if not config.get("llm"):
        raise ConfigError("config key 'llm' is missing")
    found = {LLM: str(config["llm"])}
    found.update({name: str(options["path"]) for name, options in encoders.items() if options.get("path")})
    return found


def with_paths(config: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """``config`` with other paths for the models that ``paths`` names."""
    encoders = {name: {"path": path} for name, path in paths.items() if name != LLM}
    changes: dict[str, Any] = {"frontend_conf": {"encoders": encoders}} if encoders else {}
    if LLM in paths:
        changes["llm"] = paths[LLM]
    return merge(config, changes)


def model_files(root: Path) -> list[Path]:
    """The files that decide what a model computes: its weights as transformers would choose them, its descriptions.

    Of a folder without any weights of the usual names all visible files count.
    """
    if root.is_file():
        return [root]
    visible = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    weights: list[Path] = []
    for name in _WEIGHTS:
        index = root / f"{name}.index.json"
        if (root / name).is_file():
            weights = [root / name]
        elif index.is_file():
            weights = [index, *(root / shard for shard in sorted(set(read_json(index)["weight_map"].values())))]
        if weights:
            break
    else:
        return visible
    describing = [
        path
        for path in visible
        if path.parent == root
        and path.suffix in _DESCRIBING
        and path.name != PROVENANCE
        and not path.name.endswith(".index.json")
        and not is_licence(path)
    ]
    return sorted({*weights, *describing})


def is_licence(path: Path) -> bool:
    """Whether a file's name says that it holds a licence."""
    return path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE"))


def find(path_or_id: str, recipe: Path | None, revision: str | None = None) -> tuple[Path, str | None]:
    """Where a model is on this machine: its folder or file, and the commit if it came from the Hugging Face hub.

    Args:
        path_or_id: as the configuration has it.
        recipe: folder in which relative paths start that do not exist from here.
        revision: branch, tag or commit that the configuration asks for.

    Raises:
        ConfigError: neither a path nor in the local Hugging Face cache.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for path in (Path(path_or_id), *([recipe / path_or_id] if recipe else [])):
        if path.exists():
            return path, None
    try:
        cached = try_to_load_from_cache(path_or_id, "config.json", revision=revision)
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise ConfigError(
            f"{path_or_id}: no such folder, and no such model in the local Hugging Face cache, so its commit is not "
            "known\n  -> run this where the experiment was decoded"
        )
    return Path(cached).parent, Path(cached).parent.name


def describe(name: str, path_or_id: str, root: Path, commit: str | None, recipe: Path | None) -> PretrainedModel:
    """What an archive says about the model in ``root`` (see ``find`` for the other arguments)."""
    base = root.parent if root.is_file() else root
    files = {path.relative_to(base).as_posix(): sha256_file(path) for path in model_files(root)}
    record = base / PROVENANCE
    keys = ("converter", "source", "source_sha256")
    made_from = {key: str(value) for key, value in read_json(record).items() if key in keys} if record.is_file() else {}
    if commit is not None:
        get = f"from https://huggingface.co/{path_or_id}, commit {commit}; loading fetches it"
        return PretrainedModel(name, path_or_id, commit, files, get, made_from)
    given = PurePosixPath(path_or_id)
    source = given.name if given.is_absolute() or ".." in given.parts else str(given)
    get = "from whoever packed this; its source was not noted"
    if recipe is not None and given.parts[:1] == ("downloads",):
        get = f"in {recipe_name(recipe)}: ./run.sh --stage 1 --stop_stage 1, which makes {source}"
    return PretrainedModel(name, source, None, files, get, made_from)


def recipe_name(recipe: Path) -> str:
    """``egs/<corpus>/<name>``."""
    return "/".join(recipe.resolve().parts[-3:])


def place(models: Sequence[PretrainedModel], given: Mapping[str, str | Path]) -> dict[str, str]:
    """Where each model of an archive is on this machine, every file compared with its SHA-256.

    Args:
        models: of the archive.
        given: name -> folder. What is not named is looked for where the recipe has it, seen from here, or fetched
            from the Hugging Face hub at its commit.

    Returns:
        name -> path.

    Raises:
        ConfigError: a name that no model has; models that are missing or other ones, with what to type.
    """
    if unknown := sorted(set(given) - {model.name for model in models}):
        known = ", ".join(model.name for model in models)
        raise ConfigError(f"models: there is no {unknown[0]!r} in this archive; it has {known}")
    paths, problems = {}, []
    for model in models:
        chosen = given.get(model.name)
        root = Path(model.source if chosen is None else chosen)
        if chosen is None and model.revision is not None:
            root = _fetch(model)
        problem = model.problem(root) if root.exists() else f"there is no {root}"
        if problem is None:
            paths[model.name] = str(root)
        else:
            problems.append(_explain(model, problem))
    if problems:
        raise ConfigError("\n".join(problems))
    return paths


def _fetch(model: PretrainedModel) -> Path:
    """The folder of an id at its commit, in the local Hugging Face cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.source, revision=model.revision, allow_patterns=list(model.files)))
    except (OSError, ValueError) as error:
        raise ConfigError(_explain(model, f"it cannot be fetched: {error}")) from error


def _explain(model: PretrainedModel, problem: str) -> str:
    weights = [name for name in model.files if not name.endswith(tuple(_DESCRIBING))] or list(model.files)
    expected = "\n".join(f"  expected {name}, SHA-256 {model.files[name]}" for name in weights[:4])
    return (
        f"model {model.name!r} ({model.source}): {problem}\n{expected}\n  get it {model.get}\n"
        f'  -> say where it is: --models {model.name}=DIR, or load(..., models={{"{model.name}": DIR}})'
    )
