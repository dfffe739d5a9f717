"""The page in a real Chromium, Debian's: what people do there, and what they see.

A picture of it for the README, with models that are trained (in the folder where their paths begin):

    PAM_PAGE_PICTURE=FILE.png PAM_PAGE_MODELS='exp/a exp/b' PAM_PAGE_OPTIONS=decode.yaml PAM_PAGE_RECORDING=clip.flac \
        python -m pytest -m services -k picture tests/demo/test_browser.py
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from services import unavailable
from shown_page import EXIT, require_gradio, showing

import pam_espnet
from pam_espnet.data.tasks import TASKS
from pam_espnet.decode.answers import Answer, PartialAnswer
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.demo.answering import Answering
from pam_espnet.errors import ConfigError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.services
PROMPT = "Describe the sounds."
LOOPBACK = "127.0.0.1"
PATIENCE = 300_000  # milliseconds; a busy machine is slow
FLAGS = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def chromium(wav: Path) -> Iterator[Browser]:
    """A browser whose microphone plays ``wav`` again and again."""
    require_gradio()
    program = shutil.which("chromium")
    if program is None:
        unavailable("chromium", "there is no chromium on PATH (Debian: apt install chromium)")
    if importlib.util.find_spec("playwright") is None:
        unavailable("chromium", "playwright is not installed: tools/setup.sh --extras demo,browser")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    flags = [*FLAGS, f"--use-file-for-fake-audio-capture={wav}", *(["--no-sandbox"] if os.getuid() == 0 else [])]
    with sync_playwright() as play, closing(play.chromium.launch(executable_path=program, args=flags)) as browser:
        yield browser


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[[str], Page]]:
    """``visit(url)``: the page there. Afterwards: it has asked no other machine for anything."""
    hosts: set[str] = set()
    with closing(chromium.new_context(viewport={"width": 1200, "height": 900})) as context:
        context.set_default_timeout(PATIENCE)
        context.on("request", lambda request: hosts.update(re.findall(r"^(?:http|ws)s?://([^/:]+)", request.url)))

        def open_page(url: str) -> Page:
            page = context.new_page()
            page.goto(url)
            return page

        yield open_page
    assert hosts <= {LOOPBACK}


def upload(page: Page, path: Path) -> None:
    """Put a file where the recording is."""
    if (clear := page.get_by_label("Clear", exact=True).first).is_visible():
        clear.click()
    with page.expect_response(lambda response: "/upload" in response.url):
        page.locator("input[type=file]").set_input_files(path)


def ask(page: Page, prompt: str | None = None) -> None:
    if prompt is not None:
        page.get_by_label("Prompt").fill(prompt)
        page.get_by_label("Prompt").press("Enter")
    page.get_by_role("button", name="Ask", exact=True).click()


def answers(page: Page) -> Locator:
    return page.get_by_label("Answer", exact=True)


def message(page: Page) -> Locator:
    """The words of an error."""
    return page.get_by_test_id("toast-text")


def bars(page: Page, number: int) -> dict[str, float]:
    """Name -> length of the bars in one of the boxes with bars."""
    meters = page.get_by_test_id("label").nth(number).locator("meter").all()
    return {one.get_attribute("aria-label") or "": float(one.get_attribute("value") or "nan") for one in meters}


def blocks(page: Page) -> list[str]:
    """Of each token, the number that is written behind it."""
    words = page.get_by_test_id("highlighted-text").inner_text().splitlines()
    return [number for word in words for number in re.findall(r"(?:^| )(\d+)$", word)]


def test_an_upload_is_answered_and_explained(
    visit: Callable[[str], Page], plain: Answering, model: SpeechLLM, wav: Path, wave: np.ndarray
) -> None:
    from playwright.sync_api import expect

    with showing({"tiny": plain}) as url:
        page = visit(url)
        upload(page, wav)
        for task, prompt in [*((name, spec.default_prompt) for name, spec in TASKS.items()), ("", "And now?")]:
            (expected,) = model.answer([wave], [prompt], [task])
            ask(page, prompt)
            expect(answers(page)).to_have_value(expected.texts[0])
        ask(page, TASKS["count"].default_prompt)
        expect(page.get_by_test_id("label").nth(2).locator("meter")).to_have_count(2)
        expect(page.get_by_test_id("0-confidence-set")).to_be_visible()
        (expected,) = model.answer([wave], [TASKS["count"].default_prompt], ["count"])
        encoders, layers, alternatives = (bars(page, number) for number in range(3))
        assert encoders == pytest.approx(expected.routing["encoders"])
        assert layers["two, layer 1"] == pytest.approx(expected.routing["layers"]["two"][1]) and len(layers) == 4
        assert alternatives.keys() == {"0", "1"} and sum(alternatives.values()) == pytest.approx(1)
        picture = page.get_by_test_id("matplotlib").locator("img")
        assert picture.evaluate("image => image.naturalWidth") > 300
        assert not page.get_by_test_id("highlighted-text").is_visible(), "early exit is off"


def test_the_answer_appears_as_it_is_decoded(
    visit: Callable[[str], Page], exp: Path, wav: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from playwright.sync_api import expect

    speech, seen = pam_espnet.load(exp, options={"beam_size": 1, "max_new_tokens": 6}), threading.Event()
    decode = speech.answer

    def waits(*args: Any, on_partial: Callable[[list[PartialAnswer]], None], **options: Any) -> list[Answer]:
        def show(partials: list[PartialAnswer]) -> None:
            on_partial(partials)
            if partials[0].settled_text and not partials[0].done:  # it goes on when the words were seen on the page
                assert seen.wait(PATIENCE / 1000)

        return decode(*args, on_partial=show, **options)

    monkeypatch.setattr(speech, "answer", waits)
    with closing(Answering(speech, 30.0)) as answering, showing({"tiny": answering}) as url:
        page = visit(url)
        upload(page, wav)
        ask(page, PROMPT)
        expect(answers(page)).not_to_have_value("")
        partial = answers(page).input_value()
        assert bars(page, 0) == {}, "not known before the answer is whole"
        seen.set()
        expect(page.get_by_test_id("label").first.locator("meter")).to_have_count(2)
        whole = answers(page).input_value()
    assert whole.startswith(partial) and len(whole) > len(partial)


def test_what_the_microphone_records_is_answered(
    visit: Callable[[str], Page], plain: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    from playwright.sync_api import expect

    read: list[np.ndarray] = []

    def keep(path: str | None) -> np.ndarray:
        read.append(Answering.read(plain, path))
        return read[-1]

    monkeypatch.setattr(plain, "read", keep)
    with showing({"tiny": plain}) as url:
        page = visit(url)
        page.get_by_label("Record audio").click()
        page.get_by_role("button", name="Record", exact=True).click()
        page.wait_for_timeout(1500)
        with page.expect_response(lambda response: "/upload" in response.url):
            page.get_by_role("button", name="Stop", exact=True).click()
        ask(page, PROMPT)
        expect(answers(page)).not_to_have_value("")
    wave = read[-1]
    spectrum = np.abs(np.fft.rfft(wave))
    assert len(wave) > 8000 and spectrum.argmax() * 16000 / len(wave) == pytest.approx(440, abs=5)


def test_errors_are_words(visit: Callable[[str], Page], plain: Answering, exiting: Answering, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    files = {name: tmp_path / f"{name}.wav" for name in ("long", "silent", "good")}
    soundfile.write(files["long"], np.ones(31 * 16000) / 2, 16000)
    soundfile.write(files["silent"], np.zeros(16000), 16000)
    soundfile.write(files["good"], np.sin(np.arange(16000) / 9) / 2, 16000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF and no more")
    with showing({"plain": plain, "exiting": exiting}) as url:
        page = visit(url)
        ask(page)
        expect(message(page)).to_contain_text("record or upload something first")
        upload(page, files["good"])
        ask(page)
        expect(answers(page).first).not_to_have_value("")
        expect(message(page)).to_have_count(0)
        for file, words in (
            (tmp_path / "broken.wav", "recording: cannot be read"),
            (files["long"], "too long: 31.00 s is more than 30 s"),
            (files["silent"], "recording: digital silence"),
        ):
            upload(page, file)
            ask(page)
            expect(message(page)).to_contain_text(words)
            expect(message(page)).to_contain_text("->")  # and what to do
            expect(message(page)).to_have_count(1)
            assert [one.input_value() for one in answers(page).all()] == ["", ""]
            assert "Traceback" not in page.inner_text("body")
        upload(page, files["good"])
        ask(page, "?" * 2001)
        expect(message(page)).to_have_text("the prompt has 2001 characters; at most 2000 are answered")
        exiting.settings = replace(exiting.settings, max_seconds=0.9)
        ask(page, "<b>What?</b>")
        expect(message(page)).to_contain_text("exiting: recording: too long")
        expect(answers(page).first).not_to_have_value("")


def test_models_side_by_side_and_the_depth_of_each_token(
    visit: Callable[[str], Page], plain: Answering, exiting: Answering, wav: Path, wave: np.ndarray
) -> None:
    from playwright.sync_api import expect

    gone = ConfigError("gone: no such package or experiment directory")
    with showing({"plain": plain, "gone": gone, "exiting": exiting}) as url:
        page = visit(url)
        headings = [page.get_by_role("heading", name=name, exact=True) for name in ("plain", "gone", "exiting")]
        places = [box for heading in headings if (box := heading.bounding_box())]
        assert len({box["y"] for box in places}) == 1 and len({box["x"] for box in places}) == 3
        assert page.get_by_label("Not loaded").input_value() == str(gone)
        upload(page, wav)
        ask(page, PROMPT)
        depths = page.get_by_test_id("highlighted-text").and_(page.locator(":visible"))
        expect(depths).to_contain_text("1")
        for number, answering in enumerate((plain, exiting)):
            (expected,) = answering.speech.answer([wave], [PROMPT])
            assert answers(page).nth(number).input_value() == expected.texts[0]
            assert len(bars(page, 3 * number + 2)) == len(set(expected.texts))
        assert blocks(page) == [str(depth) for depth in expected.depths[0]]


def test_the_command_shows_a_model_and_why_another_is_missing(visit: Callable[[str], Page], exp: Path) -> None:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    words = ["--model", str(exp), "nowhere", "--config", str(exp / "decode.yaml"), "--port", str(port)]
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[1] / "kit")])
    command = [sys.executable, "-m", "pam_espnet.bin.pam_demo", *words]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    try:
        assert server.stdout is not None
        while f":{port}" not in (line := server.stdout.readline()):
            assert line, "it has ended"
        page = visit(f"http://{LOOPBACK}:{port}")
        assert page.get_by_label("Not loaded").input_value().startswith("nowhere: no such package")
        page.get_by_role("heading", name=exp.name).wait_for()
    finally:
        server.send_signal(signal.SIGINT)
        status = server.wait(60)
    assert status == 0


def test_the_picture_of_the_readme(visit: Callable[[str], Page], exp: Path, wav: Path, tmp_path: Path) -> None:
    from PIL import Image
    from playwright.sync_api import expect

    picture = Path(os.environ.get("PAM_PAGE_PICTURE", tmp_path / "page.png"))
    options = os.environ.get("PAM_PAGE_OPTIONS", EXIT)
    with ExitStack() as stack:
        models = {
            Path(name).name: stack.enter_context(closing(Answering(pam_espnet.load(name, options=options), 30.0)))
            for name in os.environ.get("PAM_PAGE_MODELS", str(exp)).split()
        }
        page = visit(stack.enter_context(showing(models)))
        upload(page, Path(os.environ.get("PAM_PAGE_RECORDING", wav)))
        ask(page)
        for label in page.get_by_test_id("label").all():
            expect(label.locator("meter").first).to_be_visible()
        page.screenshot(path=picture, full_page=True, animations="disabled")
    with Image.open(picture) as image:  # few colours make a small file
        image.convert("RGB").quantize(128).save(picture, optimize=True)
    assert 10_000 < picture.stat().st_size < 200_000
