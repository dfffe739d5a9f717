"""A tiny recipe with a trained, decoded and scored experiment, and what tests do with a package of it."""

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_config

import pam_espnet
from pam_espnet.bin import pam_decode
from pam_espnet.config import write_config
from pam_espnet.data.datadir import DataDir
from pam_espnet.decode.shards import read_wave
from pam_espnet.fileio import save_trained, sha256_file, write_json
from pam_espnet.model import build_model

OPTIONS = {"beam_size": 2, "max_new_tokens": 6, "answer_sets": {"count": ["0", "1", "2"]}, "task_vocabulary": False}
LICENCE = "Tiny LLM, no licence in particular."


def make_recipe(root: Path, llm: Path, data: Path) -> None:
    """Fill ``root``, ``egs/<corpus>/<name>``, with ``exp/mine``; its paths begin at ``root``, as in real ones."""
    exp = root / "exp" / "mine"
    shutil.copytree(llm, root / "downloads" / "tiny-llm")
    (root / "downloads/tiny-llm/LICENSE").write_text(LICENCE)
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "README.md").write_text("# tiny\n\nTones are free.\n\n## Data\n\nTones are licensed CC0.\n")
    exp.mkdir(parents=True)
    (exp / "ctc_tokens.txt").write_text("5\n6\n7\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        config = tiny_config(Path("downloads/tiny-llm"), ctc_weight=0.1, ctc_tokens="exp/mine/ctc_tokens.txt")
        config |= {"output_dir": "exp/mine", "max_epoch": 3, "train_data_path_and_name_and_type": [["/home/me/x"]]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_trained(build_model(config).state_dict(), exp / "model.safetensors")
        write_config(config, exp / "config.yaml")
        write_config(OPTIONS, root / "decode.yaml")
        decoded = exp / "decode_beam" / "test"
        args = ["--exp", str(exp), "--data", str(data), "--out", str(decoded), "--config", "decode.yaml"]
        assert pam_decode.main([*args, "--dtype", "float32"]) == 0
    (exp / "RESULTS.md").write_text("# mine\n\n![Routing](routing.png)\n")
    (exp / "routing.png").write_bytes(b"\x89PNG")
    write_json(exp / "results.json", {"checkpoint": {"sha256": sha256_file(exp / "model.safetensors")}})


def llm(recipe: Path) -> dict[str, Path]:
    return {"llm": recipe / "downloads/tiny-llm"}


def answers(path: Path, data: Path, **options: Any) -> dict[str, tuple[list[str], list[float]]]:
    tables = DataDir.load(data)
    keys = list(tables.utterances)
    model = pam_espnet.load(path, **options)
    waves = [read_wave(tables, key, 16000) for key in keys]
    prompts, tasks = ([table[key] for key in keys] for table in (tables.prompt, tables.utt2task))
    found = model.answer(waves, prompts, tasks)
    return {key: (one.texts, one.scores) for key, one in zip(keys, found, strict=True)}


def decoded(recipe: Path) -> dict[str, tuple[list[str], list[float]]]:
    lines = (recipe / "exp/mine/decode_beam/test/nbest.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        (entry := json.loads(line))["utt"]: (
            [hypothesis["text"] for hypothesis in entry["hypotheses"]],
            [hypothesis["score"] for hypothesis in entry["hypotheses"]],
        )
        for line in lines
    }


def unpack(package: str | Path) -> Path:
    """What is in a zip file, in a folder beside it."""
    folder = Path("unpacked")
    with zipfile.ZipFile(package) as file:
        file.extractall(folder)
    return folder


def rewrite(package: Path, path: Path, changed: Mapping[str, bytes | None]) -> Path:
    """A copy of ``package`` with other contents, or without a member; the manifest stays as it is."""
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as target:
        contents = {name: source.read(name) for name in source.namelist()}
        for name, content in {**contents, **changed}.items():
            if content is not None:
                target.writestr(name, content)
    return path
