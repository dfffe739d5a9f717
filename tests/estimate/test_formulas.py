"""The estimate's numbers against what they stand for: real parameters, a real cache, tensors that autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_config, write_data

from pam_espnet.data.passport import Passport
from pam_espnet.errors import ConfigError
from pam_espnet.estimate import formulas
from pam_espnet.estimate.batches import Batch, of_data, of_limits, total_steps
from pam_espnet.estimate.parts import LLMShape, Part, model_parts


def by_name(parts: list[Part]) -> dict[str, Part]:
    return {part.name: part for part in parts}


@pytest.mark.parametrize("fusion", ["pam", "average", "concat", "single"])
def test_parameters_are_those_of_the_model_that_training_builds(
    tiny_llm_dir: Path, tmp_path: Path, fusion: str
) -> None:
    from pam_espnet.model import build_model

    (tmp_path / "tokens.txt").write_text("5\n6\n")
    config = tiny_config(tiny_llm_dir, fusion, ctc_tokens=str(tmp_path / "tokens.txt"))
    found = model_parts(config, cuda=False)
    assert not found.unknown
    parts = by_name(found.parts)
    model = build_model(config)
    assert sum(part.trained for part in found.parts) == sum(p.numel() for p in model.trainable_parameters().values())
    assert parts["LLM"].frozen + parts["LoRA"].trained == sum(p.numel() for p in model.decoder.parameters())
    assert parts["adapters"].trained == sum(p.numel() for p in model.frontend.adapters.parameters())
    assert parts["LLM"].bytes == 4 * parts["LLM"].frozen
    names = ["one"] if fusion == "single" else ["one", "two"]
    for name in names:
        real = model.frontend.encoder(name)
        assert parts[f"encoder {name}"].frozen == sum(p.numel() for p in real.parameters())
    assert set(found.encoders) == set(names)


def hf_folder(path: Path, kind: str) -> dict[str, Any]:
    """A tiny model of a transformers family with weights, and the configuration of the encoder that reads it."""
    import transformers as hf

    if kind == "whisper":
        config = hf.WhisperConfig(
            d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
            decoder_attention_heads=2, decoder_ffn_dim=32, num_mel_bins=80, vocab_size=60, pad_token_id=0,
            bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
        )  # fmt: skip
        hf.WhisperForConditionalGeneration(config).save_pretrained(path)
        return {"type": "whisper", "path": str(path), "layers": [1, 2]}
    config = hf.WavLMConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, feat_extract_norm="layer",
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True,
    )  # fmt: skip
    hf.WavLMModel(config).save_pretrained(path)
    hf.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(path)
    return {"type": "hf_wave", "path": str(path), "layers": [0, 2]}


@pytest.mark.parametrize("kind", ["whisper", "wavlm"])
def test_encoders_without_weights_have_the_shapes_of_those_with(tmp_path: Path, kind: str) -> None:
    from pam_espnet.frontend.encoder_spec import EncoderSpec
    from pam_espnet.frontend.encoders.base import without_weights
    from pam_espnet.frontend.encoders.registry import build_encoder

    options = hf_folder(tmp_path, kind)
    with without_weights():
        bare = build_encoder(**options)
    real = build_encoder(**options)
    on_meta = sum(p.numel() for p in bare.parameters() if p.device.type == "meta")
    assert on_meta > 0.9 * sum(p.numel() for p in bare.parameters())  # WavLM makes a few of its own on the CPU
    assert {p.device.type for p in real.parameters()} == {"cpu"}
    assert [(n, p.shape) for n, p in bare.named_parameters()] == [(n, p.shape) for n, p in real.named_parameters()]
    assert EncoderSpec.of("x", bare) == EncoderSpec.of("x", real)
    samples = torch.tensor([1, 400, 16000, 16321])
    assert bare.output_lengths(samples).tolist() == real.output_lengths(samples).tolist()


def test_what_cannot_be_had_is_unknown_and_says_why(tiny_llm_dir: Path) -> None:
    config = tiny_config(tiny_llm_dir)
    config["frontend_conf"]["encoders"]["two"] = {"type": "whisper", "path": "nobody/never-fetched"}
    found = model_parts(config, cuda=False)
    assert "encoder two: nobody/never-fetched" in found.unknown[0]
    assert "adapters and fusion" in found.unknown[1] and "two" in found.unknown[1]
    assert {"LLM", "LoRA", "encoder one"} <= set(by_name(found.parts))
    config = {**tiny_config(tiny_llm_dir), "llm": "nobody/never-fetched"}
    found = model_parts(config, cuda=False)
    assert found.llm is None and "nobody/never-fetched" in found.unknown[0]


def test_a_gpu_means_bfloat16(tiny_llm_dir: Path) -> None:
    config = tiny_config(tiny_llm_dir)
    config["llm_conf"]["dtype"] = "auto"
    parts = by_name(model_parts(config, cuda=True).parts)
    assert parts["LLM"].bytes == 2 * parts["LLM"].frozen and parts["LoRA"].bytes == 4 * parts["LoRA"].trained


def test_cache_bytes_are_those_of_a_real_cache(tiny_llm_dir: Path, tmp_path: Path) -> None:
    from pam_espnet.frontend.caching import cache_encoder

    data = write_data(tmp_path, "train")
    config = tiny_config(tiny_llm_dir)
    cache_encoder("one", config["frontend_conf"], data, tmp_path / "feats")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "feats/one/train").glob("*.ark"))
    samples = {utt: entry["num_samples"] for utt, entry in Passport.load(data).utterances.items()}
    encoder = model_parts(config, cuda=False).encoders["one"]
    assert formulas.cache_bytes(encoder, samples) == on_disk > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_are_within_a_factor_of_two_of_what_autograd_keeps(attention: str) -> None:
    """Of a Llama-type LLM with LoRA on everything: tensors saved for the backward pass, weights aside."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pam_espnet.llm.lora import add_lora

    own = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention,
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
    shape = LLMShape(6, 64, 192, 64, 32, 4, 200, 0, 0, 4, attention == "sdpa")
    reckoned = formulas.llm_activation_bytes(shape, Batch(1, 1, 160, 80, 0), checkpointing=False)
    assert real / 2 < reckoned < real * 2, (real, reckoned)


def test_checkpointing_saves_memory_and_costs_arithmetic() -> None:
    shape = LLMShape(30, 576, 1536, 576, 192, 9, 49152, 100_000_000, 5_000_000, 2, True)
    batch = Batch(80, 500, 1000, 100, 100)
    assert formulas.llm_activation_bytes(shape, batch, True) < formulas.llm_activation_bytes(shape, batch, False) / 3
    assert 1.2 < formulas.llm_flop(shape, batch, True) / formulas.llm_flop(shape, batch, False) < 1.6


def test_forward_arithmetic_is_what_torch_counts() -> None:
    """The weights' part, by torch's own counter of matrix products, of one forward pass without attention's."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    own = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, attn_implementation="eager",
    )  # fmt: skip
    lm = LlamaForCausalLM(own)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm.base_model(inputs_embeds=torch.randn(1, 20, 64), use_cache=False)
    block_params = sum(p.numel() for p in lm.base_model.layers.parameters())
    shape = LLMShape(3, 64, 192, 64, 64, 4, 200, block_params, 0, 4, False)
    forward = formulas.llm_flop(shape, Batch(1, 1, 20, 20, 0), checkpointing=False) / 2
    assert forward == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_optimiser_bytes() -> None:
    assert formulas.optimiser_bytes(10, "adamw") == 4 * 10 * 3
    assert formulas.optimiser_bytes(10, "sgd") == 4 * 10 * 2


def test_batches_of_data_are_the_samplers(tmp_path: Path) -> None:
    from pam_espnet.data.batching import BatchingOptions

    data = write_data(tmp_path, "train")
    options = BatchingOptions(max_utterances=4, max_seconds=4.0)
    batches = of_data(data, options, 12.5, ranks=1)
    assert batches.largest.seconds <= 4.0 + 1e-6 and batches.mean.positions <= batches.largest.positions
    assert batches.per_pass is not None and batches.per_pass >= 18 / 4
    two = of_data(data, options, 12.5, ranks=2)
    assert two.largest.positions < batches.largest.positions
    limits = of_limits(options, 12.5, 1)
    assert limits.largest.seconds == 4.0 and limits.per_pass is None


def test_steps() -> None:
    assert total_steps({"max_epoch": 3, "num_iters_per_epoch": 5}, 7) == 15
    assert total_steps({"max_epoch": 3}, 7) == 21
    assert total_steps({"max_epoch": 3}, None) is None


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1234567890, "1.23 GB"), (2.5e12, "2.5 TB"), (3.1e15, "3.1 PB")]
)
def test_sizes_as_text(number: float, text: str) -> None:
    assert formulas.text_of(number) == text


def test_durations_as_text() -> None:
    assert [formulas.duration(seconds) for seconds in (30, 90, 1800, 5400, 200000)] == [
        "30 s", "90 s", "30.0 min", "1.5 h", "2.3 days",
    ]  # fmt: skip


def test_report(tiny_llm_dir: Path, tmp_path: Path) -> None:
    from pam_espnet.estimate.report import Assumptions, estimate

    data = write_data(tmp_path, "train")
    config = {**tiny_config(tiny_llm_dir), "optim": "adamw", "max_epoch": 2, "num_iters_per_epoch": 10}
    slow = estimate(config, [data], Assumptions(0, True, 1e-6, 1e-6))
    assert "nothing here was measured" in slow and "time: 20 steps" in slow and "assumed 1e-06 TFLOP/s" in slow
    assert "feature cache on disk" in slow and "25 Hz x 2 layers x 8 x 4 bytes" in slow
    off = estimate(config, [], Assumptions(2, False, 100, 20))
    assert "memory of each GPU" in off and "feature cache" not in off and "the widest encoder at work" in off
    config["frontend_conf"]["encoders"]["two"] = {"type": "whisper", "path": "nobody/never-fetched"}
    assert "unknown: encoder two: nobody/never-fetched" in estimate(config, [], Assumptions(0, True, 1, 1))
    with pytest.raises(ConfigError, match="tflops"):
        Assumptions(0, True, 0, 1)
    with pytest.raises(ConfigError, match="batching_conf"):
        estimate({**config, "batching_conf": {"no": 1}}, [], Assumptions(0, True, 1, 1))
