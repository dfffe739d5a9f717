"""The application on a socket: uvicorn with limits for connections."""

from __future__ import annotations

import asyncio
import logging
import math
import shlex
import socket
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.serve.app import build_app
from pam_espnet.serve.limits import Limits

IDLE_SECONDS = 5  # that a connection may stay open without a request
HEAD_SECONDS = 20.0  # from a connection's beginning, or from its last response, to the next request's headers
SPARE_CONNECTIONS = 64  # beside those with a place: for health, metrics, and answers that there is none


class Connection(H11Protocol):
    """Closes what sends no request: uvicorn waits for one for ever where nothing, or half of one, has come."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._check, self.cycle)

    def _check(self, last: Any) -> None:
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Logs, once it answers, the command that asks it."""

    def __init__(self, config: uvicorn.Config, name: str, key: str | None) -> None:
        super().__init__(config)
        self.name, self.header = name, "" if key is None else ' -H "Authorization: Bearer KEY"'

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            url = f"http://{host}:{self.servers[0].sockets[0].getsockname()[1]}"
            form = f"-F {shlex.quote(f'model={self.name}')} -F file=@clip.wav"
            logging.info(f"to ask it: curl {url}/v1/audio/transcriptions{self.header} {form}")


def build_server(
    speech: SpeechLLM, name: str, limits: Limits, key: str | None = None, host: str = "127.0.0.1", port: int = 0
) -> uvicorn.Server:
    """A server that is not running yet; see ``build_app``."""
    config = uvicorn.Config(
        build_app(speech, name, limits, key),
        host=host,
        port=port,
        http=Connection,
        ws="none",
        log_config=None,  # the command line has set logging up
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        limit_concurrency=limits.places + SPARE_CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(limits.seconds),
    )
    return Server(config, name, key)
