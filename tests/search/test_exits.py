"""Early exit inside beam search: which rows exit where, what skipped blocks store, and what must not change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_search import EOS, LENGTHS, make_prefix, search
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.engine.calibration import Calibration
from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.engine.exits import ExitOptions, ExitPolicy
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM
from pam_espnet.search.hypothesis import BeamOptions

ROWS = list(range(len(LENGTHS)))
BLOCKS = 4
# thresholds between the surest and the least sure token of the random LLM, so that tokens exit at every block
SOME = [
    ExitOptions("fixed", (2,)),
    ExitOptions("confidence", (1, 2, 3), threshold=0.14),
    ExitOptions("entropy", (1, 2, 3), threshold=0.26),
    ExitOptions("patience", (1, 2, 3), patience=2),
]


@pytest.fixture(scope="module", params=["off", "on"], ids=["eager", "static"])
def engine(request: pytest.FixtureRequest, tiny_llm_dir: Path) -> Engine:
    """The tiny LLM with four blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_llm_dir)
    config.num_hidden_layers = BLOCKS
    config.initializer_range = 0.3  # blocks that change something, tokens that are sure of themselves
    torch.manual_seed(4)
    lm = AutoModelForCausalLM.from_config(config).float().eval()
    return make_engine(LLM(lm, AutoTokenizer.from_pretrained(tiny_llm_dir)).eval(), graphs=request.param)


@pytest.fixture(scope="module")
def prefix() -> Tensor:
    return make_prefix()


def test_never_exiting_is_the_plain_search_bit_for_bit(engine: Engine, prefix: Tensor) -> None:
    options = BeamOptions(beam_size=3, nbest=3, max_new_tokens=8, eos_ids=EOS)
    plain = search(engine, prefix, ROWS, options)
    asked = ExitOptions("confidence", (1, 2, 3), threshold=1.0)  # which this random LLM never reaches
    never = search(engine.with_exits(asked), prefix, ROWS, options)
    assert never == plain  # tokens, scores and log-probabilities
    assert {depth for nbest in plain for one in nbest for depth in one.depths} == {BLOCKS}


def reference(engine: Engine, prefix: Tensor, depths: Sequence[int]) -> tuple[list[int], list[float]]:
    """Greedy decoding of one prefix (P,D) with transformers' modules: prefix at full depth, then ``depths`` blocks per
    token; the keys and values of the others come from the hidden state of the last one that was run."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    transformer = engine.llm.transformer
    memory: list[tuple[Tensor, Tensor]] = []

    def heads(layer: Any, name: str, x: Tensor) -> Tensor:
        return getattr(layer.self_attn, name)(layer.input_layernorm(x)).unflatten(-1, (-1, layer.self_attn.head_dim))

    def run(x: Tensor, start: int, depth: int) -> Tensor:
        positions = torch.arange(start, start + x.shape[1])[None]
        cos, sin = transformer.rotary_emb(x, positions)
        for index, layer in enumerate(transformer.layers):
            query, key, value = (heads(layer, name, x).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            if start == 0:
                memory.append((key, value))
            else:
                memory[index] = tuple(torch.cat(pair, 2) for pair in zip(memory[index], (key, value), strict=True))
            if index >= depth:
                continue
            keys, values = (m.repeat_interleave(query.shape[1] // m.shape[1], 1) for m in memory[index])
            mask = torch.ones(x.shape[1], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - x.shape[1])
            found = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            x = x + layer.self_attn.o_proj(found.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x[0, -1]

    with torch.no_grad():
        hidden, tokens, scores = run(prefix[None], 0, BLOCKS), [], []
        for step in range(len(depths) + 1):
            log_probs = engine.llm.exit_logits(hidden).log_softmax(-1)
            tokens.append(int(log_probs.argmax()))
            scores.append(float(log_probs.max()))
            if step < len(depths):
                hidden = run(engine.llm.embed(torch.tensor([[tokens[-1]]])), len(prefix) + step, depths[step])
    return tokens, scores


class Planned(ExitPolicy):
    """Exits at planned depths, step by step."""

    def plan(self, depths: Sequence[int]) -> None:
        self.depths = [0, *depths]

    def begin(self, utterances: int, device: torch.device) -> None:
        del self.depths[0]

    def decide(self, layer: int, utterances: Tensor, hidden: Tensor) -> Tensor:
        return torch.full((len(utterances),), layer == self.depths[0])


@pytest.mark.parametrize("depths", [[1] * 6, [1, 4, 2, 2, 3, 4, 1, 4], [3, 1, 4, 1, 2, 4]])
def test_skipped_blocks_store_keys_of_the_exited_state(engine: Engine, prefix: Tensor, depths: list[int]) -> None:
    planned: Any = engine.with_exits(ExitOptions("confidence", (1, 2, 3)))
    policy = planned.exits = Planned(ExitOptions("confidence", (1, 2, 3)), BLOCKS, planned.norm, planned.logits)
    policy.plan(depths)
    options = BeamOptions(beam_size=1, max_new_tokens=len(depths) + 1, eos_ids=())
    for row, ((found,),) in enumerate(zip(search(planned, prefix, ROWS, options), strict=True)):
        tokens, scores = reference(engine, prefix[row, : LENGTHS[row]], depths)
        assert found.tokens == tokens
        assert found.log_probs == pytest.approx(scores, abs=1e-4)
        assert found.depths == [BLOCKS, *depths]  # the first token comes from the prefix


@pytest.fixture(scope="module")
def calibration(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random gates that open now and then, random maps."""
    torch.manual_seed(7)
    width, layers = engine.llm.width, (1, 2, 3)
    maps = torch.eye(width + 1, width) + 0.02 * torch.randn(3, width + 1, width)
    gates = 0.4 * torch.randn(3, width + 1)
    path = tmp_path_factory.mktemp("exit") / "exit.safetensors"
    Calibration(layers, maps, gates, 0.6).save(path, {})
    return path


def everyone(calibration: Path) -> list[ExitOptions]:
    """Every mode, with and without maps."""
    file = str(calibration)
    return [*SOME, ExitOptions("gate", calibration=file), ExitOptions("confidence", (1, 2, 3), 0.14, calibration=file)]


@pytest.mark.parametrize("kind", range(len(SOME) + 2))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from([1, 8, 32]), st.sampled_from([1, 4]))
def test_batch_does_not_change_nbest(
    engine: Engine,
    prefix: Tensor,
    calibration: Path,
    kind: int,
    data: st.DataObject,
    size: int,
    beam_size: int,
) -> None:
    """Any utterances, any number of them, in any order, repeated too: the same n-best from the same blocks as alone."""
    rows = data.draw(st.lists(st.integers(0, len(LENGTHS) - 1), min_size=size, max_size=size))
    early = engine.with_exits(everyone(calibration)[kind])
    options = BeamOptions(beam_size=beam_size, nbest=beam_size, max_new_tokens=8, eos_ids=EOS)
    alone = {row: search(early, prefix, [row], options)[0] for row in set(rows)}
    for row, nbest in zip(rows, search(early, prefix, rows, options), strict=True):
        assert [(one.tokens, one.depths) for one in nbest] == [(one.tokens, one.depths) for one in alone[row]]
        assert [one.score for one in nbest] == pytest.approx([one.score for one in alone[row]], abs=1e-5)


def test_exited_rows_cost_nothing_more(engine: Engine, prefix: Tensor, rows_run: list[list[int]]) -> None:
    """Rows run through each block are those that the depths name, wherever they exit."""
    engine = make_engine(engine.llm, graphs="off")  # graphs run all rows until the last has exited
    for exits in SOME:
        rows_run.clear()
        found = search(engine.with_exits(exits), prefix, ROWS, BeamOptions(beam_size=3, max_new_tokens=9, eos_ids=()))
        depths = [depth for nbest in found for depth in nbest[0].depths[1:]]  # three hypotheses at each of them
        expected = [sum(LENGTHS) + 3 * sum(depth > block for depth in depths) for block in range(BLOCKS)]
        expected[-1] += len(ROWS) - sum(LENGTHS)  # of a prefix only its last position
        run = list(map(sum, rows_run))
        assert run == expected and run[-1] < run[0]


@pytest.mark.parametrize("kind", range(1, len(SOME) + 2))
def test_tokens_exit_at_several_depths(engine: Engine, prefix: Tensor, calibration: Path, kind: int) -> None:
    exits = everyone(calibration)[kind]
    early = engine.with_exits(exits)
    found = search(early, prefix, ROWS, BeamOptions(beam_size=1, max_new_tokens=12, eos_ids=()))
    depths = [depth for (one,) in found for depth in one.depths[1:]]
    assert len(set(depths)) >= 3 and set(depths) <= {1, 2, 3, BLOCKS}
    assert exits.mode != "patience" or min(depths) == 2  # two candidates must have agreed


def test_hypotheses_of_a_step_are_scored_at_one_depth(engine: Engine, prefix: Tensor) -> None:
    early = engine.with_exits(SOME[1])
    nbests = search(early, prefix, ROWS, BeamOptions(beam_size=4, nbest=4, max_new_tokens=9, eos_ids=()))
    for nbest in nbests:
        assert len({tuple(one.depths) for one in nbest}) == 1
    assert len({depth for nbest in nbests for depth in nbest[0].depths}) > 2


def test_measures() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]])
    for mode in ("confidence", "entropy"):
        policy = ExitPolicy(ExitOptions(mode, (1,), threshold=0.9), 2, lambda hidden: hidden, lambda normed: normed)
        policy.begin(2, torch.device("cpu"))
        assert policy.decide(1, torch.tensor([0, 1]), logits).tolist() == [True, False]
    policy = ExitPolicy(ExitOptions("patience", (1, 2, 3), patience=2), 4, lambda hidden: hidden, lambda normed: normed)
    policy.begin(3, torch.device("cpu"))
    assert policy.decide(1, torch.tensor([0, 2]), logits).tolist() == [False, False]
    assert policy.decide(1, torch.tensor([0, 2]), logits.flip(1)).tolist() == [False, False]
    assert policy.decide(1, torch.tensor([2]), logits[1:].flip(1)).tolist() == [True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "oracle"}, "mode"),
        ({"mode": "fixed"}, "layers"),
        ({"mode": "fixed", "layers": (0,)}, "count from 1"),
        ({"mode": "confidence", "layers": (1,), "threshold": 1.5}, "threshold"),
        ({"mode": "patience", "layers": (1, 2), "patience": 3}, "patience"),
        ({"mode": "fixed", "layers": (BLOCKS,)}, "last block"),
        ({"mode": "fixed", "layers": 3}, "list of blocks"),
        ({"mode": "gate"}, "needs calibration"),
        ({"mode": "fixed", "layers": (1,), "threshold": 0.5}, "fixed has none"),
        ({"mode": "patience", "layers": (1, 2), "patience": 2.0}, "patience"),
    ],
)
def test_bad_options(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.with_exits(ExitOptions(**options))


def test_one_engine_does_not_change_another(engine: Engine, prefix: Tensor) -> None:
    options = BeamOptions(beam_size=2, nbest=2, max_new_tokens=6, eos_ids=())
    plain = engine
    before = search(plain, prefix, ROWS, options)
    early = search(engine.with_exits(SOME[0]), prefix, ROWS, options)
    assert search(plain, prefix, ROWS, options) == before != early


def test_transformers_cannot_exit(tiny_llm_dir: Path) -> None:
    llm = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32", fused_decoding=False)
    with pytest.raises(ConfigError, match="fused_decoding"):
        make_engine(llm, exits=ExitOptions("fixed", (1,)))
