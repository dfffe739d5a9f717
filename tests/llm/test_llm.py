"""The LLM decoder on a tiny random Llama: freezing, LoRA, losses, prompt vectors, stepping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLMDecoder
from pam_espnet.llm.prompt_layout import Placed, answer_ids, layout, place

LORA = {"r": 2, "alpha": 4, "dropout": 0.5}


def load(path: Path, **options: object) -> LLMDecoder:
    return LLMDecoder.from_pretrained(str(path), **{"dtype": "float32", **options})


def stir_lora(decoder: LLMDecoder) -> None:
    """LoRA's second matrix starts at zero, where it changes nothing."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def batch(decoder: LLMDecoder, answers: list[str], audio: Tensor, lengths: list[int]) -> Placed:
    prompts = ["Describe the sounds.", "How many people are speaking?", "Hi"][: len(answers)]
    parts = [layout(decoder.tokenizer, prompt) for prompt in prompts]
    return place(
        [torch.tensor(part.head_ids) for part in parts],
        audio,
        torch.tensor(lengths),
        [torch.tensor(part.tail_ids) for part in parts],
        [torch.tensor(answer_ids(decoder.tokenizer, answer)) for answer in answers],
        decoder.embed,
    )


@pytest.fixture
def audio() -> Tensor:
    return torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(2))


def test_only_lora_is_trainable(tiny_llm_dir: Path, audio: Tensor) -> None:
    assert not any(p.requires_grad for p in load(tiny_llm_dir).parameters())
    decoder = load(tiny_llm_dir, lora=LORA)
    trainable = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    before = {name: p.clone() for name, p in decoder.named_parameters()}
    optimizer = torch.optim.SGD([p for p in decoder.parameters() if p.requires_grad], lr=1.0)
    stir_lora(decoder)
    nll = decoder.token_losses(batch(decoder, ["a dog"], audio[:1], [7])).nll
    nll.sum().backward()
    optimizer.step()
    changed = {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable


def test_lora_in_bfloat16_keeps_float32_updates(tiny_llm_dir: Path) -> None:
    decoder = load(tiny_llm_dir, lora=LORA, dtype="bfloat16").to(dtype=torch.float32)
    assert {p.dtype for p in decoder.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in decoder.parameters() if not p.requires_grad} == {torch.bfloat16}  # not cast back
    assert decoder.logits(decoder(torch.randn(1, 2, 32), torch.ones(1, 2, dtype=torch.bool))).dtype == torch.float32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_in_bfloat16_learns_what_it_would_in_float32(
    tiny_llm_dir: Path, audio: Tensor, checkpointing: bool
) -> None:
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)  # of the first matrices
        options = {"r": 2, "alpha": 4, "dropout": 0.0}
        decoder = load(tiny_llm_dir, lora=options, dtype=dtype, gradient_checkpointing=checkpointing).train()
        stir_lora(decoder)
        nll = decoder.token_losses(batch(decoder, ["a dog", "2", "yes"], audio, [7, 3, 5])).nll
        nll.sum().backward()
        grads = [parameter.grad for parameter in decoder.parameters() if parameter.requires_grad]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
        gradients[dtype] = torch.cat([grad.flatten() for grad in grads if grad is not None])
    assert torch.cosine_similarity(gradients["float32"], gradients["bfloat16"], dim=0) > 0.99


def test_dropout_of_the_frozen_llm_stays_off(tiny_llm_dir: Path, audio: Tensor) -> None:
    decoder = load(tiny_llm_dir, lora=LORA)
    decoder.lm.config.attention_dropout = 0.5
    for layer in decoder.transformer.layers:
        layer.self_attn.attention_dropout = 0.5
    mask = torch.ones(3, 7, dtype=torch.bool)
    decoder.train()
    assert torch.equal(decoder(audio, mask), decoder(audio, mask))  # LoRA's update is still zero
    stir_lora(decoder)
    assert not torch.equal(decoder(audio, mask), decoder(audio, mask))  # LoRA's own dropout is on
    decoder.eval()
    assert torch.equal(decoder(audio, mask), decoder(audio, mask))


def test_token_losses_equal_one_utterance_at_a_time(tiny_llm_dir: Path, audio: Tensor) -> None:
    decoder = load(tiny_llm_dir).eval()
    answers, lengths = ["a dog barks", "", "two people"], [7, 0, 3]
    placed = batch(decoder, answers, audio, lengths)
    nll, correct, _ = decoder.token_losses(placed)
    assert nll.shape == correct.shape == placed.target_ids.shape and correct.dtype == torch.bool
    alone = []
    for b, answer in enumerate(answers):
        parts = layout(decoder.tokenizer, ["Describe the sounds.", "How many people are speaking?", "Hi"][b])
        ids = answer_ids(decoder.tokenizer, answer)
        embeds = torch.cat(
            [
                decoder.embed(torch.tensor(parts.head_ids)),
                audio[b, : lengths[b]],
                decoder.embed(torch.tensor(parts.tail_ids + ids)),
            ]
        )
        log_probs = decoder.lm(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
        alone.append(-log_probs[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0])
    torch.testing.assert_close(nll, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_llm_dir: Path, audio: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # LoRA's first matrix is random
        decoder = load(tiny_llm_dir, lora={**LORA, "dropout": 0.0}, gradient_checkpointing=checkpointing).train()
        stir_lora(decoder)
        calls = [0]
        layer = decoder.transformer.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        decoder.token_losses(batch(decoder, ["a dog"], audio[:1], [7]))[0].sum().backward()
        assert calls == [2 if checkpointing else 1]  # the layer is really run again in the backward pass
        gradients.append({name: p.grad for name, p in decoder.named_parameters() if "lora_B" in name})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_logits_of_hidden_states(tiny_llm_dir: Path, audio: Tensor) -> None:
    decoder = load(tiny_llm_dir).eval()
    with torch.no_grad():
        output = decoder.lm(inputs_embeds=audio, output_hidden_states=True)
        hidden = decoder(audio, torch.ones(3, 7, dtype=torch.bool))
        torch.testing.assert_close(decoder.logits(hidden), output.logits)
        assert decoder.num_layers == 2 and decoder.width == 32 and decoder.vocab_size == 300
        exit_logits = decoder.exit_logits(output.hidden_states[1])  # after the first block
    assert exit_logits.shape == (3, 7, 300)
    torch.testing.assert_close(exit_logits, decoder.logits(decoder.transformer.norm(output.hidden_states[1])))


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
        decoder = load(tiny_llm_dir, prompt_position=position)
        hidden = decoder.transformer(torch.tensor([parts.head_ids + ids])).last_hidden_state
        torch.testing.assert_close(decoder.prompt_vector("Hi"), hidden[0, -1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stepping_equals_the_whole_sequence(tiny_llm_dir: Path, audio: Tensor, attention: str) -> None:
    """Prefixes of unequal length; rows copied, re-ordered and dropped on the way."""
    decoder = load(tiny_llm_dir, attention=attention).eval()
    lengths = torch.tensor([7, 2, 5])
    prefix = audio.clone()
    for b, length in enumerate(lengths.tolist()):
        prefix[b, length:] = 1e4  # must never be seen
    logits, state = decoder.prefill(prefix, lengths)
    history: list[tuple[int, list[int]]] = [(b, []) for b in range(3)]
    for rows in ([0, 1, 2], [0, 0, 1, 1, 2, 2], [3, 2, 0, 5], [1, 1, 3]):
        state.select(torch.tensor(rows))
        history = [(history[row][0], history[row][1]) for row in rows]
        tokens = [(7 * i + len(rows)) % 300 for i in range(len(rows))]
        history = [(b, [*past, token]) for (b, past), token in zip(history, tokens, strict=True)]
        logits = decoder.step(torch.tensor(tokens), state)
        for row, (b, past) in enumerate(history):
            embeds = torch.cat([audio[b, : lengths[b]], decoder.embed(torch.tensor(past))])[None]
            with torch.no_grad():
                torch.testing.assert_close(logits[row], decoder.lm(inputs_embeds=embeds).logits[0, -1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype must be"),
        ({"prompt_position": "end"}, "prompt_position must be"),
        ({"lora": {"rank": 4}}, "unknown option"),
        ({"lora": {"target_modules": ["nothing_here"]}}, "target_modules"),
    ],
)
def test_bad_options(tiny_llm_dir: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny_llm_dir, **options)


def test_missing_folder_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--stage 1"):
        LLMDecoder.from_pretrained("downloads/models/no-such-llm")
    with pytest.raises(ConfigError, match="cannot load"):
        LLMDecoder.from_pretrained(str(tmp_path))


def test_scaled_logits_are_refused(tiny_llm_dir: Path) -> None:
    decoder = load(tiny_llm_dir)
    decoder.lm.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        LLMDecoder(decoder.lm, decoder.tokenizer)


def test_chat_template_from_a_file(tiny_llm_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}U: {{ m['content'] }}\n{% endfor %}A:", encoding="utf-8")
    decoder = load(tiny_llm_dir, chat_template=str(template))
    assert decoder.tokenizer.decode(layout(decoder.tokenizer, "Hi").tail_ids) == "\nHi\nA:"


def test_decoding_follows_the_weights(tiny_llm_dir: Path, audio: Tensor) -> None:
    """The fused copy is made anew after an optimizer's step, a write to .data, and a move."""
    lengths = torch.tensor([7, 2, 5])
    fused, plain = (load(tiny_llm_dir, lora=LORA, fused_decoding=flag).eval() for flag in (True, False))
    plain.load_state_dict(fused.state_dict())

    def same() -> bool:
        found, expected = (decoder.prefill(audio, lengths)[0] for decoder in (fused, plain))
        return torch.allclose(found, expected, atol=1e-4)

    before = fused.prefill(audio, lengths)[0]
    assert same()
    for decoder in (fused, plain):
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
    assert same() and not torch.allclose(fused.prefill(audio, lengths)[0], before, atol=1e-2)
    for decoder in (fused, plain):
        stir_lora(decoder)  # writes to .data
    assert same()
    assert fused.fused_blocks() is fused.fused_blocks()
    blocks = fused.fused_blocks()
    fused.to("cpu")
    assert fused.fused_blocks() is not blocks


