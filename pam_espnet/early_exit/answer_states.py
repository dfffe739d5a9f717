"""What flows through the LLM's blocks where it names the tokens of given answers (teacher forcing, one pass).

Forward hooks on transformers' modules take the residual stream after every block and, for Llama-type LLMs, after the
attention of every block, before its feed-forward network. Only the rows that name an answer's token are kept.

Dimension letters: B utterances, N tokens of their answers, H blocks, P positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pam_espnet.data.datadir import DataDir
from pam_espnet.decode.shards import read_wave
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.engine.engine import FAMILIES
from pam_espnet.llm.llm import LLM
from pam_espnet.llm.prompt_layout import answer_ids


@dataclass(frozen=True)
class BlockStates:
    """Of one batch of answers, all before the final norm.

    Attributes:
        blocks: H tensors (N,D), the output of each block.
        inner: H tensors (N,D), after each block's attention and before its feed-forward network; empty for an LLM
            whose blocks have no such point.
        utterance: (N,) place of each token's utterance among all utterances.
    """

    blocks: list[Tensor]
    inner: list[Tensor]
    utterance: Tensor


def reference_answers(speech: SpeechLLM, data: DataDir) -> dict[str, list[int]]:
    """Token ids of every utterance's reference, with the end token."""
    return {key: answer_ids(speech.model.decoder.tokenizer, data.text[key]) for key in data.utterances}


@torch.no_grad()
def answer_states(
    speech: SpeechLLM, data: DataDir, answers: Mapping[str, Sequence[int]], batch_size: int = 8
) -> Iterator[BlockStates]:
    """Run the answers of a formatted data directory through all blocks, with a progress bar.

    Args:
        speech: the model.
        data: whose utterances are run, in their order.
        answers: token ids by utterance, with the end token where it was said.
        batch_size: utterances run together.

    Raises:
        DataError: audio of another sample rate than the model's.
    """
    from tqdm import tqdm

    model, keys = speech.model, data.utterances
    for start in tqdm(range(0, len(keys), batch_size), desc=f"states of {data.path.name}", unit="batch"):
        batch = keys[start : start + batch_size]
        prompts = [data.prompt[key] for key in batch]
        audio = speech.encode([read_wave(data, key, model.frontend.sample_rate) for key in batch], prompts)
        placed = model.place(prompts, audio, [torch.tensor(answers[key], device=speech.device) for key in batch])
        with _caught(model.decoder, placed.target_index) as (blocks, inner):
            model.decoder(placed.embeds, placed.mask)
        counts = torch.tensor([len(answers[key]) for key in batch])
        yield BlockStates(blocks, inner, torch.repeat_interleave(torch.arange(start, start + len(batch)), counts))


@contextmanager
def _caught(decoder: LLM, index: Tensor) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Lists that a forward pass fills with rows ``index`` of the flattened (B*P,D) states; see ``BlockStates``."""
    blocks: list[Tensor] = []
    inner: list[Tensor] = []

    def after(_module: Any, _inputs: Any, output: Any) -> None:
        blocks.append((output if isinstance(output, Tensor) else output[0]).flatten(0, 1)[index])

    def before(_module: Any, inputs: Any) -> None:
        inner.append(inputs[0].flatten(0, 1)[index])

    with ExitStack() as hooks:
        for layer in decoder.transformer.layers:
            hooks.callback(layer.register_forward_hook(after).remove)
            # In these families the norm before the feed-forward network reads the residual stream.
            if decoder.lm.config.model_type in FAMILIES:
                hooks.callback(layer.post_attention_layernorm.register_forward_pre_hook(before).remove)
        yield blocks, inner
