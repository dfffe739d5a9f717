"""Maps, gates and their judge on states whose answer is known."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pam_espnet.early_exit.fitting import CostModel, Judgement, fit_gate, fit_map, judge
from pam_espnet.engine.calibration import Calibration
from pam_espnet.errors import CheckpointError

WIDTH, TOKENS, VOCAB = 16, 3000, 40


def world(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Last states (N,D) of a made-up LLM, its output layer (V,D), and a rotation (D,D)."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCAB, WIDTH, generator=generator)
    table[:, 0] = 0.0  # does not depend on the token
    last = table[torch.randint(0, VOCAB, (TOKENS,), generator=generator)]
    last = last + 0.3 * torch.randn(TOKENS, WIDTH, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    return last, table, rotation


def norm(hidden: Tensor) -> Tensor:
    return hidden / hidden.square().mean(-1, keepdim=True).sqrt()


def test_a_map_undoes_a_rotation_and_a_heavy_ridge_leaves_things_alone() -> None:
    last, _, rotation = world()
    hidden = last @ rotation + 0.7
    matrix = fit_map(hidden[:2000], last[:2000], 1e-6)
    mapped = hidden[2000:] @ matrix[:-1] + matrix[-1]
    assert torch.allclose(mapped, last[2000:], atol=1e-3)
    heavy = fit_map(hidden, last, 1e6)
    assert torch.allclose(heavy[:-1], torch.eye(WIDTH), atol=1e-3)


def test_a_gate_learns_where_a_block_is_right() -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(TOKENS, WIDTH, generator=generator)
    right = states[:, 3] - 0.5 * states[:, 5] > 0.2
    gate = fit_gate(states[:2000], right[:2000])
    found = (states[2000:] @ gate[:-1] + gate[-1]) > 0
    assert (found == right[2000:]).float().mean() > 0.95


def calibrated(shuffled: bool) -> tuple[Calibration, Judgement]:
    """Block 2 of 4 is a rotation of the last one, and half of the time noise, which has a value of its own."""
    last, table, rotation = world()
    generator = torch.Generator().manual_seed(2)
    hidden = last @ rotation
    noise = torch.rand(TOKENS, generator=generator) < 0.5
    nonsense = torch.randn(int(noise.sum()), WIDTH, generator=generator)
    nonsense[:, 0] = 4.0
    hidden[noise] = nonsense @ rotation
    if shuffled:
        hidden = hidden[torch.randperm(TOKENS, generator=generator)]
    matrix = fit_map(hidden[:1500], last[:1500], 0.01)
    mapped = norm(hidden[:1500] @ matrix[:-1] + matrix[-1])
    tokens = (norm(last) @ table.T).argmax(-1)
    gate = fit_gate(norm(hidden[:1500]), (mapped @ table.T).argmax(-1) == tokens[:1500])
    calibration = Calibration((2,), matrix[None], gate[None], None)
    cost = CostModel(4, head=1.0, memory=0.05)
    verdict = judge(calibration, [hidden[1500:]], tokens[1500:], norm, lambda x: x @ table.T, cost, 0.9)
    return calibration, verdict


def test_what_is_worth_it_is_found_and_shuffled_data_turn_it_off() -> None:
    _, verdict = calibrated(shuffled=False)
    assert verdict.worth_it and verdict.precision >= 0.9 and 0.1 < verdict.coverage < 0.6
    assert verdict.mean_depth == pytest.approx(4 - 2 * verdict.coverage, abs=1e-4)
    _, verdict = calibrated(shuffled=True)
    assert not verdict.worth_it


def test_the_cost_model_counts_skipped_memory_and_the_output_layer() -> None:
    cost = CostModel(4, head=2.0, memory=0.1)
    assert cost.speedup(torch.tensor([4, 4])) == pytest.approx(1.0)
    assert cost.speedup(torch.tensor([2, 4])) == pytest.approx(6 / ((2 + 0.2 + 2 + 6) / 2))


def test_saved_and_read_again(tmp_path: Path) -> None:
    calibration, verdict = calibrated(shuffled=False)
    calibration.save(tmp_path / "exit.safetensors", asdict(verdict))
    again = Calibration.load(tmp_path / "exit.safetensors", WIDTH)
    assert again.layers == (2,) and again.threshold == calibration.threshold
    assert again.maps is not None and calibration.maps is not None and torch.equal(again.maps, calibration.maps)
    states = torch.randn(5, WIDTH)
    assert torch.equal(again.probability(2, states), calibration.probability(2, states))
    with pytest.raises(CheckpointError, match="width 16"):
        Calibration.load(tmp_path / "exit.safetensors", 32)
    (tmp_path / "cut").write_bytes(b"no")
    for name in ("missing", "cut"):
        with pytest.raises(CheckpointError, match="pam_calibrate_exit"):
            Calibration.load(tmp_path / name, WIDTH)
