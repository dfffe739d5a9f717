"""ESPnetPaMModel: waveform (or cached features) + prompt + answer -> loss, statistics, weight; its construction.

Frontend and LLM meet here alone. The loss is the mean cross-entropy over target tokens (the answer and its end token);
``weight`` is their number, so that ESPnet's trainer weights every token the same over ranks and logging intervals.

Dimension letters: B utterances, N samples, T encoder frames, U adapter frames, L text tokens, H layers, D width.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from espnet2.torch_utils.device_funcs import force_gatherable
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch import Tensor

from pam_espnet.config import check_number, check_options, drop_removed
from pam_espnet.data.tasks import TASKS
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.frontend.ctc_head import EmbeddingCTC
from pam_espnet.frontend.frontend import AudioEmbeddings, PaMFrontend
from pam_espnet.frontend.fusion.routing import router_loss
from pam_espnet.llm.llm import LLM
from pam_espnet.llm.prompt_layout import BatchLayout, Inputs, build_inputs, lay_out, layout
from pam_espnet.llm.quantize import elements
from pam_espnet.transfer import send

FEATURE_PREFIX = "feats_"


class ESPnetPaMModel(AbsESPnetModel):
    """Prompt-aware speech LLM (PaM, Shan et al., EMNLP 2025, arXiv 2502.15178, section 3).

    Args:
        frontend: encoders, adapters and fusion.
        tasks: task names; a batch's ``task`` holds indices into it.
        ctc: head of the warm start; trained on with ``ctc_weight`` and kept in checkpoints.
        router_loss_weight: weight of the router's supervision by task; 0, the paper's reading, turns it off.
        ctc_weight: weight of the CTC loss on ASR utterances during joint training; 0 turns it off.
        ctc_posteriors: show the LLM what the CTC head detects: token embeddings, weighted by the posteriors of each
            frame, are added to the audio embeddings. The papers do not have it; speech encoders and LLMs were joined
            by CTC posteriors alone in LegoSLM (Ma et al. 2025, arXiv 2505.11352).
        exit_weight: joint optimisation for early exit (Shan et al., arXiv 2412.01455): mean weight of the answer's loss
            read from one of ``exit_layers``, drawn in each step, through the shared output layer; 0 turns it off.
            Deeper ones weigh more, in proportion to their depth (as in LayerSkip, Elhoushi et al., ACL 2024).
        exit_layers: blocks, from 1 to one less than the LLM has.
    """

    def __init__(
        self,
        frontend: PaMFrontend,
        decoder: LLM,
        tasks: Sequence[str],
        ctc: EmbeddingCTC | None = None,
        router_loss_weight: float = 0.0,
        ctc_weight: float = 0.0,
        ctc_posteriors: bool = False,
        exit_weight: float = 0.0,
        exit_layers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if not isinstance(exit_layers, list | tuple):
            raise ConfigError(f"model_conf.exit_layers: {exit_layers!r}; must be a list of blocks")
        for layer in exit_layers:  # the LLM's blocks before its last
            check_number(layer, "model_conf.exit_layers", at_least=1, below=decoder.num_layers, whole=True)
        check_number(exit_weight, "model_conf.exit_weight", at_least=0)
        if exit_weight > 0 and not exit_layers:
            raise ConfigError("model_conf.exit_weight: needs exit_layers")
        if not isinstance(ctc_posteriors, bool):
            raise ConfigError(f"model_conf.ctc_posteriors: {ctc_posteriors!r}; must be true or false")
        if ctc_posteriors and ctc is None:
            raise ConfigError("model_conf.ctc_posteriors needs model_conf.ctc_tokens (written by the warm start)")
        self.frontend = frontend
        self.decoder = decoder
        self.ctc = ctc
        self.ctc_posteriors = ctc_posteriors
        self.tasks = tuple(tasks)
        self.router_loss_weight = router_loss_weight
        self.ctc_weight = ctc_weight
        self.exit_weight = exit_weight
        self.exit_layers = tuple(sorted(set(exit_layers)))
        self.step_size = (0, 0, 0)  # of the last forward: positions of the LLM's input, with padding, target tokens
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_forgive_frozen)

    # -- audio and prompt -------------------------------------------------------------------------------------------

    def prompt_vectors(self, prompts: Sequence[str]) -> Tensor:
        """The LLM's last hidden state of each prompt, (B, D); each distinct prompt is run once and kept."""
        return self.decoder.prompt_vectors(prompts)

    def audio_embeddings(
        self,
        prompts: Sequence[str],
        num_samples: Tensor,
        wave: Tensor | None = None,
        features: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        only: Sequence[str] | None = None,
    ) -> AudioEmbeddings:
        """Route by the prompts, then encode, adapt and mix: (B, U, D) embeddings of the LLM's width.

        Args:
            prompts: one per utterance.
            num_samples: (B,) samples of each utterance, on the host.
            wave: (B, N) in [-1, 1]; may be None when ``features`` holds what the routing needs.
            features: cached hidden states per encoder, ((B, T, H*D), (B,)).
            only: the one encoder to use for each utterance (the warm start); None follows the routing.
        """
        return self.frontend(num_samples, self.prompt_vectors(prompts), wave=wave, features=features, only=only)

    def build_inputs(
        self,
        prompts: Sequence[str],
        audio: AudioEmbeddings,
        answers: Sequence[Sequence[int]] | None,
        laid_out: BatchLayout | None = None,
        alone: bool = False,
    ) -> Inputs:
        """Fill ``[prompt head | audio | prompt tail | answer]`` (see ``llm.prompt_layout``), where it is not laid out
        yet by prompts and answers. ``alone``: compute the CTC head's part of each utterance by itself."""
        if laid_out is None:
            layouts = [layout(self.decoder.tokenizer, prompt, self.decoder.system) for prompt in prompts]
            laid_out = lay_out(layouts, audio.lengths.tolist(), answers)
            laid_out = laid_out._replace(numbers=send(laid_out.numbers, audio.embeddings.device))
        embeddings = audio.embeddings
        if self.ctc_posteriors and self.ctc is not None:
            lengths, expert = audio.lengths if alone else None, audio.routing.expert
            embeddings = embeddings + self.ctc.expected_embeddings(embeddings, expert, lengths)
        return build_inputs(laid_out, embeddings, self.decoder.embed)

    # -- ESPnet's contract ------------------------------------------------------------------------------------------

    def forward(self, **batch: Any) -> tuple[Tensor, dict[str, Tensor | None], Tensor]:
        """Loss of one batch.

        The host knows all lengths, so it hardly waits for the device: tests/train/test_waits.py has what is left.

        Args (see ``train.collate``):
            text: answer token ids with the end token, B lists.
            prompt: B strings.
            task: B indices into ``tasks``.
            num_samples: B numbers.
            layout: ``BatchLayout`` of these, its numbers on the device; made here where it is missing.
            speech: (B, N) waveform; or, instead, feats_<encoder>: (B, T, H*D) cached hidden states.

        Returns:
            loss (1,), statistics, weight (1,), the number of target tokens.
        """
        prompts, answers, tasks = batch["prompt"], batch["text"], batch["task"]
        num_samples = torch.tensor(batch["num_samples"])
        audio = self.audio_embeddings(prompts, num_samples, batch.get("speech"), cached_features(batch))
        inputs = self.build_inputs(prompts, audio, answers, batch.get("layout"))
        exit_layer = self._draw_exit()
        nll, correct, exit_nll = self.decoder.token_losses(inputs, exit_layer)
        self.step_size = (inputs.positions, inputs.mask.numel(), nll.numel())
        weight = torch.full((), float(nll.numel()), device=nll.device)
        loss = nll.mean()
        task = send(torch.tensor(tasks), nll.device)
        task_of_token = task[inputs.target_index // inputs.mask.size(1)]
        stats = self._task_statistics(nll.detach(), correct, task_of_token, set(tasks))
        stats["acc"] = correct.float().mean()
        stats["loss_answer"] = loss.detach()
        if exit_layer is not None and exit_nll is not None:
            mean_layer = sum(self.exit_layers) / len(self.exit_layers)
            loss = loss + self.exit_weight * exit_layer / mean_layer * exit_nll.mean()
            stats["loss_exit"] = exit_nll.detach().mean()
        if self.router_loss_weight > 0 and audio.routing.expert_logits is not None:
            value = router_loss(audio.routing, task) * rank_share(len(tasks), weight)
            loss = loss + self.router_loss_weight * value
            stats["loss_router"] = value.detach()
        if self.ctc_weight > 0 and self.ctc is not None and "asr" in self.tasks:
            asr = self.tasks.index("asr")
            transcripts = [answer[:-1] if one == asr else [] for answer, one in zip(answers, tasks, strict=True)]
            total, count, _ = self.ctc.loss(audio.embeddings, audio.lengths, transcripts, audio.routing.expert)
            value = total / max(count, 1) * rank_share(count, weight)
            if not count and _several_ranks():  # nothing to align here: a gradient of zeros is what others' is added to
                value = value + 0.0 * sum(p.sum() for p in self.ctc.parameters())
            loss = loss + self.ctc_weight * value
            stats["loss_ctc"] = value.detach()
        stats["loss"] = loss.detach()
        # One value becomes a vector of one: what ESPnet's trainer sums over ranks must not be a scalar.
        return force_gatherable((loss, stats, weight), loss.device)

    def _draw_exit(self) -> int | None:
        """The exit block of a training step, drawn by rank 0 for all ranks; None when there is none."""
        if not self.training or self.exit_weight == 0:
            return None
        drawn = torch.randint(len(self.exit_layers), (1,))
        if _several_ranks():
            drawn = drawn.to(self.decoder.device)
            torch.distributed.broadcast(drawn, 0)
        return self.exit_layers[int(drawn)]

    def _task_statistics(
        self, nll: Tensor, correct: Tensor, task: Tensor, present: set[int]
    ) -> dict[str, Tensor | None]:
        """Loss and accuracy per task, the same keys on every rank (None where no rank had one): ESPnet reduces key by
        key, and a rank without a sample of some task would never return. ``present``: the tasks of this rank."""
        size = len(self.tasks)
        table = torch.zeros(3, size, device=nll.device)
        table[0].index_add_(0, task, nll.float())
        table[1].index_add_(0, task, correct.float())
        table[2].index_add_(0, task, torch.ones_like(nll, dtype=torch.float32))
        if _several_ranks():
            torch.distributed.all_reduce(table)
            present = {i for i, count in enumerate(table[2].tolist()) if count}  # as ESPnet reads right after this
        stats: dict[str, Tensor | None] = {}
        for i, name in enumerate(self.tasks):
            stats[f"loss_{name}"] = table[0, i] / table[2, i] if i in present else None
            stats[f"acc_{name}"] = table[1, i] / table[2, i] if i in present else None
        return stats

    def collect_feats(self, **batch: Any) -> dict[str, Tensor]:
        """Nothing to collect: no statistics of features are used, lengths come from ``utt2num_samples``."""
        raise NotImplementedError("set model_conf.extract_feats_in_collect_stats: false")

    @property
    def leaves_unused(self) -> bool:
        """Whether a step can leave trained parameters without a gradient: a CTC head kept for decoding alone."""
        return self.ctc is not None and self.ctc_weight == 0 and not self.ctc_posteriors

    def alike_names(self) -> list[str]:
        """Names of what never changes: frozen weights and buffers, which every process computes or loads itself."""
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        return [*frozen, *(name for name, _ in self.named_buffers())]

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Everything that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def rank_share(count: int, weight: Tensor) -> Tensor | float:
    """Factor on a mean over ``count`` things of this rank, to become its part of the mean over all ranks. Alone, 1.

    ESPnet's trainer weighs each rank's loss with ``weight``, its target tokens. A mean over anything else (utterances,
    words to align) would count too much on a rank that has few of them.
    """
    if not _several_ranks():
        return 1.0
    sums = torch.stack([weight, torch.full_like(weight, float(count))])
    torch.distributed.all_reduce(sums)
    return sums[0] / weight * count / sums[1].clamp_min(1.0)


def cached_features(batch: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The ``feats_<encoder>`` streams of a batch by encoder name, or None when there is none."""
    names = [key for key in batch if key.startswith(FEATURE_PREFIX) and not key.endswith("_lengths")]
    if not names:
        if "speech" not in batch:
            raise DataError("batch", "neither 'speech' nor a 'feats_<encoder>' stream is in the data list")
        return None
    return {name.removeprefix(FEATURE_PREFIX): (batch[name], batch[f"{name}_lengths"]) for name in names}


def _frozen_names(model: torch.nn.Module) -> set[str]:
    # remove_duplicate=False: tied weights (output layer = embedding) appear in state dicts under both names.
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return frozen | {n for n, _ in model.named_buffers() if n.startswith("decoder.")}


def _drop_frozen(model: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    frozen = _frozen_names(model)
    for key in list(state):
        name = key.removeprefix(prefix)
        if name in frozen or name.partition(".weight.")[0] + ".weight" in frozen:  # or the scales of a 4-bit weight
            del state[key]


def _forgive_frozen(model: torch.nn.Module, incompatible: Any) -> None:
    frozen = _frozen_names(model)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in frozen]


def _several_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _model_options(ctc_tokens: str | None = None, extract_feats_in_collect_stats: bool = False) -> None:
    """Options of ``model_conf`` that are read here and by ESPnet; the rest goes to ESPnetPaMModel."""


_BLOCKS = ("llm_conf", "frontend_conf", "model_conf")
_REMOVED = {"model_conf": {"exit_layer_dropout": 0.0}}  # see config.drop_removed


def model_options(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mappings of ``_BLOCKS``; raises ConfigError for keys that are missing or that nobody reads."""
    if not config.get("llm"):
        raise ConfigError("config key 'llm' is missing: give the LLM's folder or its Hugging Face id")
    readers: tuple[tuple[Callable[..., Any], ...], ...] = (
        (LLM.from_pretrained, LLM),
        (PaMFrontend,),
        (ESPnetPaMModel, _model_options),
    )
    blocks = []
    for key, known in zip(_BLOCKS, readers, strict=True):
        if not isinstance(config.get(key) or {}, Mapping):
            raise ConfigError(f"config key {key!r}: must be a mapping of options, got {config[key]!r}")
        blocks.append(drop_removed(config.get(key) or {}, _REMOVED.get(key, {}), key))
        check_options(blocks[-1], key, *known)
    if missing := [name for name in ("encoders", "fusion") if name not in blocks[1]]:
        raise ConfigError(f"config key 'frontend_conf': {' and '.join(missing)} missing")
    return blocks


def choose_tf32(use: bool | None) -> None:
    """Whether float32 products on GPUs may be computed in TF32 (sums in float32), in this process from now on; None:
    yes. CPUs have nothing like it."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = use is not False
        logging.info(f"TF32 for products in float32 on GPUs: {'off' if use is False else 'on'} (use_tf32)")


def build_model(config: Mapping[str, Any]) -> ESPnetPaMModel:
    """The model that ``config`` describes, with its pretrained parts, untrained ones freshly initialised.

    Args:
        config: keys ``llm`` (folder or Hugging Face id), ``llm_conf``, ``frontend_conf``, ``model_conf``, ``use_tf32``,
            as in an experiment's ``config.yaml``.

    Raises ConfigError: unknown keys, missing model folders, values that cannot work.
    """
    llm_conf, frontend_conf, model_conf = model_options(config)
    choose_tf32(config.get("use_tf32"))
    decoder = LLM.from_pretrained(config["llm"], **llm_conf)
    frontend = PaMFrontend(width=decoder.width, prompt_width=decoder.width, **frontend_conf)
    tokens = model_conf.get("ctc_tokens")
    options = {k: v for k, v in model_conf.items() if k not in inspect.signature(_model_options).parameters}
    ctc = None
    if tokens:
        token_ids = _read_token_ids(Path(tokens), decoder)
        experts = frontend.fusion.num_experts
        ctc = EmbeddingCTC(token_ids, decoder.embed(torch.tensor(token_ids)), num_experts=experts)
    elif options.get("ctc_weight"):
        raise ConfigError("model_conf.ctc_weight needs model_conf.ctc_tokens (written by the warm start of stage 3)")
    model = ESPnetPaMModel(frontend=frontend, decoder=decoder, tasks=tuple(TASKS), ctc=ctc, **options)
    trained = sum(p.numel() for p in model.trainable_parameters().values())
    total = sum(map(elements, model.parameters()))
    logging.info(f"model: {trained:,} trained of {total:,} parameters (frozen encoders not counted)")
    return model


def _read_token_ids(path: Path, decoder: LLM) -> list[int]:
    if not path.is_file():
        raise ConfigError(f"model_conf.ctc_tokens: no such file: {path}\n  -> run stage 3, which writes it")
    words = path.read_text(encoding="utf-8").split()
    if wrong := [word for word in words if not word.isdigit() or int(word) >= decoder.vocab_size]:
        hint = "  -> made with another LLM? remove the file; stage 3 writes it again"
        raise ConfigError(f"{path}: {wrong[0]!r} is not a token of this LLM\n{hint}")
    return [int(word) for word in words]
