"""A trained experiment that answers prompts about audio.

Dimension letters: B utterances, N samples, U adapter frames, P prefix positions, D width.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pam_espnet.config import load_yaml
from pam_espnet.data.tables import one_line
from pam_espnet.data.tasks import task_spec
from pam_espnet.decode.answers import Answer, PartialAnswer
from pam_espnet.decode.batches import RESERVE
from pam_espnet.decode.long_recordings import MAX_SECONDS, Segment, answer_pieces, cut_recording
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.waveforms import as_waveform
from pam_espnet.engine.engine import make_engine
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.errors import ConfigError
from pam_espnet.fileio import MODEL_FILE, load_strict, read_trained
from pam_espnet.frontend.frontend import AudioEmbeddings, join_audio
from pam_espnet.llm.quantize import dequantize
from pam_espnet.model import ESPnetPaMModel, build_model
from pam_espnet.search.answer_scores import answer_log_probs
from pam_espnet.search.beam import beam_search
from pam_espnet.search.constraints import AnswerSet, Constraint, NoRepeatNgram
from pam_espnet.search.ctc import CTCTable, token_classes
from pam_espnet.search.drafts import WholeAnswer, draft_search
from pam_espnet.search.hypothesis import Partial


class SpeechLLM:
    """A trained model that answers prompts about audio.

    Args:
        model: built and loaded; its weights must not change afterwards.
        options: how answers are decoded.
        warm_losses: the warm start's loss of each task whose answers the task vocabulary was made from; None: it was
            made from all, and only the CTC head of ASR was trained.
        int8: round the LLM's weights to 8 bits.

    Attributes:
        encodes_alone: recordings are encoded one by one. On a GPU a product's last bits depend on how many rows there
            are: in a batch, on the neighbours.

    Raises ConfigError: options that this model cannot follow, such as a task vocabulary without the warm start's
    list of tokens, an answer longer than ``max_new_tokens``, drafts for an LLM that cannot verify them.
    """

    def __init__(
        self,
        model: ESPnetPaMModel,
        options: AnswerOptions,
        device: str = "cpu",
        warm_losses: Mapping[str, str] | None = None,
        int8: bool = False,
    ) -> None:
        self.model, self.options, self.device = model.to(device).eval(), options, device
        self.on_gpu = device.startswith("cuda")
        if self.on_gpu and torch.device(device).index is not None:  # kernels are launched on the current device
            torch.cuda.set_device(device)
        self.encodes_alone = self.on_gpu and options.batch_invariant
        self.vocabulary_tasks = warm_losses
        self.ctc_tasks = {task for task, loss in (warm_losses or {"asr": "ctc"}).items() if loss == "ctc"}
        if options.task_vocabulary and model.ctc is None:
            raise ConfigError("task_vocabulary: this model was trained without the warm start's list of tokens")
        if model.ctc is None or not self.ctc_tasks:
            if options.draft.kind == "ctc":
                raise ConfigError("draft.kind: ctc needs a model whose warm start fitted a task with CTC")
            if options.ctc.weight > 0:
                raise ConfigError("ctc.weight: needs a model whose warm start fitted a task with CTC; set it to 0")
        vocabulary = model.ctc.token_ids.tolist() if options.task_vocabulary and model.ctc is not None else None
        # Answers of a set are compared at full depth, whatever the search does.
        graphs, invariant = options.graphs, options.batch_invariant
        self.full_depth = make_engine(model.decoder, vocabulary, None, int8, graphs, invariant)
        self.engine = self.full_depth.with_exits(options.exit)
        if options.draft.kind != "none" and not self.engine.can_verify:
            raise ConfigError("draft: only Llama-type LLMs with llm_conf.fused_decoding: true; set draft.kind: none")
        self._answer_sets = {
            task: [self.engine.indices(model.decoder.answer_ids(answer, task)[:-1]) for answer in answers]
            for task, answers in options.answer_sets.items()
        }
        for task, answers in self._answer_sets.items():
            if (longest := max(map(len, answers)) + 1) > options.beam.max_new_tokens:
                raise ConfigError(f"answer_sets.{task}: an answer needs {longest} tokens; raise max_new_tokens")

    @classmethod
    def load(
        cls,
        exp_dir: str | Path,
        options: AnswerOptions,
        device: str = "cpu",
        dtype: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> SpeechLLM:
        """Build from ``config.yaml`` and load ``model.safetensors`` strictly.

        Args:
            exp_dir: experiment directory.
            dtype: precision of the LLM: "float32", "bfloat16", or "int8" (weights of its products in the search, all
                else in float32); None: as configured.
            config: replaces ``config.yaml``, whose paths start at the recipe's folder.

        Raises ConfigError, CheckpointError: what is missing or does not fit, and which stage makes it.
        """
        config = dict(load_yaml(Path(exp_dir) / "config.yaml") if config is None else config)
        llm_conf = dict(config.get("llm_conf") or {})
        int8 = bool(llm_conf.pop("int8_decoding", False)) if dtype is None else dtype == "int8"  # a key of version 0.1
        config["llm_conf"] = llm_conf | ({} if dtype is None else {"dtype": "float32" if int8 else dtype})
        if dtype == "float32":  # asked for: an answer alone is then the answer in a batch, which TF32 would round away
            config["use_tf32"] = bool(config.get("use_tf32"))
        warm_start = config.get("warm_start_conf") or {}
        try:
            model = build_model(config)
            if llm_conf.get("quantize"):
                dequantize(model.decoder.lm)
            checkpoint = Path(exp_dir) / MODEL_FILE
            load_strict(model, read_trained(checkpoint), checkpoint)
            return cls(model, options, device, warm_start.get("losses"), int8)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"the model does not fit on {device}: decoding holds the whole LLM there, even if training has sharded "
                f"or rounded it (llm_conf): {error}\n  -> choose a GPU with more memory, or --device cpu"
            ) from error

    def with_exits(self, exits: ExitOptions) -> SpeechLLM:
        """The same model and weights with another ``options.exit``."""
        other = copy.copy(self)
        other.options = replace(self.options, exit=exits)
        other.engine = self.full_depth.with_exits(exits)
        return other

    def keep_prompts(self, prompts: Collection[str]) -> None:
        """Free the LLM's own weights, which the engine has packed: from now on it answers these prompts, no others."""
        for prompt in sorted(set(prompts)):
            self.model.decoder.prompt_vector(prompt)
        self.engine.take_over()

    def forget_prompts(self, most: int) -> None:
        """Free what is kept of each prompt where there are more than ``most``: for programs that ask without end."""
        self.model.decoder.forget_prompts(most)

    @cached_property
    def free_memory(self) -> int:
        """Bytes of the GPU for batches, as they were when this was asked for the first time: before the first batch."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free - RESERVE * total)

    def release(self) -> bool:
        """Free the buffers that the engine keeps from batch to batch; False where it keeps none."""
        self.engine.release()
        return self.engine.graphs

    @torch.no_grad()
    def encode(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> AudioEmbeddings:
        """Audio embeddings of waveforms, each (N,) float32 at the frontend's sample rate, one prompt for each."""
        if self.encodes_alone and len(waves) > 1:
            pairs = zip(waves, prompts, strict=True)
            return join_audio([self.encode([wave], [prompt]) for wave, prompt in pairs])
        lengths = torch.tensor([len(wave) for wave in waves])
        batch = torch.zeros(len(waves), int(lengths.max()))
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave)] = torch.from_numpy(wave)
        return self.model.audio_embeddings(prompts, lengths, batch.to(self.device))

    @torch.no_grad()
    def answer(
        self,
        waves: Sequence[np.ndarray],
        prompts: Sequence[str],
        tasks: Sequence[str] | None = None,
        audio: AudioEmbeddings | None = None,
        on_partial: Callable[[list[PartialAnswer]], None] | None = None,
        score_answers: bool = True,
    ) -> list[Answer]:
        """Answer one prompt per waveform.

        Args:
            waves: each (N,) at the frontend's sample rate, float in [-1, 1] or int16, int32, uint8.
            prompts: as many.
            tasks: as many names; without them no answer set applies.
            audio: what ``encode`` made of them, where they are answered more than once.
            on_partial: called after every step of the search with the utterances that took it: for streaming and
                progress bars.
            score_answers: also return the log-probability of each answer, where a task has a set of them; costs a few
                steps.

        Raises ConfigError: not as many of each, a waveform that cannot be one (see ``as_waveform``), a task whose
        answers the vocabulary lacks, or options that leave no answer.
        """
        if len(waves) != len(prompts) or (tasks is not None and len(tasks) != len(waves)):
            asked = "" if tasks is None else f", {len(tasks)} tasks"
            given = f"{len(waves)} waveforms, {len(prompts)} prompts{asked}"
            raise ConfigError(f"answer: as many prompts and tasks as waveforms, not {given}")
        waves = [as_waveform(wave, f"answer: waveform {index}") for index, wave in enumerate(waves)]
        if not waves:
            return []
        options, tasks = self.options, tasks or [""] * len(waves)
        known = self.vocabulary_tasks if options.task_vocabulary else None
        if known is not None and (strange := sorted(set(tasks) - set(known))):
            made_of, asked = ", ".join(known), ", ".join(strange) or "no task"
            raise ConfigError(f"task_vocabulary: it was made from answers of {made_of}, not of {asked}")
        caps = options.length_caps([len(wave) / self.model.frontend.sample_rate for wave in waves])
        if caps is not None:  # one of a set of answers is never cut
            sets = [self._answer_sets.get(task, [[]]) for task in tasks]
            caps = [max(cap, 1 + max(map(len, answers))) for cap, answers in zip(caps, sets, strict=True)]
        audio = self.encode(waves, prompts) if audio is None else audio
        inputs = self.model.build_inputs(prompts, audio, None, alone=self.encodes_alone)
        prefix, lengths = inputs.embeds, inputs.prefix_lengths
        constraints = self._constraints(tasks)
        show = None if on_partial is None else partial(self._show, on_partial)
        drafts: list[dict[str, Any] | None] = [None] * len(waves)
        if options.draft.kind == "none":
            ctc = self._ctc_table(tasks, audio)
            nbest = beam_search(self.engine, prefix, lengths, options.beam, caps, show, constraints, ctc)
        else:
            whole, most = self.drafts(tasks, audio), options.draft.most
            nbest, counts = draft_search(
                self.engine, prefix, lengths, options.beam, whole, most, caps, show, constraints
            )
            kinds = ["none" if one is None else options.draft.kind for one in whole]
            drafts = [{"drafter": kind, **asdict(count)} for kind, count in zip(kinds, counts, strict=True)]
        log_probs = self._answer_log_probs(tasks, prefix, lengths) if score_answers else {}
        answers = []
        for b, hypotheses in enumerate(nbest):
            if not hypotheses:
                raise ConfigError(f"the decoding options leave no answer to {prompts[b]!r}: {options}")
            tokens = [self.engine.token_ids(one.tokens) for one in hypotheses]
            fired = Counter({one.name: one.fired[b] for one in constraints})
            fired["length_cap"] = int(not hypotheses[0].ended)
            answers.append(
                Answer(
                    texts=[self.text(one) for one in tokens],
                    tokens=tokens,
                    scores=[one.score for one in hypotheses],
                    depths=[one.depths for one in hypotheses],
                    routing=self._routing(audio.routing, b),
                    constraints={name: times for name, times in fired.items() if times},
                    answer_log_probs=log_probs.get(b),
                    draft=drafts[b],
                )
            )
        return answers

    def segments(
        self,
        path: str | Path,
        prompt: str | None = None,
        task: str | None = "asr",
        window: float | None = None,
        max_seconds: float = MAX_SECONDS,
    ) -> Iterator[Segment]:
        """Answers about the parts of a recording of any length, each yielded when its batch is decoded.

        Args:
            path: an audio file; it is read as it is decoded.
            prompt: None: the task's.
            task: None: no answer set applies.
            window: seconds of each part; None: the parts that have speech, one between two pauses.
            max_seconds: longest part; speech that goes on longer is cut where it is quietest.

        Raises ConfigError: as ``answer``, and lengths that cannot be; DataError: a file that cannot be read, or a
        damaged place of it when it is reached.
        """
        if prompt is None:
            if task is None:
                raise ConfigError("nothing to answer: give a prompt, or a task for its default prompt")
            prompt = task_spec(task).default_prompt
        return answer_pieces(self, cut_recording(self, path, window, max_seconds), prompt, task, str(path))

    def transcribe(
        self,
        path: str | Path,
        prompt: str | None = None,
        task: str | None = "asr",
        window: float | None = None,
        max_seconds: float = MAX_SECONDS,
    ) -> list[Segment]:
        """All of ``segments``."""
        return list(self.segments(path, prompt, task, window, max_seconds))

    def text(self, tokens: Sequence[int]) -> str:
        """The words of an answer's token ids."""
        kept = [token for token in tokens if token not in self.model.decoder.eos_ids]
        return one_line(self.model.decoder.tokenizer.decode(kept, skip_special_tokens=True))

    @torch.no_grad()
    def drafts(self, tasks: Sequence[str], audio: AudioEmbeddings) -> list[WholeAnswer | None]:
        """The CTC head's best path of each utterance, in tasks that it was fitted to."""
        found: list[WholeAnswer | None] = [None] * len(tasks)
        covered = self._ctc_rows(tasks)
        if covered and self.model.ctc is not None:
            embeddings, lengths, experts = (x[covered] for x in (audio.embeddings, audio.lengths, audio.routing.expert))
            paths = self.model.ctc.greedy(embeddings, lengths, experts, self.encodes_alone)
            for b, tokens in zip(covered, paths, strict=True):
                found[b] = WholeAnswer(self.engine.indices(tokens))
        return found

    def _ctc_rows(self, tasks: Sequence[str]) -> list[int]:
        return [b for b, task in enumerate(tasks) if task in self.ctc_tasks]

    def _ctc_table(self, tasks: Sequence[str], audio: AudioEmbeddings) -> CTCTable | None:
        head, covered = self.model.ctc, [task in self.ctc_tasks for task in tasks]
        if head is None or self.options.ctc.weight == 0 or not any(covered):
            return None
        class_of = {token: number for number, token in enumerate(head.token_ids.tolist(), start=1)}
        if self.engine.ids is not None:
            class_of = {self.engine.index[token]: number for token, number in class_of.items()}
        width = self.engine.llm.vocab_size if self.engine.ids is None else len(self.engine.ids)
        classes = token_classes(class_of, self.engine.eos_ids, width)
        lengths = audio.lengths if self.encodes_alone else None
        log_probs = head.log_probs(audio.embeddings, audio.routing.expert, lengths)  # (B,U,C)
        return CTCTable.of(log_probs, audio.lengths, torch.tensor(covered), classes, self.options.ctc)

    def _show(self, on_partial: Callable[[list[PartialAnswer]], None], found: Sequence[Partial]) -> None:
        def shown(one: Partial) -> PartialAnswer:
            tokens = self.engine.token_ids(one.hypothesis.tokens)
            return PartialAnswer(one.utterance, tokens, one.hypothesis.score, one.done, self.text, one.settled)

        on_partial([shown(one) for one in found])

    def _answer_log_probs(self, tasks: Sequence[str], prefix: Tensor, lengths: Tensor) -> dict[int, dict[str, float]]:
        """Utterance -> log-probability of each answer, where the task has a set of answers."""
        found = {}
        for task, answers in self._answer_sets.items():
            if rows := [b for b, name in enumerate(tasks) if name == task]:
                own, temperature = lengths[rows], self.options.beam.temperature
                scores = answer_log_probs(self.full_depth, prefix[rows, : int(own.max())], own, answers, temperature)
                names = self.options.answer_sets[task]
                for b, values in zip(rows, scores.tolist(), strict=True):
                    found[b] = {name: round(value, 6) for name, value in zip(names, values, strict=True)}
        return found

    def _constraints(self, tasks: Sequence[str]) -> list[Constraint]:
        found: list[Constraint] = []
        if self.options.no_repeat_ngram:  # an answer of a set may repeat itself
            free = [b for b, task in enumerate(tasks) if task not in self._answer_sets]
            found.append(NoRepeatNgram(self.options.no_repeat_ngram, free))
        for task, answers in self._answer_sets.items():
            if rows := [b for b, name in enumerate(tasks) if name == task]:
                found.append(AnswerSet(answers, self.engine.eos_ids, rows))
        return found

    def _routing(self, routing: Any, b: int) -> dict[str, Any]:
        def numbers(row: Tensor) -> list[float]:
            return [round(value, 6) for value in row.tolist()]

        names = self.model.frontend.names
        return {
            "expert": int(routing.expert[b]),
            "expert_probs": numbers(routing.expert_probs[b]),
            "encoders": dict(zip(names, numbers(routing.encoder_weights[b]), strict=True)),
            "layers": {name: numbers(w[b]) for name, w in zip(names, routing.layer_weights, strict=True)},
        }
