"""The estimate's numbers against what they stand for: real parameters, a real cache, tensors that autograd keeps, and
the measured step that its rates come from."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from humanfriendly import format_size
from tiny_model import deeper_llm, tiny_config, train_args, write_data

from pam_espnet.config import write_config
from pam_espnet.frontend.encoders.registry import build_encoder
from pam_espnet.train import estimate as module
from pam_espnet.train.estimate import (
    Batch,
    batches,
    encoder_shape,
    estimate,
    fitting_checkpointing,
    llm_activation_bytes,
    parameters,
    step_bytes,
    step_seconds,
)
from pam_espnet.train.experiment import bare_llm


@pytest.mark.parametrize("fusion", ["pam", "average", "concat", "single"])
def test_parameters_are_those_of_the_model_that_training_builds(
    tiny_llm_dir: Path, tmp_path: Path, fusion: str
) -> None:
    from pam_espnet.model import build_model

    (tmp_path / "tokens.txt").write_text("5\n6\n")
    config = tiny_config(tiny_llm_dir, fusion, ctc_tokens=str(tmp_path / "tokens.txt"))
    encoders = {name: encoder_shape(name, config["frontend_conf"]) for name in ("one", "two")}
    parts = parameters(config, bare_llm(config), encoders, complete=True)
    model = build_model(config)
    assert sum(own for _, own, _ in parts.values()) == sum(p.numel() for p in model.trainable_parameters().values())
    assert parts["LLM"][0] + parts["LoRA"][1] == sum(p.numel() for p in model.decoder.parameters())
    assert parts["LLM"][2] == 4 * parts["LLM"][0]
    assert parts["encoder one"][0] == sum(p.numel() for p in model.frontend.encoder("one").parameters())


def hf_folder(path: Path, kind: str) -> dict[str, Any]:
    """A tiny model of a transformers family with weights, and the configuration of the encoder that reads it."""
    import transformers as hf

    if kind == "whisper":
        config = hf.WhisperConfig(
            d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
            decoder_attention_heads=2, decoder_ffn_dim=32, num_mel_bins=80, vocab_size=60, pad_token_id=0,
            bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
        )  # fmt: skip
        hf.WhisperForConditionalGeneration(config).half().save_pretrained(path)  # as large-v3 is published
    elif kind == "hf_wave":
        config = hf.WavLMConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
            conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, feat_extract_norm="layer",
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True,
        )  # fmt: skip
        hf.WavLMModel(config).save_pretrained(path)
        hf.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(path)
    else:
        config = hf.ASTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
        hf.ASTModel(config).save_pretrained(path)
        hf.ASTFeatureExtractor().save_pretrained(path)
    return {"type": kind, "path": str(path), "layers": [1, 2]}


@pytest.mark.parametrize("kind", ["whisper", "hf_wave", "ast"])
def test_encoders_have_the_parameters_and_precision_that_training_loads(tmp_path: Path, kind: str) -> None:
    from pam_espnet.frontend.encoder_spec import EncoderSpec

    options = hf_folder(tmp_path, kind)
    frontend_conf = {"encoders": {"x": options}}
    shape, real = encoder_shape("x", frontend_conf), build_encoder(**options)
    assert shape.params == sum(p.numel() for p in real.parameters())
    assert {p.dtype for p in real.parameters()} == {torch.float32} == {shape.dtype}
    on_gpu = encoder_shape("x", frontend_conf, cuda=True)
    assert on_gpu.dtype == torch.bfloat16 and on_gpu.bytes_per_second < shape.bytes_per_second
    assert encoder_shape("x", {**frontend_conf, "encoder_dtype": "float32"}, cuda=True) == shape
    rows = [parameters({}, None, {"x": one}, complete=False)["encoder x"] for one in (shape, on_gpu)]
    assert [size for _, _, size in rows] == [4 * shape.params, 2 * shape.params]
    assert shape.spec == EncoderSpec.of("x", real)


def test_what_cannot_be_had_is_unknown_with_the_reason(tiny_llm_dir: Path) -> None:
    config = tiny_config(tiny_llm_dir)
    config["frontend_conf"]["encoders"]["two"] = {"type": "whisper", "path": "nobody/never-fetched"}
    text = estimate(config, None, None, cached=True, ngpu=0)
    assert "unknown: encoder two (" in text and "LoRA" in text and "adapters" not in text
    text = estimate({**tiny_config(tiny_llm_dir), "llm": "nobody/never-fetched"}, None, None, cached=False, ngpu=1)
    assert "unknown: LLM nobody/never-fetched" in text and "time: unknown" in text


def test_the_measured_step_of_an_h200_is_estimated() -> None:
    """egs/librispeech/pam1: 313 s of audio, 1650 ms, of which 1198 in encoders (see the module)."""
    weight = SimpleNamespace(weight=torch.empty(151936, 2048, device="meta"))
    blocks = torch.empty(2_800_000_000, device="meta")
    lm = SimpleNamespace(
        config=SimpleNamespace(hidden_size=2048, vocab_size=151936), dtype=torch.bfloat16,
        parameters=lambda: [weight.weight, blocks], get_input_embeddings=lambda: weight,
        get_output_embeddings=lambda: weight,
    )  # fmt: skip
    config = {"llm_conf": {"gradient_checkpointing": True}, "batching_conf": {"limits": "global"}}
    plan = [Batch(313, 5800, 960)]
    work = sum(2 * 50 * params for params in (637e6, 315e6, 317e6))
    encoding = work / module._GPU_ENCODERS[torch.float32]
    assert encoding * 313 == pytest.approx(1.198, rel=0.02)
    assert work / module._GPU_ENCODERS[torch.bfloat16] * 313 == pytest.approx(0.218, rel=0.02)
    every_second = {**config, "llm_conf": {"gradient_checkpointing": 2}}
    times = [step_seconds(one, lm, plan, 1, 0.0) for one in (config, every_second, {**config, "llm_conf": {}})]
    assert times[1] == pytest.approx((times[0] + times[2]) / 2)
    one, eight = (step_seconds(config, lm, plan, ngpu, encoding) for ngpu in (1, 8))
    assert one == pytest.approx(1.198 + 0.401, rel=0.02)
    assert one / eight == pytest.approx(1.7, abs=0.05)
    assert step_seconds({**config, "batching_conf": {}}, lm, plan, 8, encoding) == one  # each has as much as one alone


def test_training_recomputes_the_least_that_fits(
    tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pam_espnet.train.task import PaMTask

    data = write_data(tmp_path, "train")
    config = tiny_config(deeper_llm(tiny_llm_dir, tmp_path / "deep", 6))
    encoders = {name: encoder_shape(name, config["frontend_conf"], cuda=True) for name in ("one", "two")}
    lm = bare_llm(config, cuda=True)
    parts = parameters(config, lm, encoders, complete=True)
    largest = max(batches(config, data, 1), key=lambda batch: batch.positions)
    for every in (0, 5, 2, 1):  # 0, 2, 3 and 6 blocks; a single one is kept while it is recomputed, so it saves nothing
        config["llm_conf"]["gradient_checkpointing"] = every
        free = sum(step_bytes(config, lm, encoders, parts, largest, False).values()) / 0.8
        config["llm_conf"]["gradient_checkpointing"] = "auto"
        assert fitting_checkpointing(config, data, False, 1, 1.0001 * free) == every
    assert fitting_checkpointing(config, data, False, 1, 1.0) == 1
    assert "nothing recomputed (auto: as much as fits)" in estimate(config, data, None, False, 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1.0001 * free, 1e12))
    caplog.set_level("INFO")
    for ngpu, expected in ((0, 0), (1, 1)):
        streams = [(f"{data}/text", "text", "text"), (f"{data}/wav.scp", "speech", "sound")]
        args = SimpleNamespace(**config, ngpu=ngpu, train_data_path_and_name_and_type=streams)
        assert PaMTask.build_model(args).decoder.gradient_checkpointing == expected
    assert "gradient_checkpointing: auto is 1 " in caplog.text


def test_a_cache_is_as_large_as_estimated(tiny_llm_dir: Path, tmp_path: Path) -> None:
    from pam_espnet.frontend.caching import cache_encoders

    data = write_data(tmp_path, "train")
    config = tiny_config(tiny_llm_dir)
    list(cache_encoders(["one", "two"], config["frontend_conf"], [data], tmp_path / "feats"))
    on_disk = sum(path.stat().st_size for path in (tmp_path / "feats").glob("*/train/*.ark"))
    line = next(line for line in estimate(config, data, None, True, 0).splitlines() if "feature cache" in line)
    number, unit = line.split(", ")[1].split()[:2]
    assert float(number) * {"KB": 1e3, "MB": 1e6}[unit] == pytest.approx(on_disk, rel=0.1)


def test_activations_are_within_a_factor_of_two_of_what_autograd_keeps() -> None:
    """Of a Llama-type LLM with LoRA on everything: tensors saved for the backward pass, weights aside."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pam_espnet.llm.lora import add_lora

    own = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    lm = LlamaForCausalLM(own).requires_grad_(False)
    add_lora(lm, {"r": 4, "dropout": 0.0})
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, or its memory is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.base_model(inputs_embeds=torch.randn(2, 80, 64, requires_grad=True), use_cache=False)
    real = sum(size for size, _ in kept.values())
    expected = llm_activation_bytes(lm, Batch(1, 160, 0), checkpointing=False)
    assert real / 2 < expected < real * 2, (real, expected)
    assert llm_activation_bytes(lm, Batch(1, 160, 0), checkpointing=True) < expected / 3
    half = llm_activation_bytes(lm, Batch(1, 160, 0), checkpointing=2)
    assert expected / 3 < half < expected


def test_batches_of_data_are_the_samplers(tiny_llm_dir: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, "train")
    config = {**tiny_config(tiny_llm_dir), "batching_conf": {"max_utterances": 4, "max_seconds": 4.0}}
    alone, shared = (batches(config, data, ranks) for ranks in (1, 2))
    assert max(batch.seconds for batch in alone) <= 4.0 + 1e-6 and len(alone) >= 18 / 4
    assert max(batch.seconds for batch in shared) <= 4.0 + 1e-6 and len(shared) < len(alone)
    config["batching_conf"]["limits"] = "global"
    assert batches(config, data, 1) == alone
    assert max(b.positions for b in batches(config, data, 2)) < max(batch.positions for batch in alone)
    assert [batches(config, None, ranks)[0].seconds for ranks in (1, 2)] == [4.0, 2.0]


def test_report(tiny_llm_dir: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, "train")
    config = {**tiny_config(tiny_llm_dir), "optim": "adamw", "max_epoch": 2, "num_iters_per_epoch": 10}
    text = estimate(config, data, data, cached=True, ngpu=0)
    assert "time: 20 steps" in text and "two CPU cores as measured" in text and "memory of this process" in text
    config["llm_conf"]["dtype"] = "auto"
    text = estimate(config, None, None, cached=False, ngpu=2)
    assert "memory of each of 2 GPUs" in text and "feature cache" not in text and "the widest encoder at work" in text
    assert "2 H200, extrapolated from one" in text and "time: 10 steps" in text  # half as many, each twice as large
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  L")}
    assert " ".join(lines["LLM"][3:]) == format_size(2 * int(lines["LLM"][1].replace(",", "")))  # bfloat16 on a GPU


def test_sharded_and_rounded_llms_need_less_memory(tiny_llm_dir: Path) -> None:
    def report(nodes: int = 1, **llm_conf: str) -> tuple[str, int]:
        config = tiny_config(tiny_llm_dir)
        config["llm_conf"] |= llm_conf
        shards = {"node": 8 // nodes, "all": 8}.get(llm_conf.get("shard", ""), 1)
        size = parameters(config, bare_llm(config), {}, complete=False, shards=shards)["LLM"][2]
        return estimate(config, None, None, False, 8, nodes), size

    lm = bare_llm(tiny_config(tiny_llm_dir))
    blocks = 4 * sum(p.numel() for p in lm.base_model.layers.parameters() if not p.requires_grad)
    (text, whole), (_, four), (sharded, eight) = report(), report(2, shard="node"), report(2, shard="all")
    assert whole - four == blocks * 3 // 4 and whole - eight == blocks * 7 // 8
    assert "two gathered blocks" in sharded and "two gathered blocks" not in text
    matrices = 4 * sum(p.numel() for p in lm.base_model.layers.parameters() if not p.requires_grad and p.dim() > 1)
    assert whole - report(quantize="nf4")[1] == pytest.approx(matrices * (1 - 4.127 / 32), rel=1e-3)


def test_the_command_begins_an_experiment_and_is_silent_once_it_is_trained(
    tiny_llm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pam_espnet.bin.pam_estimate import main

    write_data(tmp_path, "train")
    write_data(tmp_path, "dev")
    write_config(tiny_config(tiny_llm_dir), tmp_path / "given.yaml")
    words = train_args(tmp_path, tmp_path / "given.yaml", tmp_path / "exp")
    words = [word for word in words if word not in ("--num_workers", "0")]
    assert main(words) == 0
    assert "LoRA" in capsys.readouterr().out and (tmp_path / "exp/key.json").is_file()
    (tmp_path / "exp/model.safetensors").touch()
    assert main(words) == 0 and capsys.readouterr().out == ""
    assert main(["--config", str(tmp_path / "given.yaml"), "--set", "max_epoch=2"]) == 0
    assert "time: 2 steps" in capsys.readouterr().out
