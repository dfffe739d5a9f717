"""A Llama model in a GGUF file, written here with the gguf library from a tiny random model, and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_modules import mini_converter

from pam_espnet.errors import DataError

gguf = pytest.importorskip("gguf")
gguf_llm = mini_converter("gguf_llm")

WIDTH, HEADS, KV_HEADS, FEED_FORWARD = 64, 4, 2, 96


def _tokenizer() -> Any:
    """Byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["In 2020 and 2021 the speakers spoke."] * 3, trainer)
    return bpe


def convert(source: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    gguf_llm.convert(source, out)


def _model(tied: bool = True) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_tokenizer().get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        parameter.data = parameter.data.half().float()  # the precision that the converter stores
    return model


def _pair_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: row i of the first half of a head, then row i of the second half."""
    half = weight.shape[0] // heads // 2
    rows = [head * 2 * half + which * half + i for head in range(heads) for i in range(half) for which in range(2)]
    return weight[rows]


def _write(
    path: Path, model: Any, *, pre: str = "smollm", architecture: str = "llama", quantised: bool = False
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    described = json.loads(_tokenizer().to_str())
    vocabulary = sorted(described["model"]["vocab"], key=described["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if index < 3 else 1 for index in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    blocks = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, weight = name.removesuffix(".weight"), tensor.numpy()
        if stem not in top:
            index, part = stem.removeprefix("model.layers.").split(".", 1)
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
            weight = _pair_rotary(weight, heads) if heads else weight
        theirs = f"{top[stem] if stem in top else f'blk.{index}.{blocks[part]}'}.weight"
        if quantised and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(theirs, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_outputs_are_equal(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = _model(tied)
    convert(_write(tmp_path / "tiny.gguf", model), tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.dtype == torch.float32 and back.config.rms_norm_eps == pytest.approx(1e-5)
    assert (back.config.bos_token_id, back.config.eos_token_id, back.config.pad_token_id) == (1, 2, 0)
    tokens = torch.randint(0, 256, (2, 20))
    with torch.no_grad():
        expected = model(tokens).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(back(tokens).logits, expected, atol=1e-5, rtol=1e-5)


def test_quantised_weights(tmp_path: Path) -> None:
    """Q4_1: 16 steps between the least and the greatest of 32 neighbours; a wrong row order would be far off."""
    from transformers import AutoModelForCausalLM

    model = _model()
    convert(_write(tmp_path / "tiny.gguf", model, quantised=True), tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        spread = float(tensor.max() - tensor.min())
        torch.testing.assert_close(back[name], tensor, atol=spread / 15, rtol=0)


def test_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    convert(_write(tmp_path / "tiny.gguf", _model()), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "In 2020 the speakers spoke: Ça va?"
    assert tokenizer.decode(tokenizer(text).input_ids) == text  # nothing is added before or after
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids == [1, *tokenizer("a").input_ids, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    turn = [{"role": "user", "content": "In"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "<|im_start|>In<|im_end|>"


def test_truncated(tmp_path: Path) -> None:
    source = _write(tmp_path / "tiny.gguf", _model())
    whole = source.read_bytes()
    for size in (0, 3, 20, 200, len(whole) // 2, len(whole) - 64):
        source.write_bytes(whole[:size])
        with pytest.raises(DataError, match="not a whole GGUF file"):
            convert(source, tmp_path / "out")


def test_other_kinds_of_model(tmp_path: Path) -> None:
    model = _model()
    with pytest.raises(DataError, match="'qwen2'/"):
        convert(_write(tmp_path / "a.gguf", model, architecture="qwen2"), tmp_path / "out")
    with pytest.raises(DataError, match="/'llama-bpe': not known"):
        convert(_write(tmp_path / "b.gguf", model, pre="llama-bpe"), tmp_path / "out")
