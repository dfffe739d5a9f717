"""Model cards of packages: README.md with the hub's metadata, made from the package's own files.

What the recipe adds is its ``conf/card.yaml``, ``card.yaml`` in the package:

    languages: [en]          # of prompts, transcripts and captions; ISO 639
    license: other           # of the trained weights, by the hub's name for it
    trained_on: "..."        # a sentence or two
    speech: [read, acted]    # how the training speech came about: read, spontaneous, acted, synthetic; [] where none
    datasets: [org/name]     # those that are on the hub
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from pam_espnet.config import load_yaml
from pam_espnet.data.tasks import task_spec
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import read_json
from pam_espnet.package import CARD, MANIFEST, MODELS
from pam_espnet.score.report import table
from pam_espnet.score.result import MAIN_METRICS, METRICS

HUB = "https://huggingface.co"
_LISTS, _TEXTS = ("languages", "speech", "datasets"), ("license", "trained_on")
_SPEECH = ("read", "spontaneous", "acted", "synthetic")
_HUB_TASKS = {"wer": "automatic-speech-recognition", "caption": "audio-text-to-text"}  # by metric; others: below


def model_card(folder: Path, repo: str) -> str:
    """The card of the package in ``folder`` as it will be called ``repo`` on the hub.
    Raises ConfigError: a ``card.yaml`` with a key or value that is not known."""
    manifest, results, facts = read_json(folder / MANIFEST), read_json(folder / "results.json"), read_facts(folder)
    models = manifest["models"]
    scores = list(_scores(results, manifest["decoding"]["name"]))
    commits = sorted({made["commit"] for made in results.get("decodings", ()) if made.get("commit")})
    parts = [
        f"# {repo.partition('/')[2]}\n",
        "A speech LLM that answers prompts about recordings; it mixes several frozen audio encoders as the prompt asks "
        "([PaM](https://arxiv.org/abs/2502.15178)). "
        f"Experiment `{manifest['experiment']}` of PaM-ESPnet {manifest['versions']['pam_espnet']}.\n",
        _warning(facts),
        "## How to use it\n",
        _usage(folder, repo, models, scores),
        "## What it was trained on\n",
        facts.get("trained_on", "Not stated by who packed it.").strip() + "\n",
        _speech(facts),
    ]
    if scores:
        level, head = scores[0]["level"], ("set", "task", "audio", "metric", "value", "utterances")
        parts += [
            "## Scores\n",
            f"In brackets: {level:.0%} interval, bootstrap over utterances. Audio off: the same model with the "
            "waveform set to zero. All figures, and how they were made: [RESULTS.md](RESULTS.md).\n",
            table(head, [_row(entry) for entry in scores]),
        ]
    if (folder / "routing.png").is_file():
        parts += ["## Which encoders are weighed for which task\n", "![Weights of encoders and layers](routing.png)\n"]
    parts += [
        "## Parts and licences\n",
        table(("part", "where it is", "identified by", "licence"), [_part(folder, model) for model in models]),
        f"The trained weights' licence: {facts.get('license', 'not stated')}. READMEs and licence texts: "
        "[licences](licences)." + (f" Decoded with the code of commit {', '.join(commits)}." if commits else "") + "\n",
    ]
    metadata = _metadata(repo, manifest, facts, [entry for entry in scores if entry["audio"] == "on"])
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(part for part in parts if part)


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``card.yaml`` in ``folder`` states, checked; {} where there is none."""
    if not (path := folder / CARD).is_file():
        return {}
    facts = load_yaml(path)
    if unknown := sorted(set(facts) - {*_LISTS, *_TEXTS}):
        raise ConfigError(f"conf/{CARD}: unknown key {unknown[0]!r}; there are {', '.join((*_LISTS, *_TEXTS))}")
    for key, value in facts.items():
        if not isinstance(value, list if key in _LISTS else str):
            kind = "a list, such as [en]" if key in _LISTS else "a text"
            raise ConfigError(f"conf/{CARD}: {key} must be {kind}, got {value!r}")
    if other := [kind for kind in facts.get("speech", ()) if kind not in _SPEECH]:
        raise ConfigError(f"conf/{CARD}: speech: unknown {other[0]!r}; there are {', '.join(_SPEECH)}")
    return facts


def _metadata(
    repo: str, manifest: Mapping[str, Any], facts: Mapping[str, Any], scores: list[dict[str, Any]]
) -> ModelCardData:
    """The card's head, as the hub reads it."""
    other = facts.get("license") == "other"  # then the hub wants a name and an address
    results = {"model_name": manifest["experiment"], "eval_results": [_eval_result(entry) for entry in scores]}
    return ModelCardData(
        language=facts.get("languages"),
        license=facts.get("license", "unknown"),
        license_name="licences-of-its-parts" if other else None,
        license_link=f"{HUB}/{repo}/tree/main/licences" if other else None,
        library_name="pam-espnet",
        pipeline_tag="audio-text-to-text",
        tags=["speech-llm", "prompt-aware-mixture", "espnet"],
        base_model=[model["source"] for model in manifest["models"] if model["revision"]] or None,
        datasets=facts.get("datasets"),
        **(results if scores else {}),
    )


def _scores(results: Mapping[str, Any], decoding: str) -> Iterator[dict[str, Any]]:
    """The main figures of the packed decoding, and of its control without audio."""
    for made in results.get("decodings", ()):
        if made["decode"] not in (decoding, f"{decoding}_audio_off"):
            continue
        for task, metrics in made["tasks"].items():
            for metric in MAIN_METRICS[task_spec(task).metric]:
                if (entry := metrics.get(metric)) and entry["value"] is not None:
                    where = {"set": made["set"], "audio": made["audio"] or "on", "task": task, "metric": metric}
                    yield {**where, "level": made["bootstrap"]["level"], **entry}


def _eval_result(entry: Mapping[str, Any]) -> EvalResult:
    """A score as metadata; its interval is in the figure's name, because there is no field for it."""
    metric, spec, interval = METRICS[entry["metric"]], task_spec(entry["task"]), ""
    if entry["low"] is not None:
        low, high = (metric.number(entry[end]) for end in ("low", "high"))
        interval = f" ({entry['level']:.0%} interval {low} to {high}, {entry['n']} utterances)"
    return EvalResult(
        task_type=_HUB_TASKS.get(spec.metric, "audio-classification"),
        task_name=spec.default_prompt,
        dataset_type=entry["set"],
        dataset_name=entry["set"],
        metric_type=entry["metric"],
        metric_name=f"{metric.label}{metric.unit and ' ' + metric.unit}{interval}",
        metric_value=round(entry["value"], metric.digits),
    )


def _row(entry: Mapping[str, Any]) -> list[str]:
    metric = METRICS[entry["metric"]]
    return [entry["set"], entry["task"], entry["audio"], metric.title, metric.show_entry(entry), str(entry["n"])]


def _warning(facts: Mapping[str, Any]) -> str:
    made = [kind for kind in ("acted", "synthetic") if kind in facts.get("speech", ())]
    if not made:
        return ""
    return (
        f"> **Trained on {' and '.join(made)} speech.** Its scores say little about people who speak of their own "
        "accord: test it on such speech before you rely on it.\n"
    )


def _speech(facts: Mapping[str, Any]) -> str:
    if "speech" not in facts:
        return "Whether its training speech was read, spontaneous, acted or synthetic is not stated.\n"
    return f"Training speech: {', '.join(facts['speech'])}.\n" if facts["speech"] else ""


def _usage(folder: Path, repo: str, models: list[dict[str, Any]], scores: list[dict[str, Any]]) -> str:
    """Commands to copy, with the folders that whoever loads it has to name."""
    task = scores[0]["task"] if scores else "asr"
    absent = [model for model in models if not (model["revision"] or _is_packed(folder, model))]
    options = "".join(f" --models {model['name']}=DIR" for model in absent)
    folders = ", ".join(f'"{model["name"]}": "DIR"' for model in absent)
    parts = f'"clip.wav", task="{task}"' + ("" if task == "asr" else ", window=10")
    lines = [
        "```",
        f'python -m pam_espnet.bin.pam_inference --model {repo}{options} clip.wav --prompt "..."',
        "```\n",
        "```python",
        "import pam_espnet",
        f'model = pam_espnet.load("{repo}"{f", models={{{folders}}}" if absent else ""})',
        f"print(*(part.text for part in model.transcribe({parts})))",
        "```\n",
        *(f"DIR of `{model['name']}`: `{model['source']}`, {model['get']}.\n" for model in absent),
    ]
    return "\n".join(lines)


def _part(folder: Path, model: Mapping[str, Any]) -> list[str]:
    """A pretrained model in the table: where it is, and its commit or the SHA-256 of its weights."""
    name, source, commit = model["name"], model["source"], model["revision"]
    where = f"[{source}]({HUB}/{source}/tree/{commit})" if commit else f"`{source}`"
    if _is_packed(folder, model):
        where = f"[here]({MODELS}/{name}), from {where}"
    weights = [
        (file, digest) for file, digest in model["files"].items() if not file.endswith((".json", ".jinja", ".txt"))
    ]
    digests = "<br>".join(f"{file}: SHA-256 `{digest}`" for file, digest in weights)
    return [name, where, f"commit `{commit}`" if commit else digests, model["licence"] or "not known here"]


def _is_packed(folder: Path, model: Mapping[str, Any]) -> bool:
    return (folder / MODELS / model["name"]).is_dir()
