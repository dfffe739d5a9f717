"""PaMTask: ESPnet's task of this model, with its options, streams, optimizer groups and batches.

Importing it costs seconds (``espnet2.tasks.abs_task``); nothing that decodes, scores or prepares data does.
"""

import argparse
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.tasks.abs_task import AbsTask, IteratorOptions, optim_classes
from espnet2.utils.nested_dict_action import NestedDictAction
from espnet2.utils.types import str_or_none

from pam_espnet.data.batching import BatchingOptions, times_seen
from pam_espnet.data.prompts import read_wordings
from pam_espnet.data.tables import read_table
from pam_espnet.data.tasks import TASKS
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import load_strict, read_trained
from pam_espnet.llm.sources import load_tokenizer
from pam_espnet.model import ESPnetPaMModel, build_model
from pam_espnet.train.collate import PaMCollate
from pam_espnet.train.estimate import fitting_checkpointing
from pam_espnet.train.experiment import read_options
from pam_espnet.train.iterator import FreshPrompts, PaMIterFactory, PaMPreprocessor
from pam_espnet.train.trainer import PaMTrainer


class PaMTask(AbsTask):
    """Train ``ESPnetPaMModel`` with ESPnet's trainer, launcher and data list.

    Data list names: ``text``, ``prompt``, ``task`` (type text), ``num_samples`` (text_int), and either ``speech``
    (sound) or one ``feats_<encoder>`` (kaldi_ark) per encoder.
    """

    num_optimizers = 1
    trainer = PaMTrainer
    class_choices_list: ClassVar[list[Any]] = []

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Options of this task beside ESPnet's; each mapping is given in YAML."""
        group = parser.add_argument_group(description="Prompt-aware speech LLM")
        group.add_argument("--llm", type=str_or_none, default=None, help="LLM folder or Hugging Face id")
        for name, text in (
            ("llm_conf", "options of LLM.from_pretrained (lora, dtype, ...)"),
            ("frontend_conf", "options of PaMFrontend (encoders, fusion, ...)"),
            ("model_conf", "options of ESPnetPaMModel"),
            ("batching_conf", "options of BatchingOptions"),
            ("prompt_files", "task -> prompt file; training draws wordings from it anew in every epoch"),
            ("lr_scale_conf", "parameter-name prefix -> factor on the learning rate (default 1)"),
            ("warm_start_conf", "options of the CTC warm start, a separate step before training"),
            ("resources", "what the doctor checks before a run: disk_gb, memory_gb"),
        ):
            group.add_argument(f"--{name}", action=NestedDictAction, default={}, help=text)
        group.add_argument(
            "--lr_scaling",
            default="auto",
            help="growth of the learning rate with the processes (see train/scaling.py): auto, none, sqrt, linear",
        )
        group.add_argument(
            "--init_trained",
            type=str_or_none,
            default=None,
            help="safetensors file to start from: every tensor in it must fit (the warm start writes one)",
        )
        group.add_argument(
            "--checkpoint_steps",
            type=int,
            default=0,
            help="batches between two checkpoints within an epoch, rounded up to a multiple of accum_grad; 0: none",
        )
        parser.set_defaults(
            iterator_type="task",
            # Batches are planned from utt2num_samples, whose streams are named by the encoders in use.
            allow_variable_data_keys=True,
            num_att_plot=0,
            use_matplotlib=False,
            use_tensorboard=False,
            use_tf32=None,  # on, on GPUs that have it (model.choose_tf32); ESPnet's own default is off
        )

    @classmethod
    def build_collate_fn(cls, args: argparse.Namespace, train: bool) -> Callable[..., Any]:
        """Batches for ``ESPnetPaMModel.forward``."""
        frontend, system = args.frontend_conf or {}, (args.llm_conf or {}).get("system", "")
        rates = float(frontend.get("frame_rate", 12.5)), int(frontend.get("sample_rate", 16000))
        return PaMCollate(tokenizer_of(args), system, *rates)

    @classmethod
    def build_preprocess_fn(cls, args: argparse.Namespace, train: bool) -> PaMPreprocessor:
        """Strings to ids; the tokenizer object stays the LLM's own."""
        prefixes = (args.llm_conf or {}).get("answer_prefix")
        return PaMPreprocessor(tokenizer_of(args), tasks=tuple(TASKS), train=train, answer_prefix=prefixes)

    @classmethod
    def required_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Streams that every training set must have."""
        return ("num_samples", "prompt") if inference else ("num_samples", "prompt", "task", "text")

    @classmethod
    def optional_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Streams it may have, besides one ``feats_<encoder>`` per encoder."""
        return ("speech",)

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetPaMModel:
        """Build the model and, with ``--init_trained``, load what an earlier step trained."""
        model = build_model(vars(args))
        if (args.llm_conf or {}).get("gradient_checkpointing") == "auto" and args.ngpu > 0:
            paths = {name: path for path, name, _ in args.train_data_path_and_name_and_type}
            ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            train, free = Path(paths["text"]).parent, torch.cuda.mem_get_info()[0]  # nothing is on the GPU yet
            model.decoder.recompute(fitting_checkpointing(vars(args), train, "speech" not in paths, ranks, free))
        if getattr(args, "init_trained", None):
            _load_part(model, args.init_trained)
        return model

    @classmethod
    def build_optimizers(cls, args: argparse.Namespace, model: torch.nn.Module) -> list[torch.optim.Optimizer]:
        """Trainable parameters only, in groups by ``lr_scale_conf``; a prefix that matches nothing is an error."""
        optim_class, conf = optim_classes[args.optim], dict(args.optim_conf)
        if "lr" not in conf:
            raise ConfigError("optim_conf.lr is missing")
        return [optim_class(parameter_groups(model, args.lr_scale_conf or {}, float(conf["lr"])), **conf)]

    @classmethod
    def build_task_iter_factory(
        cls, args: argparse.Namespace, iter_options: IteratorOptions, mode: str
    ) -> AbsIterFactory:
        """Length-bucketed batches that mix the tasks (``data.batching``)."""
        paths = {name: path for path, name, _ in iter_options.data_path_and_name_and_type}
        sample_rate = int((args.frontend_conf or {}).get("sample_rate", 16000))
        seconds = {utt: int(n) / sample_rate for utt, n in read_table(paths["num_samples"]).items()}
        tasks = read_table(paths["task"])
        world_size = torch.distributed.get_world_size() if iter_options.distributed else 1
        rank = torch.distributed.get_rank() if iter_options.distributed else 0
        options = read_options(BatchingOptions, vars(args), "batching_conf")
        counts = {task: sum(t == task for t in tasks.values()) for task in sorted(set(tasks.values()))}
        hours = sum(seconds.values()) / 3600
        logging.info(f"[{mode}] {len(seconds)} utterances, {hours:.2f} h, per task: {counts}, {options}")
        logging.info(f"[{mode}] limits {options.limits}: {options.describe_limits(world_size)}")
        fresh = None
        if iter_options.train:
            times = {task: f"{number:.3g}" for task, number in times_seen(tasks, options).items()}
            logging.info(f"[{mode}] how often a pass shows an utterance of each task: {times}")
            if args.prompt_files:
                fresh = FreshPrompts(read_wordings(args.prompt_files), read_table(paths["prompt"]), tasks, args.seed)
                fresh.check()
        return PaMIterFactory(
            dataset=cls.build_dataset(args, iter_options),
            seconds=seconds,
            tasks=tasks,
            options=options,
            train=iter_options.train,
            seed=args.seed,
            batches_per_epoch=iter_options.num_iters_per_epoch if iter_options.train else None,
            collate_fn=iter_options.collate_fn,
            num_workers=args.num_workers,
            pin_memory=args.ngpu > 0,
            rank=rank,
            world_size=world_size,
            fresh_prompts=fresh,
        )


def parameter_groups(model: torch.nn.Module, scales: Mapping[str, float], lr: float) -> list[dict[str, Any]]:
    """Trainable parameters in groups of one learning rate each, with its factor on ``lr`` as ``scale``. ``scales``:
    parameter-name prefix -> factor; the longest matching prefix counts, others have factor 1.
    Raises ConfigError: a prefix that no trainable parameter begins with."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    matched = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = [prefix for prefix in scales if name.startswith(prefix)]
            matched.update(found)
            scale = float(scales[max(found, key=len)]) if found else 1.0
            groups.setdefault(scale, []).append(parameter)
    if unmatched := sorted(set(scales) - matched):
        raise ConfigError(f"lr_scale_conf: no trainable parameter begins with {', '.join(map(repr, unmatched))}")
    return [{"params": params, "lr": lr * scale, "scale": scale} for scale, params in sorted(groups.items())]


def _load_part(model: ESPnetPaMModel, path: str) -> None:
    """Load a file that holds some of the trained tensors; whole top-level parts only (frontend, ctc, decoder)."""
    state = read_trained(path)
    parts = {name.split(".")[0] for name in state}
    if unknown := sorted(parts - {name for name, _ in model.named_children()}):
        raise ConfigError(f"init_trained: {path} holds tensors of {', '.join(unknown)}, which this model does not have")
    rest = {name: tensor for name, tensor in model.state_dict().items() if name.split(".")[0] not in parts}
    load_strict(model, {**rest, **state}, path)


def tokenizer_of(args: argparse.Namespace) -> Any:
    """The LLM's tokenizer as the decoder uses it: same revision, same chat template."""
    names = ("revision", "local_files_only", "chat_template")
    return load_tokenizer(args.llm, **{k: v for k, v in (args.llm_conf or {}).items() if k in names})
