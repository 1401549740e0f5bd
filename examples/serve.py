# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Serve several adapters on one base model over HTTP.

    python examples/serve.py --adapter my-adapter night=user/other-adapter
    curl -F image=@photo.jpg "http://127.0.0.1:8000/detect?adapter=night"
    curl -F image=@photo.jpg -F classes="red apple" -F classes=dog -F threshold=0.4 "http://127.0.0.1:8000/detect?adapter=night"

Requests that arrive together are detected in one batch, each with its own adapter and classes. `GET /adapters` lists
the adapters, and `GET /docs` describes all requests. The server has no passwords and no encryption. On a network, put
it behind a proxy that has both.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import IO, Annotated, Any

from accelerate import Accelerator
from PIL import Image

from peft_sdpt.commands.detect import check_class_names, find_adapters, read_max_text_len
from peft_sdpt.deployment.serving import Batcher, Question, answer, make_questions, tokenize
from peft_sdpt.detection import (
    Detections,
    InputError,
    common_base_model,
    load_detector,
    load_processor,
    read_class_names,
    read_image,
    read_threshold,
    split_caption,
    split_classes,
)
from peft_sdpt.detection.decoding import opened
from peft_sdpt.detection.grounding import clean_name
from peft_sdpt.detection.images import READABLE_FORMATS
from peft_sdpt.detection.prediction import DEFAULT_THRESHOLD, join
from peft_sdpt.downloads import limit_waiting
from peft_sdpt.errors import hint, one_line_errors
from peft_sdpt.training import make_accelerator
from peft_sdpt.wording import MAX_QUOTED, counted, enumerated, printable, quoted

try:
    import uvicorn
    from fastapi import FastAPI, Form, HTTPException, Query, Request, UploadFile
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict, Field
except ImportError:
    raise SystemExit("serve.py: needs FastAPI and Uvicorn: pip install peft_sdpt[serve]") from None

# Largest size of a request in bytes, and of its image in pixels. A small file can have very many pixels.
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64_000_000
# Largest number of letters of all classes of a request. A prompt has at most 256 tokens.
MAX_LETTERS = 4000
# Largest number of detections in an answer. With a threshold of 0, each pair of query and class is a detection.
MAX_DETECTIONS = 1000
# Number of images that are decoded and resized at the same time.
NUM_DECODERS = 4
# Longest time after Ctrl-C or SIGTERM that requests have to end, in seconds. A client can be slow, or stop sending.
MAX_ENDING = 30


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter with everything that a request with it needs.

    Attributes:
        name: Name in requests.
        key: Name in the model.
        processor: Processor of the adapter.
        class_names: Classes that the adapter was trained on.
        chunks, prompts: The prompts of these classes, from `split_classes` and `tokenize`.
        threshold: Lowest score of a detection, unless a request has its own.
    """

    name: str
    key: str
    processor: Any
    class_names: list[str]
    chunks: list[list[int]]
    prompts: list[dict[str, list[int]]]
    threshold: float


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]ADAPTER",
        help="Folders or Hub ids of saved adapters. Requests use NAME. The default name is the last part of the folder "
        "or id.",
    )
    parser.add_argument(
        "--model_name_or_path",
        help="Folder or Hub id of the base model. Default: the one that the adapters were trained on.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: 127.0.0.1, this machine.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on. Default: 8000.")
    parser.add_argument("--max_batch_size", type=int, default=8, help="Maximum batch size. Default: 8.")
    parser.add_argument(
        "--max_wait_ms",
        type=float,
        default=10.0,
        help="Longest time that a request waits for others while the model is idle, in milliseconds. Default: 10.",
    )
    parser.add_argument(
        "--max_requests",
        type=int,
        default=64,
        help="Maximum number of requests at the same time. Further requests get the status 503. Default: 64.",
    )
    parser.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], help="Precision. Default: that of `accelerate config`."
    )
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    for name in ("max_batch_size", "max_requests"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1.")
    if not 0 <= args.max_wait_ms <= 60_000:
        raise InputError(f"--max_wait_ms {args.max_wait_ms}: must be from 0 to 60,000.")
    if not 0 <= args.port < 65536:
        raise InputError(f"--port {args.port}: must be from 0 to 65,535.")


def load(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Any, list[ServedAdapter]]:
    """Load the base model with all adapters. All input is checked before the weights are loaded."""
    limit_waiting()
    adapters = find_adapters(args)
    with hint("Choose one by --model_name_or_path."):
        base_model = args.model_name_or_path or common_base_model(adapters)
    max_text_len = read_max_text_len(args, base_model)
    served = []
    for number, adapter in enumerate(adapters):
        class_names, processor = read_class_names(adapter), load_processor(adapter, base_model)
        with hint(f"The adapter is {adapter.source}."):
            check_class_names(class_names)
            chunks = split_classes(class_names, processor.tokenizer, max_text_len)
        prompts = tokenize(processor.tokenizer, class_names, chunks)
        threshold = read_threshold(adapter, DEFAULT_THRESHOLD)
        served.append(
            ServedAdapter(adapter.name, f"adapter{number}", processor, class_names, chunks, prompts, threshold)
        )
    return load_detector(base_model, adapters).to(accelerator.device), served


def open_image(file: IO[bytes]) -> Image.Image:
    """Read an uploaded image, upright and as RGB."""
    try:
        with opened(file, "image", READABLE_FORMATS) as header:
            width, height = header.size
        if width * height > MAX_PIXELS:
            raise HTTPException(413, f"image: has {width} x {height} pixels; at most {MAX_PIXELS:,} are allowed.")
        file.seek(0)
        return read_image(file, "image", formats=READABLE_FORMATS)
    except InputError as error:
        # Pillow names a file without a path by its address.
        raise HTTPException(415, str(error).replace(f" {file!r}", "")) from None


class Detector:
    """Detects in the images of requests.

    Args:
        model: The model with all adapters.
        adapters: The adapters.
        accelerator: Sets the precision.
        max_batch_size, max_wait: As in `Batcher`.
    """

    def __init__(
        self,
        model: Any,
        adapters: list[ServedAdapter],
        accelerator: Accelerator,
        max_batch_size: int,
        max_wait: float,
    ) -> None:
        self.adapters = {adapter.name: adapter for adapter in adapters}
        self._model, self._accelerator = model, accelerator
        self._batcher = Batcher(self._answer, self._key, max_batch_size, max_wait)
        self._decoders = ThreadPoolExecutor(NUM_DECODERS, "images")
        # Tokenizers fail if two threads call them at once.
        self._tokenizing = threading.Lock()

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        # A second Ctrl-C cancels all tasks.
        with suppress(asyncio.CancelledError):
            async with self._batcher.running():
                yield
        self._decoders.shutdown()

    @staticmethod
    def _key(question: Question) -> Hashable:
        """Rows with the same key share a batch."""
        return question.shape

    def _answer(self, questions: list[Question]) -> list[Detections | InputError]:
        with self._accelerator.autocast():
            return answer(self._model, self._tokenizer, questions, MAX_DETECTIONS)

    @property
    def _tokenizer(self) -> Any:
        return next(iter(self.adapters.values())).processor.tokenizer

    async def detect(
        self, adapter: ServedAdapter, file: IO[bytes], classes: list[str], threshold: float | None
    ) -> dict[str, Any]:
        """Return the answer to a request."""
        loop = asyncio.get_running_loop()
        threshold = adapter.threshold if threshold is None else threshold
        class_names, questions = await loop.run_in_executor(
            self._decoders, self._prepare, adapter, file, classes, threshold
        )
        parts, best_score = [], 0.0
        for found in await asyncio.gather(*map(self._batcher, questions)):
            if isinstance(found, InputError):
                raise HTTPException(500, str(found))  # the fault of the adapter, not of the client
            parts.append((found["boxes"], found["scores"], found["labels"]))
            best_score = max(best_score, found["best_score"])
        detections = join(parts, best_score, MAX_DETECTIONS)
        width, height = questions[0].size
        return {
            "adapter": adapter.name,
            "width": width,
            "height": height,
            "threshold": threshold,
            "best_score": best_score,
            "boxes": [[x, y, x + w, y + h] for x, y, w, h in detections["boxes"].tolist()],
            "labels": [class_names[label] for label in detections["labels"].tolist()],
            "scores": detections["scores"].tolist(),
        }

    def _prepare(
        self, adapter: ServedAdapter, file: IO[bytes], classes: list[str], threshold: float
    ) -> tuple[list[str], list[Question]]:
        """Decode the image, and write the prompts. Runs in a thread."""
        class_names, chunks, prompts = adapter.class_names, adapter.chunks, adapter.prompts
        if classes:
            class_names, chunks, prompts = self._prompts_of(classes, adapter.processor.tokenizer)
        image = open_image(file)
        return class_names, make_questions(
            adapter.key, adapter.processor.image_processor, image, prompts, chunks, threshold
        )

    def _prompts_of(
        self, classes: list[str], tokenizer: Any
    ) -> tuple[list[str], list[list[int]], list[dict[str, list[int]]]]:
        """Write the prompt of the classes of a request. A client may not ask for more than one prompt."""
        max_text_len = self._model.config.max_text_len
        letters = sum(map(len, classes))
        if letters > MAX_LETTERS:
            raise InputError(f"classes: may have at most {MAX_LETTERS:,} letters in all, got {letters:,}.")
        class_names = [clean_name(name) for text in classes for name in split_caption(text)]
        # Each class has at least two tokens, a word and a full stop.
        if len(class_names) <= max_text_len // 2:
            check_class_names(class_names)
            with self._tokenizing:
                chunks = split_classes(class_names, tokenizer, max_text_len)
                if len(chunks) == 1:
                    return class_names, chunks, tokenize(tokenizer, class_names, chunks)
        raise InputError(
            f"classes: {counted(len(class_names), 'class does', 'classes do')} not fit into one prompt of "
            f"{max_text_len} tokens; send several requests."
        )


class Limits:
    """Refuses requests that are too large, and requests that are too many (ASGI middleware)."""

    def __init__(self, app: Callable[..., Awaitable[None]], max_requests: int) -> None:
        self.app, self.max_requests, self.num_requests = app, max_requests, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # The state of the server can be read also when it is busy.
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self.num_requests >= self.max_requests:
            busy = JSONResponse({"detail": "the server is busy; try again."}, 503, {"Retry-After": "1"})
            return await busy(scope, receive, send)
        received, answering = 0, False

        async def noted(message: Any) -> None:
            nonlocal answering
            answering = True
            await send(message)

        async def limited() -> Any:
            nonlocal received
            message = await receive()
            # Counted, because a client need not give the length of a request, or give the right one.
            received += len(message.get("body", b""))
            if received > MAX_BYTES:
                raise HTTPException(413, f"the request is too large; at most {MAX_BYTES:,} bytes are allowed.")
            return message

        self.num_requests += 1
        try:
            await self.app(scope, limited, noted)
        except asyncio.CancelledError:
            # Only the end of the server cancels a request. Uvicorn would print the traceback of a cancelled task.
            if not answering:
                await JSONResponse({"detail": "the server has ended."}, 503)(scope, receive, send)
        finally:
            self.num_requests -= 1


class Options(BaseModel):
    """What a request can say about the detection, in the address or in the form."""

    model_config = ConfigDict(extra="forbid")

    adapter: str | None = Field(None, description="Name of the adapter. May be left out if there is one.")
    classes: list[str] | None = Field(
        None, description="Names of classes. Default: those that the adapter was trained on."
    )
    threshold: float | None = Field(
        None, ge=0, lt=1, allow_inf_nan=False, description="Lowest score. Default: the one that the adapter suggests."
    )


class Fields(Options):
    """The form of a request."""

    image: UploadFile = Field(description="The image file.")


# Errors of pydantic that need other words here, by their type.
WORDING = {
    "extra_forbidden": f"is unknown; the fields are {', '.join(Fields.model_fields)}",
    "missing": "is missing",
    # Only the image has a check of its own, which is whether it is a file.
    "value_error": "must be a file",
    "finite_number": "must be a number of at least 0 and below 1",
}


async def check_places(request: Request) -> None:
    """Raise an `InputError` for a field that is given twice or is empty. All but one of its values would be ignored."""
    query, form = request.query_params, await request.form()
    for name in Fields.model_fields:
        values = query.getlist(name), form.getlist(name)
        number = sum(map(len, values))
        if name == "classes":
            if all(values):
                raise InputError("classes: are given in the address and in the form; give all of them in one place.")
        elif number > 1:
            raise InputError(f"{name}: is given {number} times; give it once.")
        elif "" in values[0] + values[1]:
            raise InputError(f"{name}: is empty.")


def make_app(detector: Detector, max_requests: int) -> FastAPI:
    """Make the app. Every error is one line, `{"detail": ...}`."""
    app = FastAPI(title="SDPT", description="Detection with several adapters.", lifespan=detector.running)
    app.add_middleware(Limits, max_requests=max_requests)

    @app.exception_handler(InputError)
    async def bad_value(_: Request, error: InputError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def bad_request(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = []
        for problem in error.errors():
            _, name, *_ = *problem["loc"], "request"
            if problem["loc"] == ("query", "image"):
                problems.append("image: must be in the form")
            else:
                problems.append(f"{printable(str(name), MAX_QUOTED)}: {WORDING.get(problem['type'], problem['msg'])}")
        return JSONResponse({"detail": enumerated(problems) + "."}, 422)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "the server failed; its log has the reason."}, 500)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/adapters")
    async def adapters() -> list[dict[str, Any]]:
        return [
            {"name": adapter.name, "classes": adapter.class_names, "threshold": adapter.threshold}
            for adapter in detector.adapters.values()
        ]

    @app.post("/detect")
    async def detect(
        request: Request,
        query: Annotated[Options, Query()],
        form: Annotated[Fields, Form(media_type="multipart/form-data")],
    ) -> dict[str, Any]:
        """Detect objects in an image. Boxes are x0, y0, x1, y1 in pixels of the upright image, the best first.

        `adapter`, `classes` and `threshold` may be in the address or in the form.
        """
        await check_places(request)
        adapter, classes, threshold = (
            getattr(form if getattr(query, name) is None else query, name) for name in Options.model_fields
        )
        names = [*detector.adapters]
        if adapter is None and len(names) == 1:
            adapter = names[0]
        if adapter not in detector.adapters:
            raise HTTPException(404, f"adapter: must be one of {enumerated(names)}; got {quoted(adapter)}.")
        return await detector.detect(detector.adapters[adapter], form.image.file, classes or [], threshold)

    return app


def main() -> None:
    args = parse_args()
    names = {name: name for name in vars(args)} | {"adapters": "adapter", "source": "adapter"}
    with one_line_errors("serve.py", names):
        check_args(args)
        accelerator = make_accelerator(args.mixed_precision)
        model, adapters = load(args, accelerator)
        detector = Detector(model, adapters, accelerator, args.max_batch_size, args.max_wait_ms / 1000)
        # Uvicorn stops at Ctrl-C and SIGTERM, after it has answered the requests that it has.
        app = make_app(detector, args.max_requests)
        uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=MAX_ENDING)


if __name__ == "__main__":
    main()
