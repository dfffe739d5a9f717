"""ESPnet's own CTC/attention ASR on the mixture of encoders, on each encoder alone and on log-mel, at equal steps.

The recognition utterances of a recipe's formatted data, characters as tokens, the same small Transformer behind each
frontend (its frames are 40 ms long everywhere), no augmentation, one learning rate. Frozen encoders are run in every
step: nothing is cached. From a recipe's folder:

    python ../../../tests/benchmarks/espnet_frontends.py --config conf/train.yaml --train dump/quick/raw/train \\
        --valid dump/quick/raw/dev --test dump/quick/raw/test_asr dump/quick/raw/test_voices --output exp/espnet

Encoders and LLM are those of --config. What is finished is not done again; a killed training goes on at its last epoch.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHECKPOINT = "valid.acc.ave.pth"
WIDTH = 256  # of the mixture's features


def main(argv: Sequence[str] | None = None) -> None:
    """Train, decode, print the table and write it to ``<output>/results.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML with llm and frontend_conf.encoders")
    parser.add_argument("--train", required=True, help="formatted data directory")
    parser.add_argument("--valid", required=True)
    parser.add_argument("--test", required=True, nargs="+")
    parser.add_argument("--output", required=True, type=Path, help="folder of data, experiments and results")
    parser.add_argument("--frontends", nargs="+", help="log-mel, single encoders by name, static, pam (default: all)")
    parser.add_argument("--steps", type=int, default=1000, help="of training (1000)")
    parser.add_argument("--epoch_steps", type=int, default=100, help="between two validations (100)")
    parser.add_argument("--batch_size", type=int, default=16, help="utterances (16)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)

    from pam_espnet.cli import run_record
    from pam_espnet.config import load_yaml
    from pam_espnet.fileio import write_json

    choices = frontends(load_yaml(args.config))
    if unknown := sorted(set(args.frontends or ()) - set(choices)):
        parser.error(f"--frontends: {', '.join(unknown)} not among {', '.join(choices)}")
    data = args.output / "data"
    sets = {Path(path).name: write_data(Path(path), data) for path in (args.train, args.valid, *args.test)}
    write_tokens(sets[Path(args.train).name], data / "tokens.txt")
    rows = []
    for name in args.frontends or choices:
        exp = args.output / f"{name}_{args.steps}_{args.seed}"
        train(exp, choices[name], args)
        for test in map(Path, args.test):
            rows.append({"frontend": name, "set": test.name, **decode(exp, sets[test.name])})
    for row in rows:
        low, high = row["interval"]
        print(f"{row['frontend']:12s} {row['set']:12s} WER {row['wer']:.1f} [{low:.1f}, {high:.1f}] %")
    options = {key: str(value) for key, value in vars(args).items()}
    record = {**run_record("tests/benchmarks/espnet_frontends.py"), "options": options, "rows": rows}
    write_json(args.output / "results.json", record)


def frontends(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> the options of ESPnet's that differ."""
    from pam_espnet.data.tasks import TASKS

    encoders = config["frontend_conf"]["encoders"]
    asked = {"prompt": TASKS["asr"].default_prompt, "llm": config["llm"], "llm_conf": config.get("llm_conf") or {}}
    mel = {"fs": 16000, "n_fft": 512, "win_length": 400, "hop_length": 160}  # 100 Hz
    mixtures: dict[str, dict[str, Any]] = {
        name: {"encoders": {name: conf}, "fusion": "single"} for name, conf in encoders.items()
    }
    mixtures["static"] = {"encoders": encoders, "fusion": "static"}
    mixtures["pam"] = {"encoders": encoders, "fusion": "pam", **asked}
    # 50 Hz, to as many features as log-mel has: what ESPnet's recipes do with features of pretrained models.
    narrow = {"preencoder": "linear", "preencoder_conf": {"input_size": WIDTH, "output_size": 80}}
    found = {
        name: {"frontend": "pam", "frontend_conf": {**conf, "width": WIDTH}, **narrow}
        for name, conf in mixtures.items()
    }
    return {"log-mel": {"frontend": "default", "frontend_conf": mel}, **found}


def write_data(source: Path, root: Path) -> Path:
    """``root/<name>`` with the recognition utterances of ``source``: wav.scp, text, speech_shape."""
    from pam_espnet.data.datadir import DataDir
    from pam_espnet.data.tables import read_table, write_table

    data, samples = DataDir.load(source), read_table(source / "utt2num_samples")
    keys = [key for key in data.utterances if data.utt2task[key] == "asr"]
    write_table(root / source.name / "wav.scp", {key: data.wav[key] for key in keys})
    write_table(root / source.name / "text", {key: data.text[key].lower() for key in keys})
    write_table(root / source.name / "speech_shape", {key: samples[key] for key in keys})
    return root / source.name


def write_tokens(train: Path, path: Path) -> None:
    """The characters of the training texts, as ESPnet's recipes list them."""
    from pam_espnet.data.tables import read_table
    from pam_espnet.fileio import write_text

    letters = sorted(set("".join(read_table(train / "text").values())) - {" "})
    write_text(path, "\n".join(["<blank>", "<unk>", "<space>", *letters, "<sos/eos>"]) + "\n")


def train(exp: Path, frontend: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Train with ESPnet's command, or what is left of it."""
    from pam_espnet.bin import pam_asr_train
    from pam_espnet.config import write_config
    from pam_espnet.fileio import check_key

    blocks = {"attention_heads": 4, "linear_units": 512}
    epoch_steps = min(args.epoch_steps, args.steps)
    config = {
        **frontend,
        "token_type": "char", "token_list": str(args.output / "data/tokens.txt"), "normalize": "utterance_mvn",
        "encoder": "transformer",
        "encoder_conf": {**blocks, "output_size": 144, "num_blocks": 4,
                         "input_layer": "conv2d2" if frontend["frontend"] == "pam" else "conv2d"},  # to 25 Hz
        "decoder": "transformer", "decoder_conf": {**blocks, "num_blocks": 2},
        "model_conf": {"ctc_weight": 0.3, "lsm_weight": 0.1, "extract_feats_in_collect_stats": False,
                       "report_cer": False, "report_wer": False},  # need packages of ESPnet's extra asr
        "optim": "adam", "optim_conf": {"lr": 0.001},
        "scheduler": "warmuplr", "scheduler_conf": {"warmup_steps": max(1, args.steps // 10)}, "grad_clip": 5.0,
        "batch_type": "sorted", "batch_size": args.batch_size, "num_workers": 0, "seed": args.seed,
        "num_iters_per_epoch": epoch_steps, "max_epoch": args.steps // epoch_steps,
        "best_model_criterion": [["valid", "acc", "max"]], "keep_nbest_models": 3,
        "use_tensorboard": False, "use_matplotlib": False, "num_att_plot": 0,
    }  # fmt: skip
    check_key(exp / "key.json", {**config, "train": args.train, "valid": args.valid}, "give another --output")
    if (exp / CHECKPOINT).exists():
        return
    write_config(config, exp / "given.yaml")
    words = ["--config", str(exp / "given.yaml"), "--output_dir", str(exp), "--resume", "true"]
    for part, source in (("train", args.train), ("valid", args.valid)):
        folder = args.output / "data" / Path(source).name
        words += [f"--{part}_data_path_and_name_and_type", f"{folder}/wav.scp,speech,sound"]
        words += [f"--{part}_data_path_and_name_and_type", f"{folder}/text,text,text"]
        words += [f"--{part}_shape_file", f"{folder}/speech_shape"]
    logging.info(f"training {exp.name}")
    pam_asr_train.main(words)


def decode(exp: Path, data: Path) -> dict[str, Any]:
    """Decode with ESPnet's command; WER in per cent, its 95 % interval, the errors of each utterance."""
    from pam_espnet.bin import pam_asr_inference
    from pam_espnet.data.tables import read_table
    from pam_espnet.score.intervals import Ratio, bootstrap
    from pam_espnet.score.wer import count_errors

    folder = exp / f"decode_{data.name}"
    if not (folder / "text").exists():
        words = ["--asr_train_config", str(exp / "config.yaml"), "--asr_model_file", str(exp / CHECKPOINT)]
        words += ["--data_path_and_name_and_type", f"{data}/wav.scp,speech,sound", "--output_dir", str(folder)]
        pam_asr_inference.main([*words, "--beam_size", "10", "--ctc_weight", "0.3", "--num_workers", "0"])
        (folder / "1best_recog/text").rename(folder / "text")  # whole from here on
    references, found = read_table(data / "text"), read_table(folder / "text", allow_empty=True)
    errors = count_errors(list(references.values()), [found[key] for key in references])
    counts = errors[:, :3].sum(axis=1)
    wer, *interval = bootstrap(Ratio(counts, errors[:, 3], 100.0))
    return {"wer": wer, "interval": interval, "errors": counts.tolist(), "words": errors[:, 3].tolist()}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    main()
