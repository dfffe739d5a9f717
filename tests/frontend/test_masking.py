"""Masks on encoder frames in training."""

import pytest
import torch

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.masking import MaskOptions, draw_spans, hide


def test_spans_lie_inside_and_cover_at_most_a_third_each() -> None:
    torch.manual_seed(0)
    seconds = torch.tensor([0.3, 4.0, 9.0])
    for _ in range(50):
        spans = draw_spans(seconds, float(seconds.max()), MaskOptions(span=0.5, every=2.0))
        assert spans.shape == (3, 5, 2)
        width = spans[..., 1] - spans[..., 0]
        assert (spans[..., 0] >= 0).all() and (spans[..., 1] <= seconds[:, None] + 1e-5).all()
        assert (width <= torch.clamp(seconds / 3, max=0.5)[:, None] + 1e-5).all()
        assert (width > 0).sum(dim=1).tolist() == [1, 2, 5]


def test_hide_zeroes_the_span_at_every_rate() -> None:
    spans = torch.tensor([[[0.2, 0.4]], [[0.0, 0.0]]])
    for rate in (50.0, 12.5, 6.25):
        hidden = torch.ones(2, int(2 * rate), 3)
        masked = hide(hidden, rate, spans, dropout=0.0)
        time = (torch.arange(hidden.shape[1]) + 0.5) / rate
        assert torch.equal(masked[0, :, 0] == 0, (time >= 0.2) & (time < 0.4))
        assert torch.equal(masked[1], hidden[1])


def test_defaults_hide_nothing() -> None:
    spans = draw_spans(torch.tensor([3.0]), 3.0, MaskOptions())
    hidden = torch.randn(1, 150, 4)
    assert torch.equal(hide(hidden, 50.0, spans, MaskOptions().dropout), hidden)


def test_options_out_of_range() -> None:
    for wrong in ({"span": -1.0}, {"every": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match="mask_conf"):
            MaskOptions(**wrong)
