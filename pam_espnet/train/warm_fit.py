"""The fit of the warm start: steps on the losses of ``warm_losses``, resumed from a state file, and what they leave.

Dimension letters: B utterances, U adapter frames, D width.
"""

import copy
import itertools
import json
import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pam_espnet.errors import CheckpointError, ConfigError
from pam_espnet.fileio import atomic_path, load_strict, save_trained, write_text
from pam_espnet.frontend.ctc_head import BAG_TEMPERATURE
from pam_espnet.frontend.fusion.routing import router_loss
from pam_espnet.model import ESPnetPaMModel
from pam_espnet.processes import agree, first_process
from pam_espnet.train.encoder_draws import EncoderDraws
from pam_espnet.train.export import not_finite
from pam_espnet.train.task import parameter_groups
from pam_espnet.train.warm_losses import token_errors, warm_loss
from pam_espnet.train.warm_options import WarmStartOptions, rate

OUTPUT = "warm_start.safetensors"
STATE = "warm_start.pth"
LOG = "warm_start.jsonl"
CLIP = 1.0  # gradient norm; at 5 and a rate of 2e-3 one run of seven lost for good what it had learned


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
    priors: Mapping[str, Tensor] | None = None,
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
        priors: of tasks whose loss is "bag", see ``EmbeddingCTC.log_shares``.

    Raises ConfigError: no utterance can be aligned, or the loss is not finite.
    """
    from tqdm import tqdm

    done, first, lr = output_dir / OUTPUT, first_process(), options.lr * lr_factor
    model.to(device)
    model.train()
    model.decoder.requires_grad_(False)
    groups = parameter_groups(model, lr_scales or {}, lr)
    for group in groups:
        # The losses compare directions: the length's gradient is rounding, of which AdamW makes steps as of any other.
        group["params"] = [p for p in group["params"] if p is not model.frontend.gain]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.01)
    step, epoch = 0, 0
    lines: list[dict] = []
    if agree((output_dir / STATE).exists()):
        step, epoch, lines = _resume(output_dir / STATE, model, optimizer, options.steps)
    started = time.monotonic()
    supervised = bool(router_pairs) and model.router_loss_weight > 0
    if step == 0 and supervised:
        logging.info(f"router fitted to {len(router_pairs)} prompts: loss {fit_router(model, router_pairs):.4f}")
    # Nothing here would hold it at its tasks: a straight-through router leaves for one expert.
    model.frontend.fusion.router_held = supervised
    if dist.is_initialized():
        for tensor in _trained(model).values():
            dist.broadcast(tensor, src=0)

    def diverged(number: int, loss: float) -> ConfigError:
        return ConfigError(
            f"the warm start diverged at step {number} of {options.steps}: loss {loss}, learning rate {lr:.3g}\n"
            f"  -> no model was written; give another --tag and a lower warm_start_conf.lr than {options.lr:g}"
        )

    mixture = model.frontend.fusion.mixture_parameters() if options.held_out_every else []
    fixed = {id(p) for p in mixture}
    networks = [p for group in groups for p in group["params"] if id(p) not in fixed]
    draws = EncoderDraws(model, valid, options, train.seed, priors)
    with tqdm(
        total=options.steps, initial=step, desc="CTC warm start", unit="step", mininterval=2.0, disable=not first
    ) as bar:
        while step < options.steps:
            epoch += 1
            before, unaligned = step, 0
            torch.manual_seed(1000 * train.seed + epoch)  # masks
            held_out = _endless(valid, epoch)
            draws.update(step)
            for keys, batch in train.build_iter(epoch):
                draws.begin_mixing(step)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["scale"] * rate(step, options)
                only = draws.draw(keys, batch, step)
                bag = BAG_TEMPERATURE if step < options.single_steps else None  # then the expert's own
                loss_of = partial(warm_loss, losses=options.losses, bag_temperature=bag, priors=priors)
                total, count, skipped = _step(model, batch, loss_of, only, optimizer, networks)
                unaligned += skipped
                if count == 0:
                    continue
                if not torch.isfinite(total):
                    raise diverged(step + 1, total.item())
                if mixture and step % options.held_out_every == 0:
                    keys, batch = next(held_out)
                    _step(model, batch, loss_of, draws.draw(keys, batch, step), optimizer, mixture)
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
    model.frontend.fusion.router_held = False
    model.eval()
    errors = token_errors(model, valid.build_iter(1), options.losses, priors)
    if not first:
        return done
    rates = {task: wrong / max(tokens, 1e-9) for task, (wrong, tokens) in sorted(errors.items())}
    if lost := [task for task, rate in rates.items() if options.losses[task] == "ctc" and rate >= 1.0]:
        logging.warning(
            f"the warm start learned nothing of {', '.join(lost)}: every token on the validation set is wrong\n"
            f"  -> are {options.steps} steps enough? else give another --tag and a lower rate than {options.lr:g} "
            "(warm_start_conf.lr)"
        )
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
    loss_of: Callable[..., tuple[Tensor, int, int]],
    only: Sequence[str] | None,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
) -> tuple[Tensor, int, int]:
    """One optimizer step of ``parameters`` alone; ``loss_of`` is ``warm_loss`` with its options. Returns, of all
    processes, the summed loss, its target tokens, utterances left out."""
    own, count, skipped = loss_of(model, batch, only=only)
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
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
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
    try:
        optimizer.load_state_dict(state["optimizer"])
        if any(moments["exp_avg"].shape != parameter.shape for parameter, moments in optimizer.state.items()):
            raise ValueError("of other shapes")
    except ValueError as error:  # begun by a version that trained more, or had one temperature for all experts
        raise CheckpointError(f"{path}: fits other parameters ({error})\n  -> remove it to start again") from error
    logging.info(f"warm start: resumed at step {state['step']} from {path}")
    return state["step"], state["epoch"], state["lines"]
