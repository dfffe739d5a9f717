"""CTC warm start: fit the adapters in the LLM's embedding space before the LLM is trained (``warm_fit``).

No LLM forward pass is needed beyond one per distinct prompt, so it takes seconds to minutes where joint training
takes hours. What it trains (frontend and CTC head) is written as safetensors and loaded by training through
``--init_trained``. Several processes share every batch and sum their gradients; the first one writes.
"""

import argparse
import logging
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from espnet2.tasks.abs_task import DistributedOption
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed

from pam_espnet.data.batching import BatchingOptions
from pam_espnet.data.tables import read_table
from pam_espnet.data.tasks import TASKS
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import read_trained, write_text
from pam_espnet.llm.shard import stream_blocks
from pam_espnet.model import build_model
from pam_espnet.processes import agree, first_process
from pam_espnet.train.experiment import read_options
from pam_espnet.train.scaling import factors
from pam_espnet.train.step_checkpoint import disk_errors
from pam_espnet.train.task import PaMTask
from pam_espnet.train.warm_fit import OUTPUT, fit
from pam_espnet.train.warm_options import WarmStartOptions


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
        factory.options = BatchingOptions(
            options.max_utterances, options.max_seconds, factory.options.limits, task_share=options.task_share
        )
        # What a killed run resumes from is written between epochs, so these have save_every batches.
        factory.batches_per_epoch = options.save_every if mode == "train" else None
        factories[mode] = factory
    if not (args.model_conf or {}).get("ctc_tokens"):
        raise ConfigError("model_conf.ctc_tokens is missing: the file for the head's token ids (pam.sh sets it)")
    tokens = Path(args.model_conf["ctc_tokens"])
    texts, strings = read_table(paths["text"]), PaMTask.build_preprocess_fn(args, train=True)
    missing = first_process() and not tokens.exists()
    answers: defaultdict[str, list[list[int]]] = defaultdict(list)
    for utt, task in factories["train"].tasks.items():
        if missing or options.losses[task] == "bag":
            answers[task].append(strings.answer_ids(texts[utt], task)[:-1])
    if missing:
        ids = {token for some in answers.values() for answer in some for token in answer}
        write_text(tokens, "".join(f"{token}\n" for token in sorted(ids)))
        logging.info(f"{tokens}: {len(ids)} token types in {len(factories['train'].tasks)} training answers")
    agree(None)  # the others wait for the file
    scales = {**(args.lr_scale_conf or {}), **options.lr_scales}
    scales = {prefix: factor for prefix, factor in scales.items() if not prefix.startswith("decoder")}
    device = "cuda" if args.ngpu > 0 else "cpu"
    model = build_model(vars(args))
    if (args.llm_conf or {}).get("shard") and model.decoder.shard_group is None:  # it would not fit on one GPU
        stream_blocks(model.decoder.lm, device)
    assert model.ctc is not None
    bags = [task for task in answers if options.losses[task] == "bag"]
    priors = {task: model.ctc.log_shares(answers[task]).to(device) for task in bags}
    sets = factories["train"], factories["valid"]
    with disk_errors(output_dir):
        return fit(model, *sets, options, output_dir, device, scales, pairs, growth, priors)
