"""Prompt layout: positions of audio, prompt and answer in the LLM's input, and the targets that carry the loss.

One utterance is ``[head | audio | tail | answer]``: head is everything the tokenizer's chat template puts before the
audio, tail is the prompt text plus the header of the assistant's turn, the answer ends with the end-of-turn token.
Nothing here depends on the LLM: ``build_inputs`` is given the function that embeds token ids.

B utterances, U audio frames (embeddings), L tokens, P positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


def build_inputs(
    head: Sequence[Tensor],
    audio: Tensor,
    audio_lengths: Tensor,
    tail: Sequence[Tensor],
    answer: Sequence[Tensor] | None,
    embed: Callable[[Tensor], Tensor],
) -> Inputs:
    """Put ``[head | audio | tail | answer]`` of each utterance in one right-padded batch.

    Padding is behind the answer only, never between the parts, so prompts of different length share a batch.
    The last answer token is a target but no input: nothing is predicted from it.

    Args:
        head, tail: B tensors (L,) of token ids; L differs.
        audio: (B,U,D) audio embeddings; gradients flow back through them.
        audio_lengths: (B,) valid frames, 0 allowed.
        answer: B tensors (L,) of token ids that end with the end-of-turn token, or None when decoding.
        embed: token ids (L,) -> (L,D).
    """
    device, answers = audio.device, answer if answer is not None else [None] * len(head)
    rows, prefixes, targets, index = [], [], [], []
    for b, (before, after, reply) in enumerate(zip(head, tail, answers, strict=True)):
        given = [after] if reply is None else [after, reply[:-1]]
        row = torch.cat(
            [embed(before.to(device)), audio[b, : int(audio_lengths[b])], embed(torch.cat(given).to(device))]
        )
        rows.append(row)
        prefixes.append(len(row) - (0 if reply is None else len(reply) - 1))
    embeds = pad_sequence(rows, batch_first=True)
    positions = torch.arange(embeds.size(1), device=device)
    mask = positions < torch.tensor([len(row) for row in rows], device=device)[:, None]
    for b, reply in enumerate(answers):
        if reply is not None:
            first = b * embeds.size(1) + prefixes[b] - 1  # the last prefix position predicts the first answer token
            targets.append(reply.to(device))
            index.append(torch.arange(first, first + len(reply), device=device))
    none = torch.zeros(0, dtype=torch.long, device=device)
    return Inputs(
        embeds=embeds,
        mask=mask,
        positions=sum(map(len, rows)),
        prefix_lengths=torch.tensor(prefixes, device=device),
        target_ids=torch.cat(targets) if targets else none,
        target_index=torch.cat(index) if index else none,
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
