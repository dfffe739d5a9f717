"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

ROUTES = ("/v1/audio/transcriptions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server.

    ``rate(pam_audio_seconds_total[5m]) / rate(pam_decoding_seconds_total[5m])`` is the seconds of audio that it decodes
    in a second.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("pam_requests", "Responses", ("path", "status"), registry=self.registry)
        self.places = Gauge("pam_places", "Requests that are read, wait or are decoded", registry=self.registry)
        self.waiting = Gauge("pam_waiting", "Recordings that wait for a batch", registry=self.registry)
        self.batches = Histogram("pam_batch_size", "Recordings in a batch", buckets=BATCHES, registry=self.registry)
        self.audio = Counter("pam_audio_seconds", "Seconds of audio that were decoded", registry=self.registry)
        self.decoding = Counter("pam_decoding_seconds", "Seconds that decoding took", registry=self.registry)

    def watch(self, waiting: Callable[[], int]) -> None:
        """Ask ``waiting`` for the number of recordings that wait."""
        self.waiting.set_function(waiting)

    def count_request(self, path: str, status: str) -> None:
        """One response; ``status`` none: the client went away before it began."""
        self.requests.labels(path if path in ROUTES else "other", status).inc()

    def count_batch(self, size: int, audio: float, took: float) -> None:
        """One batch of ``size`` recordings, ``audio`` seconds long together, decoded in ``took`` seconds."""
        self.batches.observe(size)
        self.audio.inc(audio)
        self.decoding.inc(took)

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)
