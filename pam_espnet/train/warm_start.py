"""CTC warm start: fit the adapters in the LLM's embedding space before the LLM is trained (``warm_losses``).

No LLM forward pass is needed beyond one per distinct prompt, so it takes seconds to minutes where joint training
takes hours. What it trains (frontend and CTC head) is written as safetensors and loaded by training through
``--init_trained``. Several processes share every batch and sum their gradients; the first one writes.

Dimension letters: B utterances, U adapter frames, D width.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import math
import pickle
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from espnet2.tasks.abs_task import DistributedOption
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from torch import Tensor

from pam_espnet.config import check_number
from pam_espnet.data.batching import BatchingOptions
from pam_espnet.data.tables import read_table
from pam_espnet.data.tasks import TASKS, task_spec
from pam_espnet.errors import CheckpointError, ConfigError
from pam_espnet.fileio import atomic_path, load_strict, read_trained, save_trained, write_text
from pam_espnet.frontend.fusion.routing import router_loss
from pam_espnet.llm.shard import stream_blocks
from pam_espnet.model import ESPnetPaMModel, build_model
from pam_espnet.processes import agree, first_process, gathered
from pam_espnet.train.experiment import read_options
from pam_espnet.train.export import not_finite
from pam_espnet.train.scaling import factors
from pam_espnet.train.step_checkpoint import disk_errors
from pam_espnet.train.task import PaMTask, parameter_groups
from pam_espnet.train.warm_losses import by_expert, encoder_weights, token_errors, warm_loss

OUTPUT = "warm_start.safetensors"
STATE = "warm_start.pth"
LOG = "warm_start.jsonl"


@dataclass(frozen=True)
class WarmStartOptions:
    """How long and how fast."""

    losses: Mapping[str, str] = field(default_factory=lambda: {"asr": "ctc"})  # task -> "ctc" or "bag": what is fitted
    steps: int = 400  # of the optimizer
    # In the first n steps each utterance is encoded by one encoder, drawn at random. Mixed from the start, untrained
    # encoders drown the one that encodes words, and the loss stays on its plateau.
    single_steps: int = 0
    # Fit the weights of encoders and layers on the validation set, one step after n steps of everything else on the
    # training set (differentiable architecture search: Liu, Simonyan and Yang, ICLR 2019, first order). On the training
    # set the encoder wins that is best memorised. Where encoders compete, their losses on that set also say how often
    # each is drawn in the first steps, and the weights with which mixing begins. 0: all is fitted on the training set,
    # as the paper reads.
    held_out_every: int = 0
    lr: float = 2e-3  # peak of AdamW's learning rate: linear warm-up over a tenth of the steps, cosine to zero
    # Parameter-name prefix -> factor on the learning rate, laid over training's ``lr_scale_conf``.
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    max_utterances: int = 16  # limits of a batch (``data.batching``), of one GPU or global as ``batching_conf.limits``
    max_seconds: float = 120.0
    save_every: int = 100  # steps between checkpoints that a killed run resumes from
    report_every: int = 20  # steps between lines in the log

    def __post_init__(self) -> None:
        if not isinstance(self.losses, Mapping) or not self.losses:
            raise ConfigError(f"warm_start_conf.losses: {self.losses!r}; must name tasks, such as {{asr: ctc}}")
        for task, loss in self.losses.items():
            task_spec(task)
            if loss not in ("ctc", "bag"):
                raise ConfigError(f"warm_start_conf.losses.{task}: {loss!r}; choose ctc or bag")
        for name in ("steps", "save_every", "report_every", "max_utterances"):
            check_number(getattr(self, name), f"warm_start_conf.{name}", at_least=1, whole=True)
        check_number(self.lr, "warm_start_conf.lr", above=0)
        check_number(self.held_out_every, "warm_start_conf.held_out_every", at_least=0, whole=True)
        check_number(self.single_steps, "warm_start_conf.single_steps", at_least=0, at_most=self.steps, whole=True)


def fit_router(model: ESPnetPaMModel, pairs: Sequence[tuple[str, int]], steps: int = 200, lr: float = 1e-3) -> float:
    """Fit a supervised router to distinct (prompt, task index); returns its loss at the end.

    Comes before the CTC steps, so that the expert they fit is the one that ASR prompts will be routed to.
    """
    vectors = model.prompt_vectors([prompt for prompt, _ in pairs])
    task = torch.tensor([index for _, index in pairs], device=vectors.device)
    if model.frontend.route(vectors).expert_logits is None:
        return 0.0
    optimizer = torch.optim.Adam(model.frontend.fusion.parameters(), lr=lr)
    for _ in range(steps):
        loss = router_loss(model.frontend.route(vectors), task)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def rate(step: int, options: WarmStartOptions) -> float:
    """Learning-rate factor at ``step`` (from 0)."""
    warm = max(1, options.steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, options.steps - warm)))


def fit(
    model: ESPnetPaMModel,
    train: Any,
    valid: Any,
    options: WarmStartOptions,
    output_dir: Path,
    device: str = "cpu",
    lr_scales: Mapping[str, float] | None = None,
    router_pairs: Sequence[tuple[str, int]] = (),
    lr_factor: float = 1.0,
) -> Path:
    """Fit frontend and CTC head; resumes from ``warm_start.pth``; returns the path of ``warm_start.safetensors``.

    All processes of torch.distributed's group call it and get the same weights.

    Args:
        model: with a CTC head; its LLM is not trained.
        train, valid: ``PaMIterFactory`` over utterances of the chosen tasks.
        options, output_dir, device: how long and how fast; the experiment directory; a torch device.
        lr_scales: parameter-name prefix -> factor on the learning rate.
        router_pairs: (prompt, task index) to fit the router to first, where it is supervised.
        lr_factor: of several processes, on ``options.lr``.

    Raises ConfigError: no utterance can be aligned, or the loss is not finite.
    """
    from tqdm import tqdm

    done, first, lr = output_dir / OUTPUT, first_process(), options.lr * lr_factor
    model.to(device)
    model.train()
    model.decoder.requires_grad_(False)
    groups = parameter_groups(model, lr_scales or {}, lr)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.01)
    step, epoch = 0, 0
    lines: list[dict] = []
    if agree((output_dir / STATE).exists()):
        step, epoch, lines = _resume(output_dir / STATE, model, optimizer, options.steps)
    started = time.monotonic()
    if step == 0 and router_pairs and model.router_loss_weight > 0:
        logging.info(f"router fitted to {len(router_pairs)} prompts: loss {fit_router(model, router_pairs):.4f}")
    if dist.is_initialized():
        for tensor in _trained(model).values():
            dist.broadcast(tensor, src=0)

    def shares(weights: Tensor) -> str:
        return ", ".join(f"{name} {w:.2f}" for name, w in zip(model.frontend.names, weights.tolist(), strict=True))

    def diverged(number: int, loss: float) -> ConfigError:
        return ConfigError(
            f"the warm start diverged at step {number} of {options.steps}: loss {loss}, learning rate {lr:.3g}\n"
            f"  -> no model was written; give another --tag and a lower warm_start_conf.lr than {options.lr:g}"
        )

    mixture = model.frontend.fusion.mixture_parameters() if options.held_out_every else []
    fixed = {id(parameter) for parameter in mixture}
    networks = [parameter for parameter in parameters if id(parameter) not in fixed]
    competing = bool(mixture) and options.single_steps > 0 and model.frontend.fusion.learns_encoder_weights
    with tqdm(
        total=options.steps, initial=step, desc="CTC warm start", unit="step", mininterval=2.0, disable=not first
    ) as bar:
        while step < options.steps:
            epoch += 1
            before, unaligned = step, 0
            torch.manual_seed(1000 * train.seed + epoch)  # masks
            held_out = _endless(valid, epoch)
            chances: dict[int, list[float]] = {}
            if competing and 0 < step < options.single_steps:
                # An encoder that is ahead on a task gets more of its utterances: on the others most would be lost.
                for (_, task), weights in _held_out_weights(model, valid, options.losses).items():
                    chances[task] = weights.square().tolist()
                    logging.info(f"step {step}, {model.tasks[task]}: {shares(weights)}")

            def draw(keys: Sequence[str], batch: Mapping[str, Any], number: int, chances: Any = chances) -> list[str]:
                used, pairs = model.frontend.fusion.used, zip(keys, batch["task"], strict=True)
                draws = ((random.Random(f"{train.seed} {number} {utt}"), task) for utt, task in pairs)
                return [one.choices(used, chances.get(task))[0] for one, task in draws]

            for keys, batch in train.build_iter(epoch):
                single = step < options.single_steps
                if competing and step == options.single_steps:
                    for expert, weights in by_expert(_held_out_weights(model, valid, options.losses)).items():
                        model.frontend.fusion.set_encoder_weights(expert, weights)
                        logging.info(f"step {step}, expert {expert}: {shares(weights)}")
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["scale"] * rate(step, options)
                only = draw(keys, batch, step) if single else None
                total, count, skipped = _step(model, batch, options.losses, only, optimizer, networks)
                unaligned += skipped
                if count == 0:
                    continue
                if not torch.isfinite(total):
                    raise diverged(step + 1, total.item())
                if mixture and step % options.held_out_every == 0:
                    keys, batch = next(held_out)
                    only = draw(keys, batch, step) if single else None
                    _step(model, batch, options.losses, only, optimizer, mixture)
                step += 1
                bar.update()
                if step % options.report_every == 0 or step == options.steps:
                    loss = total.item() / count
                    lines.append({"step": step, "loss": round(loss, 4), "unaligned": unaligned})
                    bar.set_postfix(loss=f"{loss:.2f}")
                    if first:
                        _write_log(output_dir, lines)
                if step >= options.steps:
                    break
            if step == before:
                raise ConfigError(
                    f"warm start: none of {unaligned} utterances can be aligned; are the answers longer than the "
                    "audio, or is frontend_conf.frame_rate too low?"
                )
            # Saved between epochs, so that a resumed run gets the same batches.
            if step < options.steps and first:
                _save(output_dir / STATE, model, optimizer, options.steps, step, epoch, lines)
    trained = _trained(model)
    if not_finite(trained):  # since the last step
        raise diverged(step, total.item())
    model.eval()
    errors = _all_errors(token_errors(model, valid.build_iter(1), options.losses))
    if not first:
        return done
    rates = {task: wrong / max(tokens, 1) for task, (wrong, tokens) in sorted(errors.items())}
    lines.append({"step": step, **{f"valid_token_error_rate_{task}": round(rate, 4) for task, rate in rates.items()}})
    _write_log(output_dir, lines)
    save_trained(trained, done)
    (output_dir / STATE).unlink(missing_ok=True)
    shown = ", ".join(f"{task} {rate:.1%}" for task, rate in rates.items())
    seconds = time.monotonic() - started
    logging.info(f"warm start: {step} steps, {seconds:.0f} s; token errors on dev: {shown}; wrote {done}")
    return done


def _step(
    model: ESPnetPaMModel,
    batch: Mapping[str, Any],
    losses: Mapping[str, str],
    only: Sequence[str] | None,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
) -> tuple[Tensor, int, int]:
    """One optimizer step of ``parameters`` alone; of all processes the summed loss, its target tokens, utterances left
    out."""
    own, count, skipped = warm_loss(model, batch, losses, only)
    total = own.detach()
    if dist.is_initialized():
        sums = torch.stack([total.double(), *(total.new_tensor(n, dtype=torch.double) for n in (count, skipped))])
        dist.all_reduce(sums)
        total, count, skipped = sums[0], int(sums[1]), int(sums[2])
    optimizer.zero_grad()  # parameters without a gradient are left alone, by weight decay too
    if count:
        gradients = torch.autograd.grad(own / count, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, _summed(gradients, parameters), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
    return total, count, skipped


def _summed(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients summed over all processes, in one exchange; None where no process has one."""
    if not dist.is_initialized():
        return list(gradients)
    pairs = list(zip(gradients, parameters, strict=True))
    used = parameters[0].new_tensor([gradient is not None for gradient in gradients])
    everything = torch.cat([used, *(torch.zeros_like(p).view(-1) if g is None else g.reshape(-1) for g, p in pairs)])
    dist.all_reduce(everything)
    used, *parts = everything.split([len(pairs), *(parameter.numel() for parameter in parameters)])
    found = zip(used.tolist(), parts, parameters, strict=True)
    return [part.view_as(parameter) if number else None for number, part, parameter in found]


def _all_errors(own: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Errors and tokens per task, summed over all processes, some of which may have no utterance of a task."""
    every = gathered(dict(own))
    pairs = {task: [errors[task] for errors in every if task in errors] for task in set().union(*every)}
    return {task: (sum(wrong for wrong, _ in some), sum(tokens for _, tokens in some)) for task, some in pairs.items()}


def _held_out_weights(model: ESPnetPaMModel, valid: Any, losses: Mapping[str, str]) -> dict[tuple[int, int], Tensor]:
    """``encoder_weights`` on the validation set. The state of random numbers stays, so that a resumed run sees what an
    unbroken one does."""
    state = torch.get_rng_state()
    model.eval()
    found = encoder_weights(model, valid.build_iter(1), losses)
    model.train()
    torch.set_rng_state(state)
    return found


def _endless(valid: Any, epoch: int) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
    """Keys and shuffled batches of the validation set without end; which ones depends on the training epoch alone."""
    shuffled = copy.copy(valid)
    shuffled.train = True
    for number in itertools.count(1000 * epoch):
        yield from shuffled.build_iter(number)


def _trained(model: ESPnetPaMModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("decoder.")}


def _write_log(output_dir: Path, lines: list[dict]) -> None:
    write_text(output_dir / LOG, "".join(json.dumps(line) + "\n" for line in lines))


def _save(
    path: Path, model: ESPnetPaMModel, optimizer: Any, steps: int, step: int, epoch: int, lines: list[dict]
) -> None:
    state = {"model": _trained(model), "optimizer": optimizer.state_dict()}
    with atomic_path(path) as tmp:
        torch.save({**state, "steps": steps, "step": step, "epoch": epoch, "lines": lines}, tmp)


def _resume(path: Path, model: ESPnetPaMModel, optimizer: Any, steps: int) -> tuple[int, int, list[dict]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: damaged ({error})\n  -> remove it to start again") from error
    if (begun := state.get("steps", steps)) != steps:
        raise CheckpointError(
            f"{path}: was begun for {begun} steps, now there are {steps}, with another number of processes\n"
            "  -> continue with as many as before, or remove it to start again"
        )
    rest = {k: v for k, v in model.state_dict().items() if k.startswith("decoder.")}
    load_strict(model, {**rest, **state["model"]}, path)
    optimizer.load_state_dict(state["optimizer"])
    logging.info(f"warm start: resumed at step {state['step']} from {path}")
    return state["step"], state["epoch"], state["lines"]


def run(args: argparse.Namespace) -> Path:
    """Warm start with the options of a training run, parsed by ``PaMTask.get_parser()``.

    ``model_conf.ctc_tokens`` names the file of token ids, which is written here when it is missing.
    Several processes are in torch.distributed's group already; ``train.scaling`` has what they change.
    Raises ConfigError: no utterances of these tasks, or keys that nobody reads in ``warm_start_conf``.
    """
    options = read_options(WarmStartOptions, vars(args), "warm_start_conf")
    output_dir = Path(args.output_dir)
    if agree((output_dir / OUTPUT).exists()):
        read_trained(output_dir / OUTPUT)
        logging.info(f"{output_dir / OUTPUT}: already there")
        return output_dir / OUTPUT
    set_all_random_seed(args.seed)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    ratio, growth = factors(vars(args), processes, "adamw")
    if ratio > 1:
        steps, single = (math.ceil(number / ratio) for number in (options.steps, options.single_steps))
        logging.info(f"{processes} processes: {steps} steps (of {options.steps}), learning rate times {growth:.3g}")
        options = replace(options, steps=steps, single_steps=single)
    factories = {}
    pairs: list[tuple[str, int]] = []
    for mode in ("train", "valid"):
        factory = PaMTask.build_iter_factory(args, DistributedOption(distributed=dist.is_initialized()), mode)
        if mode == "train":
            paths = {name: path for path, name, _ in args.train_data_path_and_name_and_type}
            prompts, order = read_table(paths["prompt"]), list(TASKS)
            pairs = sorted({(prompts[utt], order.index(task)) for utt, task in factory.tasks.items()})
        chosen = {utt: task for utt, task in factory.tasks.items() if task in options.losses}
        if len(chosen) < processes:
            number = f"{len(chosen)} utterances, for {processes} processes," if chosen else "no utterance"
            raise ConfigError(
                f"warm_start_conf.losses: the {mode} set has {number} of {', '.join(options.losses)}\n"
                "  -> choose other tasks, or run with --warm_start false"
            )
        factory.seconds = {utt: s for utt, s in factory.seconds.items() if utt in chosen}
        factory.tasks = chosen
        factory.announce = False  # its passes are counted, and fall in the middle of the bar
        factory.options = BatchingOptions(options.max_utterances, options.max_seconds, factory.options.limits)
        # What a killed run resumes from is written between epochs, so these have save_every batches.
        factory.batches_per_epoch = options.save_every if mode == "train" else None
        factories[mode] = factory
    if not (args.model_conf or {}).get("ctc_tokens"):
        raise ConfigError("model_conf.ctc_tokens is missing: the file for the head's token ids (pam.sh sets it)")
    tokens = Path(args.model_conf["ctc_tokens"])
    if first_process() and not tokens.exists():
        texts, strings = read_table(paths["text"]), PaMTask.build_preprocess_fn(args, train=True)
        answers = (strings.answer_ids(texts[utt], task)[:-1] for utt, task in factories["train"].tasks.items())
        ids = {token for answer in answers for token in answer}
        write_text(tokens, "".join(f"{token}\n" for token in sorted(ids)))
        logging.info(f"{tokens}: {len(ids)} token types in {len(factories['train'].tasks)} training answers")
    agree(None)  # the others wait for the file
    scales = {**(args.lr_scale_conf or {}), **options.lr_scales}
    device = "cuda" if args.ngpu > 0 else "cpu"
    model = build_model(vars(args))
    if (args.llm_conf or {}).get("shard") and model.decoder.shard_group is None:  # it would not fit on one GPU
        stream_blocks(model.decoder.lm, device)
    with disk_errors(output_dir):
        return fit(
            model,
            factories["train"],
            factories["valid"],
            options,
            output_dir,
            device=device,
            lr_scales={prefix: factor for prefix, factor in scales.items() if not prefix.startswith("decoder")},
            router_pairs=pairs,
            lr_factor=growth,
        )
