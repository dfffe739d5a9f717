"""Routing, PaM's gradients and the control fusions."""

import pytest
import torch

from pam_espnet.errors import ConfigError
from pam_espnet.frontend.fusion.registry import FUSIONS, build_fusion
from pam_espnet.frontend.fusion.routing import Routing, keep_encoder, router_loss, skip_encoders

NAMES = ("ear", "nose", "eye")
LAYERS = (2, 3, 1)
WIDTH, PROMPT = 6, 10


def make(kind: str, **options):
    torch.manual_seed(1)
    if kind == "single":
        options.setdefault("encoder", "nose")
    return build_fusion(kind, num_layers=LAYERS, width=WIDTH, prompt_width=PROMPT, names=NAMES, **options)


def make_pam(**options):
    """PaM whose experts' networks do something and whose router is decided enough to choose different experts."""
    fusion = make("pam", **{"init_std": 1.0, **options})
    with torch.no_grad():
        fusion.experts.out_weight.normal_()
        for parameter in fusion.router[3].parameters():
            parameter.mul_(20.0)
    return fusion


def streams(batch: int = 4, frames: int = 5):
    torch.manual_seed(2)
    return [torch.randn(batch, frames, WIDTH) for _ in NAMES]


def prompts(batch: int = 4):
    torch.manual_seed(3)
    return torch.randn(batch, PROMPT)


def one_expert(fusion, index: int, x: torch.Tensor) -> torch.Tensor:
    """An expert by hand: its layer weights, then its residual network."""
    weights = fusion.layer_logits[index].softmax(0).split(LAYERS)
    mixed = sum(w.sum() * stream for w, stream in zip(weights, x, strict=True))
    experts = fusion.experts
    normed = torch.nn.functional.layer_norm(mixed, (WIDTH,), eps=experts.norm_eps)
    inner = torch.nn.functional.gelu(normed @ experts.in_weight[index] + experts.in_bias[index])
    return mixed + inner @ experts.out_weight[index] + experts.out_bias[index]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", sorted(FUSIONS))
def test_shapes_and_weights_that_sum_to_one(kind, training):
    fusion = make(kind).train(training)
    routing = fusion.route(prompts())
    assert [tuple(w.shape) for w in routing.layer_weights] == [(4, count) for count in LAYERS]
    torch.testing.assert_close(routing.encoder_weights.sum(1), torch.ones(4))
    torch.testing.assert_close(routing.expert_probs.sum(1), torch.ones(4))
    assert routing.gate.shape == routing.expert_probs.shape
    assert routing.expert.tolist() == routing.expert_probs.argmax(1).tolist()
    assert fusion(streams(), routing).shape == (4, 5, WIDTH)


@pytest.mark.parametrize("kind", ["average", "concat", "static"])
def test_controls_start_as_the_plain_mean_whatever_the_layer_counts(kind):
    fusion = make(kind)
    routing = fusion.route(prompts())
    torch.testing.assert_close(routing.encoder_weights, torch.full((4, 3), 1 / 3))
    torch.testing.assert_close(fusion(streams(), routing), torch.stack(streams()).mean(0))


def test_pam_starts_as_the_plain_weighted_mix_near_the_mean():
    fusion = make("pam", gradient="straight_through")
    routing = fusion.route(prompts())
    assert (routing.encoder_weights - 1 / 3).abs().max() < 0.1
    assert not torch.equal(fusion.layer_logits[0], fusion.layer_logits[1])
    mix = sum(w[:, None, None] * s for w, s in zip(routing.encoder_weights.T, streams(), strict=True))
    torch.testing.assert_close(fusion(streams(), routing), mix)


@pytest.mark.parametrize("gradient", ["scaled", "straight_through"])
@pytest.mark.parametrize("training", [True, False])
def test_pam_forward_equals_its_definition(gradient, training):
    fusion = make_pam(gradient=gradient).train(training)
    x, routing = streams(), fusion.route(prompts())
    assert routing.expert.unique().numel() > 1
    out = fusion(x, routing)
    by_expert = torch.stack([one_expert(fusion, index, x) for index in range(3)], dim=1)  # (B,E,U,D)
    rows = torch.arange(4)
    expected = by_expert[rows, routing.expert]
    if gradient == "scaled":  # at inference as well
        expected = routing.expert_probs[rows, routing.expert][:, None, None] * expected
    torch.testing.assert_close(out, expected)


def test_straight_through_is_bitwise_top_1_in_training():
    fusion = make_pam(gradient="straight_through")
    in_training = fusion.train().route(prompts())
    in_use = fusion.eval().route(prompts())
    assert torch.equal(in_training.gate, in_use.gate)
    for a, b in zip(in_training.layer_weights, in_use.layer_weights, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", ["scaled", "straight_through"])
def test_gradient_reaches_router_and_experts(gradient):
    fusion = make_pam(gradient=gradient).train()
    torch.manual_seed(4)
    out = fusion(streams(), fusion.route(prompts()))
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_no_gradient_to_the_router_at_inference():
    fusion = make_pam(gradient="straight_through").eval()
    routing = fusion.route(prompts())
    assert not routing.gate.requires_grad
    fusion(streams(), routing).sum().backward()
    assert all(parameter.grad is None for parameter in fusion.router.parameters())


@pytest.mark.parametrize("gradient", ["scaled", "straight_through"])
def test_a_router_that_is_held_changes_nothing_but_its_own_gradient(gradient):
    found = []
    for held in (False, True):
        fusion = make_pam(gradient=gradient).train()
        fusion.router_held = held
        routing = fusion.route(prompts())
        assert (routing.chosen is None) == (gradient == "straight_through" and not held)  # else experts run alone
        out = fusion(streams(), routing)
        torch.manual_seed(4)
        (out * torch.randn_like(out)).sum().backward()
        of_router = [parameter.grad for parameter in fusion.router.parameters()]
        assert all((grad is None) == held for grad in of_router)
        found.append((out, fusion.layer_logits.grad, *(parameter.grad for parameter in fusion.experts.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_an_expert_that_nobody_chose_gets_a_gradient_of_zeros():
    fusion = make_pam(gradient="scaled").train()
    routing = fusion.route(prompts(1))
    fusion(streams(1), routing).sum().backward()
    others = [index for index in range(3) if index != routing.expert.item()]
    for parameter in fusion.experts.parameters():
        assert parameter.grad is not None and parameter.grad[others].eq(0).all()
    assert fusion.layer_logits.grad[others].eq(0).all()


def test_router_ignores_the_scale_of_the_prompt_vector():
    fusion = make_pam()
    a, b = fusion.route(prompts()), fusion.route(1000 * prompts() + 5)
    torch.testing.assert_close(a.expert_probs, b.expert_probs, atol=1e-3, rtol=0)


def test_noise_only_in_training():
    fusion = make_pam(noise=1.0)
    prompt = prompts()
    quiet = [fusion.eval().route(prompt).expert_logits for _ in range(2)]
    loud = [fusion.train().route(prompt).expert_logits for _ in range(2)]
    assert torch.equal(*quiet)
    assert not torch.equal(*loud)


def test_experts_as_layer_weights_alone():
    fusion = make("pam", expert_hidden=0, gradient="straight_through").eval()
    assert not list(fusion.experts.parameters())
    routing = fusion.route(prompts())
    mix = sum(w[:, None, None] * s for w, s in zip(routing.encoder_weights.T, streams(), strict=True))
    torch.testing.assert_close(fusion(streams(), routing), mix)


@pytest.mark.parametrize("kind", ["single", "average", "concat", "static"])
def test_controls_do_not_read_the_prompt(kind):
    fusion = make(kind)
    a, b = fusion.route(prompts()), fusion.route(-prompts() + 3)
    assert a.expert_logits is None
    assert torch.equal(a.encoder_weights, b.encoder_weights)
    assert torch.equal(fusion(streams(), a), fusion(streams(), b))


def test_average_does_not_depend_on_the_order_of_encoders():
    fusion = make("average")
    routing = fusion.route(prompts())
    torch.testing.assert_close(fusion(streams(), routing), fusion(streams()[::-1], routing))


def test_concat_uses_every_stream():
    fusion = make("concat")
    x = [stream.requires_grad_() for stream in streams()]
    fusion(x, fusion.route(prompts())).sum().backward()
    assert all(stream.grad.abs().sum() > 0 for stream in x)
    routing = fusion.route(prompts())
    silent = [torch.zeros_like(x[0]), *x[1:]]
    assert torch.equal(fusion([None, *x[1:]], routing), fusion(silent, routing))


def test_single_returns_its_encoder_and_needs_no_other():
    fusion = make("single", encoder="nose")
    routing = fusion.route(prompts())
    assert fusion.used == ("nose",)
    assert routing.encoder_weights[0].tolist() == pytest.approx([0, 1, 0])
    x = streams()
    assert torch.equal(fusion([None, x[1], None], routing), x[1])


def test_keeping_one_encoder_gives_it_all_weight_and_its_layers_their_shares():
    routing = keep_encoder(routing_of([[0.5, 0.3, 0.2], [0.1, 0.0, 0.9]]), [2, 0])
    assert routing.encoder_weights.flatten().tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    assert routing.layer_weights[2][0].tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("kind", ["pam", "static"])
def test_weights_that_are_set_leave_layers_their_shares(kind):
    fusion = make(kind).eval()
    before, last = fusion.route(prompts()), fusion.mixture_parameters()[0].view(-1, sum(LAYERS)).shape[0] - 1
    for expert in range(last + 1):
        fusion.set_encoder_weights(expert, torch.tensor([0.7, 0.1, 0.2]))
    after = fusion.route(prompts())
    torch.testing.assert_close(after.encoder_weights, torch.tensor([[0.7, 0.1, 0.2]]).expand(4, -1))
    for old, new in zip(before.layer_weights, after.layer_weights, strict=True):
        torch.testing.assert_close(new / new.sum(1, keepdim=True), old / old.sum(1, keepdim=True))


def routing_of(weights) -> Routing:
    """A routing with encoder weights (B,3), each encoder's weight in two unequal layers."""
    layers = [torch.outer(column, torch.tensor([0.25, 0.75])) for column in torch.tensor(weights).T]
    ones = torch.ones(len(weights), 1)
    return Routing(None, ones, torch.zeros(len(weights), dtype=torch.long), ones, layers)


def test_skipping_renormalises_utterance_by_utterance():
    routing = skip_encoders(routing_of([[0.6, 0.3, 0.1], [0.05, 0.45, 0.5], [0.2, 0.3, 0.5]]), 0.2)
    expected = torch.tensor([[2 / 3, 1 / 3, 0], [0, 0.45 / 0.95, 0.5 / 0.95], [0.2, 0.3, 0.5]])
    torch.testing.assert_close(routing.encoder_weights, expected)
    torch.testing.assert_close(routing.layer_weights[0], torch.outer(expected[:, 0], torch.tensor([0.25, 0.75])))


def test_the_heaviest_encoder_is_never_skipped():
    routing = skip_encoders(routing_of([[0.3, 0.4, 0.3]]), 0.9)
    torch.testing.assert_close(routing.encoder_weights, torch.tensor([[0.0, 1.0, 0.0]]))


def test_router_loss_is_cross_entropy_modulo_experts():
    fusion = make_pam()
    routing = fusion.route(prompts())
    loss = router_loss(routing, torch.tensor([0, 1, 2, 4]))
    log_probs = routing.expert_probs.log()
    expected = -torch.stack([log_probs[0, 0], log_probs[1, 1], log_probs[2, 2], log_probs[3, 1]]).mean()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    loss.backward()
    assert fusion.router[1].weight.grad.abs().sum() > 0
    assert router_loss(make("average").route(prompts()), torch.tensor([0, 1, 2, 4])).item() == 0


def test_router_loss_teaches_one_expert_per_task():
    fusion = make("pam")
    optimizer = torch.optim.Adam(fusion.router.parameters(), lr=1e-2)
    for _ in range(100):
        loss = router_loss(fusion.route(prompts(3)), torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert fusion.route(prompts(3)).expert.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("pan", {}, "pam"),
        ("average", {"num_experts": 3}, "num_experts"),
        ("pam", {"num_expert": 3}, "num_experts"),
        ("pam", {"gradient": "hard"}, "straight_through"),
        ("pam", {"num_experts": 0}, "num_experts"),
        ("pam", {"router_hidden": 0}, "router_hidden"),
        ("pam", {"gradient": "soft"}, "6d6c31d"),
        ("pam", {"temperature": 0.5}, r"temperature.*6d6c31d"),
        ("pam", {"noise": -1.0}, "noise"),
        ("pam", {"expert_hidden": -1}, "expert_hidden"),
        ("single", {"encoder": "mouth"}, "ear, nose, eye"),
        ("single", {"encoder": None}, "ear, nose, eye"),
    ],
)
def test_bad_configuration_names_what_would_do(kind, options, named):
    with pytest.raises(ConfigError, match=named):
        make(kind, **options)


def test_the_removed_temperature_is_accepted_where_it_changed_nothing():
    assert torch.equal(make("pam", temperature=1.0).layer_logits, make("pam").layer_logits)


def test_experts_picked_in_any_order_equal_all_of_them_gated():
    torch.manual_seed(6)
    experts = make_pam().experts
    x, expert = streams()[0], torch.tensor([2, 0, 2, 1])
    gate = torch.nn.functional.one_hot(expert, 3) * torch.rand(4, 3)
    torch.testing.assert_close(experts(x, gate, expert.tolist()), experts(x, gate))
