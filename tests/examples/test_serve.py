# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The server gives each client what a call of its own gives, and survives what clients send."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from PIL import Image

from peft_sdpt.detection import detect, load_base_model, load_processor, save_adapter, split_classes
from tests.helpers.detectors import acting
from tests.helpers.main_job import HOST
from tests.helpers.patience import PATIENCE, wait_until

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="the server needs FastAPI: pip install peft_sdpt[serve]")

import serve  # noqa: E402

CLASSES = {"day": ["cat", "red apple"], "night": ["st. bernard", "tea cup", "cat"], "lora": ["dog"]}
# Low, because noise is what the tests' pictures show.
THRESHOLD = 0.005


def noise(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def adapters(made_once):
    """Adapters of different numbers of tokens and classes, one with its own image size and one with LoRA."""

    def make(folder: Path) -> None:
        configs = {"day": {}, "night": {"num_virtual_tokens": 3}, "lora": {"lora_rank": 2}}
        for seed, (name, class_names) in enumerate(CLASSES.items()):
            torch.manual_seed(seed)
            model = get_peft_model(load_base_model(HOST), acting(**configs[name]))
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if "sdpt_lora_B" in parameter_name:
                        parameter.normal_(0, 0.02)
            save_adapter(folder / name, model, load_processor(None, HOST), class_names)
        (folder / "night" / "detection.json").write_text(json.dumps({"threshold": 0.03}))

    return made_once("serve-adapters", make)


@pytest.fixture(scope="module")
def loaded(adapters):
    args = SimpleNamespace(
        adapter=[str(adapters / name) for name in CLASSES], model_name_or_path=None, class_names=None
    )
    accelerator = Accelerator(cpu=True)
    return (*serve.load(args, accelerator), accelerator)


@pytest.fixture
def server(loaded):
    """Starts a server in this process, without a socket. Yields a client, and the adapters of each model call."""
    model, all_served, accelerator = loaded

    @asynccontextmanager
    async def server(max_batch_size=8, max_wait=0.2, max_requests=64, served=all_served):
        detector = serve.Detector(model, served, accelerator, max_batch_size, max_wait)
        app = serve.make_app(detector, max_requests)
        calls = []
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(kwargs["adapter_names"]), with_kwargs=True
        )
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        try:
            async with detector.running(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield client, calls
        finally:
            hook.remove()

    return server


def post(client, image, **parts):
    """Ask for detections in an image or in some bytes."""
    adapter = parts.pop("adapter", None)
    data = image if isinstance(image, bytes) else encoded(image)
    query = {} if adapter is None else {"adapter": adapter}
    return client.post("/detect", params=query, files={"image": ("photo.png", data)}, data=parts, timeout=PATIENCE)


def alone(loaded, adapter: str, image: Image.Image, class_names: list[str], threshold: float) -> dict:
    """What `detect` finds with one adapter, in the form of an answer."""
    model, served, _ = loaded
    (number,) = [number for number, each in enumerate(served) if each.name == adapter]
    model.set_adapter(f"adapter{number}")
    processor = served[number].processor
    chunks = split_classes(class_names, processor.tokenizer, model.config.max_text_len)
    (found,) = detect(model, processor, [image], class_names, chunks, threshold, None)
    boxes = found["boxes"]
    return {
        "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
        "scores": found["scores"],
        "labels": [class_names[label] for label in found["labels"]],
        "best_score": found["best_score"],
    }


def assert_same(answer: dict, expected: dict) -> None:
    assert answer["labels"] == expected["labels"] and answer["labels"]
    torch.testing.assert_close(torch.tensor(answer["scores"]), expected["scores"], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(answer["boxes"]), expected["boxes"], atol=1e-2, rtol=0)
    assert answer["best_score"] == pytest.approx(expected["best_score"], abs=1e-5)


# ---- answers


def test_different_adapters_and_classes_in_one_batch(server, loaded):
    """Each client gets what a call of its own gives."""
    asked = [
        ("day", noise(1), {}),
        ("night", noise(2), {}),
        ("lora", noise(3), {}),
        ("day", noise(1), {"classes": ["tea cup", "blue car", "tree"]}),
        ("night", noise(1), {"classes": "cat . dog ."}),
    ]

    async def clients():
        # A full batch, however long the images take.
        async with server(max_batch_size=len(asked), max_wait=PATIENCE) as (client, calls):
            answers = await asyncio.gather(
                *(post(client, image, adapter=name, threshold=THRESHOLD, **more) for name, image, more in asked)
            )
            return answers, calls

    answers, calls = asyncio.run(clients())
    assert [answer.status_code for answer in answers] == [200] * len(asked)
    assert [sorted(names) for names in calls] == [["adapter0", "adapter0", "adapter1", "adapter1", "adapter2"]]
    names = [CLASSES["day"], CLASSES["night"], CLASSES["lora"], ["tea cup", "blue car", "tree"], ["cat", "dog"]]
    for answer, (name, image, _), class_names in zip(answers, asked, names, strict=True):
        assert answer.json()["adapter"] == name and answer.json()["threshold"] == THRESHOLD
        assert (answer.json()["width"], answer.json()["height"]) == image.size
        assert_same(answer.json(), alone(loaded, name, image, class_names, THRESHOLD))


def test_images_of_different_sizes_are_not_padded(server, loaded):
    """Padding would change the scores. Oblong and small images are detected too."""
    images = [noise(1), noise(2, 90, 120), noise(3, 400, 10), noise(4, 8, 8)]

    async def clients():
        async with server() as (client, calls):
            answers = [post(client, image, adapter="day", threshold=THRESHOLD) for image in images]
            return await asyncio.gather(*answers), calls

    answers, calls = asyncio.run(clients())
    assert len(calls) == len(images)
    for answer, image in zip(answers, images, strict=True):
        assert_same(answer.json(), alone(loaded, "day", image, CLASSES["day"], THRESHOLD))


def test_classes_of_an_adapter_that_need_several_prompts(server, loaded):
    """All prompts of an image share a batch."""
    model, served, _ = loaded
    processor, chunks = served[0].processor, [[1], [0]]
    prompts = serve.tokenize(processor.tokenizer, CLASSES["day"], chunks)
    split = dataclasses.replace(served[0], chunks=chunks, prompts=prompts, threshold=THRESHOLD)

    async def clients():
        async with server(served=[split]) as (client, calls):
            return await post(client, noise(1)), calls

    answer, calls = asyncio.run(clients())
    model.set_adapter("adapter0")
    (found,) = detect(model, processor, [noise(1)], CLASSES["day"], chunks, THRESHOLD, None)
    assert calls == [["adapter0", "adapter0"]]
    assert answer.json()["labels"] == [CLASSES["day"][label] for label in found["labels"]]
    assert answer.json()["scores"] == pytest.approx(found["scores"].tolist(), abs=1e-5)


def test_a_photo_is_turned_upright(server, loaded):
    upright = noise(3, 90, 120)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned a quarter to the left
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)

    async def clients():
        async with server() as (client, _):
            return (await post(client, turned, adapter="day", threshold=THRESHOLD)).json()

    answer = asyncio.run(clients())
    assert (answer["width"], answer["height"]) == (90, 120)
    assert_same(answer, alone(loaded, "day", upright, CLASSES["day"], THRESHOLD))


def test_adapters_health_and_the_suggested_threshold(server):
    async def clients():
        async with server() as (client, _):
            listed = (await client.get("/adapters")).json()
            return listed, (await client.get("/health")).json(), (await post(client, noise(1), adapter="night")).json()

    listed, health, answer = asyncio.run(clients())
    assert {each["name"]: each["classes"] for each in listed} == CLASSES
    assert {each["name"]: each["threshold"] for each in listed} == {"day": 0.3, "night": 0.03, "lora": 0.3}
    assert health == {"status": "ok"}
    assert answer["threshold"] == 0.03 and all(score >= 0.03 for score in answer["scores"])


# ---- what clients send


def bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    """A small PNG file that says it has very many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
REFUSED = {
    "no image": (415, "image: cannot be opened as an image", b"no image", {}),
    "empty": (415, "image: cannot be opened as an image", b"", {}),
    "half": (415, "image: cannot be opened as an image", encoded(noise(1))[:3000], {}),
    # Pillow would run Ghostscript.
    "postscript": (415, "image: cannot be opened as an image", POSTSCRIPT, {}),
    "too oblong": (415, "too oblong for a detector", encoded(noise(1, 2000, 2)), {}),
    "bomb": (415, "image: cannot be opened as an image", bomb(), {}),
    "many pixels": (413, "image: has 9000 x 8000 pixels; at most 64,000,000 are allowed.", bomb(9000, 8000), {}),
    "many bytes": (413, "the request is too large; at most 33,554,432 bytes are allowed.", b"x" * 33_600_000, {}),
    "adapter": (404, "adapter: must be one of day, night, lora; got 'dusk'.", noise(1), {"adapter": "dusk"}),
    "path": (404, "got '../night'.", noise(1), {"adapter": "../night"}),
    "no adapter": (404, "adapter: must be one of day, night, lora; got None.", noise(1), {"adapter": None}),
    "threshold": (422, "threshold: Input should be less than 1.", noise(1), {"threshold": 1}),
    "nan": (422, "threshold: must be a number of at least 0 and below 1.", noise(1), {"threshold": "nan"}),
    "empty threshold": (422, "threshold: is empty.", noise(1), {"threshold": ""}),
    "unknown field": (422, "treshold: is unknown; the fields are adapter, ", noise(1), {"treshold": 0.5}),
    "two thresholds": (422, "threshold: is given 2 times; give it once.", noise(1), {"threshold": [0.5, 0.5]}),
    "word": (422, "threshold: Input should be a valid number", noise(1), {"threshold": "low\nhigh"}),
    "no word": (422, "has no word for a prompt", noise(1), {"classes": "..."}),
    "empty name": (422, "has no word for a prompt", noise(1), {"classes": " "}),
    "unknown letter": (422, "the tokenizer knows no word of '☃'", noise(1), {"classes": "☃"}),
    "twice": (422, "class names: dog is given 2 times.", noise(1), {"classes": ["dog", "Dog "]}),
    "long name": (422, "classes: may have at most 4,000 letters in all, got 5,000.", noise(1), {"classes": "a" * 5000}),
    # An expression that searches the end of a phrase would take hours.
    "spaces": (422, "letters in all, got 900,003.", noise(1), {"classes": "a" + " " * 900_000 + "b."}),
    "long word": (422, "tokens, but a prompt takes at most 254", noise(1), {"classes": "qzx " * 240}),
    "many names": (
        422,
        "classes: 300 classes do not fit into one prompt of 256 tokens",
        noise(1),
        {"classes": [f"w {n}" for n in range(300)]},
    ),
}
# By name: the message, the query, and the form.
MISPLACED = {
    "unknown in the query": ("foo: is unknown; the fields are adapter, classes, threshold, image.", "foo=1", {}),
    "strange name": ("a b: is unknown; the fields are", "a%0Ab=1", {}),
    "adapter twice": ("adapter: is given 2 times; give it once.", "", {"adapter": "night"}),
    "threshold twice": ("threshold: is given 2 times; give it once.", "threshold=0.1", {"threshold": "0.1"}),
    "image twice": ("image: is given 2 times; give it once.", "", {"image": [encoded(noise(1)), encoded(noise(2))]}),
    "image in the query": ("image: must be in the form.", "image=a.png", {}),
    "classes in both": ("classes: are given in the address and in the form;", "classes=dog", {"classes": "cat"}),
    "empty in the query": ("threshold: ", "threshold=", {}),
    "file as threshold": ("threshold: Input should be a valid number", "", {"threshold": b"0.5"}),
    "file as classes": ("classes: Input should be a valid string", "", {"classes": [b"dog"]}),
}


def test_options_in_the_address_and_in_the_form(server):
    """Both places give the same answer."""
    options = {"adapter": "night", "classes": ["dog", "tea cup"], "threshold": "0.004"}

    async def clients():
        async with server(max_wait=0.0) as (client, _):
            file = {"image": ("a.png", encoded(noise(1)))}
            answers = [
                await client.post("/detect", params=options, files=file),
                await client.post("/detect", data=options, files=file),
                await client.post(
                    "/detect?adapter=night&threshold=0.004", data={"classes": "dog . tea cup ."}, files=file
                ),
            ]
            return [answer.json() for answer in answers]

    first, second, third = asyncio.run(clients())
    assert first["adapter"] == "night" and first["threshold"] == 0.004 and {*first["labels"]} <= {"dog", "tea cup"}
    assert first["labels"] and first == second == third


def test_what_is_refused(server):
    """Every error is one line, and the next client is served."""

    async def clients():
        async with server(max_wait=0.0) as (client, calls):
            answers = {}
            for name, (_, _, image, parts) in REFUSED.items():
                answers[name] = await post(client, image, **{"adapter": "day", **parts})
            answers["no file"] = await client.post("/detect?adapter=day", data={"classes": "dog"})
            for name, (_, query, form) in MISPLACED.items():
                form = {"image": encoded(noise(1)), **form}
                parts = [
                    (field, ("a.png", value) if isinstance(value, bytes) else (None, value))
                    for field, values in form.items()
                    for value in (values if isinstance(values, list) else [values])
                ]
                answers[name] = await client.post(f"/detect?adapter=day&{query}", files=parts)
            answers["no form"] = await client.post("/detect?adapter=day", content=b"\xff" * 100)
            answers["text as file"] = await client.post("/detect?adapter=day", data={"image": "/etc/passwd"})
            broken = {"content-type": "multipart/form-data; boundary=x"}
            answers["broken form"] = await client.post("/detect?adapter=day", content=b"--x\r\nno", headers=broken)
            assert not calls
            return answers, await post(client, noise(1), adapter="day")

    answers, last = asyncio.run(clients())
    for name, (status, message, _, _) in REFUSED.items():
        assert (name, answers[name].status_code) == (name, status)
        assert message in answers[name].json()["detail"]
        assert " at 0x" not in answers[name].json()["detail"]
    for name in ("no file", "no form", "text as file", "broken form"):
        assert (name, answers[name].status_code) == (name, 422)
    assert answers["no file"].json() == answers["no form"].json() == {"detail": "image: is missing."}
    assert answers["text as file"].json() == {"detail": "image: must be a file."}
    for name, (message, _, _) in MISPLACED.items():
        assert (name, answers[name].status_code) == (name, 422)
        assert message in answers[name].json()["detail"]
    for name, answer in answers.items():
        detail = answer.json()["detail"]
        assert isinstance(detail, str) and detail.isprintable() and len(detail) < 600, name
    assert last.status_code == 200


def test_a_server_that_is_busy_says_so(server, loaded, monkeypatch):
    """Further requests get 503 at once. Those that wait are answered, and `GET /health` always is."""
    started, go_on = threading.Event(), threading.Event()
    real = serve.answer

    def slow(*args):
        started.set()
        assert go_on.wait(60)
        return real(*args)

    monkeypatch.setattr(serve, "answer", slow)

    async def clients():
        async with server(max_wait=0.0, max_requests=2) as (client, _):
            tasks = [asyncio.create_task(post(client, noise(seed), adapter="day")) for seed in range(2)]
            while not started.is_set():
                await asyncio.sleep(0.001)
            refused, health = await post(client, noise(3), adapter="day"), await client.get("/health")
            go_on.set()
            return await asyncio.gather(*tasks), refused, health, await post(client, noise(3), adapter="day")

    answers, refused, health, later = asyncio.run(clients())
    assert refused.status_code == 503 and refused.json() == {"detail": "the server is busy; try again."}
    assert refused.headers["retry-after"] == "1"
    assert [answer.status_code for answer in answers] == [200, 200] and health.status_code == later.status_code == 200


def test_an_adapter_whose_scores_are_not_finite_fails_alone(server, loaded):
    model, _, _ = loaded
    damaged = [p for name, p in model.named_parameters() if "prompts" in name and "adapter1" in name]
    before = [parameter.detach().clone() for parameter in damaged]

    async def clients():
        # A full batch, however long the images take.
        async with server(max_batch_size=2, max_wait=PATIENCE) as (client, calls):
            answers = await asyncio.gather(*(post(client, noise(1), adapter=name) for name in ("day", "night")))
            return answers, calls

    with torch.no_grad():
        for parameter in damaged:
            parameter.fill_(torch.nan)
        try:
            (good, bad), calls = asyncio.run(clients())
        finally:
            for parameter, values in zip(damaged, before, strict=True):
                parameter.copy_(values)
    # Those in the batch are then detected one by one.
    # The requests are in the order in which their images were decoded.
    assert sorted(calls[0]) == ["adapter0", "adapter1"] and calls[1:] == [[name] for name in calls[0]]
    assert good.status_code == 200 and bad.status_code == 500
    assert "image: the scores or boxes are not finite" in bad.json()["detail"]


def test_an_error_of_the_model_does_not_end_the_server(server, monkeypatch):
    """For instance if a GPU has no memory left."""
    real, failures = serve.answer, [RuntimeError("out of memory")]

    def failing(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(serve, "answer", failing)

    async def clients():
        async with server() as (client, _):
            return await post(client, noise(1), adapter="day"), await post(client, noise(1), adapter="day")

    failed, good = asyncio.run(clients())
    assert failed.status_code == 500 and failed.json() == {"detail": "the server failed; its log has the reason."}
    assert good.status_code == 200


# ---- the command


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*flags) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, flags)])
        try:
            serve.main()
        except SystemExit as exit:
            return exit.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("message", "flags"),
    [
        ("--max_batch_size 0: must be at least 1.", ("--max_batch_size", 0)),
        ("--max_requests 0: must be at least 1.", ("--max_requests", 0)),
        ("--max_wait_ms nan: must be from 0 to 60,000.", ("--max_wait_ms", "nan")),
        ("--port 70000: must be from 0 to 65,535.", ("--port", 70000)),
        ("--adapter no-such-folder: no such folder", ()),
    ],
)
def test_bad_flags(run, offline, monkeypatch, message, flags):
    monkeypatch.setattr(serve, "load_detector", lambda *_: pytest.fail("loaded"))
    code, error = run("--adapter", "no-such-folder", *flags)
    assert code == 2 and message in error and "Traceback" not in error


@pytest.fixture
def port(loaded, monkeypatch):
    """A free port, for servers that do not load the model again."""
    model, served, _ = loaded
    monkeypatch.setattr(serve, "load", lambda *_: (model, served))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.ConnectError:
        return False


def test_the_command_answers_what_it_has_before_it_ends(run, adapters, loaded, port, monkeypatch):
    """A real server on a socket gets SIGTERM while it detects."""
    real, answers, signals = serve.answer, [], []

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    def ask() -> None:
        wait_until(lambda: is_up(port))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            answers.append(post(client, noise(1), adapter="day", threshold=THRESHOLD))

    monkeypatch.setattr(serve, "answer", interrupted)
    # Uvicorn raises the signal again when it has ended.
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        thread = threading.Thread(target=ask)
        thread.start()
        code, error = run("--adapter", adapters / "day", "--port", port)
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 0, error
    assert signals and [answer.status_code for answer in answers] == [200]
    monkeypatch.undo()
    assert_same(answers[0].json(), alone(loaded, "day", noise(1), CLASSES["day"], THRESHOLD))


@pytest.mark.parametrize("times", [1, 2])
def test_a_slow_client_does_not_keep_the_server(run, adapters, port, monkeypatch, times):
    """A client sends half of its request. One Ctrl-C ends the server after a while, and a second one at once."""
    monkeypatch.setattr(serve, "MAX_ENDING", 1 if times == 1 else int(PATIENCE))
    received = []

    def ask() -> None:
        wait_until(lambda: is_up(port))
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(
                b"POST /detect?adapter=day HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
            )
            time.sleep(0.5)
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            # Until the server closes the connection, because the body may come after the head.
            with contextlib.suppress(ConnectionError):
                received.append(b"".join(iter(lambda: client.recv(10_000), b"")))

    thread = threading.Thread(target=ask)
    thread.start()
    code, error = run("--adapter", adapters / "day", "--port", port)
    thread.join()
    assert code == 0 and "Traceback" not in error, error
    if times == 1:
        assert b" 503 " in received[0] and b"the server has ended." in received[0]
