"""Encoders in bfloat16: how far hidden states and the loss move, who cannot, and what the feature cache makes of it.

On tiny random models of the real classes; on a CPU bfloat16 works as well.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_config, write_data

from pam_espnet.errors import ConfigError, DataError
from pam_espnet.frontend.caching import cache_encoders
from pam_espnet.frontend.encoders.base import AbsEncoder, layer_dtype
from pam_espnet.frontend.encoders.registry import ENCODERS, build_encoder, encoder_class
from pam_espnet.frontend.frontend import PaMFrontend
from pam_espnet.llm.prompt_layout import answer_ids
from pam_espnet.model import build_model

WAVES = [f"{family}-{norm}" for family in ("wav2vec2", "hubert", "wavlm") for norm in ("layer", "group")]
HALF = ["whisper", "ast", *WAVES, "data2vec-audio-layer"]
SAMPLES = (16000, 23999, 8000)


@pytest.fixture
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Arguments of build_encoder for the case named by the test's parameter."""
    if request.param in ("whisper", "ast"):
        return {"type": request.param, "path": str(request.getfixturevalue(f"tiny_{request.param}_dir"))}
    return {"type": "hf_wave", "path": str(request.getfixturevalue("tiny_wave_dir")(request.param))}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    wave = torch.zeros(len(SAMPLES), max(SAMPLES))
    generator = torch.Generator().manual_seed(1)
    for row, size in enumerate(SAMPLES):
        wave[row, :size] = torch.randn(size, generator=generator) * 0.1
    return wave, torch.tensor(SAMPLES)


def test_who_can() -> None:
    assert {kind for kind in ENCODERS if encoder_class(kind).runs_in_bfloat16} == {"whisper", "hf_wave", "ast"}
    assert not AbsEncoder.runs_in_bfloat16  # a user's own encoder has to say so


@pytest.mark.parametrize("options", HALF, indirect=True)
def test_hidden_states_move_by_little(options: dict[str, Any]) -> None:
    """After the layer mix's normalisation, by at most 2 % of their size in any layer (bfloat16 rounds by 0.2 %)."""
    wave, lengths = batch()
    expected, frames = build_encoder(**options)(wave, lengths)
    encoder = build_encoder(**options).use_dtype(torch.bfloat16)
    hidden, same = encoder(wave, lengths)
    assert hidden.dtype == torch.bfloat16 and hidden.shape == expected.shape and torch.equal(frames, same)
    one, other = (torch.nn.functional.layer_norm(x.float(), x.shape[-1:]) for x in (hidden, expected))
    error = (one - other).square().mean((0, 2, 3)).sqrt()  # of values whose mean square is 1
    assert 0 < error.max() < 0.02, error
    for row, size in enumerate(SAMPLES):  # and neighbours and padding matter as little
        alone, own = encoder(wave[row : row + 1, :size], lengths[row : row + 1])
        normed = torch.nn.functional.layer_norm(alone[0].float(), alone.shape[-1:])
        assert (normed - one[row, :, : own[0]]).square().mean((1, 2)).sqrt().max() < 0.02
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training


@pytest.mark.parametrize("options", HALF, indirect=True)
def test_features_before_the_first_layer_stay_float32(options: dict[str, Any]) -> None:
    encoder = build_encoder(**options).use_dtype(torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in encoder.buffers(recurse=False)} <= {torch.float32}


def test_auto_is_bfloat16_on_gpus_that_compute_it(monkeypatch: pytest.MonkeyPatch) -> None:
    able, unable = encoder_class("whisper"), encoder_class("yamnet")
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert layer_dtype("auto", able, "cuda:0") == expected
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert layer_dtype("auto", able, "cpu") == layer_dtype("auto", unable, "cuda") == torch.float32
    assert (
        layer_dtype("float32", able, "cuda") == torch.float32 and layer_dtype("bfloat16", able, "cpu") == torch.bfloat16
    )
    with pytest.raises(ConfigError, match="YAMNetEncoder computes in float32 only\n  -> write auto"):
        layer_dtype("bfloat16", unable, "cuda")
    with pytest.raises(ConfigError, match="encoder_dtype: 'half'; choose"):
        layer_dtype("half", able, "cuda")


def frontend_of(folder: Path, **options: Any) -> PaMFrontend:
    encoders = {"whisper": {"type": "whisper", "path": str(folder)}}
    return PaMFrontend(encoders, "average", width=8, prompt_width=4, **options)


def test_precision_follows_the_device(tiny_whisper_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``auto`` moves change it, and no weight that was rounded is used in float32 afterwards."""
    frontend = frontend_of(tiny_whisper_dir)
    before = frontend.encoder("whisper").weights_sha256()
    on_gpu = [True]
    monkeypatch.setattr(
        "pam_espnet.frontend.frontend.layer_dtype", lambda *_: torch.bfloat16 if on_gpu[0] else torch.float32
    )
    frontend.to("cpu")
    assert frontend.encoder("whisper").dtype == torch.bfloat16
    assert {p.dtype for p in frontend.parameters()} == {torch.float32}
    on_gpu[0] = False
    frontend.to("cpu")
    assert frontend.encoder("whisper").weights_sha256() == before


def test_explicit_precision_outlives_moves_and_casts(tiny_whisper_dir: Path) -> None:
    frontend = frontend_of(tiny_whisper_dir, encoder_dtype="bfloat16").to("cpu").float()
    assert frontend.encoder("whisper").dtype == torch.bfloat16
    frontend = frontend_of(tiny_whisper_dir, encoder_dtype="float32").to(torch.bfloat16)
    assert {p.dtype for p in frontend.encoder("whisper").parameters()} == {torch.float32}
    with pytest.raises(ConfigError, match="encoder_dtype"):
        frontend_of(tiny_whisper_dir, encoder_dtype="fp16")


def test_loss_moves_by_little(
    tiny_llm_dir: Path,
    tiny_whisper_dir: Path,
    tiny_wave_dir: Callable[[str], Path],
    tiny_ast_dir: Path,
    tiny_pyannote_dir: Path,
) -> None:
    """Real classes, one that stays float32 among them: the loss by less than 0.1 %, the gradients by less than 2 %."""
    encoders = {
        "whisper": {"type": "whisper", "path": str(tiny_whisper_dir)},
        "wavlm": {"type": "hf_wave", "path": str(tiny_wave_dir("wavlm-layer"))},
        "hubert": {"type": "hf_wave", "path": str(tiny_wave_dir("hubert-layer"))},
        "ast": {"type": "ast", "path": str(tiny_ast_dir)},
        "pyannote": {"type": "pyannote", "path": str(tiny_pyannote_dir)},
    }
    config = tiny_config(tiny_llm_dir, "average")
    config["frontend_conf"] |= {"encoders": encoders, "frame_rate": 5.0}
    torch.manual_seed(0)
    model = build_model(config).eval()
    wave, lengths = batch()
    text = [answer_ids(model.decoder.tokenizer, one) for one in ("you have", "a dog barks", "2")]
    prompt, task = ["Transcribe the speech."] * 3, [0] * 3
    given = {"speech": wave, "num_samples": lengths.tolist(), "prompt": prompt, "text": text, "task": task}
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for name in encoders:
            encoder = model.frontend.encoder(name)
            encoder.use_dtype(dtype if encoder.runs_in_bfloat16 else torch.float32)
        loss, *_ = model(**given)
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(model.frontend.adapters.parameters()))]
        )
        results.append((loss.item(), gradient))
    (one, first), (other, second) = results
    assert one != other and other == pytest.approx(one, rel=1e-3)
    assert (second - first).norm() < 0.02 * first.norm()


def test_feature_cache_knows_the_precision(tmp_path: Path, tiny_whisper_dir: Path) -> None:
    """float32 has no entry in the key, so caches of version 0.1 stay valid for it; the other precision is refused."""
    data = write_data(tmp_path, "train", 2)
    conf = {"encoders": {"one": {"type": "whisper", "path": str(tiny_whisper_dir), "layers": [1]}}}

    def cache(dtype: str | None, where: str) -> dict[str, Any]:
        own = conf if dtype is None else {**conf, "encoder_dtype": dtype}
        (made,) = cache_encoders(["one"], own, [data], tmp_path / where)
        return json.loads((made.scp.parent / "cache.json").read_text())["key"]

    keys = [cache(dtype, "a") for dtype in (None, "auto", "float32")]
    assert set(keys[0]) == {"encoder", "spec", "weights_sha256", "audio_sha256"} and keys[0] == keys[1] == keys[2]
    with pytest.raises(DataError, match=r"other settings or data \(changed: encoder_dtype\)"):
        cache("bfloat16", "a")
    half = cache("bfloat16", "b")
    assert half == {**keys[0], "encoder_dtype": "bfloat16"} and half == cache("bfloat16", "b")
    with pytest.raises(DataError, match=r"changed: encoder_dtype"):
        cache("auto", "b")
