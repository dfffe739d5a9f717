"""The layout of the page, and what its button does."""

from __future__ import annotations

import html
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gradio
from matplotlib import colormaps
from matplotlib.colors import to_hex

from pam_espnet.demo.answering import PROMPTS, Answering, View, checked
from pam_espnet.demo.spectrogram import draw_spectrogram
from pam_espnet.errors import PamError

TOGETHER = 8  # questions to a model at once; others wait
KEPT = 3600  # seconds that recordings stay in gradio's folder
# Errors stay until they are closed, or until the next question.
CLOSE_ERRORS = """(...inputs) => {
    document.querySelectorAll("[data-testid=toast-close]").forEach((one) => one.click());
    return inputs;
}"""
LAUNCH: dict[str, Any] = {
    "share": False,
    "max_file_size": "100mb",
    "footer_links": ["api"],
    # The browser's own fonts: nothing is fetched from elsewhere.
    "theme": gradio.themes.Default(font="sans-serif", font_mono="monospace"),
}


def build_page(models: Mapping[str, Answering | PamError], max_seconds: float) -> gradio.Blocks:
    """The page: a recording, a prompt, and side by side what each model answers, or why it could not be loaded.

    Programs reach the models that answer under ``/answer``, ``/answer_2`` and so on, with the fields of a ``View``.

    Args:
        models: name -> model; at least one that answers.
        max_seconds: longest recording.
    """
    answering = {name: model for name, model in models.items() if isinstance(model, Answering)}
    reader = next(iter(answering.values()))
    with gradio.Blocks(title="PaM-ESPnet", fill_width=True, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.Markdown("# PaM-ESPnet")
        with gradio.Row():
            with gradio.Column(scale=1):
                label = f"Recording, at most {max_seconds:g} s"
                audio = gradio.Audio(type="filepath", label=label, buttons=["download"])
                first = next(iter(PROMPTS))
                prompt = gradio.Dropdown([*PROMPTS], value=first, allow_custom_value=True, label="Prompt")
                ask = gradio.Button("Ask", variant="primary")
                spectrogram = gradio.Plot(label="Spectrogram", show_label=False, format="png")
            with gradio.Column(scale=2), gradio.Row():
                columns = {name: shown for name, model in models.items() if (shown := _column(name, model))}

        def begin(wav: str | None, prompt: str | None) -> Iterator[list[Any]]:
            empty = _values(View("")) * len(columns)
            yield [None, *empty]
            with _explained():
                checked(prompt)
                wave = reader.read(wav)
            yield [draw_spectrogram(wave, reader.settings.sample_rate), *empty]

        begun = ask.click(
            begin,
            [audio, prompt],
            [spectrogram, *(one for shown in columns.values() for one in shown)],
            show_progress_on=spectrogram,
            js=CLOSE_ERRORS,
            api_visibility="private",
        )
        for number, (name, model) in enumerate(answering.items(), 1):
            begun.success(
                _listener(name, model),
                [audio, prompt],
                columns[name],
                show_progress_on=columns[name][0],
                api_name="answer" if number == 1 else f"answer_{number}",
                concurrency_limit=TOGETHER,
            )
    return page


def _column(name: str, model: Answering | PamError) -> list[Any]:
    """A model's name, and what shows the fields of a ``View``: blocks of tokens where early exit is on. Of a model that
    could not be loaded the reason, which is none of them."""
    with gradio.Column(min_width=200):
        gradio.Markdown(f"## {html.escape(name)}")
        if isinstance(model, PamError):
            gradio.Textbox(str(model), label="Not loaded", lines=2)
            return []
        return [
            gradio.Textbox(label="Answer", lines=2),
            gradio.Label(label="Weights of the encoders", show_heading=False),
            gradio.Label(label="Weights of their layers", show_heading=False),
            gradio.Label(label="Alternatives, probability among these", show_heading=False),
            gradio.HighlightedText(
                label="Block of the LLM that predicted each token",
                color_map=_shades(model.speech.model.decoder.num_layers),
                visible=model.exits,
            ),
        ]


def _shades(blocks: int) -> dict[str, str]:
    """A colour for each block, the deeper the darker."""
    return {str(n): to_hex(colormaps["viridis_r"](0.4 + 0.6 * n / blocks)) for n in range(1, blocks + 1)}


def _listener(name: str, model: Answering) -> Callable[[str | None, str | None], AsyncIterator[list[Any]]]:
    async def answer(wav: str | None, prompt: str | None) -> AsyncIterator[list[Any]]:
        with _explained(name):
            yield _values(View(""))
            async for view in model.views(wav, prompt):
                yield _values(view)

    return answer


def _values(view: View) -> list[Any]:
    return [view.text, view.encoders, view.layers, view.alternatives, view.depths]


@contextmanager
def _explained(name: str = "") -> Iterator[None]:
    """Errors of the user as words on the page."""
    try:
        yield
    except PamError as error:
        words = html.escape(f"{name}: {error}" if name else str(error)).replace("\n", "<br>")
        raise gradio.Error(words, duration=None, print_exception=False) from error
