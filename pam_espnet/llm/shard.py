"""A frozen LLM larger than one GPU: blocks sharded over processes by FSDP2, and read part by part from safetensors.

Each process holds its rows of every matrix of the blocks; a block is gathered when it runs, forward and backward, and
let go again. Embedding matrix, final norm and output layer are whole everywhere. LoRA comes later (``llm.lora``), is
whole, and stays DDP's. Every process must run the blocks equally often, or all wait for ever: see ``wanted_by_any``.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from pam_espnet.data.hub import hub_folder
from pam_espnet.errors import ConfigError
from pam_espnet.processes import gathered

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def check_shard(shard: str | None) -> None:
    """Raises ConfigError: a way to shard that there is not."""
    if shard not in (None, "node", "all"):
        raise ConfigError(f"llm_conf.shard: {shard!r}; choose node, all, or leave it out")


def shard_mesh(shard: str | None) -> DeviceMesh | None:
    """The processes over which blocks are sharded: those of this node, or all; None: the LLM is whole here.
    Raises ConfigError: another value."""
    check_shard(shard)
    if shard is None:
        return None
    size = dist.get_world_size() if dist.is_initialized() else 1
    own = int(os.environ.get("LOCAL_WORLD_SIZE", size)) if shard == "node" else size
    if own == 1:
        logging.info(f"llm_conf.shard: {shard}: one process, which holds the whole LLM")
        return None
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    # peft makes LoRA for whole matrices where the mesh has this name, for this process's rows elsewhere.
    return dist.init_device_mesh(device, (size // own, own), mesh_dim_names=("copies", "fsdp"))["fsdp"]


def load_sharded(path_or_id: str, mesh: DeviceMesh, dtype: torch.dtype, attention: str, source: Mapping) -> Any:
    """A causal LM whose blocks are sharded over ``mesh``, without LoRA; ``source``: as ``hub_source`` returns it.
    The host never holds more than this process's part of one tensor, and what is whole everywhere.
    Raises ConfigError: files that are missing, or hold other tensors than the LLM has; blocks under another name.
    """
    from accelerate import init_empty_weights
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(path_or_id, **source)
    with init_empty_weights(include_buffers=False):  # buffers are in no file: they are computed
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with suppress(OSError):  # not every LLM has one
        lm.generation_config = GenerationConfig.from_pretrained(path_or_id, **source)
    lm.tie_weights()
    kind, blocks = type(lm.base_model), getattr(lm.requires_grad_(False).eval().base_model, "layers", None)
    if blocks is None:
        raise ConfigError(f"llm_conf.shard: {kind.__name__} has no blocks named layers\n  -> leave out shard")
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # The root of all blocks, so that the next one is gathered while one runs; it has nothing of its own to shard.
    whole = set(lm.parameters()) - set(blocks.parameters())
    fully_shard(lm.base_model, mesh=mesh, ignored_params=whole)
    lm.base_model.__class__ = kind  # transformers records hidden states of the classes it knows
    folder = Path(path_or_id)
    if not folder.is_dir():
        folder = hub_folder(path_or_id, source.get("revision"), local_files_only=source["local_files_only"])
    _read(lm, folder)
    lm.tie_weights()
    held = sum(p.to_local().nbytes for p in blocks.parameters())
    size = sum(p.numel() * p.element_size() for p in blocks.parameters())
    logging.info(f"blocks of the LLM: {held / 1e9:.3f} of {size / 1e9:.3f} GB in each of {mesh.size()} processes")
    return lm


def _read(lm: Any, folder: Path) -> None:
    """Fill parameters that have no storage yet: sharded ones with this process's rows, others whole."""
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor

    named = {id(tensor): (name, tensor) for name, tensor in reversed(lm.state_dict(keep_vars=True).items())}
    missing, read = dict(named.values()), {}  # of tied weights the first name alone
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in missing.keys() & set(file.keys()):
                tensor, stored = missing.pop(name), file.get_slice(name)
                if stored.get_shape() != [*tensor.shape]:
                    raise ConfigError(f"{path}: {name} is {stored.get_shape()}, in the LLM {[*tensor.shape]}")
                if not isinstance(tensor, DTensor):
                    read[name] = stored[:].to(tensor.dtype)
                    continue
                mesh = tensor.device_mesh
                size = -(-len(tensor) // mesh.size())  # rows of a process, the last ones perhaps fewer
                begin = min(size * mesh.get_local_rank(), len(tensor))
                rows = stored[begin : min(begin + size, len(tensor))].to(mesh.device_type, tensor.dtype)
                shape, stride = tensor.shape, tensor.stride()
                read[name] = DTensor.from_local(rows, mesh, tensor.placements, shape=shape, stride=stride)
    if missing:
        raise ConfigError(
            f"llm_conf.shard: no model*.safetensors in {folder} holds {min(missing)} ({len(missing)} tensors missing)\n"
            "  -> write the LLM with this transformers: AutoModelForCausalLM.from_pretrained(A).save_pretrained(B)"
        )
    lm.load_state_dict(read, strict=False, assign=True)


def wanted_by_any(wanted: Iterable[str], group: dist.ProcessGroup | None) -> list[str]:
    """What some process of ``group`` wants, in one order in all of them: each then runs the blocks equally often."""
    if group is None:
        return list(wanted)
    return list(dict.fromkeys(itertools.chain(*gathered(list(wanted), group))))


def stream_blocks(lm: Any, device: str) -> None:
    """Keep the blocks of a whole LLM on the host, also where the rest moves to ``device``: each is copied there while
    it runs. For the few passes of a warm start, which has one process; without gradients."""

    def send(block: nn.Module, _: Any) -> None:
        block.__dict__["on_host"] = [p.data for p in block.parameters()]
        for p in block.parameters():
            p.data = p.data.to(device)

    def drop(block: nn.Module, *_: Any) -> None:
        for p, data in zip(block.parameters(), block.__dict__.pop("on_host"), strict=True):
            p.data = data

    for block in lm.base_model.layers:
        block.register_forward_pre_hook(send)
        block.register_forward_hook(drop)
        block._apply = lambda *_, block=block: block  # what ``to`` calls
