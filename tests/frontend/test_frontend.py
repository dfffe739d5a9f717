"""PaMFrontend with a mock encoder: lengths, invariance, skipping, cached features, what is kept where."""

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.encoder_spec import EncoderSpec
from pam_espnet.frontend.encoders.base import AbsEncoder
from pam_espnet.frontend.frontend import PaMFrontend

WIDTH, PROMPT = 6, 10
calls: list[str] = []
loads: list[str] = []


class Mock(AbsEncoder):
    """Random projections of non-overlapping windows of ``window`` samples; counts its calls."""

    def __init__(
        self, path: str, window: int = 320, layers: list[int] | None = None, width: int = 4, rate: int = 16000
    ):
        super().__init__()
        loads.append(path)
        self.path, self.window = path, window
        generator = torch.Generator().manual_seed(len(path))
        self.weight = torch.nn.Parameter(torch.randn(3, window, width, generator=generator))
        self.dropout = torch.nn.Dropout(0.5)
        self.finish(layers=layers, available=3, width=width, frame_rate=16000 / window, sample_rate=rate)

    def output_lengths(self, num_samples):
        return (num_samples + self.window - 1) // self.window

    def hidden_states(self, wave, lengths):
        calls.append(self.path)
        wave = torch.nn.functional.pad(wave, (0, -wave.shape[1] % self.window))
        windows = wave.unflatten(1, (-1, self.window))
        return [self.dropout(windows @ weight) for weight in self.weight]


module = ModuleType("mock_encoders_for_frontend")
module.Mock = Mock
sys.modules[module.__name__] = module
TYPE = f"{module.__name__}:Mock"


@pytest.fixture(autouse=True)
def _count_from_zero():
    calls.clear()
    loads.clear()


def conf(**more):
    return {
        "fast": {"type": TYPE, "path": "fast"},
        "mid": {"type": TYPE, "path": "mid", "window": 640, "layers": [0, 2]},
        "slow": {"type": TYPE, "path": "slowest", "window": 2560, "width": 3},
        **more,
    }


def make(fusion="pam", seed=1, **options) -> PaMFrontend:
    torch.manual_seed(seed)
    options.setdefault("encoders", conf())
    return PaMFrontend(fusion=fusion, width=WIDTH, prompt_width=PROMPT, **options)


def decided(frontend: PaMFrontend, *encoders: int) -> PaMFrontend:
    """Make expert e put nearly all weight on encoder ``encoders[e]``."""
    counts = frontend.fusion.num_layers
    with torch.no_grad():
        frontend.fusion.layer_logits.zero_()
        for expert, encoder in enumerate(encoders):
            frontend.fusion.layer_logits[expert].split(counts)[encoder].add_(8.0)
    return frontend


def batch(*seconds: float):
    torch.manual_seed(5)
    num_samples = torch.tensor([int(s * 16000) for s in seconds])
    wave = 0.1 * torch.randn(len(seconds), int(num_samples.max()))
    return num_samples, torch.randn(len(seconds), PROMPT), wave


@given(st.integers(1, 10**7), st.sampled_from([(12.5, 2, 25), (6.25, 4, 25), (25.0, 1, 25), (1 / 0.48, 12, 25)]))
def test_output_lengths_are_exact(num_samples, rate):
    frame_rate, denominator, numerator = rate
    frontend = PaMFrontend.__new__(PaMFrontend)
    torch.nn.Module.__init__(frontend)
    frontend.frame_rate, frontend.sample_rate = frame_rate, 16000
    expected = -(-num_samples * numerator // (denominator * 16000))
    assert frontend.output_lengths(torch.tensor([num_samples])).tolist() == [expected]


@pytest.mark.parametrize("fusion", ["pam", "average", "concat", "static", "single"])
def test_shapes_lengths_and_zeros_beyond(fusion):
    frontend = make(fusion, fusion_conf={"encoder": "mid"} if fusion == "single" else {})
    num_samples, prompt, wave = batch(0.5, 1.01, 0.01)
    out = frontend(num_samples, prompt, wave)
    assert out.lengths.tolist() == [7, 13, 1]
    assert out.embeddings.shape == (3, 13, WIDTH)
    assert frontend.output_size() == WIDTH
    for row, length in zip(out.embeddings, out.lengths, strict=True):
        assert row[length:].eq(0).all()
        assert row[:length].abs().sum(dim=1).gt(0).all()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 20000), min_size=1, max_size=4),
    st.sampled_from(["pam", "concat", "static"]),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 3000),
)
def test_an_utterance_does_not_depend_on_its_neighbours_or_padding(lengths, fusion, threshold, padding):
    frontend = make(fusion, skip_threshold=threshold).eval()
    if fusion == "pam":
        decided(frontend, 0, 1, 2)
    torch.manual_seed(len(lengths))
    num_samples = torch.tensor(lengths)
    prompt = torch.randn(len(lengths), PROMPT)
    wave = torch.randn(len(lengths), max(lengths) + padding)  # noise beyond each utterance's end
    together = frontend(num_samples, prompt, wave)
    for b, length in enumerate(lengths):
        alone = frontend(num_samples[b : b + 1], prompt[b : b + 1], wave[b : b + 1, :length])
        frames = int(alone.lengths)
        assert frames == together.lengths[b]
        torch.testing.assert_close(together.embeddings[b, :frames], alone.embeddings[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.routing.encoder_weights[b], alone.routing.encoder_weights[0])


@pytest.mark.parametrize("shape", ["flat", "layers"])
def test_cached_features_give_what_the_waveform_gives(shape):
    frontend = make()
    num_samples, prompt, wave = batch(0.7, 1.3)
    features = {}
    for name, (hidden, frames) in frontend.encode(wave, num_samples).items():
        if shape == "flat":  # column block h of the cache is layer h
            hidden = torch.cat([hidden[:, h] for h in range(hidden.shape[1])], dim=-1)
        features[name] = (hidden, frames)
    live = frontend(num_samples, prompt, wave)
    calls.clear()
    cached = frontend(num_samples, prompt, features=features)
    assert calls == []
    assert torch.equal(live.embeddings, cached.embeddings)
    features.pop("mid")
    mixed = frontend(num_samples, prompt, wave, features)
    assert calls == ["mid"]
    assert torch.equal(live.embeddings, mixed.embeddings)


def test_features_that_do_not_fit_or_are_missing():
    frontend = make()
    num_samples, prompt, wave = batch(0.7)
    features = frontend.encode(wave, num_samples)
    with pytest.raises(ConfigError, match=r"no waveform for encoder.*mid, slow"):
        frontend(num_samples, prompt, features={"fast": features["fast"]})
    features["mid"] = features["fast"]
    with pytest.raises(ConfigError, match=r"'mid'.*2 layers of width 4"):
        frontend(num_samples, prompt, features=features)


def test_encoders_without_weight_are_not_run_and_the_result_is_the_renormalised_mix():
    frontend = decided(make(skip_threshold=0.1, fusion_conf={"gradient": "straight_through"}), 1, 1, 1).eval()
    num_samples, prompt, wave = batch(0.7, 1.3)
    assert frontend.needed_encoders(frontend.route(prompt)) == ["mid"]
    out = frontend(num_samples, prompt, wave)
    assert calls == ["mid"]
    assert out.routing.encoder_weights.tolist() == [[0, 1, 0], [0, 1, 0]]
    # by hand: all encoders run, weights renormalised afterwards
    with torch.no_grad():
        frontend.fusion.layer_logits.split(frontend.fusion.num_layers, dim=1)[0].fill_(-torch.inf)
        frontend.fusion.layer_logits.split(frontend.fusion.num_layers, dim=1)[2].fill_(-torch.inf)
    frontend.skip_threshold = 0.0
    torch.testing.assert_close(frontend(num_samples, prompt, wave).embeddings, out.embeddings, atol=1e-6, rtol=1e-5)


def test_an_encoder_is_run_when_one_prompt_of_the_batch_needs_it():
    frontend = decided(make(skip_threshold=0.1, fusion_conf={"num_experts": 2}), 0, 2).eval()
    torch.nn.init.orthogonal_(frontend.fusion.router[3].weight, gain=100.0)
    prompt = torch.randn(64, PROMPT)
    expert = frontend.route(prompt).expert
    rows = [int((expert == index).nonzero()[0]) for index in range(2)]
    num_samples, _, wave = batch(0.5, 0.5)
    frontend(num_samples, prompt[rows], wave)
    assert sorted(calls) == ["fast", "slowest"]


def test_in_training_every_encoder_keeps_its_gradient():
    frontend = decided(make(skip_threshold=0.1), 1, 1, 1).train()
    num_samples, prompt, wave = batch(0.7, 1.3)
    out = frontend(num_samples, prompt, wave)
    assert sorted(calls) == ["fast", "mid", "slowest"]
    (out.embeddings * torch.randn_like(out.embeddings)).sum().backward()
    assert all(parameter.grad is not None for parameter in frontend.parameters())


@pytest.mark.parametrize("fusion", ["average", "concat"])
def test_fusions_of_everything_skip_nothing(fusion):
    frontend = make(fusion, skip_threshold=0.9).eval()
    assert frontend.needed_encoders(frontend.route(torch.randn(2, PROMPT))) == ["fast", "mid", "slow"]


def test_single_runs_and_adapts_one_encoder():
    frontend = make("single", fusion_conf={"encoder": "slow"})
    num_samples, prompt, wave = batch(0.7)
    live = frontend(num_samples, prompt, wave)
    assert calls == ["slowest"]
    assert list(frontend.adapters) == ["slow"]
    cached = frontend(num_samples, prompt, features=make().encode(wave, num_samples))  # those of all encoders
    assert torch.equal(cached.embeddings, live.embeddings)


def test_frozen_encoders_are_in_no_checkpoint_no_optimizer_and_no_train():
    frontend = make().train()
    assert all(key.startswith(("adapters.", "fusion.", "gain")) for key in frontend.state_dict())
    assert {id(p) for p in frontend.parameters()}.isdisjoint(id(p) for p in frontend.encoder("fast").parameters())
    assert not frontend.encoder("fast").training
    other = make(seed=7)
    other.load_state_dict(frontend.state_dict())
    num_samples, prompt, wave = batch(0.7)
    assert torch.equal(frontend(num_samples, prompt, wave).embeddings, other(num_samples, prompt, wave).embeddings)


def test_encoders_follow_to_the_device_but_stay_in_float32():
    frontend = make(specs={"mid": EncoderSpec("mid", 16000, 25.0, 4, 2, (0, 2)).to_dict()})
    assert loads == ["fast", "slowest"]
    frontend.to(torch.bfloat16).to("meta")
    assert frontend.gain.dtype == torch.bfloat16
    for name in ("fast", "mid"):  # loaded before and after the move
        weight = frontend.encoder(name).weight
        assert (weight.device.type, weight.dtype) == ("meta", torch.float32)


def test_encoders_and_router_are_in_float32_under_autocast():
    frontend = make().eval()
    num_samples, prompt, wave = batch(0.7)
    plain_hidden, plain = frontend.encode(wave, num_samples), frontend.route(prompt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, routing = frontend.encode(wave, num_samples), frontend.route(prompt)
        out = frontend(num_samples, prompt, wave)
    assert all(torch.equal(hidden[name][0], plain_hidden[name][0]) for name in hidden)
    assert torch.equal(routing.expert_probs, plain.expert_probs)
    reference = frontend(num_samples, prompt, wave).embeddings
    torch.testing.assert_close(out.embeddings.float(), reference, atol=0.02, rtol=0.05)


def test_with_specs_nothing_is_loaded_until_a_waveform_comes():
    eager = make()
    specs = {name: spec.to_dict() for name, spec in eager.specs.items()}
    num_samples, prompt, wave = batch(0.7)
    features = eager.encode(wave, num_samples)
    loads.clear()
    lazy = make(specs=specs)
    from_cache = lazy(num_samples, prompt, features=features)
    assert loads == []
    from_wave = lazy(num_samples, prompt, wave)
    assert sorted(loads) == ["fast", "mid", "slowest"]
    assert torch.equal(from_cache.embeddings, from_wave.embeddings)


def test_a_spec_that_is_not_the_encoders():
    spec = EncoderSpec("fast", 16000, 50.0, 4, 3, (0, 1, 2))
    assert EncoderSpec.from_dict("fast", spec.to_dict()) == spec
    frontend = make(specs={"fast": {**spec.to_dict(), "layers": [0, 1, 3]}})
    with pytest.raises(ConfigError, match=r"specs\.fast"):
        frontend.encoder("fast")


def test_narrow_layers_come_from_the_encoder():
    Mock.layer_widths = (2, 4, 4)
    try:
        frontend = make("average", encoders={"fast": conf()["fast"]})
    finally:
        del Mock.layer_widths
    assert frontend.specs["fast"].layer_widths == (2, 4, 4)
    assert make("average", encoders={"fast": conf()["fast"]}).specs["fast"].layer_widths == (4, 4, 4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"encoders": {}}, "encoders"),
        ({"encoders": {"a.b": {"type": TYPE, "path": "x"}}}, r"a\.b"),
        ({"encoders": {"keys": {"type": TYPE, "path": "x"}}}, "keys"),
        ({"encoders": {"a": {"path": "x"}}}, "'type'"),
        ({"encoders": {"a": "whisper"}}, "'type'"),
        ({"encoders": {"a": {"type": "nothing", "path": "x"}}}, r"encoders\.a.*nothing"),
        ({"encoders": {"a": {"type": "ge2e", "path": "x"}}}, r"encoders\.a.*ge2e.*6d6c31d"),
        ({"encoders": {"a": {"type": TYPE, "path": "x", "rate": 8000}}}, "'a'.*8000 Hz"),
        ({"frame_rate": 20.0}, "'fast'"),
        ({"frame_rate": 0.0}, "frame_rate"),
        ({"skip_threshold": 1.0}, "skip_threshold"),
        ({"initial_rms": 0.0}, "initial_rms"),
        ({"mask_conf": {"width": 1}}, "mask_conf"),
        ({"adapter_conf": {"width_in": 3}}, "hidden_width"),
        ({"fusion_conf": {"experts": 3}}, "num_experts"),
        ({"specs": {"other": {}}}, "other"),
        ({"specs": {"fast": {"width": 4}}}, "frame_rate"),
        ({"specs": {"fast": EncoderSpec("fast", 16000, 50.0, 4, 3, (0, 1, 2)).to_dict() | {"num_layers": 2}}}, "fast"),
    ],
)
def test_bad_configuration(options, named):
    with pytest.raises(ConfigError, match=named):
        make(**options)


def test_import_is_light():
    import subprocess

    code = (
        "import sys, pam_espnet.frontend.frontend; "
        "print([m for m in ('espnet2.tasks', 'transformers', 'librosa') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("fusion", ["pam", "static", "average", "concat"])
def test_only_one_encoder_is_run_and_has_weight(fusion):
    frontend = make(fusion).eval()
    num_samples, prompt, wave = batch(0.7, 0.4)
    audio = frontend(num_samples, prompt, wave, only=["mid"] * 2)
    assert len(calls) == 1
    assert audio.routing.encoder_weights.tolist() == [[0.0, 1.0, 0.0]] * 2
    hidden = make().encode(wave, num_samples)
    loud = {name: (states * (1.0 if name == "mid" else 5.0), frames) for name, (states, frames) in hidden.items()}
    assert torch.equal(frontend(num_samples, prompt, features=loud, only=["mid"] * 2).embeddings, audio.embeddings)


def test_each_utterance_has_its_only_encoder():
    frontend = make("pam").eval()
    num_samples, prompt, wave = batch(0.7, 0.4)
    both = frontend(num_samples, prompt, wave, only=["mid", "slow"])
    assert len(calls) == 2 and both.routing.encoder_weights.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    for row, name in enumerate(("mid", "slow")):
        alone = frontend(num_samples, prompt, wave, only=[name] * 2)
        torch.testing.assert_close(both.embeddings[row], alone.embeddings[row])


@pytest.mark.parametrize("rms", [0.1, 1.0])
def test_embeddings_start_at_the_given_scale_and_the_gain_is_trained(rms):
    frontend = make("average", initial_rms=rms)
    num_samples, prompt, wave = batch(2.0)
    embeddings = frontend(num_samples, prompt, wave).embeddings
    same_at_one = make("average", initial_rms=1.0)(num_samples, prompt, wave).embeddings
    torch.testing.assert_close(embeddings, rms * same_at_one)
    embeddings.square().sum().backward()
    assert frontend.gain.grad.abs() > 0


def test_masks_act_in_training_only():
    frontend = make(mask_conf={"span": 0.3, "every": 0.5, "dropout": 0.3})
    num_samples, prompt, wave = batch(0.9)
    twice = [frontend.eval()(num_samples, prompt, wave).embeddings for _ in range(2)]
    assert torch.equal(*twice)
    twice = [frontend.train()(num_samples, prompt, wave).embeddings for _ in range(2)]
    assert not torch.equal(*twice)
