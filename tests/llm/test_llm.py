"""The LLM on a tiny random Llama: freezing, LoRA, losses, prompt vectors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import deeper_llm
from torch import Tensor

from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM, needed_mask
from pam_espnet.llm.prompt_layout import Inputs, answer_ids, build_inputs, lay_out, layout

LORA = {"r": 2, "alpha": 4, "dropout": 0.5}


def load(path: Path, **options: object) -> LLM:
    return LLM.from_pretrained(str(path), **{"dtype": "float32", **options})


def stir_lora(llm: LLM) -> None:
    """LoRA's second matrix starts at zero, where it changes nothing."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def batch(llm: LLM, answers: list[str], audio: Tensor, lengths: list[int]) -> Inputs:
    prompts = ["Describe the sounds.", "How many people are speaking?", "Hi"][: len(answers)]
    parts = [layout(llm.tokenizer, prompt) for prompt in prompts]
    laid_out = lay_out(parts, lengths, [answer_ids(llm.tokenizer, answer) for answer in answers])
    return build_inputs(laid_out, audio, llm.embed)


@pytest.fixture
def audio() -> Tensor:
    return torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(2))


def test_only_lora_is_trainable(tiny_llm_dir: Path, audio: Tensor) -> None:
    assert not any(p.requires_grad for p in load(tiny_llm_dir).parameters())
    llm = load(tiny_llm_dir, lora=LORA)
    trainable = {name for name, p in llm.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    before = {name: p.clone() for name, p in llm.named_parameters()}
    optimizer = torch.optim.SGD([p for p in llm.parameters() if p.requires_grad], lr=1.0)
    stir_lora(llm)
    nll = llm.token_losses(batch(llm, ["a dog"], audio[:1], [7])).nll
    nll.sum().backward()
    optimizer.step()
    changed = {name for name, p in llm.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable


def test_lora_in_bfloat16_keeps_float32_updates(tiny_llm_dir: Path) -> None:
    llm = load(tiny_llm_dir, lora=LORA, dtype="bfloat16").to(dtype=torch.float32)
    assert {p.dtype for p in llm.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in llm.parameters() if not p.requires_grad} == {torch.bfloat16}  # not cast back
    assert llm.logits(llm(torch.randn(1, 2, 32), torch.ones(1, 2, dtype=torch.bool))).dtype == torch.float32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_in_bfloat16_learns_what_it_would_in_float32(
    tiny_llm_dir: Path, audio: Tensor, checkpointing: bool
) -> None:
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)  # of the first matrices
        options = {"r": 2, "alpha": 4, "dropout": 0.0}
        llm = load(tiny_llm_dir, lora=options, dtype=dtype, gradient_checkpointing=checkpointing).train()
        stir_lora(llm)
        nll = llm.token_losses(batch(llm, ["a dog", "2", "yes"], audio, [7, 3, 5])).nll
        nll.sum().backward()
        grads = [parameter.grad for parameter in llm.parameters() if parameter.requires_grad]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
        gradients[dtype] = torch.cat([grad.flatten() for grad in grads if grad is not None])
    assert torch.cosine_similarity(gradients["float32"], gradients["bfloat16"], dim=0) > 0.99


def test_dropout_of_the_frozen_llm_stays_off(tiny_llm_dir: Path, audio: Tensor) -> None:
    llm = load(tiny_llm_dir, lora=LORA)
    llm.lm.config.attention_dropout = 0.5
    for layer in llm.transformer.layers:
        layer.self_attn.attention_dropout = 0.5
    mask = torch.ones(3, 7, dtype=torch.bool)
    llm.train()
    assert torch.equal(llm(audio, mask), llm(audio, mask))  # LoRA's update is still zero
    stir_lora(llm)
    assert not torch.equal(llm(audio, mask), llm(audio, mask))  # LoRA's own dropout is on
    llm.eval()
    assert torch.equal(llm(audio, mask), llm(audio, mask))


def test_token_losses_equal_one_utterance_at_a_time(tiny_llm_dir: Path, audio: Tensor) -> None:
    llm = load(tiny_llm_dir).eval()
    answers, lengths = ["a dog barks", "", "two people"], [7, 0, 3]
    inputs = batch(llm, answers, audio, lengths)
    nll, correct, _ = llm.token_losses(inputs)
    assert nll.shape == correct.shape == inputs.target_ids.shape and correct.dtype == torch.bool
    alone = []
    for b, answer in enumerate(answers):
        parts = layout(llm.tokenizer, ["Describe the sounds.", "How many people are speaking?", "Hi"][b])
        ids = answer_ids(llm.tokenizer, answer)
        embeds = torch.cat(
            [
                llm.embed(torch.tensor(parts.head_ids)),
                audio[b, : lengths[b]],
                llm.embed(torch.tensor(parts.tail_ids + ids)),
            ]
        )
        log_probs = llm.lm(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
        alone.append(-log_probs[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0])
    torch.testing.assert_close(nll, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_llm_dir: Path, audio: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # LoRA's first matrix is random
        llm = load(tiny_llm_dir, lora={**LORA, "dropout": 0.0}, gradient_checkpointing=checkpointing).train()
        stir_lora(llm)
        calls = [0]
        layer = llm.transformer.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        llm.token_losses(batch(llm, ["a dog"], audio[:1], [7]))[0].sum().backward()
        assert calls == [2 if checkpointing else 1]  # the layer is really run again in the backward pass
        gradients.append({name: p.grad for name, p in llm.named_parameters() if "lora_B" in name})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("option", "runs"), [(2, [2, 1, 2, 1, 2]), (3, [2, 1, 1, 2, 1]), (1, [2] * 5), (None, [1] * 5), ("auto", [1] * 5)]
)
def test_every_nth_block_is_recomputed_with_the_same_gradients(
    tiny_llm_dir: Path, tmp_path: Path, audio: Tensor, option: Any, runs: list[int]
) -> None:
    torch.manual_seed(0)
    path, gradients = deeper_llm(tiny_llm_dir, tmp_path / "deep", 5), []
    for value in (False, option):
        torch.manual_seed(0)
        llm = load(path, lora={**LORA, "dropout": 0.0}, gradient_checkpointing=value).train()
        stir_lora(llm)
        calls = [0] * 5
        for i, layer in enumerate(llm.transformer.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.__setitem__(i, calls[i] + 1))
        llm.token_losses(batch(llm, ["a dog", "2"], audio[:2], [7, 3]))[0].sum().backward()
        gradients.append({name: p.grad for name, p in llm.named_parameters() if "lora_B" in name})
    assert calls == runs
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient)


@pytest.mark.parametrize("option", [-1, 1.5, "always", "every 2", [2]])
def test_another_way_to_recompute_is_refused(tiny_llm_dir: Path, option: object) -> None:
    with pytest.raises(ConfigError, match=r"llm_conf.gradient_checkpointing: .*; must be a whole number"):
        load(tiny_llm_dir, gradient_checkpointing=option)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_mask_valid_positions_are_the_same(
    tiny_llm_dir: Path, audio: Tensor, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """What CUDA computes: torch's causal kernel where there was a mask, the same states, losses and gradients."""
    found, causal, plain = [], [], torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, **options: Any) -> Tensor:
        causal.append((options["attn_mask"] is None, options["is_causal"]))
        return plain(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    for masked in (True, False):
        if not masked:
            monkeypatch.setattr("pam_espnet.llm.llm.needed_mask", lambda mask: None)
        torch.manual_seed(0)
        llm = load(tiny_llm_dir, lora={**LORA, "dropout": 0.0}, attention=attention).train()
        stir_lora(llm)
        source = audio.clone().requires_grad_()
        inputs = batch(llm, ["a dog barks", "", "two people"], source, [7, 0, 3])
        assert not inputs.mask.all() and inputs.positions == int(inputs.mask.sum())
        causal.clear()
        nll, _, exit_nll = llm.token_losses(inputs, exit_layer=1)
        assert set(causal) == ({(not masked, not masked)} if attention == "sdpa" else set())
        assert exit_nll is not None
        hidden = llm._outputs(inputs.embeds, needed_mask(inputs.mask) if masked else None).last_hidden_state
        (nll.sum() + exit_nll.sum()).backward()
        trained = [p.grad for p in llm.parameters() if p.requires_grad]
        found.append([hidden[inputs.mask], nll, exit_nll, source.grad, *trained])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_logits_of_hidden_states(tiny_llm_dir: Path, audio: Tensor) -> None:
    llm = load(tiny_llm_dir).eval()
    with torch.no_grad():
        output = llm.lm(inputs_embeds=audio, output_hidden_states=True)
        hidden = llm(audio, torch.ones(3, 7, dtype=torch.bool))
        torch.testing.assert_close(llm.logits(hidden), output.logits)
        assert llm.num_layers == 2 and llm.width == 32 and llm.vocab_size == 300
        exit_logits = llm.exit_logits(output.hidden_states[1])  # after the first block
    assert exit_logits.shape == (3, 7, 300)
    torch.testing.assert_close(exit_logits, llm.logits(llm.transformer.norm(output.hidden_states[1])))


def test_prompt_vector_is_the_base_models_and_is_kept(tiny_llm_dir: Path) -> None:
    prompt = "Describe the sounds."
    plain, tuned = load(tiny_llm_dir), load(tiny_llm_dir, lora=LORA)
    stir_lora(tuned)
    next(p for p in tuned.parameters() if p.requires_grad).requires_grad_(False)  # frozen on purpose: stays so
    flags = [p.requires_grad for p in tuned.parameters()]
    vector = tuned.train().prompt_vector(prompt)
    assert [p.requires_grad for p in tuned.parameters()] == flags
    assert vector.shape == (32,) and vector.dtype == torch.float32 and not vector.requires_grad
    torch.testing.assert_close(vector, plain.prompt_vector(prompt))
    assert tuned.prompt_vector(prompt) is vector
    assert not torch.allclose(vector, tuned.prompt_vector("Hi"))
    tuned.load_state_dict(tuned.state_dict())
    assert tuned.prompt_vector(prompt) is not vector


def test_prompt_vector_positions(tiny_llm_dir: Path) -> None:
    parts = layout(load(tiny_llm_dir).tokenizer, "Hi")
    for position, ids in (("prompt", parts.prompt_ids), ("template", parts.tail_ids)):
        llm = load(tiny_llm_dir, prompt_position=position)
        hidden = llm.transformer(torch.tensor([parts.head_ids + ids])).last_hidden_state
        torch.testing.assert_close(llm.prompt_vector("Hi"), hidden[0, -1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype must be"),
        ({"prompt_position": "end"}, "prompt_position must be"),
        ({"lora": {"rank": 4}}, "unknown option"),
        ({"lora": {"target_modules": ["nothing_here"]}}, "target_modules: the LLM has no module 'nothing_here'"),
        ({"lora": {"target_modules": ["q_proj", "v_porj"]}}, "target_modules: the LLM has no module 'v_porj'"),
        ({"lora": {"target_modules": 3}}, "target_modules: 3; must be a list"),
        ({"lora": {"target_modules": []}}, r"target_modules: \[\]; must be a list"),
        ({"lora": {"target_modules": "(q_proj"}}, "target_modules: .*unterminated"),
    ],
)
def test_bad_options(tiny_llm_dir: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny_llm_dir, **options)


def test_missing_folder_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--stage 1"):
        LLM.from_pretrained("downloads/models/no-such-llm")
    with pytest.raises(ConfigError, match="cannot load"):
        LLM.from_pretrained(str(tmp_path))


def test_scaled_logits_are_refused(tiny_llm_dir: Path) -> None:
    llm = load(tiny_llm_dir)
    llm.lm.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        LLM(llm.lm, llm.tokenizer)


def test_chat_template_from_a_file(tiny_llm_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}U: {{ m['content'] }}\n{% endfor %}A:", encoding="utf-8")
    llm = load(tiny_llm_dir, chat_template=str(template))
    assert llm.tokenizer.decode(layout(llm.tokenizer, "Hi").tail_ids) == "\nHi\nA:"
