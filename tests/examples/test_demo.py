# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The demo page works in a real browser."""

from __future__ import annotations

import configparser
import io
import json
import os
import re
import shutil
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import get_peft_model
from PIL import Image

from peft_sdpt import SDPTConfig
from peft_sdpt.detection import (
    detect,
    find_adapter,
    load_base_model,
    load_detector,
    load_processor,
    read_image,
    save_adapter,
    split_classes,
)
from tests.helpers.main_job import HOST, launched
from tests.helpers.patience import PATIENCE, wait_until

gr = pytest.importorskip("gradio", reason="the page needs Gradio: pip install peft_sdpt[demo]")

import demo  # noqa: E402

SPACE = HOST.parent / "space"
CLASSES = {"one": ["cat", "red apple"], "two": ["st. bernard", "tea cup"]}
# The threshold of the second adapter. No other threshold of the page has this value.
SUGGESTED = 0.22
# The timeout of a step on the page in milliseconds. A step takes a few seconds.
WAIT = 300_000


@pytest.fixture(scope="session")
def adapters(made_once):
    """A folder with two adapters. They have an effect, as trained ones have."""

    def make(folder: Path) -> None:
        for seed, (name, class_names) in enumerate(CLASSES.items()):
            torch.manual_seed(seed)
            model = get_peft_model(load_base_model(HOST), SDPTConfig(init_weights=False))
            save_adapter(folder / name, model, load_processor(None, HOST), class_names)
        (folder / "two" / "detection.json").write_text(json.dumps({"threshold": SUGGESTED}))

    return made_once("demo-adapters", make)


@pytest.fixture(scope="session")
def picture(small_task):
    return sorted((small_task / "images").glob("test_*"))[0]


# Not for the whole session: a DataLoader worker that a later test forks would hold the pipe of the driver open, and the
# driver would never end.
@pytest.fixture
def browser():
    """Chromium with a camera that shows a test picture. It may only be missing on the machines of developers."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs Chromium, and playwright of the extra `test`")
    arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=arguments, timeout=WAIT)
        yield chromium
        chromium.close()


@contextmanager
def served(log: Path, script=demo.__file__, *flags):
    """The address of the page, on a free port."""
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch, log.open("w") as errors:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        for name, value in {"GRADIO_SERVER_PORT": port, "HF_HUB_OFFLINE": 1, "PYTHONUNBUFFERED": 1}.items():
            patch.setenv(name, str(value))
        process = launched([script, *flags], stdout=-1, stderr=errors, text=True)
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if f"http://127.0.0.1:{port}" in line:
                    break
            else:
                pytest.fail("".join(lines) + log.read_text())
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(PATIENCE)


class Page:
    """The page, with the actions of a user and what the user sees."""

    def __init__(self, browser, address: str):
        from playwright.sync_api import expect

        expect.set_options(timeout=WAIT)
        self.expect = expect
        self.tab = browser.new_page()
        self.tab.set_default_timeout(WAIT)
        self.requests: list[str] = []
        self.addresses: list[str | None] = []  # of the images that `shows` saw last
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(address)
        self.tab.get_by_role("button", name="Detect").wait_for()

    def upload(self, file: Path) -> None:
        if self.tab.get_by_label("Remove Image").count():
            self.tab.get_by_label("Remove Image").click()
        self.tab.get_by_test_id("file-upload").first.set_input_files(file)
        self.tab.get_by_label("Remove Image").wait_for()

    def write(self, classes: str) -> None:
        self.tab.get_by_label("classes").fill(classes)

    def set(self, slider: str, value: float) -> None:
        number = self.tab.get_by_label(f"number input for {slider}")
        number.fill(str(value))
        number.press("Tab")

    def choose(self, adapter: str) -> None:
        self.tab.get_by_label("adapter", exact=True).click()
        self.tab.get_by_role("option", name=adapter).click()

    def detect(self) -> None:
        self.tab.get_by_role("button", name="Detect").click()

    def shows(self, *headings: str | re.Pattern) -> list[np.ndarray]:
        """Wait for the headings of the results, and for other images than before. Returns the images."""
        images = self.tab.locator(".result img")
        self.expect(self.tab.locator(".result p")).to_have_text(list(headings))
        self.expect(images).to_have_count(len(headings))
        wait_until(lambda: self.addresses != [image.get_attribute("src") for image in images.all()])
        self.addresses = [image.get_attribute("src") for image in images.all()]
        contents = [self.tab.request.get(address).body() for address in self.addresses]
        return [np.asarray(Image.open(io.BytesIO(content))) for content in contents]

    def says(self, text: str) -> None:
        self.expect(self.tab.get_by_text(text).first).to_be_visible()


@pytest.fixture(scope="module")
def heading(adapters):
    """Return the expected heading of an image, computed with the functions of the package."""
    saved = [find_adapter(str(adapters / name)) for name in CLASSES]
    model = load_detector(HOST, saved)
    processor = load_processor(None, HOST)

    def heading(file, class_names, threshold, adapter=None, scale=1.0) -> str:
        image = read_image(file, "the picture")
        chunks = split_classes(class_names, processor.tokenizer, model.config.max_text_len)
        if adapter:
            model.set_adapter(f"adapter{list(CLASSES).index(adapter)}")
            model.base_model.set_scale(model.active_adapter, scale)
            found = detect(model, processor, [image], class_names, chunks, max_detections=None)[0]
        else:
            with model.disable_adapter():
                found = detect(model, processor, [image], class_names, chunks, max_detections=None)[0]
        count = int((found["scores"] >= threshold).sum())
        text = f"{count} found" if count else f"nothing found; the best score is {found['scores'].max():.2f}"
        return f"{adapter or 'base model'}{f' x {scale:g}' if scale != 1 else ''}: {text}"

    return heading


@pytest.mark.slow
def test_the_page_in_a_browser(browser, adapters, picture, heading, tmp_path):
    with served(tmp_path / "log", demo.__file__, "--adapter", adapters / "one", adapters / "two") as address:
        page = Page(browser, address)
        page.detect()
        page.says("Choose an image first.")
        page.upload(picture)
        page.write(" , .")
        page.detect()
        page.says("Write at least one class.")
        page.write("red apple, cup. " + "very " * 300 + "long")
        page.detect()
        page.says("but a prompt takes at most")

        # The adapter and the base model have different detections.
        page.write("star, leaf. star")
        names = ["star", "leaf"]
        page.set("threshold", 0.1)
        page.detect()
        one = (picture, names, 0.1)
        base, tuned = page.shows(heading(*one), heading(*one, "one"))
        assert base.shape == tuned.shape and not np.array_equal(base, tuned)

        # With the scale 0, they have the same detections. The scale of a call does not affect the next call.
        page.set("adapter scale", 0)
        page.detect()
        same_base, same = page.shows(heading(*one), heading(*one, "one", 0.0))
        assert np.array_equal(same_base, base) and np.array_equal(same, base)
        page.set("adapter scale", 1)
        page.detect()
        assert np.array_equal(page.shows(heading(*one), heading(*one, "one"))[1], tuned)

        # A new threshold draws again, without the button.
        page.set("threshold", 0.99)
        nothing = page.shows(heading(picture, names, 0.99), heading(picture, names, 0.99, "one"))
        assert "nothing found" in heading(picture, names, 0.99) and np.array_equal(*nothing)
        assert not np.array_equal(nothing[0], base) and not np.array_equal(nothing[1], tuned)

        # Another adapter has other detections, and suggests its own threshold. The classes of the user stay.
        page.choose("two")
        page.expect(page.tab.get_by_label("number input for threshold")).to_have_value(str(SUGGESTED))
        page.expect(page.tab.get_by_label("classes")).to_have_value("star, leaf. star")
        page.set("threshold", 0.1)
        page.detect()
        other_base, other = page.shows(heading(*one), heading(*one, "two"))
        assert np.array_equal(other_base, base) and not np.array_equal(other, tuned)

        # The page reads files as the package does: turned photos, and 16 bits.
        exif = Image.Exif()
        exif[0x0112] = 6
        part = Image.open(picture).convert("RGB").crop((0, 0, 96, 60))
        part.save(tmp_path / "turned.jpg", exif=exif)
        Image.fromarray(np.asarray(part.convert("L"), np.uint16) * 257).save(tmp_path / "deep.png")
        for file, size in {"turned.jpg": (60, 96), "deep.png": (96, 60)}.items():
            page.upload(tmp_path / file)
            page.detect()
            read = (tmp_path / file, names, 0.1)
            height, width, _ = page.shows(heading(*read), heading(*read, "two"))[0].shape
            assert width / height == size[0] / size[1]

        # The page requested nothing else, so it works without the internet.
        assert not [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]


@pytest.mark.slow
def test_a_space_with_a_webcam_and_the_adapters_own_classes(browser, adapters, picture, heading, tmp_path, monkeypatch):
    """A Space has the script beside its other files, and variables instead of flags."""
    shutil.copytree(SPACE, tmp_path / "space")
    shutil.copy(demo.__file__, tmp_path / "space")
    front_matter = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert front_matter["sdk"] == "gradio"
    script = tmp_path / "space" / front_matter["app_file"]
    monkeypatch.setenv("ADAPTER", str(adapters / "two"))
    monkeypatch.setenv("MODEL", str(HOST))
    with served(tmp_path / "log", script) as address:
        page = Page(browser, address)
        page.expect(page.tab.get_by_label("classes")).to_have_value("st bernard, tea cup")
        page.upload(picture)
        page.detect()
        own = (picture, CLASSES["two"], SUGGESTED)
        page.shows(heading(*own), heading(*own, "two"))

        page.tab.get_by_label("Remove Image").click()
        page.tab.get_by_label("Capture from camera").click()
        page.tab.get_by_text("Click to Access Webcam").click()
        page.tab.wait_for_function("document.querySelector('video')?.videoWidth > 0")
        page.tab.get_by_label("capture photo").click()
        page.tab.get_by_label("Remove Image").wait_for()
        page.detect()
        page.shows(re.compile("base model: .+"), re.compile("two: .+"))


def test_the_space_has_the_version_that_is_tested():
    front_matter = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert f"gradio=={front_matter['sdk_version']}\n" in (HOST.parent.parent / "constraints.txt").read_text()
    setup = configparser.ConfigParser()
    setup.read(HOST.parent.parent / "setup.cfg")
    (requirement,) = (SPACE / "requirements.txt").read_text().split()
    assert requirement.removeprefix("peft_sdpt[").removesuffix("]") in setup["options.extras_require"]


def load(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, flags)])
    return demo.load(demo.parse_args())


def test_the_base_model_alone(monkeypatch, picture):
    model, choices = load(monkeypatch, "--class_names", "star", "--threshold", 0.4)
    assert [choice.threshold for choice in choices] == [0.4]
    result = demo.detect_both(model, choices, str(picture), "star", 0, 1.0)
    assert [heading for heading, _ in result[2]] == ["base model"]
    heading, image = demo.draw(result, 0.4)
    assert heading.startswith("**base model**: ") and min(image.size) >= 480
    assert demo.draw(None, 0.4) == gr.skip()
    demo.make_page(model, choices)


def test_class_names_as_text():
    choice = demo.Choice("name", None, {"st bernard": "st. bernard", "cup paper": "cup, paper"}, 0.3)
    assert demo.read_text("st bernard, cup  paper", choice) == ["st. bernard", "cup, paper"]
    assert demo.read_text("cat . dog.\nred  apple,Cat", choice) == ["Cat", "dog", "red apple"]


def test_an_adapter_without_gates_cannot_be_scaled(monkeypatch, picture, tmp_path):
    model = get_peft_model(load_base_model(HOST), SDPTConfig(prompt_gate=None))
    save_adapter(tmp_path / "flat", model, load_processor(None, HOST), ["star"])
    model, choices = load(monkeypatch, "--adapter", tmp_path / "flat")
    assert demo.detect_both(model, choices, str(picture), "star", 0, 1.0)[2][1][0] == "flat"
    with pytest.raises(gr.Error, match=r"flat cannot be scaled: .*prompt_gate is None"):
        demo.detect_both(model, choices, str(picture), "star", 0, 0.5)


def test_names_on_the_page_cannot_be_html_or_markdown(picture):
    result = (Image.open(picture).convert("RGB"), ["a"], [("<b>*x*</b>", demo.Detections(**nothing_found()))])
    heading, _ = demo.draw(result, 0.4)
    assert heading == "**&#60;b&#62;&#42;x&#42;&#60;/b&#62;**: nothing found; the best score is 0.10"
    error = demo.page_error("class_names: the tokenizer knows no word of '<img src=x onerror=alert(1)>'")
    assert error.message == "class_names: the tokenizer knows no word of '&lt;img src=x onerror=alert(1)&gt;'"


def nothing_found():
    return {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.long),
        "best_score": 0.1,
    }


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--threshold", "2"], "--threshold 2.0: must be at least 0.05 and below 1."),
        (["--adapter", str(HOST)], f"--adapter {HOST}: is not a saved adapter"),
        (["--model_name_or_path", "nowhere"], "--model_name_or_path nowhere: cannot be loaded as a detector"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, monkeypatch, capsys, offline):
    monkeypatch.setattr(sys, "argv", ["demo.py", *flags])
    with pytest.raises(SystemExit) as exit:
        demo.main()
    assert exit.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"demo.py: {message}")
