"""The routes: transcriptions and chat completions as OpenAI's clients ask for them, model names, health, metrics."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from pam_espnet.data.tasks import TASKS
from pam_espnet.decode import subtitles
from pam_espnet.decode.long_recordings import Segment
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import DataError, PamError
from pam_espnet.serve.answers import Answers, Recording
from pam_espnet.serve.limits import Gate, Limits, Refused, error_response
from pam_espnet.serve.metrics import Metrics
from pam_espnet.serve.queue import DecodingQueue
from pam_espnet.serve.requests import ChatRequest, TranscriptionForm

FORM_FIELDS, FORM_FILES = 20, 1
MOST_RETRY = 60  # seconds
TEXTS = {"text": subtitles.to_text, "srt": subtitles.to_srt, "vtt": subtitles.to_vtt}
CUT = ("srt", "vtt", "verbose_json")  # formats with times


def build_app(speech: SpeechLLM, name: str, limits: Limits, key: str | None = None) -> FastAPI:
    """An application that answers with ``speech``, which nothing else may use while it runs.

    Args:
        name: of the model, which clients must give.
        key: that clients must send; None: anyone may ask.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        queue = DecodingQueue(speech, metrics.count_batch)
        metrics.watch(lambda: len(queue))
        app.state.answers = answers = Answers(queue, limits.max_seconds)
        yield
        answers.close()

    def retry_after() -> int:
        return min(MOST_RETRY, math.ceil(app.state.answers.queue.pace * limits.places) or 1)

    app = FastAPI(
        title="PaM-ESPnet",
        lifespan=lifespan,
        form_limits={"max_fields": FORM_FIELDS, "max_files": FORM_FILES},
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Gate, limits=limits, key=key, metrics=metrics, retry_after=retry_after)
    _add_errors(app)

    def check_name(model: str) -> None:
        if model != name:
            raise Refused(404, f"there is no model {model!r} here; the one that answers is {name!r}", "model_not_found")

    @app.get("/health")
    def health() -> JSONResponse:
        if app.state.answers.queue.healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the last batch failed; the log has more"}, HTTPStatus.SERVICE_UNAVAILABLE)

    @app.get("/metrics")
    def metrics_text() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "pam_espnet"}]}

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(form: Annotated[TranscriptionForm, Form()]) -> Response:
        check_name(form.model)
        recording = Recording(await form.file.read(), True if form.response_format in CUT else None)
        answers: Answers = app.state.answers
        found = answers.segments(recording, TASKS["asr"].default_prompt, "asr", form.stream)
        if form.stream:
            return await _streamed(_transcript_events(found))
        segments = [one async for one in found if isinstance(one, Segment)]
        return _transcript(segments, recording.seconds, form)

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> Response:
        check_name(request.model)
        if not request.prompt:
            raise Refused(400, "messages: there is no text part to answer, and no task", "invalid_value")
        most = speech.options.beam.max_new_tokens
        if min(request.max_tokens or most, request.max_completion_tokens or most) < most:
            raise Refused(400, f"max_tokens: answers are cut at {most}, an option of decoding", "invalid_value")
        answers: Answers = app.state.answers
        found = answers.segments(Recording(request.audio, False), request.prompt, request.task or "", request.stream)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if request.stream:
            return await _streamed(_chat_events(found, head | {"object": "chat.completion.chunk"}))
        (one,) = [one async for one in found if isinstance(one, Segment)]
        message = {"role": "assistant", "content": one.text}
        choice = {"index": 0, "message": message, "finish_reason": _finish(one), "logprobs": None}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice]})

    return app


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        if isinstance(error, Refused):
            return error.response()
        return error_response(error.status_code, str(error.detail), "invalid_request")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        places = [".".join(map(str, one["loc"][1:])) for one in error.errors()]
        words = [one["msg"].removeprefix("Value error, ") for one in error.errors()]
        message = "; ".join(": ".join(filter(None, pair)) for pair in zip(places, words, strict=True))
        return error_response(400, message, "invalid_value")

    @app.exception_handler(PamError)
    async def unanswerable(_: Request, error: PamError) -> Response:
        return error_response(*_explain(error))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return error_response(500, "an error of the server; its log has more", "internal_error")


def _explain(error: Exception) -> tuple[int, str, str]:
    """Status, message and code of an error that was met while answering."""
    if isinstance(error, DataError):  # its path may be that of a temporary file
        return 400, f"file: {error.message}", "invalid_audio"
    if type(error) is PamError:  # the GPU's memory
        return 503, str(error), "overloaded"
    if isinstance(error, PamError):
        return 400, str(error), "invalid_value"
    return 500, "an error of the server; its log has more", "internal_error"


async def _streamed(events: AsyncIterator[Mapping[str, Any] | str]) -> Response:
    """Server-sent events; an error before the first of them is raised, a later one is an event itself."""
    first = await anext(events)

    async def lines() -> AsyncIterator[str]:
        yield _line(first)
        try:
            async for event in events:
                yield _line(event)
        except Exception as error:
            if not isinstance(error, PamError):
                logging.exception("streaming failed")
            status, message, code = _explain(error)
            yield _line({"error": {"message": message, "type": HTTPStatus(status).phrase, "code": code}})

    return StreamingResponse(lines(), media_type="text/event-stream")


def _line(event: Mapping[str, Any] | str) -> str:
    return f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n"


def _transcript(segments: list[Segment], seconds: float, form: TranscriptionForm) -> Response:
    """In the format that was asked for; ``seconds`` of the recording."""
    kind, text = form.response_format, subtitles.to_text(segments)
    if kind in TEXTS:
        return PlainTextResponse(TEXTS[kind](segments))
    duration = round(seconds, 3)
    usage = {"type": "duration", "seconds": duration}
    if kind == "json":
        return JSONResponse({"text": text.rstrip("\n"), "usage": usage})
    parts = [
        {"id": number, "start": round(one.start, 3), "end": round(one.end, 3), "text": one.text}
        for number, one in enumerate(segments)
    ]
    about = {"task": "transcribe", "language": form.language or "", "duration": duration}
    return JSONResponse({**about, "text": text.rstrip("\n"), "segments": parts, "usage": usage})


async def _transcript_events(found: AsyncIterator[str | Segment]) -> AsyncIterator[Mapping[str, Any]]:
    text = ""
    async for one in found:
        if isinstance(one, str):
            text += one
            yield {"type": "transcript.text.delta", "delta": one}
    yield {"type": "transcript.text.done", "text": text}


async def _chat_events(
    found: AsyncIterator[str | Segment], head: Mapping[str, Any]
) -> AsyncIterator[Mapping[str, Any] | str]:
    role = {"role": "assistant"}
    async for one in found:
        delta = role | {"content": one} if isinstance(one, str) else {}
        finish = None if isinstance(one, str) else _finish(one)
        yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
        role = {}
    yield "[DONE]"


def _finish(segment: Segment) -> str:
    return "length" if segment.answer and segment.answer.constraints.get("length_cap") else "stop"
