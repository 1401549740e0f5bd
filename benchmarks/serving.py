# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measure the server of examples/serve.py: requests per second, and how long a client waits.

    python -m benchmarks.serving
    python -m benchmarks.serving --adapters 8 --clients 16 --image_size 480

Clients on this machine send images over HTTP, each one its next image after the answer to the last. The adapter of each
request is drawn at random. Three servers on the same model take turns in each round: batches of mixed adapters, batches
of one adapter each, for which the model switches adapters, and no batches. The ratios are those of the same round. The
table has their median over the rounds, with quartiles in brackets.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import tempfile
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image
from torch import nn

from examples import serve
from peft_sdpt import SDPTConfig
from peft_sdpt.deployment.serving import Question, answer
from peft_sdpt.detection import Detections, InputError, load_base_model, load_processor, save_adapter, set_image_size
from peft_sdpt.errors import one_line_errors
from peft_sdpt.training import make_accelerator

from . import EXAMPLES
from .results import Help, device_name
from .speed.measuring import quartiles

try:
    import httpx
    import uvicorn
except ImportError:
    raise SystemExit("benchmarks.serving: needs httpx and the server: pip install httpx peft_sdpt[serve]") from None

HOST = EXAMPLES / "host"
CLASSES = ["grinning face", "dog", "red apple", "tea cup"]
MIXED, SWITCHING, SINGLE = "mixed adapters", "one adapter per batch", "no batches"


class ActiveAdapter(nn.Module):
    """Calls a model with its active adapter, without the names of adapters in the call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, adapter_names: list[str], **inputs: Any) -> Any:
        return self.model(**inputs)


class Switching(serve.Detector):
    """Puts only requests for one adapter into a batch, and makes this adapter the active one."""

    @staticmethod
    def _key(question: Question) -> Hashable:
        return question.shape, question.adapter

    def _answer(self, questions: list[Question]) -> list[Detections | InputError]:
        # Frozen, because prompts that may be trained are projected anew in each call.
        self._model.set_adapter(questions[0].adapter, inference_mode=True)
        with self._accelerator.autocast():
            return answer(ActiveAdapter(self._model), self._tokenizer, questions, serve.MAX_DETECTIONS)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--adapters", type=int, default=4, help="Number of adapters.")
    parser.add_argument("--clients", type=int, default=8, help="Number of clients.")
    parser.add_argument("--max_batch_size", type=int, default=8, help="Maximum batch size.")
    parser.add_argument("--image_size", type=int, default=96, help="Width and height of the images in pixels.")
    parser.add_argument("--rounds", type=int, default=5, help="Number of rounds.")
    parser.add_argument("--requests", type=int, default=64, help="Number of requests per server and round.")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if value < 1:
            raise InputError(f"--{name} {value}: must be at least 1.")


def make_adapters(folder: Path, number: int, image_size: int) -> list[Path]:
    """Save adapters with random prompts and gates. Gates of a new adapter are zero, which would skip the prompts."""
    processor = load_processor(None, HOST)
    set_image_size(processor, image_size)
    folders = [folder / f"adapter-{index}" for index in range(number)]
    for seed, each in enumerate(folders):
        torch.manual_seed(seed)
        save_adapter(each, get_peft_model(load_base_model(HOST), SDPTConfig(init_weights=False)), processor, CLASSES)
    return folders


@contextmanager
def running(detector: serve.Detector, max_requests: int) -> Iterator[str]:
    """Run a server in a thread. Yields its address."""
    app = serve.make_app(detector, max_requests)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


async def load(address: str, names: list[str], images: list[bytes], clients: int) -> tuple[float, list[float]]:
    """Send each image once. Returns the seconds in all, and those of each request."""
    seconds: list[float] = []
    waiting = iter(zip(names, images, strict=True))
    # Without proxies of the environment, which may catch the requests.
    async with httpx.AsyncClient(base_url=address, timeout=None, trust_env=False) as client:

        async def ask() -> None:
            for name, image in waiting:
                start = time.perf_counter()
                found = await client.post("/detect", params={"adapter": name}, files={"image": image})
                found.raise_for_status()
                seconds.append(time.perf_counter() - start)

        start = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(clients)))
        return time.perf_counter() - start, seconds


def make_image(random: np.random.Generator, size: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def measure(args: argparse.Namespace) -> dict[str, list[tuple[float, float, float]]]:
    """Return for each server and round: requests per second, and the median and 95th percentile of the seconds."""
    accelerator = make_accelerator()
    with tempfile.TemporaryDirectory() as folder:
        folders = make_adapters(Path(folder), args.adapters, args.image_size)
        loading = argparse.Namespace(adapter=[*map(str, folders)], model_name_or_path=None)
        model, adapters = serve.load(loading, accelerator)
    detectors = {
        MIXED: lambda: serve.Detector(model, adapters, accelerator, args.max_batch_size, 0.01),
        SWITCHING: lambda: Switching(model, adapters, accelerator, args.max_batch_size, 0.01),
        SINGLE: lambda: serve.Detector(model, adapters, accelerator, 1, 0.0),
    }
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in detectors}
    random = np.random.default_rng(0)
    print(f"{device_name(accelerator.device.type)}, {torch.get_num_threads()} threads")
    for number in range(args.rounds + 1):
        names = [f"adapter-{index}" for index in random.integers(0, args.adapters, args.requests)]
        images = [make_image(random, args.image_size) for _ in names]
        for name, make in detectors.items():
            with running(make(), args.clients) as address:
                whole, seconds = asyncio.run(load(address, names, images, args.clients))
            if number:  # the first round warms up
                results[name].append((len(names) / whole, *np.quantile(seconds, (0.5, 0.95))))
        print(f"round {number} of {args.rounds}", flush=True)
    return results


def report(results: dict[str, list[tuple[float, float, float]]]) -> None:
    print("\n| batches | requests per second | median wait | 95 % wait | ratio of requests per second |")
    print("|---|---|---|---|---|")
    for name, rounds in results.items():
        rate, median, slow = (statistics.median(values) for values in zip(*rounds, strict=True))
        ratios = [one[0] / other[0] for one, other in zip(rounds, results[SWITCHING], strict=True)]
        low, middle, high = quartiles(ratios)
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {name} | {rate:.1f} | {median * 1000:.0f} ms | {slow * 1000:.0f} ms | {ratio} |")


def main() -> None:
    args = parse_args()
    with one_line_errors("benchmarks.serving"):
        check_args(args)
        report(measure(args))


if __name__ == "__main__":
    main()
