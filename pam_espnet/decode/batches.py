"""Batches as large as a GPU's memory: an estimate of what utterances need, and smaller ones where it was too low.

Sizes are counted as the engine's buffers are: utterances, prefix and steps rounded up to few shapes.

B utterances, K hypotheses of each, P prefix positions, S steps, U adapter frames, D width, F feed-forward width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pam_espnet.engine.engine import TransformersEngine
from pam_espnet.engine.graphs import out_of_memory
from pam_espnet.engine.static_memory import rounded
from pam_espnet.errors import DataError, PamError
from pam_espnet.fileio import read_json, write_json
from pam_espnet.llm.prompt_layout import layout

if TYPE_CHECKING:
    from pam_espnet.decode.speech_llm import SpeechLLM

AUTO, BATCHES = "auto", "batches.json"
CPU_BATCH = 8  # utterances; a CPU gains little from more
MOST_UTTERANCES, MOST_ROWS = 128, 512  # of a batch; a GPU gains little from more
RESERVE = 0.1  # of a GPU's memory: kernels' workspaces, captured graphs, what the allocator cannot use
SPARE = 1.25  # on the estimate
ENCODER_STATES = 64  # hidden states (T,D) that an encoder holds at its peak, beside those that it returns
ENCODER_SECONDS = 30.0  # to which some encoders pad

type Resized = Callable[[list[list[str]]], None]


@dataclass(frozen=True)
class Needs:
    """Bytes that parts of an utterance need while it is decoded."""

    slot: int  # keys and values of a position, in all blocks
    position: int  # of the prefix: activations of a block
    row: int  # of a hypothesis: logits, and what is made of them
    frame: int  # of the audio embeddings: their copies, probabilities of the CTC head
    second: int  # of audio in the encoders; 0 where they run one utterance at a time
    beams: int  # K
    steps: int  # S
    shared: bool = True  # the prefix's keys and values belong to all hypotheses

    @classmethod
    def of(cls, speech: SpeechLLM) -> Needs:
        """Of a model with its options."""
        llm, frontend, options = speech.model.decoder, speech.model.frontend, speech.options
        config: Any = llm.lm.config
        size, float32 = llm.dtype.itemsize, 4
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head = getattr(config, "head_dim", None) or llm.width // config.num_attention_heads
        inner = getattr(config, "intermediate_size", None) or 4 * llm.width
        columns = llm.vocab_size if speech.engine.ids is None else len(speech.engine.ids)
        classes = 0 if options.ctc.weight == 0 or speech.model.ctc is None else len(speech.model.ctc.token_ids)
        states = [
            spec.frame_rate * spec.width * (2 * spec.num_layers + ENCODER_STATES) for spec in frontend.specs.values()
        ]
        return cls(
            slot=2 * llm.num_layers * kv_heads * head * size,
            position=(8 * llm.width + 4 * inner) * size,
            row=4 * columns * float32,
            frame=(3 * llm.width + 3 * classes) * float32,
            second=0 if speech.encodes_alone else int(sum(states)) * float32,
            beams=options.beam.beam_size,
            steps=options.beam.max_new_tokens,
            shared=not isinstance(speech.engine, TransformersEngine),
        )

    def utterance(self, prefix: int, frames: int, seconds: float) -> int:
        """Bytes of one with ``prefix`` positions, ``frames`` of them audio, which lasts ``seconds``."""
        prefix, steps = rounded(prefix, 64), rounded(self.steps, 16)
        slots = prefix + self.beams * steps if self.shared else 2 * self.beams * (prefix + steps)
        search = slots * self.slot + prefix * self.position + self.beams * self.row
        encoders = int(max(seconds, ENCODER_SECONDS) * self.second)  # before the search, in the same memory
        return int(SPARE * (max(search, encoders) + frames * self.frame))


def plan(needs: Sequence[int], free: int, beams: int) -> list[int]:
    """Sizes of batches of utterances that need ``needs`` bytes each, one after the other, in ``free`` bytes: as many as
    fit, one where none does; at most ``MOST_UTTERANCES``, and ``MOST_ROWS`` hypotheses."""
    most = max(1, min(MOST_UTTERANCES, MOST_ROWS // beams))
    sizes: list[int] = []
    while (start := sum(sizes)) < len(needs):
        size = largest = 1
        for count in range(1, min(most, len(needs) - start) + 1):
            largest = max(largest, needs[start + count - 1])
            buffers = rounded(count)
            if buffers <= most and buffers * largest <= free:
                size = count
        sizes.append(size)
    return sizes


def plan_batches(speech: SpeechLLM, prompts: Sequence[str], seconds: Sequence[float]) -> list[int]:
    """Sizes of batches of utterances, whose audio lasts ``seconds``, in this order."""
    if not speech.on_gpu:
        return [len(part) for part in cut(seconds, CPU_BATCH)]
    decoder, frontend = speech.model.decoder, speech.model.frontend
    layouts = [layout(decoder.tokenizer, prompt, decoder.system) for prompt in set(prompts)]
    text = max((len(one.head_ids) + len(one.tail_ids) for one in layouts), default=0)  # positions beside the audio
    samples = torch.tensor([round(length * frontend.sample_rate) for length in seconds])
    frames: list[int] = frontend.output_lengths(samples).tolist()
    needs = Needs.of(speech)
    every = [needs.utterance(text + count, count, length) for count, length in zip(frames, seconds, strict=True)]
    return plan(every, speech.free_memory, needs.beams)


def read_batches(
    folder: Path,
    speech: SpeechLLM,
    keys: Sequence[str],
    prompts: Mapping[str, str],
    seconds: Mapping[str, float],
    size: int | str,
) -> tuple[list[list[str]], Resized | None]:
    """The batches of a decoding, the same ones in every run, and ``in_batches``'s ``resized``.

    Args:
        folder: of the journal; those of "auto" are kept there, in ``batches.json``.
        keys: utterances, longest first.
        size: a number, or "auto".

    Raises DataError: ``batches.json`` is about another number of utterances.
    """
    if isinstance(size, int):
        return cut(keys, size), None
    path = folder / BATCHES

    def write(batches: list[list[str]]) -> None:
        write_json(path, {"sizes": [len(batch) for batch in batches]})

    if path.exists():  # a GPU may have more free memory now, or less
        sizes = read_json(path)["sizes"]
    else:
        sizes = plan_batches(speech, [prompts[key] for key in keys], [seconds[key] for key in keys])
    if sum(sizes) != len(keys):
        raise DataError(path, f"is about {sum(sizes)} utterances, not {len(keys)}", hint=f"remove it: rm -r {folder}")
    batches = split(keys, sizes)
    write(batches)
    return batches, write


def cut[T](items: Sequence[T], size: int) -> list[list[T]]:
    """Parts of ``size`` items, the last one of what is left."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def split[T](items: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    """Parts of ``sizes`` items."""
    return [list(items[end - size : end]) for end, size in zip(accumulate(sizes), sizes, strict=True)]


def in_batches[T, R](
    speech: SpeechLLM,
    batches: Iterable[Sequence[T]],
    work: Callable[[list[T]], R],
    resized: Callable[[list[list[T]]], None] | None,
    name: Callable[[T], str] = str,
) -> Iterator[tuple[list[T], R]]:
    """Each batch, and what ``work`` made of it.

    Where a GPU's memory is too small for a batch, the engine's buffers are freed and it is tried again; then it and all
    that come after it are halved.

    Args:
        resized: called with all batches, those done included, before a smaller one is tried; None: the user chose the
            size, which stays.
        name: of an item, for messages.

    Raises PamError: a batch that the user chose, or a single utterance, does not fit; names the options to change.
    """
    todo, index, released = [list(batch) for batch in batches], 0, False
    while index < len(todo):
        batch = todo[index]
        try:
            result = work(batch)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0].partition(". GPU ")[0]  # the error itself would hold tensors
        else:
            yield batch, result
            index, released = index + 1, False
            continue
        if speech.release() and not released:
            released = True
            continue
        if len(batch) == 1:
            beam = speech.options.beam
            raise PamError(
                f"{name(batch[0])}: the GPU's memory is too small for this utterance alone ({reason})\n"
                f"  -> lower beam_size (now {beam.beam_size}) or max_new_tokens (now {beam.max_new_tokens})"
            )
        half = -(-len(batch) // 2)
        if resized is None:
            raise PamError(
                f"--batch_size: the GPU's memory is too small for {len(batch)} utterances together ({reason})\n"
                f"  -> --batch_size {half}, or --batch_size auto"
            )
        logging.warning(f"the GPU's memory is too small for {len(batch)} utterances together: at most {half} from here")
        todo[index:] = [part for later in todo[index:] for part in cut(later, half)]
        resized(todo)
