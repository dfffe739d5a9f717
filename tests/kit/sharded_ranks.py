"""One of two processes of torch.distributed.run: an LLM under DDP, whole and with sharded blocks.

Arguments: folder of an LLM, folder for results: rank<R>.pt, a list of two mappings, whole and sharded.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pam_espnet.llm.llm import LLM, TokenLosses
from pam_espnet.llm.prompt_layout import Inputs, answer_ids, build_inputs, lay_out, layout


class Model(nn.Module):
    """What DDP wraps."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, inputs: Inputs) -> TokenLosses:
        return self.llm.token_losses(inputs, exit_layer=1)


def inputs_of(llm: LLM, audio: Tensor, answers: list[str]) -> Inputs:
    part = layout(llm.tokenizer, "Describe the sounds.")
    ids = [answer_ids(llm.tokenizer, answer) for answer in answers]
    return build_inputs(lay_out([part] * len(ids), [audio.size(1)] * len(ids), ids), audio, llm.embed)


def trained(path: str, rank: int, shard: str | None, checkpointing: int) -> dict[str, Any]:
    """Three steps of LoRA, other data on every rank, and what the processes hold."""
    torch.manual_seed(0)
    lora = {"r": 2, "alpha": 4, "dropout": 0.1}
    llm = LLM.from_pretrained(path, lora, "float32", shard=shard, gradient_checkpointing=checkpointing)
    llm.train().to(device="cpu", dtype=torch.float32)  # as ESPnet does
    model = Model(llm)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    ignore = [*frozen, *(name for name, _ in model.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignore)
    shared = DistributedDataParallel(model)
    lora_of = {name: p for name, p in llm.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(lora_of.values(), lr=0.5)
    torch.manual_seed(rank)
    result: dict[str, Any] = {"vectors": llm.prompt_vectors(["Hi", "Count."] if rank else ["Who?"]), "steps": []}
    for step in range(3):
        audio = torch.randn(2, 5 + rank, llm.width, requires_grad=True)
        losses = shared(inputs_of(llm, audio, ["a dog", "2", "yes", "no"][step : step + 2]))
        (losses.nll.mean() + losses.exit_nll.mean()).backward()
        gradients = {name: p.grad.clone() for name, p in lora_of.items()}
        result["steps"].append({"loss": losses.nll.detach(), "audio": audio.grad, **gradients})
        optimizer.step()
        optimizer.zero_grad()
    shared.eval()
    with torch.no_grad():
        result["valid"] = shared(inputs_of(llm, torch.ones(1, 4, llm.width), ["no"])).nll
    result["state"] = {name: p.detach() for name, p in lora_of.items()}
    blocks = [p for p in llm.transformer.layers.parameters() if not p.requires_grad]
    result["held"] = sum(p.to_local().numel() if shard else p.numel() for p in blocks), sum(p.numel() for p in blocks)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = [trained(sys.argv[1], rank, *way) for way in ((None, 0), ("all", 0), ("node", 2))]
    torch.save(results, Path(sys.argv[2]) / f"rank{rank}.pt")
    dist.destroy_process_group()
