"""What OpenAI's clients send, checked. A field is refused where it should change the answer and cannot."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pam_espnet.data.tasks import TASKS
from pam_espnet.serve.answers import PROMPT_LENGTH


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    temperature: float | None = None

    @field_validator("temperature")
    @classmethod
    def _no_chance(cls, value: float | None) -> None:
        if value:
            raise ValueError("answers are searched, not drawn: only 0")


class TranscriptionForm(_Request):
    """The form of ``/v1/audio/transcriptions``."""

    file: UploadFile
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    language: str | None = None  # the model finds it
    prompt: str | None = None
    chunking_strategy: Literal["auto"] | None = None
    granularities: list[Literal["segment"]] = Field([], alias="timestamp_granularities[]")

    @field_validator("prompt")
    @classmethod
    def _no_prompt(cls, value: str | None) -> None:
        if value:
            raise ValueError("transcribes without one; ask with a prompt at /v1/chat/completions")

    @model_validator(mode="after")
    def _streamed(self) -> TranscriptionForm:
        if self.stream and self.response_format != "json":
            raise ValueError("stream: only with response_format json")
        return self


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class InputAudio(_Strict):
    """A recording; its format is found from its bytes."""

    data: bytes
    format: str

    @field_validator("data", mode="before")
    @classmethod
    def _decode(cls, value: Any) -> bytes:
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError, TypeError) as error:
            raise ValueError(f"is not base64: {error}") from error


class TextPart(_Strict):
    """Words of the prompt."""

    type: Literal["text"]
    text: str = Field(max_length=PROMPT_LENGTH)


class AudioPart(_Strict):
    """The recording that is asked about."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class UserMessage(_Strict):
    """The only message: one question about one recording."""

    role: Literal["user"]
    content: list[Annotated[TextPart | AudioPart, Field(discriminator="type")]]


class ChatRequest(_Request):
    """The body of ``/v1/chat/completions``.

    ``task`` is no field of OpenAI's: it chooses that task's answer set and, where there is no text, its prompt.
    """

    messages: list[UserMessage] = Field(min_length=1, max_length=1)
    task: str | None = None
    modalities: list[Literal["text"]] | None = None
    n: Literal[1] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = None  # the same answer with any
    user: str | None = None

    @field_validator("messages")
    @classmethod
    def _one_recording(cls, messages: list[UserMessage]) -> list[UserMessage]:
        if (count := sum(isinstance(part, AudioPart) for part in messages[0].content)) != 1:
            raise ValueError(f"there are {count} input_audio parts; there must be one")
        return messages

    @field_validator("task")
    @classmethod
    def _known(cls, task: str | None) -> str | None:
        if task is not None and task not in TASKS:
            raise ValueError(f"one of {', '.join(TASKS)}")
        return task

    @property
    def audio(self) -> bytes:
        """The recording."""
        (found,) = (part for part in self.messages[0].content if isinstance(part, AudioPart))
        return found.input_audio.data

    @property
    def prompt(self) -> str:
        """What is asked; empty: neither text nor task."""
        texts = [part.text for part in self.messages[0].content if isinstance(part, TextPart)]
        default = TASKS[self.task].default_prompt if self.task else ""
        return " ".join(texts).strip() or default
