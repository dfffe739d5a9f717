"""The LLM's states where it predicts the tokens of given answers (teacher forcing, one pass).

B utterances, N tokens of their answers, H blocks, P positions, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pam_espnet.data.datadir import DataDir
from pam_espnet.decode.shards import read_wave
from pam_espnet.decode.speech_llm import SpeechLLM


@dataclass(frozen=True)
class BlockStates:
    """Of one batch of answers, before the final norm.

    Attributes:
        blocks: H tensors (N,D), the output of each block.
        utterance: (N,) index of each token's utterance among all utterances.
    """

    blocks: list[Tensor]
    utterance: Tensor


def reference_answers(speech: SpeechLLM, data: DataDir) -> dict[str, list[int]]:
    """Token ids of every utterance's reference, with the end token."""
    llm = speech.model.decoder
    return {key: llm.answer_ids(data.text[key], data.utt2task[key]) for key in data.utterances}


@torch.no_grad()
def answer_states(
    speech: SpeechLLM, data: DataDir, answers: Mapping[str, Sequence[int]], batch_size: int = 8
) -> Iterator[BlockStates]:
    """Run the answers of a formatted data directory through all blocks, with a progress bar.

    Args:
        speech: the model.
        data: whose utterances are run, in their order.
        answers: token ids by utterance, with the end token where there was one.
        batch_size: utterances run together.

    Raises DataError: audio of another sample rate than the model's.
    """
    from tqdm import tqdm

    model, keys = speech.model, data.utterances
    for start in tqdm(range(0, len(keys), batch_size), desc=f"states of {data.path.name}", unit="batch"):
        batch = keys[start : start + batch_size]
        prompts = [data.prompt[key] for key in batch]
        audio = speech.encode([read_wave(data, key, model.frontend.sample_rate) for key in batch], prompts)
        inputs = model.build_inputs(prompts, audio, [answers[key] for key in batch])
        blocks: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any, kept: Any = blocks, index: Any = inputs.target_index) -> None:
            kept.append((output if isinstance(output, Tensor) else output[0]).flatten(0, 1)[index])

        with ExitStack() as hooks:
            for layer in model.decoder.transformer.layers:
                hooks.callback(layer.register_forward_hook(keep).remove)
            model.decoder(inputs.embeds, inputs.mask)
        counts = torch.tensor([len(answers[key]) for key in batch])
        yield BlockStates(blocks, torch.repeat_interleave(torch.arange(start, start + len(batch)), counts))
