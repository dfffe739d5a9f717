"""The network that reads Silero's weights against the package's own model."""

import numpy as np
import pytest
import torch
from synthetic_voice import hiss, voice

from pam_espnet.decode import voice_activity
from pam_espnet.decode.voice_activity import FRAME, RATE, VoiceActivity
from pam_espnet.errors import ConfigError


def buzz() -> np.ndarray:
    """Four seconds (T, FRAME): noise, two of a voice, noise."""
    wave = np.concatenate([hiss(1.0), voice(2.0), hiss(1.0)])
    return wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)


@pytest.mark.filterwarnings("ignore")
def test_with_the_weights_of_the_package_s_own_network_it_finds_the_same() -> None:
    from silero_vad import load_silero_vad

    threads, frames = torch.get_num_threads(), buzz()
    theirs = load_silero_vad()
    torch.set_num_threads(threads)
    with torch.no_grad():
        expected = [float(theirs(torch.from_numpy(frame), RATE)) for frame in frames]
    weights = {"stft_conv.weight": theirs._model.stft.forward_basis_buffer}
    for name, weight in theirs._model.named_parameters():
        kind = name.rpartition(".")[2]
        part = {"encoder": f"conv{int(name.split('.')[1]) + 1}" if "encoder" in name else "", "decoder": "final_conv"}
        weights[f"lstm.{kind}_l0" if ".rnn." in name else f"{part[name.split('.')[0]]}.{kind}"] = weight
    ours = VoiceActivity()
    ours.load_state_dict(weights)
    assert max(expected) > 0.5 > 0.1 > min(expected)
    np.testing.assert_allclose(ours(frames), expected, atol=1e-4)


def test_a_voice_and_no_voice() -> None:
    found = VoiceActivity()(buzz())
    second = RATE // FRAME
    assert (found[second + 5 : 3 * second - 5] > 0.5).mean() > 0.5
    assert (found[: second - 2] < 0.5).all() and (found[-second + 10 :] < 0.1).all()


def test_calls_continue_each_other() -> None:
    frames, parts = buzz(), VoiceActivity()
    joined = np.concatenate([parts(frames[:10]), parts(frames[10:11]), parts(frames[11:])])
    np.testing.assert_allclose(joined, VoiceActivity()(frames), atol=1e-6)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voice_activity, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install silero-vad"):
        VoiceActivity()
