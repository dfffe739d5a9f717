"""Batches by memory: plans made of numbers, kept for resumed runs, halved where a GPU's memory was too small."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_config, write_data

from pam_espnet.bin.pam_decode import main
from pam_espnet.config import write_config
from pam_espnet.decode.batches import MOST_ROWS, MOST_UTTERANCES, Needs, in_batches, plan, rounded, split
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.shards import DecodeOptions, as_begun, decode_shard
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import ConfigError, DataError, PamError
from pam_espnet.fileio import read_json, save_trained, write_json
from pam_espnet.model import build_model
from pam_espnet.search.hypothesis import BeamOptions

GIB = 1 << 30
QWEN_3B = {"num_layers": 36, "kv_heads": 2, "head": 128, "width": 2048, "inner": 11008, "columns": 151_936}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "test", size=4)  # 12 utterances


@pytest.fixture(scope="module")
def exp(tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exp")
    torch.manual_seed(0)
    config = tiny_config(tiny_llm_dir)
    save_trained(build_model(config).state_dict(), path / "model.safetensors")
    write_config(config, path / "config.yaml")
    write_config({"beam_size": 2, "max_new_tokens": 6}, path / "decode.yaml")
    return path


def decode(exp: Path, data: Path, out: Path, *more: str) -> int:
    args = ["--exp", str(exp), "--data", str(data), "--out", str(out), "--config", str(exp / "decode.yaml"), *more]
    return main([*args, "--device", "cpu"])


def small_gpu(model: SpeechLLM, monkeypatch: pytest.MonkeyPatch, holds: int, plan_for: int) -> list[int]:
    """Make ``model`` behave as on a GPU whose memory holds ``holds`` utterances and seems to hold ``plan_for``;
    returns the sizes of the batches that are tried."""
    tried: list[int] = []
    answer = model.answer

    def limited(waves: Any, *args: Any, **options: Any) -> Any:
        tried.append(len(waves))
        if len(waves) > holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return answer(waves, *args, **options)

    monkeypatch.setattr(model, "answer", limited)
    monkeypatch.setattr(model, "on_gpu", True)
    seconds, prefix = 0.7, 60
    need = Needs.of(model).utterance(prefix, 9, seconds)
    model.__dict__["free_memory"] = int(need * plan_for * 1.01)
    return tried


def test_numbers_between_powers_of_two_are_rounded_to_few() -> None:
    assert [rounded(n) for n in (1, 7, 8, 9, 15, 17, 100, 128)] == [1, 7, 8, 10, 16, 20, 112, 128]
    assert [rounded(n, 64) for n in (1, 64, 65, 448, 513)] == [64, 64, 128, 448, 640]


@given(
    st.lists(st.integers(1, 1000), max_size=300).map(lambda needs: sorted(needs, reverse=True)),
    st.integers(0, 20_000),
    st.integers(1, 600),
)
def test_planned_batches_fit_and_cover_everything_once(needs: list[int], free: int, beams: int) -> None:
    sizes = plan(needs, free, beams)
    batches = split(needs, sizes)
    assert [need for batch in batches for need in batch] == needs and all(sizes)
    for index, batch in enumerate(batches):
        assert len(batch) == 1 or rounded(len(batch)) * max(batch) <= free
        assert len(batch) <= MOST_UTTERANCES and (len(batch) * beams <= MOST_ROWS or len(batch) == 1)
        if index + 1 < len(batches):  # one more, of any that fit the buffers, would be too much
            more = rounded(len(batch) + 1)
            assert more * max(batch) > free or more > MOST_UTTERANCES or more * beams > MOST_ROWS


def test_shorter_utterances_are_decoded_in_larger_batches() -> None:
    assert plan([100] * 8 + [10] * 100, 400, 4) == [4, 4, 40, 40, 20]
    assert plan([], 400, 4) == []
    assert plan([1] * 300, 10**6, 4) == [128, 128, 44]
    assert plan([1] * 300, 10**6, 16)[0] == 32  # 512 rows


def test_bytes_of_an_utterance_in_the_shape_of_a_real_llm() -> None:
    q, two, four = QWEN_3B, 2, 4
    needs = Needs(
        slot=2 * q["num_layers"] * q["kv_heads"] * q["head"] * two,
        position=(8 * q["width"] + 4 * q["inner"]) * two,
        row=4 * q["columns"] * four,
        frame=3 * q["width"] * four,
        second=0,
        beams=4,
        steps=48,
    )
    assert needs.slot == 36_864
    batch = 32 * needs.utterance(400, 380, 60.0)
    assert 1.5 * GIB < batch < 4 * GIB  # measured on an H200 in bfloat16, encoders left out: 1.9 to 2.3 GB
    assert needs.utterance(400, 380, 60.0) < dataclasses.replace(needs, steps=200).utterance(400, 380, 60.0)
    assert needs.utterance(400, 380, 60.0) < dataclasses.replace(needs, shared=False).utterance(400, 380, 60.0)
    together = dataclasses.replace(needs, second=50 * 1280 * 96 * four)
    assert together.utterance(400, 380, 60.0) > 1 * GIB  # encoders that run a whole batch


def test_needs_are_those_of_the_model(tiny_llm_dir: Path) -> None:
    model = SpeechLLM(build_model(tiny_config(tiny_llm_dir)), AnswerOptions(BeamOptions(beam_size=3, max_new_tokens=7)))
    needs, llm = Needs.of(model), model.model.decoder
    _, state = model.engine.prefill(torch.zeros(1, 5, llm.width), torch.tensor([5]))
    kept = [*state.keys, *state.values]
    assert needs.slot == sum(tensor.nbytes for tensor in kept) // kept[0].shape[2]
    assert (needs.beams, needs.steps, needs.shared) == (3, 7, True) and needs.row == 4 * 4 * llm.vocab_size
    assert needs.second > 0
    model.encodes_alone = True
    assert Needs.of(model).second == 0


def test_a_cpu_decodes_by_eight_as_before(exp: Path, data: Path, tmp_path: Path) -> None:
    """A directory of an older version, whose key has the number 8, is complete; a killed one continues."""
    assert decode(exp, data, tmp_path / "old", "--batch_size", "8") == 0
    assert decode(exp, data, tmp_path / "new") == 0
    for name in ("key.json", "score", "text"):
        assert (tmp_path / "new" / name).read_text() == (tmp_path / "old" / name).read_text()
    assert read_json(tmp_path / "new" / "stats.json")["batch_size"] == 8
    assert not list(tmp_path.rglob("batches.json"))
    (tmp_path / "old" / "stats.json").unlink()
    assert decode(exp, data, tmp_path / "old") == 0 and (tmp_path / "old" / "stats.json").exists()


def test_auto_is_what_the_directory_was_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    auto = DecodeOptions("auto")
    assert [as_begun(auto, tmp_path, device).batch_size for device in ("cpu", "cuda:1", "auto")] == [8, "auto", "auto"]
    for size in (8, "auto", 3):
        write_json(tmp_path / "key.json", {"batch_size": size})
        assert as_begun(auto, tmp_path, "cpu").batch_size == as_begun(auto, tmp_path, "cuda").batch_size == size
        assert as_begun(DecodeOptions(5), tmp_path, "cuda").batch_size == 5  # is then refused
    for wrong in (0, 2.5, "all", None):
        with pytest.raises(ConfigError, match="batch_size"):
            DecodeOptions(wrong)  # type: ignore[arg-type]


def test_a_resumed_run_has_the_same_batches_with_other_free_memory(
    exp: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SpeechLLM.load(exp, AnswerOptions(BeamOptions(beam_size=2, max_new_tokens=6)))
    tried = small_gpu(model, monkeypatch, holds=99, plan_for=5)
    journal = decode_shard(model, data, tmp_path, DecodeOptions("auto"))
    assert tried == [5, 5, 2] and read_json(journal.with_name("batches.json")) == {"sizes": [5, 5, 2]}
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:7]))
    model.free_memory *= 100
    decode_shard(model, data, tmp_path, DecodeOptions("auto"))
    assert tried == [5, 5, 2, 5, 2]
    last = {json.loads(line)["utt"]: line for line in journal.read_text().splitlines()}
    assert len(last) == 12
    for line in lines:
        again = json.loads(last[json.loads(line)["utt"]])
        assert {**again, "seconds_wall": 0} == {**json.loads(line), "seconds_wall": 0}
    write_json(journal.with_name("batches.json"), {"sizes": [5, 5]})
    with pytest.raises(DataError, match=r"10 utterances, not 12\n.*rm -r"):
        decode_shard(model, data, tmp_path, DecodeOptions("auto"))


def test_a_batch_that_does_not_fit_is_halved_with_those_behind_it(
    exp: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = AnswerOptions(BeamOptions(beam_size=2, max_new_tokens=6))
    model = SpeechLLM.load(exp, options)
    tried = small_gpu(model, monkeypatch, holds=3, plan_for=10)
    journal = decode_shard(model, data, tmp_path / "a", DecodeOptions("auto"))
    assert tried == [10, 5, 3, 2, 3, 2, 2] and "10 utterances together: at most 5 from here" in caplog.text
    assert read_json(journal.with_name("batches.json")) == {"sizes": [3, 2, 3, 2, 2]}
    expected = decode_shard(SpeechLLM.load(exp, options), data, tmp_path / "b", DecodeOptions(5))
    found, wanted = ([json.loads(line) for line in one.read_text().splitlines()] for one in (journal, expected))
    assert [one["utt"] for one in found] == [one["utt"] for one in wanted]
    assert [one["hypotheses"][0]["tokens"] for one in found] == [one["hypotheses"][0]["tokens"] for one in wanted]


def test_buffers_are_freed_before_a_batch_is_halved(
    exp: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SpeechLLM.load(exp, AnswerOptions(BeamOptions(beam_size=2, max_new_tokens=6)))
    assert not model.release()  # on a CPU nothing is kept
    tried, released = small_gpu(model, monkeypatch, holds=6, plan_for=8), list[int]()
    stub = SimpleNamespace(graphs=True, release=lambda: released.append(len(tried)))
    monkeypatch.setattr(model, "release", lambda: SpeechLLM.release(cast(SpeechLLM, SimpleNamespace(engine=stub))))
    decode_shard(model, data, tmp_path, DecodeOptions("auto"))
    assert tried == [8, 8, 4, 4, 4] and released == [1, 2]


def test_a_size_that_the_user_chose_and_a_single_utterance_are_errors_in_words(
    exp: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SpeechLLM.load(exp, AnswerOptions(BeamOptions(beam_size=2, max_new_tokens=6)))
    small_gpu(model, monkeypatch, holds=4, plan_for=12)
    with pytest.raises(PamError, match=r"--batch_size: .* 7 utterances .*2\.00 GiB\)\n  -> --batch_size 4, or "):
        decode_shard(model, data, tmp_path / "a", DecodeOptions(7))
    decode_shard(model, data, tmp_path / "b", DecodeOptions(4))
    small_gpu(model, monkeypatch, holds=0, plan_for=12)
    first = r"-test-\d+: .*this utterance alone .*\n.*beam_size \(now 2\) or max_new_tokens \(now 6\)"
    for size in ("auto", 7, 1):
        with pytest.raises(PamError, match=first if size != 7 else "--batch_size 4"):
            decode_shard(model, data, tmp_path / f"c{size}", DecodeOptions(size))


def test_other_errors_are_not_caught(exp: Path) -> None:
    model = SpeechLLM.load(exp, AnswerOptions())

    def broken(batch: list[int]) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(in_batches(model, [[1, 2]], broken, lambda batches: None))


def test_encoded_one_by_one_equals_together_and_alone(
    tiny_llm_dir: Path, tone: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tokens = tmp_path / "ctc_tokens.txt"
    tokens.write_text("".join(f"{token}\n" for token in range(3, 250)))
    for fusion in ("pam", "average"):
        model = SpeechLLM(build_model(tiny_config(tiny_llm_dir, fusion, ctc_tokens=str(tokens))), AnswerOptions())
        assert not model.encodes_alone  # on a CPU
        waves = [tone(0.4 + 0.3 * index, 300 + 100 * index) for index in range(4)]
        prompts = ["Describe the sounds.", "Who?", "Describe the sounds.", "How many people are speaking?"]
        together = model.encode(waves, prompts)
        model.encodes_alone = True
        found = model.encode(waves, prompts)
        assert torch.equal(found.lengths, together.lengths)
        assert found.embeddings.shape == together.embeddings.shape
        torch.testing.assert_close(found.embeddings, together.embeddings)
        for name in ("expert_logits", "expert_probs", "expert", "gate", "encoder_weights"):
            torch.testing.assert_close(getattr(found.routing, name), getattr(together.routing, name))
        for one, other in zip(found.routing.layer_weights, together.routing.layer_weights, strict=True):
            torch.testing.assert_close(one, other)
        head = model.model.ctc
        assert head is not None
        experts = found.routing.expert
        log_probs = head.log_probs(found.embeddings, experts, found.lengths)
        paths = head.greedy(found.embeddings, found.lengths, experts)
        assert head.greedy(found.embeddings, found.lengths, experts, alone=True) == paths
        for index, (wave, prompt) in enumerate(zip(waves, prompts, strict=True)):
            alone, length = model.encode([wave], [prompt]), int(found.lengths[index])
            assert torch.equal(found.embeddings[index, :length], alone.embeddings[0])
            assert not found.embeddings[index, length:].any()
            assert torch.equal(found.routing.expert_probs[index], alone.routing.expert_probs[0])
            assert torch.equal(log_probs[index, :length], head.log_probs(alone.embeddings, alone.routing.expert)[0])
            assert not log_probs[index, length:].any()


def test_graphs_and_batch_invariant_are_checked() -> None:
    assert AnswerOptions.from_dict({"graphs": False, "batch_invariant": False}).graphs == "off"  # YAML's off
    assert AnswerOptions.from_dict({"graphs": True}).graphs == "on"
    assert AnswerOptions().graphs == "auto" and AnswerOptions().batch_invariant
    for wrong in ({"graphs": "always"}, {"batch_invariant": "yes"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            AnswerOptions.from_dict(wrong)
