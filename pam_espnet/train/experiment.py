"""An experiment: its data, its merged configuration, and what must hold before anything is computed for it.

    exp/<tag>/key.json     what it depends on; written once, compared by every later command
    exp/<tag>/processes.json   how many processes train it, where the limits of batches are per GPU
    exp/<tag>/train.yaml   the merged configuration, as ESPnet reads it

A directory that was continued under another learning rate or other recordings would hold a model that its own
configuration does not describe.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pam_espnet.config import add_specs, load_yaml, merge, resolve, used_encoders, write_config
from pam_espnet.data.audio_ark import ARCHIVED_SOUND, locate
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.passport import Passport
from pam_espnet.data.prompts import read_wordings
from pam_espnet.data.tables import read_table
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import check_key, exclusive, read_json, sha256_file

# What may change without changing the model.
_FREE = ("resources", "num_workers", "log_interval", "checkpoint_steps")
_STREAMS = ("text,text,text", "prompt,prompt,text", "utt2task,task,text", "utt2num_samples,num_samples,text_int")


def experiment_parser(description: str | None, needed: Sequence[str] = ("train", "valid", "exp")) -> Any:
    """The options that all commands of training share; those in ``needed`` must be given."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, text in (
        ("train", "formatted training set, dump/raw/<set>"),
        ("valid", "formatted validation set"),
        ("feats", "root of the feature cache, dump/feats; left out: encoders are run on waveforms"),
        ("exp", "experiment directory"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", required=name in needed, help=text)
    parser.add_argument(
        "--config", nargs="+", required=True, metavar="FILE", help="YAML files; later ones are laid over earlier ones"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY.SUB=VALUE", help="changes on top (YAML values)")
    return parser


def merged_config(files: Sequence[str | Path], changes: Sequence[str] = ()) -> dict[str, Any]:
    """Configuration files and changes in one mapping; of fusion ``single`` with its encoder alone.
    Raises ConfigError: a file that is none, or a ``fusion_conf.encoder`` that is not configured."""
    config = resolve(files, changes)
    frontend = config.get("frontend_conf") or {}
    own = dict(frontend.get("fusion_conf") or {})
    if frontend.get("fusion") != "single" or "encoder" not in own:
        return config
    name, known = own.pop("encoder"), dict(frontend.get("encoders") or {})
    if name not in known:
        raise ConfigError(f"fusion single:{name}: no such encoder; frontend_conf.encoders has {', '.join(known)}")
    others: dict[str, Any] = dict.fromkeys(known)  # null removes them
    del others[name]
    return merge(config, {"frontend_conf": {"encoders": others, "fusion_conf": own or None}})


@dataclass(frozen=True)
class Experiment:
    """What an experiment is made of."""

    exp: Path  # its directory
    train: Path  # formatted data directories
    valid: Path
    feats: Path | None  # root of the feature cache; None: trained on waveforms
    config: dict[str, Any]  # merged

    @classmethod
    def of(cls, args: argparse.Namespace) -> Experiment:
        """From the options of ``experiment_parser``; ``batching_conf.limits`` of an experiment that an older version
        began, which had no such option, stays global."""
        config = merged_config(args.config, args.set)
        noted = None if args.exp is None else _noted_batching(args.exp)
        limits = {"limits": "per_gpu" if noted is None else noted.get("limits", "global")}
        config["batching_conf"] = {**limits, **(config.get("batching_conf") or {})}
        return cls(args.exp, args.train, args.valid, args.feats, config)

    def begin(self, processes: int | None = None) -> None:
        """Check the configuration and note what the experiment depends on; later, compare it with what is noted.

        Args:
            processes: those that share every batch, where training is about to begin.

        Raises:
            ConfigError: the configuration cannot work.
            DataError: the directory was begun with another configuration or other data; names what differs. Also data
                or prompt files that cannot be used.
        """
        data = {}
        for path in (self.train, self.valid):
            tables = DataDir.load(path)
            data[path.name] = {
                "audio_sha256": Passport.load(path).audio_digest(tables.utterances),
                "tables_sha256": tables.digest(),
            }
        config = {name: value for name, value in self.config.items() if name not in _FREE}
        batching, noted = config.get("batching_conf") or {}, _noted_batching(self.exp)
        if batching.get("limits") == "global" and noted is not None and "limits" not in noted:
            config["batching_conf"] = {name: value for name, value in batching.items() if name != "limits"}
        key = {"config": config, "data": data}
        if files := self.config.get("prompt_files"):
            read_wordings(files)
            key["prompt_files_sha256"] = {task: sha256_file(path) for task, path in files.items()}
        if not (self.exp / "key.json").exists():
            check_config(self.config)
        hint = f"give another --tag, or remove {self.exp} to train it anew"
        check_key(self.exp / "key.json", key, hint)
        if processes and batching.get("limits") == "per_gpu":
            hint = f"train it in as many processes as before, or {hint}; with batching_conf.limits=global any number do"
            check_key(self.exp / "processes.json", {"processes": processes}, hint)

    @contextlib.contextmanager
    def locked(self, first: bool, processes: int | None = None) -> Iterator[list[str]]:
        """Of several processes the ``first`` holds the directory's lock and begins (see there); yields ``arguments``,
        for which the others, which share its directory and write nothing there, have a folder of their own."""
        with (
            exclusive(self.exp / ".lock") if first else contextlib.nullcontext(),
            contextlib.nullcontext(self.exp) if first else tempfile.TemporaryDirectory() as folder,
        ):
            if first:
                self.begin(processes)
            else:
                logging.getLogger().setLevel(logging.ERROR)  # one process logs what all of them do
            yield self.arguments(Path(folder))

    def arguments(self, folder: Path | None = None) -> list[str]:
        """Write ``train.yaml`` (to ``folder``, or the experiment's directory); ESPnet's own options that name it, the
        directory and every stream of the data.
        Raises ConfigError: a part of the feature cache is not there."""
        config = self.config if self.feats is None else add_specs(self.config, self.feats)
        path = (folder or self.exp) / "train.yaml"
        write_config(config, path)
        words = ["--config", str(path), "--output_dir", str(self.exp), "--resume", "true"]
        for mode, raw in (("train", self.train), ("valid", self.valid)):
            streams = [f"{raw}/{stream}" for stream in _STREAMS]
            if self.feats is None:
                archived = any(locate(value)[1] is not None for value in read_table(raw / "wav.scp").values())
                streams.append(f"{raw}/wav.scp,speech,{ARCHIVED_SOUND if archived else 'sound'}")
            else:
                for name in used_encoders(config):
                    scp = self.feats / name / raw.name / "feats.scp"
                    if not scp.is_file():
                        raise ConfigError(f"{scp}: no such file\n  -> make it with pam_cache_features, or omit --feats")
                    streams.append(f"{scp},feats_{name},kaldi_ark")
            for stream in streams:
                words += [f"--{mode}_data_path_and_name_and_type", stream]
        return words


def _noted_batching(exp: Path) -> Mapping[str, Any] | None:
    """``batching_conf`` as an experiment was begun with it; None: it was not begun."""
    if (exp / "key.json").exists():
        return read_json(exp / "key.json")["config"].get("batching_conf") or {}
    if (exp / "config.yaml").exists():  # of version 0.1
        return load_yaml(exp / "config.yaml").get("batching_conf") or {}
    return None


def check_config(config: Mapping[str, Any]) -> None:
    """Find what would end training later, without loading a weight: keys that nobody reads, options out of range,
    model folders that are not there, LoRA targets that the LLM does not have.

    Raises ConfigError: naming the key.
    """
    from espnet2.tasks.abs_task import optim_classes, scheduler_classes

    from pam_espnet.data.batching import BatchingOptions
    from pam_espnet.frontend.encoders.base import layer_dtype, model_folder_or_id
    from pam_espnet.frontend.encoders.registry import encoder_class
    from pam_espnet.frontend.fusion.registry import build_fusion
    from pam_espnet.frontend.masking import MaskOptions
    from pam_espnet.model import model_options
    from pam_espnet.train.scaling import scaled
    from pam_espnet.train.task import PaMTask
    from pam_espnet.train.warm_options import WarmStartOptions

    known = vars(PaMTask.get_parser().parse_args([]))
    for key in config:
        if key not in known:
            close = "".join(f"; did you mean {name!r}?" for name in difflib.get_close_matches(key, known, 1))
            raise ConfigError(f"config key {key!r}: nothing reads it{close}")
    for key, classes in (("optim", optim_classes), ("scheduler", scheduler_classes)):
        if not (name := config.get(key)):
            continue
        if name not in classes:
            raise ConfigError(f"{key}: unknown {name!r}; one of {', '.join(sorted(classes))}")
        try:
            inspect.signature(classes[name]).bind(None, **(config.get(f"{key}_conf") or {}))
        except TypeError as error:
            raise ConfigError(f"{key}_conf: {error}; {name} takes {inspect.signature(classes[name])}") from error
    _check_schedule(config)
    model_options(config)
    read_options(BatchingOptions, config, "batching_conf")
    scaled(config, 1)
    read_options(WarmStartOptions, config, "warm_start_conf")
    frontend = config["frontend_conf"]
    read_options(MaskOptions, frontend, "mask_conf")
    names, counts = used_encoders(config), []
    for name in names:
        options = dict(frontend["encoders"][name])
        cls = encoder_class(options.pop("type", "(none)"))
        layer_dtype(frontend.get("encoder_dtype", "auto"), cls, "cpu")
        try:
            inspect.signature(cls).bind(**options)
        except TypeError as error:
            raise ConfigError(f"frontend_conf.encoders.{name}: {error}; it takes {inspect.signature(cls)}") from error
        if options.get("path"):
            model_folder_or_id(options["path"])
        counts.append(len(options.get("layers") or [0]))
    own = frontend.get("fusion_conf") or {}
    build_fusion(frontend["fusion"], num_layers=counts, width=8, prompt_width=8, names=names, **own)
    # Of an id whose config.json was never fetched nothing can be known yet; loading it checks the same.
    with contextlib.suppress(OSError):
        bare_llm(config)


def _check_schedule(config: Mapping[str, Any]) -> None:
    """Say so where the learning rate is to reach its end at another step than the training does."""
    steps, per_epoch = config.get("max_epoch"), config.get("num_iters_per_epoch")
    if not steps or not per_epoch:
        return
    steps = int(steps) * int(per_epoch) // int(config.get("accum_grad") or 1)
    for name in ("max_steps", "total_steps"):
        planned = (config.get("scheduler_conf") or {}).get(name, steps)
        if planned != steps:
            logging.warning(f"scheduler_conf.{name} is {planned}, but the training has {steps} steps")


def read_options[T](cls: type[T], config: Mapping[str, Any], key: str) -> T:
    """``cls`` from the mapping ``config[key]``, which may be missing.
    Raises ConfigError: an option that it does not have."""
    try:
        return cls(**(config.get(key) or {}))
    except TypeError as error:
        raise ConfigError(f"config key {key!r}: {error}") from error


def bare_llm(config: Mapping[str, Any], cuda: bool = False) -> Any:
    """The configured LLM with its LoRA on torch's meta device: shapes without weights, from its ``config.json``; with
    ``cuda`` in the precision in which a GPU will train it.

    Raises:
        ConfigError: no such folder, or LoRA options that do not fit it.
        OSError: an id whose configuration is not on this machine.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pam_espnet.llm.llm import recomputed_every
    from pam_espnet.llm.lora import add_lora
    from pam_espnet.llm.quantize import check_quantize
    from pam_espnet.llm.shard import check_shard
    from pam_espnet.llm.sources import choose_dtype, hub_source

    conf = dict(config.get("llm_conf") or {})
    recomputed_every(conf.get("gradient_checkpointing"))  # raises
    check_shard(conf.get("shard"))
    check_quantize(conf.get("quantize"), conf.get("shard"))
    name = conf.get("dtype", "auto")
    # The GPU is perhaps another machine's; those that train LLMs compute bfloat16.
    dtype = torch.bfloat16 if name == "auto" and cuda else choose_dtype(name)
    source = hub_source(config["llm"], conf.get("revision"), conf.get("local_files_only", False))
    with torch.device("meta"):
        own = AutoConfig.from_pretrained(config["llm"], **source)
        lm = AutoModelForCausalLM.from_config(own, dtype=dtype).requires_grad_(False)
        if conf.get("lora") is not None:
            add_lora(lm, conf["lora"])
    return lm
