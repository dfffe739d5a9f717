"""Layer mix and frame-stacking adapter."""

import pytest
import torch

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.adapter import FrameStackingAdapter, mix_layers, stacking


@pytest.mark.parametrize(
    ("encoder_rate", "frame_rate", "expected"),
    [(50, 12.5, (4, 1)), (100, 12.5, (8, 1)), (12.5, 12.5, (1, 1)), (1 / 0.48, 12.5, (1, 6)), (6.25, 12.5, (1, 2))],
)
def test_rates_become_stacking_or_repetition(encoder_rate, frame_rate, expected):
    assert stacking(encoder_rate, frame_rate, "any") == expected


@pytest.mark.parametrize(("encoder_rate", "frame_rate"), [(50, 20), (16000 / 270, 12.5), (10, 12.5)])
def test_rates_that_do_not_fit_name_the_encoder_and_rates_that_do(encoder_rate, frame_rate):
    with pytest.raises(ConfigError, match="my-encoder") as caught:
        stacking(encoder_rate, frame_rate, "my-encoder")
    rates = str(caught.value).split("For this encoder ")[1].split(" Hz")[0].split(", ")
    for rate in rates:
        # what the message suggests must be accepted, up to its six printed digits
        factor = encoder_rate / float(rate)
        assert factor == pytest.approx(round(factor), rel=1e-5)


def test_stacking_concatenates_neighbours_and_pads_the_last_group_with_zeros():
    adapter = FrameStackingAdapter(2, 5, 50, 25, "any")
    seen = []
    adapter.mlp[0].register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    hidden = torch.arange(1.0, 7).reshape(1, 3, 2)
    assert adapter(hidden, 2).shape == (1, 2, 5)
    torch.testing.assert_close(seen[0], torch.tensor([[[1.0, 2, 3, 4], [5, 6, 0, 0]]]))


def test_repetition_for_a_slow_encoder():
    adapter = FrameStackingAdapter(3, 4, 5, 10, "any")
    out = adapter(torch.randn(2, 3, 3), 6)
    torch.testing.assert_close(out[:, 0::2], out[:, 1::2], atol=0, rtol=0)
    assert not torch.allclose(out[:, 0], out[:, 2])


def test_longer_input_is_cut_and_shorter_padded():
    adapter = FrameStackingAdapter(3, 4, 50, 12.5, "any")
    hidden = torch.randn(2, 40, 3)
    torch.testing.assert_close(adapter(hidden, 7), adapter(hidden[:, :28], 7))
    padded = torch.cat([hidden, torch.zeros(2, 8, 3)], dim=1)
    torch.testing.assert_close(adapter(hidden, 12), adapter(padded, 12))


@pytest.mark.parametrize("output_norm", [True, False])
def test_starts_at_unit_scale(output_norm):
    torch.manual_seed(0)
    adapter = FrameStackingAdapter(64, 96, 50, 12.5, "any", output_norm=output_norm)
    rms = adapter(torch.randn(2, 400, 64), 100).square().mean().sqrt()
    assert rms.item() == pytest.approx(1.0, rel=0.1)


def test_hidden_width_is_used():
    assert FrameStackingAdapter(3, 4, 50, 25, "any", hidden_width=7).mlp[0].out_features == 7


def test_silent_frames_do_not_blow_up_the_gradient():
    torch.manual_seed(0)
    adapter = FrameStackingAdapter(8, 16, 50, 25, "any")
    grads = []
    for hidden in (torch.randn(1, 40, 8), torch.zeros(1, 40, 8)):
        adapter.zero_grad()
        (adapter(hidden, 20) * torch.randn(20, 16)).sum().backward()
        grads.append(adapter.mlp[2].bias.grad.norm().item())
    assert grads[1] < 20 * grads[0]


@pytest.mark.parametrize("options", [{"hidden_width": 0}])
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        FrameStackingAdapter(3, 4, 50, 25, "any", **options)


def test_mix_is_the_weighted_sum_of_normalised_layers():
    states = torch.randn(2, 3, 5, 4) * torch.tensor([1.0, 100.0, 0.01])[None, :, None, None]
    weights = torch.tensor([[0.1, 0.2, 0.1], [0.0, 0.0, 0.0]])  # sums below one are conditioned, zeros stay zero
    mixed = mix_layers(states, torch.tensor([5, 3]), weights, (4, 4, 4))
    normed = torch.nn.functional.layer_norm(states[0], (4,))
    torch.testing.assert_close(mixed[0], 0.25 * normed[0] + 0.5 * normed[1] + 0.25 * normed[2])
    assert mixed[1].eq(0).all()


def test_mix_ignores_states_beyond_the_frames_and_keeps_float32():
    states = torch.randn(1, 2, 6, 4)
    weights = torch.tensor([[0.5, 0.5]])
    clean = mix_layers(states, torch.tensor([4]), weights, (4, 4))
    states[:, :, 4:] = 99.0
    torch.testing.assert_close(mix_layers(states, torch.tensor([4]), weights, (4, 4)), clean)
    assert clean[:, 4:].eq(0).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = mix_layers(states.half(), torch.tensor([4]), weights, (4, 4))
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, clean, atol=1e-2, rtol=0)


def test_mix_normalises_narrow_layers_over_their_own_columns():
    states = torch.randn(1, 2, 5, 6)
    states[:, 0, :, 3:] = 0
    mixed = mix_layers(states, torch.tensor([5]), torch.tensor([[1.0, 0.0]]), (3, 6))
    torch.testing.assert_close(mixed[..., :3], torch.nn.functional.layer_norm(states[:, 0, :, :3], (3,)))
    assert mixed[..., 3:].eq(0).all()
