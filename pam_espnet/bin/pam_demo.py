"""Answer prompts about recordings in a web browser: upload or record, ask, and see the weight of each encoder.

    python -m pam_espnet.bin.pam_demo --model mine.zip

Needs gradio (tools/setup.sh --extras demo). The page is served to this machine alone unless --host is given; it
asks for no password. Recordings are treated as by pam_inference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pam_espnet.bin.pam_inference import add_model_options, answer, load_model
from pam_espnet.cli import run_main
from pam_espnet.errors import ConfigError, PamError

if TYPE_CHECKING:
    from pam_espnet.decode.speech_llm import SpeechLLM


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 is all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    args = parser.parse_args(argv)
    try:
        import gradio  # noqa: F401  before a model is loaded for nothing
    except ImportError as error:
        raise ConfigError(f"the demo needs gradio ({error})\n  -> tools/setup.sh --extras demo") from error
    page = build_page(load_model(args), args.max_seconds)
    page.launch(server_name=args.host, server_port=args.port, share=False)
    return 0


def respond(model: SpeechLLM, wav: str | None, prompt: str, max_seconds: float) -> tuple[str, dict[str, float]]:
    """The answer about an audio file, and the weight of each encoder for this prompt.
    Raises ConfigError: no recording, or no prompt; DataError: a recording that cannot be used."""
    if not wav:
        raise ConfigError("record or upload something first")
    if not prompt.strip():
        raise ConfigError("ask something first")
    found = answer(model, wav, prompt, None, max_seconds)
    return found["answer"], found["routing"]["encoders"]


def build_page(model: SpeechLLM, max_seconds: float) -> Any:
    """The page, a ``gradio.Interface``; programs reach it under ``/answer``."""
    import gradio

    from pam_espnet.data.tasks import TASKS

    def answer_or_explain(wav: str | None, prompt: str) -> tuple[str, dict[str, float]]:
        try:
            return respond(model, wav, prompt, max_seconds)
        except PamError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    prompts = [spec.default_prompt for spec in TASKS.values()]
    return gradio.Interface(
        answer_or_explain,
        inputs=[
            gradio.Audio(type="filepath", label=f"Recording, at most {max_seconds:g} s"),
            gradio.Dropdown(prompts, value=prompts[0], allow_custom_value=True, label="Prompt"),
        ],
        outputs=[gradio.Textbox(label="Answer"), gradio.Label(label="Weights of the encoders")],
        title="PaM-ESPnet",
        api_name="answer",
        flagging_mode="never",
        analytics_enabled=False,
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
