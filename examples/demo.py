# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Show the detections of adapters and of the base model in a browser.

    python examples/demo.py --adapter my-adapter
    python examples/demo.py --adapter my-adapter night=user/other-adapter

The script prints the address of the page. All adapters are loaded on one base model. Without an adapter, only the base
model detects. The script is also the app of a Space on the Hub, and docs/demo.md explains how to make one.
"""

from __future__ import annotations

import argparse
import html
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from peft import PeftModel
from PIL import Image

from peft_sdpt.commands.detect import find_adapters, read_max_text_len
from peft_sdpt.detection import (
    Detections,
    InputError,
    class_prompt,
    common_base_model,
    detect,
    draw_detections,
    load_detector,
    load_processor,
    read_class_names,
    read_image,
    read_threshold,
    split_caption,
    split_classes,
)
from peft_sdpt.detection.prediction import DEFAULT_THRESHOLD
from peft_sdpt.downloads import limit_waiting
from peft_sdpt.errors import hint, one_line_errors
from peft_sdpt.model_card import plain

try:
    import gradio as gr
except ImportError:
    raise SystemExit("demo.py: needs Gradio: pip install peft_sdpt[demo]") from None

HOST = Path(__file__).resolve().parent / "host"
BASE = "base model"
# The lowest threshold on the page. With lower ones, boxes hide the image.
LOWEST = 0.05


class Choice(NamedTuple):
    """An adapter to choose on the page, or the base model if there are no adapters."""

    name: str
    processor: Any
    # Maps each class as the page shows it, without the commas and full stops that separate classes there, to its name.
    class_names: dict[str, str]
    threshold: float


# An image, the class names, and for each model a heading and its detections.
Result = tuple[Image.Image, list[str], list[tuple[str, Detections]]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter",
        nargs="+",
        default=os.environ.get("ADAPTER", "").split(),
        metavar="[NAME=]ADAPTER",
        help="Folders or Hub ids of saved adapters. NAME is shown on the page. The default name is the last part of "
        "the folder or id. Default: those in the environment variable ADAPTER.",
    )
    parser.add_argument(
        "--model_name_or_path",
        default=os.environ.get("MODEL"),
        help="Folder or Hub id of the base model. Default: the environment variable MODEL, then the base model that "
        f"the adapters were trained on, or {HOST} without any adapter.",
    )
    parser.add_argument(
        "--class_names", nargs="+", metavar="NAME", help="Classes at the start. Default: those of each adapter."
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="Lowest score at the start. Default: the threshold that each adapter suggests, or 0.3.",
    )
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Any, list[Choice]]:
    """Load the base model with all adapters, and what the page needs for each one."""
    if args.threshold is not None and not LOWEST <= args.threshold < 1:
        raise InputError(f"--threshold {args.threshold}: must be at least {LOWEST} and below 1.")
    limit_waiting()
    adapters = find_adapters(args)
    with hint("Choose one by --model_name_or_path."):
        base_model = args.model_name_or_path or (common_base_model(adapters) if adapters else str(HOST))
    max_text_len = read_max_text_len(args, base_model)
    choices = []
    for adapter in adapters or [None]:
        with hint("Pass --class_names."):
            class_names = [name for text in args.class_names or () for name in split_caption(text)] or (
                read_class_names(adapter) if adapter else []
            )
        threshold = args.threshold or (read_threshold(adapter, DEFAULT_THRESHOLD) if adapter else DEFAULT_THRESHOLD)
        shown = {" ".join(re.sub("[,.]", " ", name).split()): name for name in class_names}
        name, processor = adapter.name if adapter else BASE, load_processor(adapter, base_model)
        if class_names:
            split_classes(class_names, processor.tokenizer, max_text_len)  # names that a prompt cannot hold
        choices.append(Choice(name, processor, shown, max(LOWEST, threshold)))
    return load_detector(base_model, adapters).to(Accelerator().device), choices


def read_text(text: str, choice: Choice) -> list[str]:
    """Return the class names in a text, each once. Commas, full stops and new lines separate them."""
    parts = [" ".join(part.split()) for part in re.split(r"[,.\n]", text)]
    names = [choice.class_names.get(part, part) for part in parts if part]
    if not names:
        raise InputError("Write at least one class.")
    return list({class_prompt([name]): name for name in names}.values())


def detect_both(model: Any, choices: list[Choice], file: str | None, text: str, number: int, scale: float) -> Result:
    """Detect with the base model, and with an adapter if there are adapters."""
    choice = choices[number]
    try:
        if not file:
            raise InputError("Choose an image first.")
        names = read_text(text, choice)
        chunks = split_classes(names, choice.processor.tokenizer, model.config.max_text_len)
        image = read_image(file, Path(file).name)
    except InputError as error:
        raise page_error(str(error)) from None

    detect_now = partial(detect, model, choice.processor, [image], names, chunks, LOWEST, None)
    if not isinstance(model, PeftModel):
        return image, names, [(BASE, *detect_now())]
    with model.disable_adapter():
        base = (BASE, *detect_now())
    model.set_adapter(f"adapter{number}")
    try:
        # The model keeps the scale of the call before.
        model.base_model.set_scale(f"adapter{number}", scale)
    except ValueError as error:  # the adapter has no gates, and always has the scale 1
        if scale != 1:
            raise page_error(f"{choice.name} cannot be scaled: {error}") from None
    return image, names, [base, (choice.name if scale == 1 else f"{choice.name} x {scale:g}", *detect_now())]


def page_error(message: str) -> gr.Error:
    """Return an error for the page. Its message is escaped, because the page would show HTML in names as HTML."""
    return gr.Error(html.escape(message, quote=False), print_exception=False)


def draw(result: Result | None, threshold: float) -> Any:
    """Draw the detections of each model with a score of at least `threshold`."""
    if result is None:
        return gr.skip()
    image, class_names, models = result
    shown = []
    for heading, detections in models:
        count = int((detections["scores"] >= threshold).sum())
        found = f"{count} found" if count else f"nothing found; the best score is {detections['best_score']:.2f}"
        # Small images are enlarged, so that the names of the classes can be read.
        drawn = draw_detections(image, detections, class_names, threshold, max(image.width, 480))
        shown += [f"**{plain(heading)}**: {found}", drawn]
    return shown


def make_page(model: Any, choices: list[Choice]) -> gr.Blocks:
    has_adapters = isinstance(model, PeftModel)
    texts = [", ".join(choice.class_names) for choice in choices]
    # Images are deleted from the server after an hour.
    with gr.Blocks(analytics_enabled=False, title="SDPT", fill_width=True, delete_cache=(3600, 3600)) as page, gr.Row():
        with gr.Column():
            # Without a mode, the file is handed over as it is. Gradio would clip 16-bit images.
            image = gr.Image(type="filepath", image_mode=None, sources=["upload", "webcam", "clipboard"], label="image")
            text = gr.Textbox(texts[0], label="classes", info="Separated by commas.", max_lines=4)
            names = [(choice.name, number) for number, choice in enumerate(choices)]
            adapter = gr.Dropdown(names, value=0, label="adapter", visible=len(choices) > 1)
            scale = gr.Slider(0, 1, 1, step=0.05, label="adapter scale (0: base model)", visible=has_adapters)
            threshold = gr.Slider(LOWEST, 1, choices[0].threshold, step=0.01, label="threshold")
            button = gr.Button("Detect", variant="primary")
        with gr.Column(scale=2), gr.Row():
            shown = []
            for name in [BASE, "adapter"] if has_adapters else [BASE]:
                with gr.Column(elem_classes="result"):
                    heading = gr.Markdown(f"**{name}**")
                    # A label would cover a part of the image. The default buttons share images on the Hub.
                    drawn = gr.Image(show_label=False, interactive=False, buttons=["download", "fullscreen"])
                    shown += [heading, drawn]
        result = gr.State()

        # One call at a time, because each one switches and scales the adapters of the model.
        gr.on(
            [button.click, text.submit],
            partial(detect_both, model, choices),
            [image, text, adapter, scale],
            result,
            concurrency_limit=1,
        ).success(draw, [result, threshold], shown)
        threshold.change(draw, [result, threshold], shown, trigger_mode="always_last", show_progress="hidden")
        # Classes that the user wrote stay.
        adapter.change(
            lambda number, text: [texts[number] if text in texts else text, choices[number].threshold],
            [adapter, text],
            [text, threshold],
        )
    return page


def main() -> None:
    args = parse_args()
    with one_line_errors("demo.py", {name: name for name in vars(args)} | {"adapters": "adapter", "source": "adapter"}):
        model, choices = load(args)
    make_page(model, choices).launch()


if __name__ == "__main__":
    main()
