"""How often the search waits for the device: once per step, once per prefix, once per candidate block of early exit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_search import LENGTHS, make_prefix
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pam_espnet import transfer
from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.llm.llm import LLM
from pam_espnet.search.answer_scores import answer_log_probs
from pam_espnet.search.beam import beam_search
from pam_espnet.search.constraints import AnswerSet, NoRepeatNgram
from pam_espnet.search.drafts import WholeAnswer, draft_search
from pam_espnet.search.hypothesis import BeamOptions

READS = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")
SIZES_FROM_VALUES = ("nonzero", "unique", "bincount", "masked_select", "equal", "_local_scalar_dense")


class Waits(TorchDispatchMode):
    """Operators whose result's size or value the host needs."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        sizes = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        masks = name.startswith("index") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool
            for one in (args[1] if isinstance(args[1], (list, tuple)) else [])
        )
        if sizes or masks or name.startswith(SIZES_FROM_VALUES):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Transfers(TorchFunctionMode):
    """What crosses between host and device, on a CPU that plays both: what ``Tensor.cpu`` returned is on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.uploads = 0
        self.host: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        here = args and isinstance(args[0], Tensor) and args[0].untyped_storage().data_ptr() in {
            one.untyped_storage().data_ptr() for one in self.host
        }  # fmt: skip
        if name == "cpu":
            self.waits.append(name)
            self.host.append(func(*args, **kwargs).clone())
            return self.host[-1]
        if name in READS and not here:
            self.waits.append(name)
        if name == "to" and any(isinstance(one, torch.device) for one in args):
            self.uploads += 1
        listed = name in ("__getitem__", "__setitem__") and any(
            isinstance(one, list) for one in (args[1] if isinstance(args[1], tuple) else args[1:2])
        )
        if listed or (name in ("tensor", "as_tensor") and "device" in kwargs):  # from memory that is not pinned
            self.waits.append(name)
        return func(*args, **kwargs)


def count(run: Callable[[], Any]) -> tuple[int, int]:
    """How often the host waits for the device in ``run()``, and how often it sends something there."""
    with Transfers() as transfers, Waits(transfers.waits):
        run()
    return len(transfers.waits), transfers.uploads


@pytest.fixture(autouse=True)
def a_device_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is treated as a device with memory of its own."""
    monkeypatch.setattr(transfer, "HOST", ())
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)


@pytest.fixture(scope="module")
def engine(tiny_llm_dir: Path) -> Engine:
    return make_engine(LLM.from_pretrained(str(tiny_llm_dir), dtype="float32").eval())


PREFIX, PREFIX_LENGTHS = make_prefix()[:3], torch.tensor(LENGTHS[:3])


def test_what_counts() -> None:
    one = torch.arange(3)
    for run in (
        lambda: one.tolist(), lambda: int(one[0]), lambda: one[one > 1], lambda: torch.equal(one, one),
        lambda: one.unique_consecutive(), lambda: bool(one.any()), lambda: one.repeat_interleave(one),
        lambda: one.cpu().tolist(), lambda: torch.tensor([1], device="cpu"), lambda: one[[1, 2]],
        lambda: one.masked_select(one > 1), lambda: one.bincount().sum(),
    ):  # fmt: skip
        assert count(run)[0] >= 1
    assert count(lambda: one[torch.tensor([1])] + one[1:2]) == (0, 0)


def test_one_transfer_brings_what_several_would() -> None:
    values = torch.tensor([[0.1, -torch.inf], [3.0, -0.0]])
    tensors = values.t(), torch.tensor([[2**31 - 1, 0, 7]])[:, ::2], torch.zeros(0, dtype=torch.long), torch.tensor(5)
    assert transfer.download(*tensors) == [one.tolist() for one in tensors]


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_step_waits_once(engine: Engine, beam_size: int) -> None:
    """Beside that the prefix does once, for the lengths; sent are tokens, the tree's indices and its mask."""
    steps = 6
    options = BeamOptions(beam_size=beam_size, max_new_tokens=steps, min_new_tokens=steps)
    assert count(lambda: beam_search(engine, PREFIX, PREFIX_LENGTHS, options)) == (1 + steps, 1 + 3 * (steps - 1))
    constraints = [NoRepeatNgram(1), AnswerSet([list(range(9, 20))], engine.eos_ids, [1])]
    waits, uploads = count(lambda: beam_search(engine, PREFIX, PREFIX_LENGTHS, options, constraints=constraints))
    assert (waits, uploads) == (1 + steps, 1 + 3 * (steps - 1) + steps)  # all rules of a step at once


def test_finished_utterances_cost_one_transfer(engine: Engine) -> None:
    options = BeamOptions(beam_size=4, max_new_tokens=6, eos_ids=())
    assert count(lambda: beam_search(engine, PREFIX, PREFIX_LENGTHS, options, [6, 3, 6])) == (1 + 6, 1 + 3 * 5 + 1)


def test_a_candidate_block_waits_once(engine: Engine) -> None:
    early = engine.with_exits(ExitOptions("confidence", (1,), threshold=0.06))
    options = BeamOptions(beam_size=4, max_new_tokens=6, eos_ids=())
    depths = {depth for (one,) in beam_search(early, PREFIX, PREFIX_LENGTHS, options) for depth in one.depths[1:]}
    assert depths == {1, 2}
    assert count(lambda: beam_search(early, PREFIX, PREFIX_LENGTHS, options))[0] == 1 + 6 + 5


def test_drafts_and_answer_sets(engine: Engine) -> None:
    options = BeamOptions(beam_size=1, max_new_tokens=6, eos_ids=())
    drafts = [None, WholeAnswer([1, 2, 3]), WholeAnswer([4])]
    passes = 6  # the first utterance has no draft
    waits, _ = count(lambda: draft_search(engine, PREFIX, PREFIX_LENGTHS, options, drafts, 8))
    assert waits == 1 + passes
    waits, _ = count(lambda: answer_log_probs(engine, PREFIX, PREFIX_LENGTHS, [[1], [2, 3, 4]]))
    assert waits == 1
