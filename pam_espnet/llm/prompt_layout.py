"""Prompt layout: positions of audio, prompt and answer in the LLM's input, and the targets that carry the loss.

One utterance is ``[head | audio | tail | answer]``: head is everything the tokenizer's chat template puts before the
audio, tail is the prompt text plus the header of the assistant's turn, the answer ends with the end-of-turn token.
Nothing here depends on the LLM: ``build_inputs`` is given the function that embeds token ids. What goes where follows
from lengths alone; ``lay_out`` finds it on the host, in training in the processes that load data.

B utterances, U audio frames (embeddings), L tokens, P positions, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pam_espnet.data.tasks import task_spec
from pam_espnet.errors import ConfigError

AUDIO_MARK = "[[audio]]"  # replaces the audio while the chat template is rendered; never tokenised
ANSWER_MARK = "[[answer]]"


@dataclass(frozen=True)
class PromptLayout:
    """Token ids around the audio of one prompt."""

    head_ids: list[int]  # before the audio: system turn, header of the user turn
    tail_ids: list[int]  # after the audio: prompt text, end of the user turn, header of the assistant turn
    prompt_ids: list[int]  # the part of the tail up to the end of the prompt text (for the prompt vector)


class BatchLayout(NamedTuple):
    """Where the parts of a batch go in the LLM's input, rows of (B*P, D)."""

    utterances: int  # B
    width: int  # P
    positions: int  # of all utterances, padding not counted
    sizes: list[int]  # of the parts of ``numbers``
    # int64, so that one transfer moves all of them: token_ids (L,) of heads, tails and answers, and their rows (L,);
    # the row of each audio frame (B*U,), B*P for padding; positions of each utterance (B,), those before its answer
    # (B,); target_ids and target_index (targets,) as in Inputs.
    numbers: Tensor


@dataclass(frozen=True)
class Inputs:
    """A batch as the LLM reads it; right-padded, so positions are 0..P-1 in every row."""

    embeds: Tensor  # (B,P,D)
    mask: Tensor  # (B,P) bool, False on padding
    positions: int  # of all utterances, padding not counted: known on the host, without asking the device
    prefix_lengths: Tensor  # (B,) positions before the answer
    target_ids: Tensor  # (targets,) answer tokens of all utterances, one after the other
    target_index: Tensor  # (targets,) row of embeds.view(B*P, D) whose hidden state predicts each target


def layout(tokenizer: Any, prompt: str, system: str | None = "") -> PromptLayout:
    """Render the chat template with the audio in the user turn, before the prompt text.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        prompt: the user's text, e.g. "Transcribe the speech."
        system: the system prompt; "" is an explicitly empty one, None leaves it to the template's default.

    Raises ConfigError: no chat template, or one that drops, changes or repeats the user's text; a prompt that is not
    Unicode text, as a terminal gives bytes that are not UTF-8.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ConfigError(f"the prompt {prompt!a} is not UTF-8; type it in a terminal that writes UTF-8")
    prompt = prompt.strip()  # many templates strip the user's text; do it for all of them
    shown = f"\n{prompt}" if prompt else ""
    turns = [{"role": "user", "content": AUDIO_MARK + shown}]
    text = _render(tokenizer, turns, system, add_generation_prompt=True)
    if text.count(AUDIO_MARK) != 1:
        raise ConfigError(
            f"the chat template must show the user's text once and unchanged; the mark of the audio, {AUDIO_MARK}, "
            f"was found {text.count(AUDIO_MARK)} times for the prompt {prompt!r}; give another `chat_template`"
        )
    head, tail = text.split(AUDIO_MARK)
    start = tail.find(shown)
    if start < 0:
        raise ConfigError(f"the chat template changes the prompt {prompt!r}; give another `chat_template`")
    end = start + len(shown)
    prompt_ids, tail_ids = _ids(tokenizer, tail[:end]), _ids(tokenizer, tail)
    text_ids = _text_ids(tokenizer, shown)
    if text_ids != _ids(tokenizer, shown):  # the prompt has words that look like control tokens
        prompt_ids = [*_ids(tokenizer, tail[:start]), *text_ids]
        tail_ids = [*prompt_ids, *_ids(tokenizer, tail[end:])]
    return PromptLayout(head_ids=_ids(tokenizer, head), tail_ids=tail_ids, prompt_ids=prompt_ids)


def end_of_turn_id(tokenizer: Any) -> int:
    """The first special token that the chat template puts after the assistant's text, else the tokenizer's EOS.
    Raises ConfigError: the template ends no turn and the tokenizer has no EOS."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER_MARK}]
    after = _render(tokenizer, turns, None, add_generation_prompt=False).split(ANSWER_MARK)[-1]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in _ids(tokenizer, after):
        if token in special:
            return token
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-turn and no EOS token; give another `chat_template`")
    return int(tokenizer.eos_token_id)


def answer_ids(tokenizer: Any, text: str, end_id: int | None = None, prefix: str = "") -> list[int]:
    """Token ids of an answer and the token that ends it (``end_id``, by default ``end_of_turn_id(tokenizer)``).
    ``prefix``: white space before it, see ``check_answer_prefix``."""
    return [*_text_ids(tokenizer, prefix + text), end_of_turn_id(tokenizer) if end_id is None else end_id]


def check_answer_prefix(tokenizer: Any, prefixes: Mapping[str, str]) -> dict[str, str]:
    """White space that is put before the answers of each task in training, and stripped when decoded.

    In many vocabularies a word at the beginning of a text is another token than the same word inside it: after a
    space, the first word of an answer is trained by every other place where it occurs.

    Raises ConfigError: not white space of a known task, or a token of its own in this vocabulary, which helps nobody.
    """
    if not isinstance(prefixes, Mapping):
        raise ConfigError(f'llm_conf.answer_prefix: {prefixes!r}; must be a mapping such as {{asr: " "}}')
    for task, prefix in prefixes.items():
        task_spec(task)
        if not isinstance(prefix, str) or prefix.strip():
            raise ConfigError(f"llm_conf.answer_prefix.{task}: {prefix!r}; must be white space in quotes")
        if len(_text_ids(tokenizer, f"{prefix}the")) > len(_text_ids(tokenizer, "the")):
            raise ConfigError(
                f"llm_conf.answer_prefix.{task}: {prefix!r} is a token of its own for this tokenizer; leave it out"
            )
    return dict(prefixes)


def lay_out(
    prompts: Sequence[PromptLayout], frames: Sequence[int], answers: Sequence[Sequence[int]] | None
) -> BatchLayout:
    """Where each part of ``[head | audio | tail | answer]`` goes in one right-padded batch.

    Padding is behind the answer only, never between the parts, so prompts of different length share a batch.
    The last answer token is a target but no input: nothing is predicted from it.

    Args:
        prompts: B.
        frames: of the audio, B; 0 allowed.
        answers: token ids that end with the end-of-turn token, B; None when decoding.
    """
    replies = [()] * len(prompts) if answers is None else answers
    prefixes = [len(one.head_ids) + size + len(one.tail_ids) for one, size in zip(prompts, frames, strict=True)]
    lengths = [prefix + len(reply[:-1]) for prefix, reply in zip(prefixes, replies, strict=True)]
    width = max(lengths)
    tokens: list[int] = []
    token_rows, target_index = [], []
    frame_rows = np.full((len(prompts), max(frames)), len(prompts) * width)
    for b, (prompt, size, reply) in enumerate(zip(prompts, frames, replies, strict=True)):
        tokens += [*prompt.head_ids, *prompt.tail_ids, *reply[:-1]]
        rows, head = np.arange(b * width, b * width + lengths[b]), len(prompt.head_ids)
        token_rows += [rows[:head], rows[head + size :]]
        frame_rows[b, :size] = rows[head : head + size]
        first = b * width + prefixes[b] - 1  # the last prefix position predicts the first answer token
        target_index.append(np.arange(first, first + len(reply)))
    targets = [token for reply in replies for token in reply]
    parts = [tokens, np.concatenate(token_rows), frame_rows.ravel(), lengths, prefixes, targets]
    arrays = [np.asarray(part, dtype=np.int64) for part in (*parts, np.concatenate(target_index))]
    numbers = torch.from_numpy(np.concatenate(arrays))
    return BatchLayout(len(prompts), width, sum(lengths), [len(array) for array in arrays], numbers)


def build_inputs(layout: BatchLayout, audio: Tensor, embed: Callable[[Tensor], Tensor]) -> Inputs:
    """Fill a batch that was laid out.

    Args:
        layout: its numbers on the device of ``audio``.
        audio: (B,U,D) audio embeddings; gradients flow back through them.
        embed: token ids (L,) -> (L,D).
    """
    ids, token_rows, frame_rows, lengths, prefixes, targets, target_index = layout.numbers.split(layout.sizes)
    tokens, frames = embed(ids), audio[:, : len(frame_rows) // layout.utterances].flatten(0, 1)
    size = layout.utterances * layout.width
    dtype = torch.promote_types(tokens.dtype, audio.dtype)
    rows = torch.zeros(size + 1, audio.size(2), dtype=dtype, device=audio.device)  # the last one is of padding
    rows = rows.index_copy(0, token_rows, tokens.to(dtype)).index_copy(0, frame_rows, frames.to(dtype))
    return Inputs(
        embeds=rows[:size].unflatten(0, (layout.utterances, layout.width)),
        mask=torch.arange(layout.width, device=audio.device) < lengths[:, None],
        positions=layout.positions,
        prefix_lengths=prefixes,
        target_ids=targets,
        target_index=target_index,
    )


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a user's text: what looks like a control token in it, such as ``<|im_end|>``, is ordinary text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of ``text`` alone: the template has written BOS and the like already."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _render(tokenizer: Any, turns: list[dict[str, str]], system: str | None, add_generation_prompt: bool) -> str:
    """The template's text. Templates that refuse a system turn are rendered without one when it is empty."""
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template; give `chat_template` (a Jinja text or a file)")
    tries = [turns] if system is None else [[{"role": "system", "content": system}, *turns]]
    if system == "":
        tries.append(turns)
    error: Exception | None = None
    for messages in tries:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except TemplateError as problem:
            error = problem
    raise ConfigError(f"the chat template refuses the conversation ({error}); give another `chat_template` or `system`")
