"""A test set with all kinds of tasks, and decodings of it, for what scores them."""

import json
from pathlib import Path
from typing import Any

from pam_espnet.data.tables import write_table
from pam_espnet.fileio import write_json, write_text

TEXT = {"a1": "the cat sat", "a2": "on the mat", "b1": "2", "b2": "3", "c1": "a dog barks", "c2": "rain falls"}
TASK = {"a": "asr", "b": "count", "c": "caption"}
GOOD = {**TEXT, "a2": "on a mat", "b2": "many"}
BAD = {**dict.fromkeys(TEXT, "no no no no"), "a1": ""}


def make_data(path: Path) -> Path:
    path.mkdir(parents=True)
    tasks = {key: TASK[key[0]] for key in TEXT}
    tables = {"wav.scp": {key: f"{key}.flac" for key in TEXT}, "text": TEXT, "utt2task": tasks, "utt2spk": tasks}
    for name, table in {**tables, "prompt": dict.fromkeys(TEXT, "Well?")}.items():
        write_table(path / name, table)
    references = {"c1": ["a dog barks", "barking of a dog"], "c2": ["rain falls", "it rains"]}
    write_table(path / "references", {key: json.dumps(value) for key, value in references.items()})
    return path


def make_decoding(path: Path, text: dict[str, str], audio: str = "on", experts: int = 2) -> Path:
    path.mkdir(parents=True)
    write_table(path / "text", text)
    stats: dict[str, Any] = {"seconds_audio": 20.0, "seconds_wall": 5.0, "tokens": 50, "peak_memory_bytes": 2**30}
    stats |= {"batch_size": 2, "device": "cpu", "threads": 1, "audio": audio, "commit": "0123abc"}
    stats |= {"command": ["pam_decode", "--set", "a b"], "versions": {"torch": "2.14"}}
    write_json(path / "stats.json", stats)
    lines = []
    for key in text:
        expert = min("abc".index(key[0]), experts - 1)
        routing = {
            "expert": expert,
            "expert_probs": [0.75 if index == expert else 0.25 for index in range(experts)] if experts > 1 else [1.0],
            "encoders": {"whisper": 0.7, "yamnet": 0.3},
            "layers": {"whisper": [0.5, 0.2], "yamnet": [0.3]},
        }
        lines.append(
            json.dumps({"utt": key, "task": TASK[key[0]], "prompt": "Well?", "hypotheses": [], "routing": routing})
            + "\n"
        )
    write_text(path / "nbest.jsonl", "".join(lines))
    return path
