"""Probe of the number of voices in each encoder, layer by layer: linear, on pooled hidden states.

Per utterance and layer, mean and standard deviation over the frames go through a logistic regression (features
standardised on the training set, strength of the L2 penalty by three-fold cross-validation in it). No LLM, no adapter:
it measures what a layer holds, not what the whole model makes of it. Which layer to take is chosen by the
cross-validated accuracy, so the test set judges the choice and does not make it.

    python tests/benchmarks/count_probe.py --train data/train --test data/test_count \\
        --model yamnet=downloads/models/yamnet --model whisper=downloads/models/whisper-tiny.en --output probe.json

Prints, per layer, accuracy with its bootstrap 95 % interval; per encoder the CPU seconds per second of audio on one
thread; and the chosen layers' differences to the first encoder's, paired over the test utterances. Writes all of it as
JSON. Dimension letters: B utterances (one here), H layers, T frames, D width.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from pam_espnet.data.audio import read_audio, resample
from pam_espnet.data.datadir import DataDir
from pam_espnet.errors import DataError
from pam_espnet.fileio import write_json
from pam_espnet.frontend.encoders.base import AbsEncoder
from pam_espnet.frontend.encoders.registry import build_encoder
from pam_espnet.score.intervals import bootstrap, bootstrap_difference, mean_of

PENALTIES = [1e-4, 1e-3, 1e-2, 1e-1]  # scikit-learn's C: small is strong
FOLDS = 3


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="data directory to fit the probes on")
    parser.add_argument("--test", type=Path, required=True, help="data directory to judge them on")
    parser.add_argument("--task", default="count", help="which task's utterances; their text is the class")
    parser.add_argument(
        "--model", action="append", required=True, metavar="TYPE=PATH", help="encoder and its folder; may be repeated"
    )
    parser.add_argument("--output", type=Path, default=Path("count_probe.json"), help="where the figures go as JSON")
    return parser


def labelled(path: Path, task: str) -> tuple[DataDir, list[str], np.ndarray]:
    """The utterances of one task and their answers (B,)."""
    data = DataDir.load(path)
    keys = [key for key in data.utterances if data.utt2task[key] == task]
    if not keys:
        raise DataError(path / "utt2task", f"no utterance of task {task}")
    return data, keys, np.array([data.text[key] for key in keys])


def pooled(encoder: AbsEncoder, data: DataDir, keys: list[str], label: str) -> tuple[np.ndarray, float, float]:
    """(B,H,2D) mean and standard deviation over time; CPU seconds spent in the encoder; seconds of audio."""
    rows, cpu, audio = [], 0.0, 0.0
    for key in tqdm(keys, desc=label, file=sys.stderr):
        source, start, end = data.source(key)
        samples, rate = read_audio(source, start=start, end=end)
        wave = torch.from_numpy(resample(samples, rate, encoder.sample_rate))[None]
        before = time.process_time()
        hidden, _ = encoder(wave, torch.tensor([wave.shape[1]]))
        cpu += time.process_time() - before
        audio += wave.shape[1] / encoder.sample_rate
        rows.append(torch.cat([hidden[0].mean(1), hidden[0].std(1, correction=0)], dim=-1).numpy())
    return np.stack(rows), cpu, audio


def probe(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> dict[str, Any]:
    """Fit on (B,2D) features; cross-validated accuracy and what is right in the test set."""
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=300, tol=1e-3)) for penalty in PENALTIES
    ]
    with warnings.catch_warnings():
        # The weakest penalty may need more steps; cross-validation judges it as it stands.
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = [float(cross_val_score(model, train, train_labels, cv=FOLDS).mean()) for model in models]
        best = int(np.argmax(scores))
        model = models[best].fit(train, train_labels)
    right = model.predict(test) == test_labels
    interval = bootstrap(mean_of(right, scale=100.0))
    return {
        "cross_validated_percent": 100.0 * scores[best],
        "accuracy_percent": interval.value,
        "interval_95": [interval.low, interval.high],
        "penalty": PENALTIES[best],
        "right": right,
    }


def main() -> int:
    """Run the probes of all encoders."""
    args = build_parser().parse_args()
    torch.set_num_threads(1)
    train, train_keys, train_labels = labelled(args.train, args.task)
    test, test_keys, test_labels = labelled(args.test, args.task)
    chance = 100.0 * max(np.mean(test_labels == value) for value in np.unique(test_labels))
    print(f"{len(train_keys)} train and {len(test_keys)} test utterances; the most frequent answer is {chance:.1f} %")
    report: dict[str, Any] = {
        "command": sys.argv,
        "train_utterances": len(train_keys),
        "test_utterances": len(test_keys),
        "most_frequent_answer_percent": chance,
        "encoders": {},
    }
    chosen: dict[str, np.ndarray] = {}
    for model in args.model:
        name, _, path = model.partition("=")
        encoder = build_encoder(name, path=path)
        train_features, cpu, audio = pooled(encoder, train, train_keys, f"{name} train")
        test_features, _, _ = pooled(encoder, test, test_keys, f"{name} test")
        results = [
            probe(train_features[:, index], train_labels, test_features[:, index], test_labels)
            for index in tqdm(range(encoder.num_layers), desc=f"{name} probes", file=sys.stderr)
        ]
        best = max(range(len(results)), key=lambda index: results[index]["cross_validated_percent"])
        chosen[name] = results[best]["right"]
        print(f"\n{name}: {cpu / audio:.4f} CPU seconds per second of audio")
        for layer, result in zip(encoder.layers, results, strict=True):
            low, high = result["interval_95"]
            mark = "  <- chosen by cross-validation" if layer == encoder.layers[best] else ""
            print(
                f"  layer {layer:2d}: {result['accuracy_percent']:5.1f} % [{low:.1f}, {high:.1f}]"
                f"   cross-validated {result['cross_validated_percent']:5.1f} %{mark}"
            )
        report["encoders"][name] = {
            "path": path,
            "weights_sha256": encoder.weights_sha256(),
            "cpu_seconds_per_second": cpu / audio,
            "chosen_layer": encoder.layers[best],
            "layers": {
                layer: {key: value for key, value in result.items() if key != "right"}
                for layer, result in zip(encoder.layers, results, strict=True)
            },
        }
        write_json(args.output, report)  # an unfinished run keeps what it has measured
    first, *others = chosen
    for other in others:
        value, low, high = bootstrap_difference(mean_of(chosen[first], 100.0), mean_of(chosen[other], 100.0))
        print(f"\n{other} minus {first}, chosen layers: {value:+.1f} points [{low:+.1f}, {high:+.1f}]")
        report["encoders"][other][f"minus_{first}"] = {"points": value, "interval_95": [low, high]}
    write_json(args.output, report)
    print(f"\nwrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
