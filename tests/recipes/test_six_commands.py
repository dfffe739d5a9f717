"""From a folder of recordings to a served answer: the README's six commands, read from there, in a copy of the tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import soundfile
from huggingface_hub import ModelCard
from model_hub import ModelHub
from recipe_modules import local_modules
from served import require_serve
from services import unavailable

from pam_espnet.data.audio import read_audio
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.tables import read_table

ROOT = Path(__file__).resolve().parents[2]
HEADING = "## From a folder of recordings to a served answer"
MADE = {"data", "dump", "exp", "downloads"}  # in a recipe's folder
COUNT = 20  # recordings


def commands() -> list[str]:
    """The lines of the code block below ``HEADING``."""
    found = re.search(rf"^{HEADING}\n.*?^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1].splitlines()


def copy_tree(target: Path) -> Path:
    """The working tree as a fresh clone has it."""

    def made(folder: str, names: list[str]) -> set[str]:
        if Path(folder) == ROOT:
            return {name for name in names if name.startswith(".")} | {"tests"}
        return {name for name in names if name in ("__pycache__", ".uv") or (name in MADE and folder.endswith("/pam1"))}

    return Path(shutil.copytree(ROOT, target, ignore=made))


def write_recordings(folder: Path, downloads: Path) -> Path:
    """Telephone prompts with their transcripts, as the README describes a folder."""
    folder.mkdir()
    with local_modules(ROOT / "egs/mini/pam1/local", ("recordings", "download", "rcc")) as local:
        clips = [clip for clip in local.recordings.asterisk_english(downloads) if "," not in clip.text][:COUNT]
    lines = ["file_name,text\n"]
    for clip in clips:
        wave, rate = read_audio(clip.path)
        soundfile.write(folder / f"{clip.name}.wav", wave, rate, subtype="PCM_16")
        lines.append(f"{clip.name}.wav,{clip.text}\n")
    (folder / "metadata.csv").write_text("".join(lines), encoding="utf-8")
    return folder


def environment(hub: ModelHub, home: Path) -> dict[str, str]:
    """That of a person without an account on this machine's hub and without an active environment."""
    ours = ("HF_", "TRANSFORMERS_", "PAM_", "PYTHON", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = [folder for folder in kept["PATH"].split(os.pathsep) if Path(folder) != Path(sys.prefix, "bin")]
    new = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PAM_PYTHON": sys.executable}
    return {**kept, "PATH": os.pathsep.join(path), **new, "TQDM_MININTERVAL": "60"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(command: str, tree: Path, env: Mapping[str, str]) -> str:
    """What it prints; it must succeed."""
    done = subprocess.run(["bash", "-c", command], cwd=tree, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@contextmanager
def served(command: str, tree: Path, env: Mapping[str, str]) -> Iterator[str]:
    """What a server logs until it answers; it must stop well when it is asked to."""
    server = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=tree, env=env, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        lines = [server.stderr.readline()]
        while "to ask it: " not in lines[-1]:
            assert lines[-1], f"{command} has ended:\n{''.join(lines)}"
            lines.append(server.stderr.readline())
        yield "".join(lines)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.communicate()


@pytest.mark.services
def test_from_recordings_to_a_served_answer(tmp_path: Path, mini_models: Path, hub: ModelHub) -> None:
    """At size tiny nothing is learnt: what is served must be what the experiment answered, wrong words or not."""
    require_serve()
    if shutil.which("curl") is None:
        unavailable("serve", "curl is not installed")
    tree = copy_tree(tmp_path / "tree")
    (tree / "egs/mini/pam1/downloads").symlink_to(mini_models.parent)  # stage 1 finds all that it would fetch
    recordings = write_recordings(tmp_path / "my recordings", mini_models.parent)
    env, port = environment(hub, tmp_path / "hf"), str(free_port())
    setup, train, login, upload, serve, ask = (line.partition("  #")[0].rstrip() for line in commands())

    run(setup, tree, env)
    assert "~/recordings" in train
    run(f"{train} --size tiny".replace("~/recordings", f"'{recordings}'"), tree, env)
    recipe = tree / "egs/own/pam1"
    exp = recipe / "exp/pam_tiny"
    clips = DataDir.load(recipe / "data/tiny/test").wav
    answers = read_table(exp / "decode_beam/test/text")
    assert answers.keys() == clips.keys() and len(clips) == COUNT // 10 and all(answers.values())

    run(f"{login} --token {hub.token}", tree, env)
    printed = run(f"{upload} --size tiny", tree, env)
    assert serve.removeprefix(".venv/bin/python") in printed.rpartition("next: ")[2]
    repo = hub.repos["me/mine"]
    files = repo.commits[repo.head]
    assert repo.private and files["model.safetensors"] == (exp / "model.safetensors").read_bytes()
    models = {model["name"]: model["licence"] for model in json.loads(files["manifest.json"])["models"]}
    assert models == {"llm": "apache-2.0", "whisper": "mit", "yamnet": "apache-2.0", "pyannote": "mit"}
    assert all(f"models/{name}/model.safetensors" in files for name in models)
    card = ModelCard(files["README.md"].decode())
    assert ("test", "wer") in [(one.dataset_name, one.metric_type) for one in card.data.eval_results or []]

    shutil.rmtree(recipe)  # as on another machine
    (tree / "egs/mini/pam1/downloads").unlink()
    assert "8000" in ask and "clip.wav" in ask
    with served(f"{serve} --port {port}", tree, env) as log:
        assert f"me/mine: commit {repo.head}" in log and ask.replace("8000", port) in log
        for key, clip in clips.items():
            said = run(ask.replace("8000", port).replace("clip.wav", f"'{clip}'"), tree, env)
            assert json.loads(said)["text"] == answers[key], key
    shutil.rmtree(tree)  # with an environment of some GB
