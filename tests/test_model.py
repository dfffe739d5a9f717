"""The model in ESPnet: loss over answer tokens only, statistics per task, what is saved and what is not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import deeper_llm, tiny_config

from pam_espnet.errors import CheckpointError, ConfigError
from pam_espnet.fileio import load_strict, read_trained, save_trained
from pam_espnet.llm.prompt_layout import answer_ids, layout
from pam_espnet.model import ESPnetPaMModel, build_model, choose_tf32

PROMPTS = {"asr": "Transcribe the speech.", "count": "How many people are speaking?", "caption": "Describe the sounds."}
TEXTS = {"asr": "you have", "count": "2", "caption": "a dog barks"}


def make_batch(model: ESPnetPaMModel, tasks: list[str], seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    waves = [torch.randn(8000 + 3000 * i, generator=generator) * 0.1 for i in range(len(tasks))]
    return {
        "speech": torch.nn.utils.rnn.pad_sequence(waves, batch_first=True),
        "num_samples": [len(wave) for wave in waves],
        "prompt": [PROMPTS[task] for task in tasks],
        "text": [answer_ids(model.decoder.tokenizer, TEXTS[task]) for task in tasks],
        "task": [model.tasks.index(task) for task in tasks],
    }


@pytest.fixture
def model(tiny_llm_dir: Path) -> ESPnetPaMModel:
    torch.manual_seed(0)
    return build_model(tiny_config(tiny_llm_dir, router_loss_weight=0.1)).eval()


def test_weight_is_the_number_of_target_tokens(model: ESPnetPaMModel) -> None:
    batch = make_batch(model, ["asr", "count"])
    _, _, weight = model(**batch)
    assert weight.item() == sum(map(len, batch["text"]))


def test_loss_is_the_token_mean_whatever_the_batch(model: ESPnetPaMModel) -> None:
    """The weighted mean over single utterances equals the batch's loss: no padding, no neighbour counts."""
    tasks = ["asr", "caption", "count", "asr"]
    batch = make_batch(model, tasks)
    _, stats, weight = model(**batch)
    total = 0.0
    for i in range(len(tasks)):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        one["speech"] = one["speech"][:, : batch["num_samples"][i]]
        _, single, count = model(**one)
        total += single["loss_answer"].item() * count.item()
    assert total / weight.item() == pytest.approx(stats["loss_answer"].item(), abs=1e-5)


def test_statistics_name_every_task_and_absent_ones_are_none(model: ESPnetPaMModel) -> None:
    loss, stats, _ = model(**make_batch(model, ["asr", "count"]))
    assert stats["loss_caption"] is None
    assert stats["loss_asr"] is not None and stats["loss_count"] is not None
    assert loss.item() == pytest.approx(stats["loss_answer"].item() + 0.1 * stats["loss_router"].item(), abs=1e-6)


def test_prompt_tail_is_not_a_target(model: ESPnetPaMModel) -> None:
    """Another prompt of the same length changes the loss only through what the answer is conditioned on."""
    batch = make_batch(model, ["asr"])
    audio = model.audio_embeddings(batch["prompt"], torch.tensor(batch["num_samples"]), batch["speech"])
    inputs = model.build_inputs(batch["prompt"], audio, batch["text"])
    assert inputs.target_ids.tolist() == batch["text"][0]
    first = int(inputs.prefix_lengths[0]) - 1
    assert inputs.target_index.tolist() == list(range(first, first + len(inputs.target_ids)))


def test_state_dict_holds_what_is_trained_and_nothing_else(model: ESPnetPaMModel) -> None:
    assert set(model.state_dict()) == set(model.trainable_parameters())
    assert any("lora" in name for name in model.state_dict())


def test_frozen_parts_stay_in_eval_mode(model: ESPnetPaMModel) -> None:
    model.train()
    assert model.training and model.frontend.fusion.training
    frozen = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    assert frozen and not any(module.training for module in frozen)


def test_the_llm_keeps_its_precision_when_the_trainer_casts(tiny_llm_dir: Path) -> None:
    config = tiny_config(tiny_llm_dir)
    config["llm_conf"]["dtype"] = "bfloat16"
    model = build_model(config).to(dtype=torch.float32)
    assert model.decoder.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for n, p in model.frontend.named_parameters())


def test_gradients_reach_every_trained_parameter(model: ESPnetPaMModel) -> None:
    """Over all three prompts at once; an expert nobody is routed to may be left out, its adapters may not."""
    model.train()
    loss, _, _ = model(**make_batch(model, ["asr", "count", "caption"]))
    loss.backward()
    without = [n for n, p in model.trainable_parameters().items() if p.grad is None]
    assert all(".experts." in name or "layer_logits" in name for name in without), without


def test_save_and_load_round_trip(model: ESPnetPaMModel, tiny_llm_dir: Path, tmp_path: Path) -> None:
    batch = make_batch(model, ["asr", "count", "caption"])
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.01)
    expected = model(**batch)[0]
    save_trained(model.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(99)
    other = build_model(tiny_config(tiny_llm_dir, router_loss_weight=0.1)).eval()
    report = load_strict(other, read_trained(tmp_path / "model.safetensors"), "model.safetensors")
    assert "frontend" in report and "decoder" in report
    assert torch.equal(other(**batch)[0], expected)


def test_a_checkpoint_that_lacks_or_has_too_much_is_refused(model: ESPnetPaMModel) -> None:
    state = dict(model.state_dict())
    name, tensor = next(iter(state.items()))
    for wrong, message in (
        ({k: v for k, v in state.items() if k != name}, "missing in the checkpoint"),
        ({**state, "other.weight": tensor}, "not in the model"),
        ({**state, name: tensor[..., None]}, "of another shape"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_strict(model, wrong, "x")


def test_a_truncated_checkpoint_is_an_error(model: ESPnetPaMModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_trained(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        read_trained(path)
    with pytest.raises(CheckpointError, match="stage 3"):
        read_trained(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_conf": {"no_such_option": 1}}, "no_such_option"),
        ({"model_conf": {"ctc_weight": 0.1}}, "ctc_tokens"),
        ({"model_conf": {"ctc_tokens": "nowhere.txt"}}, "nowhere.txt"),
        ({"model_conf": {"ctc_posteriors": True}}, "ctc_posteriors needs"),
        ({"model_conf": {"ctc_posteriors": 0.5}}, "ctc_posteriors: 0.5"),
        ({"llm": None}, "'llm'"),
        ({"llm": "downloads/models/none"}, "stage 1"),
    ],
)
def test_wrong_configurations_name_the_key(tiny_llm_dir: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model({**tiny_config(tiny_llm_dir), **change})


def test_posteriors_of_the_ctc_head_are_shown_to_the_llm(tiny_llm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "ctc_tokens.txt").write_text("5\n7\n11\n")
    torch.manual_seed(0)
    options = {"ctc_tokens": str(tmp_path / "ctc_tokens.txt"), "ctc_posteriors": True}
    model = build_model(tiny_config(tiny_llm_dir, **options)).train()
    batch = make_batch(model, ["asr", "count"])
    audio = model.audio_embeddings(batch["prompt"], torch.tensor(batch["num_samples"]), batch["speech"])
    shown = model.build_inputs(batch["prompt"], audio, batch["text"]).embeds
    alone = model.build_inputs(batch["prompt"], audio, batch["text"], alone=True).embeds
    expected = model.ctc.expected_embeddings(audio.embeddings, audio.routing.expert)
    model.ctc_posteriors = False
    plain = model.build_inputs(batch["prompt"], audio, batch["text"]).embeds
    head = len(layout(model.decoder.tokenizer, batch["prompt"][0], model.decoder.system).head_ids)
    for b, frames in enumerate(audio.lengths.tolist()):
        rows = slice(head, head + frames)
        assert torch.allclose((shown - plain)[b, rows], expected[b, :frames], atol=1e-6)
        assert expected[b, :frames].abs().min(dim=1).values.max() > 0
    assert torch.allclose(alone, shown, atol=1e-6)
    model.ctc_posteriors = True
    assert not model.leaves_unused  # even without a CTC loss
    model(**batch)[0].backward()
    assert all(parameter.grad is not None for parameter in model.ctc.parameters())


def test_joint_optimisation_reads_the_answer_from_an_intermediate_block(tiny_llm_dir: Path) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_config(tiny_llm_dir, exit_weight=0.4, exit_layers=[1])).train()
    batch = make_batch(model, ["asr", "count"])
    loss, stats, _ = model(**batch)
    answer, from_block = stats["loss_answer"], stats["loss_exit"]
    assert from_block is not None and answer is not None and from_block != answer
    assert loss.item() == pytest.approx(answer.item() + 0.4 * from_block.item(), rel=1e-5)
    # the block's own loss, from transformers' hidden states
    with torch.no_grad():
        audio = model.audio_embeddings(batch["prompt"], torch.tensor(batch["num_samples"]), batch["speech"])
        inputs = model.build_inputs(batch["prompt"], audio, batch["text"])
        hidden = model.decoder.lm(
            inputs_embeds=inputs.embeds, attention_mask=inputs.mask, output_hidden_states=True
        ).hidden_states[1]
        logits = model.decoder.exit_logits(hidden.flatten(0, 1)[inputs.target_index])
        expected = torch.nn.functional.cross_entropy(logits, inputs.target_ids)
    assert from_block.item() == pytest.approx(expected.item(), rel=1e-4)
    assert "loss_exit" not in model.eval()(**batch)[1]


@pytest.fixture(scope="module")
def deep_llm_dir(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deeper_llm(tiny_llm_dir, tmp_path_factory.mktemp("models") / "deep-llm", 6)


def test_deeper_blocks_weigh_more_and_the_mean_is_the_option(deep_llm_dir: Path) -> None:
    model = build_model(tiny_config(deep_llm_dir, exit_weight=0.4, exit_layers=[2, 4, 5])).train()
    batch = make_batch(model, ["count"])
    weights = {}
    torch.manual_seed(0)
    while len(weights) < 3:
        loss, stats, _ = model(**batch)
        weight = (loss.item() - stats["loss_answer"].item()) / stats["loss_exit"].item()
        weights[round(weight * 11 / 3 / 0.4)] = weight
    assert sorted(weights) == [2, 4, 5]
    assert sum(weights.values()) / 3 == pytest.approx(0.4, rel=1e-3)


def test_rank_0_draws_for_all(deep_llm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"exit_weight": 0.4, "exit_layers": [2, 4]}
    model = build_model(tiny_config(deep_llm_dir, **options)).train()

    def broadcast(tensor: torch.Tensor, source: int) -> None:
        assert source == 0
        tensor.copy_(torch.tensor([1]))  # the second exit layer

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    assert model._draw_exit() == 4


@pytest.mark.parametrize(
    "options",
    [
        {"exit_weight": 0.3},
        {"exit_weight": 0.3, "exit_layers": [2]},
    ],
)
def test_joint_optimisation_needs_blocks_before_the_last(tiny_llm_dir: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exit_"):
        build_model(tiny_config(tiny_llm_dir, **options))


def test_tf32_is_on_unless_refused(tiny_llm_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """``use_tf32`` of a configuration; without a GPU nothing is said."""
    flags = SimpleNamespace(allow_tf32=None)
    monkeypatch.setattr(torch.backends.cuda, "matmul", flags)
    caplog.set_level("INFO")
    choose_tf32(None)
    assert flags.allow_tf32 is None and "TF32" not in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for use, expected, word in ((None, True, "on"), (False, False, "off"), (True, True, "on")):
        choose_tf32(use)
        assert flags.allow_tf32 is expected and f"GPUs: {word} (use_tf32)" in caplog.messages[-1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen: list[bool | None] = []
    monkeypatch.setattr("pam_espnet.model.choose_tf32", seen.append)
    build_model({**tiny_config(tiny_llm_dir), "use_tf32": False})
    build_model(tiny_config(tiny_llm_dir))
    assert seen == [False, None]
