"""ESPnet's own ASR on the mixture of encoders: trained and decoded by its commands, on tiny models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from make_data import write_lines

from pam_espnet.config import load_yaml, write_config
from pam_espnet.errors import ConfigError
from pam_espnet.frontend.frontend import PaMFrontend
from pam_espnet.llm.llm import LLM
from pam_espnet.train.espnet_frontend import MixtureFrontend

ENCODERS = {name: {"type": "tiny_encoder:TinyEncoder", "seed": seed} for seed, name in enumerate(("one", "two"), 1)}
PROMPT = "Transcribe the speech."
STATIC: dict[str, Any] = {"encoders": ENCODERS, "width": 16, "frame_rate": 25.0}
TONES = {"low": (200, "ab"), "high": (3000, "c")}  # Hz, what is said


def pam(llm: Path) -> dict[str, Any]:
    conf = {"fusion": "pam", "prompt": PROMPT, "llm": str(llm), "llm_conf": {"dtype": "float32"}}
    return {**STATIC, **conf, "fusion_conf": {"num_experts": 2}}


def build(conf: dict[str, Any], seed: int = 0) -> MixtureFrontend:
    torch.manual_seed(seed)
    return MixtureFrontend(**conf).eval()


@pytest.fixture(scope="module")
def wave() -> torch.Tensor:
    return torch.rand(3, 9000, generator=torch.Generator().manual_seed(0)) - 0.5


LENGTHS = torch.tensor([9000, 4100, 640])


@pytest.mark.parametrize("fusion", ["static", "pam"])
def test_features_are_those_of_an_utterance_alone(fusion: str, tiny_llm_dir: Path, wave: torch.Tensor) -> None:
    frontend = build(STATIC if fusion == "static" else pam(tiny_llm_dir))
    features, lengths = frontend(wave, LENGTHS)
    assert features.shape == (3, 15, frontend.output_size())
    assert lengths.tolist() == [15, 7, 1]
    for one, size, samples, frames in zip(features, LENGTHS, wave, lengths, strict=True):
        alone, _ = frontend(samples[None, :size], size[None])
        torch.testing.assert_close(one[:frames], alone[0])
        assert not one[frames:].any()


def test_the_mixture_is_the_one_for_the_prompt(tiny_llm_dir: Path, wave: torch.Tensor) -> None:
    frontend = build(pam(tiny_llm_dir))
    vectors = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32").prompt_vectors([PROMPT] * 3)
    torch.manual_seed(0)
    options = {"fusion_conf": {"num_experts": 2}, "frame_rate": 25.0, "initial_rms": 1.0}
    expected = PaMFrontend(ENCODERS, "pam", 16, vectors.shape[1], **options).eval()
    expected.load_state_dict(frontend.mixture.state_dict())
    assert torch.equal(frontend(wave, LENGTHS)[0], expected(LENGTHS, vectors, wave=wave).embeddings)


def test_a_trained_frontend_needs_no_llm(tiny_llm_dir: Path, wave: torch.Tensor, tmp_path: Path) -> None:
    trained = build(pam(tiny_llm_dir))
    state = trained.state_dict()
    assert "prompt_vector" in state
    assert not any("first" in name or "second" in name for name in state)  # the encoders' weights
    conf = {**pam(tmp_path / "gone"), **trained.found_options}
    loaded = build(conf, seed=1)
    loaded.load_state_dict(state)
    assert torch.equal(loaded(wave, LENGTHS)[0], trained(wave, LENGTHS)[0])
    with pytest.raises(ConfigError, match="gone does not exist"):
        build(conf)(wave, LENGTHS)
    fresh = build({**pam(tiny_llm_dir), **trained.found_options})  # its configuration, used to train again
    assert torch.equal(fresh(wave, LENGTHS)[0], trained(wave, LENGTHS)[0])


@pytest.mark.parametrize("fusion", ["static", "pam"])
def test_every_trained_parameter_gets_a_gradient(fusion: str, tiny_llm_dir: Path, wave: torch.Tensor) -> None:
    """Without one, ESPnet's distributed training stops."""
    frontend = build(STATIC if fusion == "static" else pam(tiny_llm_dir)).train()
    frontend(wave, LENGTHS)[0].square().sum().backward()
    assert [name for name, one in frontend.named_parameters() if one.grad is None] == []


def test_espnets_init_leaves_the_mixture_balanced() -> None:
    from espnet2.torch_utils.initialize import initialize

    model = torch.nn.Module()
    model.frontend = build(STATIC)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialize(model, "xavier_uniform")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": "pam"}, "needs a prompt, and the llm"),
        ({"prompt": PROMPT}, "fusion static does not read prompt"),
        ({"sise": 3}, "no option sise"),
        ({"fs": "8k"}, "8000 Hz, but encoder 'one' is made for 16000 Hz"),
        ({"frame_rate": 20.0}, "does not fit encoder"),
    ],
)
def test_options_that_cannot_work(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixtureFrontend(**{**STATIC, **change})


def test_options_of_the_llm_that_cannot_work(tiny_llm_dir: Path) -> None:
    with pytest.raises(ConfigError, match="llm_conf': no option dtipe"):
        MixtureFrontend(**{**pam(tiny_llm_dir), "llm_conf": {"dtipe": "float32"}})


def test_whole_numbers_for_samples_are_refused(wave: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="not between -1 and 1"):
        build(STATIC)(wave * 32768, LENGTHS)


# ---- ESPnet's commands ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tone: Callable[..., np.ndarray]) -> Path:
    """``train`` and ``dev``, twelve utterances each, of two tones that stand for two words; ``tokens.txt``."""
    root = tmp_path_factory.mktemp("data")
    (root / "tokens.txt").write_text("<blank>\n<unk>\na\nb\nc\n<sos/eos>\n")
    for number, name in enumerate(("train", "dev")):
        (root / name).mkdir()
        scp, text = {}, {}
        for i in range(12):
            kind = ("low", "high")[i % 2]
            key = f"{kind}-{name}-{i:02d}"
            scp[key], text[key] = str(root / name / f"{key}.wav"), TONES[kind][1]
            wave = tone(0.4 + 0.05 * i + 0.02 * number, TONES[kind][0])
            # Silence behind it, or the mean over time, which ESPnet subtracts, would be all that tells tones apart.
            soundfile.write(scp[key], np.pad(wave, (0, 4800)), 16000, subtype="PCM_16")
        write_lines(root / name / "wav.scp", scp)
        write_lines(root / name / "text", text)
    return root


def train(root: Path, exp: Path, frontend_conf: dict[str, Any], *more: str, epochs: int = 12) -> Path:
    """Statistics and training as ESPnet's recipes ask for them."""
    from pam_espnet.bin.pam_asr_train import main

    config = {
        "frontend": "pam",
        "frontend_conf": frontend_conf,
        "normalize": "utterance_mvn",
        "encoder": "transformer",
        "encoder_conf": {"input_layer": "linear", "output_size": 16, "attention_heads": 2, "linear_units": 32,
                         "num_blocks": 1, "dropout_rate": 0.0, "positional_dropout_rate": 0.0},
        "decoder": "transformer",
        "decoder_conf": {"attention_heads": 2, "linear_units": 32, "num_blocks": 1, "dropout_rate": 0.0},
        "model_conf": {"ctc_weight": 0.5, "extract_feats_in_collect_stats": False,
                       "report_cer": False, "report_wer": False},  # need a package of ESPnet's extra asr
        "optim": "adam", "optim_conf": {"lr": 0.01}, "max_epoch": epochs, "batch_type": "unsorted", "batch_size": 6,
        "best_model_criterion": [["valid", "loss", "min"]], "keep_nbest_models": 2, "num_workers": 0, "seed": 1,
        "use_tensorboard": False, "use_matplotlib": False, "num_att_plot": 0,
    }  # fmt: skip
    write_config(config, exp / "given.yaml")
    words = ["--config", str(exp / "given.yaml"), "--token_type", "char", "--token_list", str(root / "tokens.txt")]
    words += ["--frontend_conf", "fs=16k", "--ngpu", "0"]
    for part, name in (("train", "train"), ("valid", "dev")):
        for file, stream, kind in (("wav.scp", "speech", "sound"), ("text", "text", "text")):
            words += [f"--{part}_data_path_and_name_and_type", f"{root / name / file},{stream},{kind}"]
    stats = exp.with_name(f"{exp.name}_stats")
    shapes = [f"--{part}_shape_file" for part in ("train", "valid")]
    keys = [str(root / name / "wav.scp") for name in ("train", "dev")]
    collect = [word for pair in zip(shapes, keys, strict=True) for word in pair]
    assert main([*words, *collect, "--collect_stats", "true", "--output_dir", str(stats)]) == 0
    found = [str(stats / part / "speech_shape") for part in ("train", "valid")]
    shaped = [word for pair in zip(shapes, found, strict=True) for word in pair]
    assert main([*words, *shaped, "--output_dir", str(exp), *more]) == 0
    return exp


def decode(root: Path, exp: Path, output: Path) -> dict[str, str]:
    from pam_espnet.bin.pam_asr_inference import main

    words = ["--asr_train_config", str(exp / "config.yaml"), "--asr_model_file", str(exp / "valid.loss.ave.pth")]
    words += ["--data_path_and_name_and_type", f"{root / 'dev/wav.scp'},speech,sound", "--output_dir", str(output)]
    assert main([*words, "--beam_size", "3", "--ctc_weight", "0.5", "--num_workers", "0"]) == 0
    lines = (output / "1best_recog/text").read_text().splitlines()
    return {key: text for key, _, text in (line.partition(" ") for line in lines)}


def test_espnets_asr_trains_and_decodes_with_the_llm_gone(root: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    shutil.copytree(tiny_llm_dir, llm)
    exp = train(root, tmp_path / "exp", pam(llm))
    assert load_yaml(exp / "config.yaml")["frontend_conf"]["prompt_width"] == 32
    state = torch.load(exp / "checkpoint.pth", weights_only=True)
    mixture = {name for name in state["model"] if name.startswith("frontend.mixture.")}
    assert {name.split(".")[2] for name in mixture} == {"adapters", "fusion", "gain"}
    trained = sum(len(group["params"]) for group in state["optimizers"][0]["param_groups"])
    buffers = [name for name in state["model"] if name == "frontend.prompt_vector" or name.endswith(".pe")]
    assert trained == len(state["model"]) - len(buffers)
    shutil.rmtree(llm)
    assert decode(root, exp, tmp_path / "decode") == {
        key: TONES[key.split("-")[0]][1] for key in (line.split()[0] for line in (root / "dev/wav.scp").open())
    }


def test_error_rates_need_the_package_that_counts_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before training, and by name: ESPnet would import it after the first epoch."""
    monkeypatch.setattr("pam_espnet.train.espnet_asr.find_spec", lambda name: None)
    message = "report_wer: .* not installed\n  -> pip install editdistance, or --model_conf report_wer=false"
    with pytest.raises(ConfigError, match=message):
        train(root, tmp_path / "exp", STATIC, "--model_conf", "report_wer=true")
    assert not (tmp_path / "exp/checkpoint.pth").exists()


def test_training_begins_with_the_frontend_of_an_experiment(root: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    """A speech LLM's checkpoint, through ESPnet's ``init_param``."""
    conf = {**pam(tiny_llm_dir), "width": 32}
    options = {"fusion_conf": conf["fusion_conf"], "frame_rate": conf["frame_rate"]}
    speech_llm = PaMFrontend(ENCODERS, "pam", 32, 32, **options)
    saved = {f"frontend.{name}": value for name, value in speech_llm.state_dict().items()}
    torch.save({**saved, "decoder.other": torch.zeros(2)}, tmp_path / "best.pth")
    more = ["--init_param", f"{tmp_path / 'best.pth'}:frontend:frontend.mixture", "--freeze_param", "frontend"]
    exp = train(root, tmp_path / "exp", conf, *more, epochs=1)
    state = torch.load(exp / "1epoch.pth", weights_only=True)
    for name, value in saved.items():
        assert torch.equal(state[name.replace("frontend.", "frontend.mixture.", 1)], value), name
