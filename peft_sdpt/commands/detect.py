# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detect objects in your images with the adapters that `sdpt-train` saved.

    sdpt-detect photo.jpg --adapter my-adapter
    sdpt-detect folder/of/photos --adapter my-adapter user/other-adapter --threshold 0.4
    sdpt-detect camera/ --adapter my-adapter --watch

The command writes each image with its boxes drawn, under the name of the image, and `detections.json`, a COCO file
whose annotations have a `score`. Folders are searched with their subfolders, and the results have the same subfolders.
Several adapters are loaded on one base model. Each adapter detects in every image, and has its own folder of results.
Photos with an EXIF orientation are turned upright first, and the boxes are in pixels of the upright image.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..detection import (
    Detections,
    SavedAdapter,
    class_prompt,
    common_base_model,
    detect,
    draw_detections,
    find_adapter,
    load_base_config,
    load_detector,
    load_processor,
    read_class_names,
    read_threshold,
    split_classes,
)
from ..detection.grounding import clean_name, names_as_words, split_caption
from ..detection.images import (
    HEIF_SUFFIXES,
    WRITABLE_SUFFIXES,
    absolute_folders,
    as_text,
    batches,
    find_images,
    read_images,
    relative_name,
    watch,
)
from ..detection.prediction import DEFAULT_THRESHOLD
from ..downloads import limit_waiting
from ..errors import InputError, hint, one_line_errors
from ..files import check_writable, only_writer, output_folder, read_json, whole_files
from ..wording import MAX_QUOTED, counted, enumerated, printable, quoted, shorten, shown_path
from . import print_any_name
from .train_arguments import BASE_MODEL

RESULTS_FILE = "detections.json"
# Largest number of bytes of the name of a file or folder, on all common file systems.
MAX_NAME_BYTES = 255
# Arguments of the library whose flag has another name.
RENAMED = {"adapters": "adapter", "source": "adapter"}


def parse_args(description: str | None, model_name_or_path: str) -> argparse.Namespace:
    """Parse the flags in `sys.argv`. The arguments are those of `main`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "inputs", nargs="+", type=Path, help="Images and folders. Folders are searched with their subfolders."
    )
    parser.add_argument(
        "--adapter",
        nargs="+",
        default=[],
        metavar="[NAME=]ADAPTER",
        help="Folders or Hub ids of saved adapters. With several adapters, each has a folder NAME in --output_dir. The "
        "default name is the last part of the folder or id. Without any adapter, the base model detects.",
    )
    parser.add_argument(
        "--model_name_or_path",
        help="Folder or Hub id of the base model. Default: the one that the adapters were trained on, or "
        f"{model_name_or_path} without any adapter.",
    )
    parser.add_argument(
        "--class_names",
        nargs="+",
        metavar="NAME",
        help='Classes to detect, such as "red blood cell" platelet, or a caption such as "cat . dog .". Default: the '
        "classes each adapter was trained on.",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="Lowest score of a detection. Default: the threshold that each adapter suggests, or "
        f"{DEFAULT_THRESHOLD} if it suggests none.",
    )
    parser.add_argument(
        "--batch_size", type=int, default=4, help="Batch size, for consecutive images of the same size. Default: 4."
    )
    parser.add_argument(
        "--output_dir",
        type=output_folder,
        default=Path("detections"),
        help="Folder for the results. Default: detections.",
    )
    parser.add_argument(
        "--watch", action="store_true", help="Keep looking for new images in the folders, until Ctrl-C."
    )
    parser.add_argument(
        "--skip_bad_images", action="store_true", help="Skip files that cannot be opened as images, with a message."
    )
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    if args.threshold is not None and not 0 <= args.threshold < 1:
        raise InputError(f"--threshold {args.threshold}: must be at least 0 and below 1.")
    if args.batch_size < 1:
        raise InputError(f"--batch_size {args.batch_size}: must be at least 1.")
    for path in args.inputs:
        if not os.path.exists(path):  # `Path.exists` raises an error for a name that is too long
            raise InputError(f"{shown_path(path)}: no such image or folder.")
        if args.watch and not path.is_dir():
            raise InputError(f"{shown_path(path)}: is not a folder, which --watch needs.")


@dataclass
class Results:
    """The results of one adapter: a folder with the images and their COCO file.

    Attributes:
        name: Name of the adapter. Empty if it is the only one.
        folder: Folder to write to.
        processor: Processor of the images.
        class_names: Names of the classes.
        chunks: Class indices of each prompt, from `split_classes`.
        threshold: Lowest score of a detection.
        suggested: The threshold that the adapter suggests. None if it suggests none.
        images, annotations: Entries of the COCO file. All ids start at 1. The id of a category is its index in
            `class_names` plus 1.
        full: Names of the images in which all queries of the detector found an object.
        earlier: Names of the images that an earlier run wrote into the folder, and that may be replaced.
    """

    name: str
    folder: Path
    processor: Any
    class_names: list[str]
    chunks: list[list[int]]
    threshold: float
    suggested: float | None = None
    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)
    full: list[str] = field(default_factory=list)
    earlier: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            coco = read_json(self.folder / RESULTS_FILE)
            self.earlier = {image["file_name"] for image in coco["images"]}

    def check_free(self, name: str) -> None:
        """Raise an `InputError` if a result would replace a file that this command did not write."""
        if os.path.lexists(self.folder / name) and name not in self.earlier:
            raise InputError(f"--output_dir: {self.folder / name} exists, and this command did not write it.")

    def add(self, source: Path, name: str, image: Image.Image, detections: Detections, num_queries: int) -> None:
        """Write an image with its boxes, and add them to the entries of the COCO file.

        Args:
            source: Path of the image.
            name: Path of the file to write, relative to the folder of the results.
            image: The image, RGB.
            detections: Its detections.
            num_queries: Number of queries of the detector.
        """
        drawn = draw_detections(image, detections, self.class_names, threshold=0.0)  # all of them score enough
        # Properties of the source file, such as a compression for black and white, may not suit the new image.
        drawn.info.clear()
        self.check_free(name)
        file = self.folder / name
        # Encoded in memory, because Pillow 12 raises no error if the disk is full and only a part of a JPEG is written.
        encoded = io.BytesIO()
        encoded.name = file.name  # Pillow takes the format from the suffix
        drawn.save(encoded, quality=95)
        with whole_files(file.parent) as folder:
            (folder / file.name).write_bytes(encoded.getvalue())
        width, height = image.size
        entry = {"id": len(self.images) + 1, "file_name": name, "width": width, "height": height}
        origin = as_text(os.path.abspath(source))
        self.images.append({**entry, "source": origin, "best_score": detections["best_score"]})
        columns = (detections["boxes"].tolist(), detections["scores"].tolist(), detections["labels"].tolist())
        for box, score, label in zip(*columns, strict=True):
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": entry["id"],
                    "category_id": label + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "score": score,
                    "iscrowd": 0,
                }
            )
        if uses_all_queries(detections, self.chunks, num_queries):
            self.full.append(printable(name))

    def introduction(self) -> str:
        """Say which classes are looked for, with which threshold."""
        classes = counted(len(self.class_names), "class", "classes")
        names = enumerated(shorten(name, MAX_QUOTED) for name in self.class_names)
        lines = [f"looking for {classes}: {names} ({self._threshold()})"]
        return "\n".join(map(self._named, [*lines, *names_as_words(self.class_names)]))

    def summary(self) -> str:
        """Say in one line what was found."""
        names = (self.class_names[annotation["category_id"] - 1] for annotation in self.annotations)
        per_class = [f"{shorten(name, MAX_QUOTED)}: {number}" for name, number in Counter(names).most_common()]
        objects = counted(len(self.annotations), "object") + (f" ({enumerated(per_class)})" if per_class else "")
        text = f"{counted(len(self.images), 'image')}, {objects}."
        found_in = {annotation["image_id"] for annotation in self.annotations}
        empty = sorted((i for i in self.images if i["id"] not in found_in), key=lambda i: -i["best_score"])
        if empty:
            # Scores are rounded down, so that none looks like the threshold.
            best = [
                f"{printable(image['file_name'])} {math.floor(image['best_score'] * 1000) / 1000}" for image in empty
            ]
            text += f" Nothing was found in {counted(len(empty), 'image')} ({self._threshold()}), where the best "
            text += f"{'score is' if len(empty) == 1 else 'scores are'}: {enumerated(best)}."
        return self._named(f"{text} Results: {self.folder}")

    def _threshold(self) -> str:
        if self.suggested is None:
            return f"threshold {self.threshold}"
        if self.suggested == self.threshold:
            return f"threshold {self.threshold}, as the adapter suggests"
        return f"threshold {self.threshold}; the adapter suggests {self.suggested}"

    def _named(self, text: str) -> str:
        return f"{self.name}: {text}" if self.name else text

    def write(self) -> None:
        """Write the COCO file."""
        coco = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.class_names, 1)],
        }
        with whole_files(self.folder) as folder:
            (folder / RESULTS_FILE).write_text(json.dumps(coco) + "\n")


def uses_all_queries(detections: Detections, chunks: list[list[int]], num_queries: int) -> bool:
    """Return whether each query of the detector found an object. The image may then have more objects.

    A query can have several classes, but it has only one box for each prompt.
    """
    if len(detections["scores"]) < num_queries:
        return False
    classes = (torch.isin(detections["labels"], torch.tensor(chunk)) for chunk in chunks)
    return any(len(detections["boxes"][mine].unique(dim=0)) >= num_queries for mine in classes)


def free_name(name: Path, taken: set[str]) -> str:
    """Return a new path for the result of an image, relative to the folder of the results, and add it to `taken`.

    Args:
        name: Path of the image, relative to the folder of the inputs.
        taken: Paths of other results, casefolded.

    Returns:
        The path of the image, or `folder/photo-2.jpg` and so on. If images of this format cannot be written, another
        suffix is added. The path is text that can be encoded as UTF-8, and names that are too long are cut.
    """
    name = Path(as_text(name))
    stem, suffix = name.stem, name.suffix
    if suffix.lower() not in WRITABLE_SUFFIXES:
        stem, suffix = name.name, ".jpg" if suffix.lower() in HEIF_SUFFIXES else ".png"
    folder = Path(*(_cut(part, "") for part in name.parent.parts))
    free, number = (folder / _cut(stem, suffix)).as_posix(), 1
    while free.casefold() in taken:
        number += 1
        free = (folder / _cut(stem, f"-{number}{suffix}")).as_posix()
    taken.add(free.casefold())
    return free


def _cut(stem: str, end: str) -> str:
    """Return the name of a file, with its stem cut to the length that file systems allow."""
    return stem.encode()[: MAX_NAME_BYTES - len(end.encode())].decode(errors="ignore") + end


def find_adapters(args: argparse.Namespace) -> list[SavedAdapter]:
    """Find the adapters of `--adapter`. Their names are unique, because the folders of the results have these names."""
    adapters = []
    named: dict[str, SavedAdapter] = {}
    for text in args.adapter:
        name, equals, source = text.partition("=")
        # The path of a folder may have an equals sign.
        adapter = find_adapter(source, name) if equals and not os.path.isdir(text) else find_adapter(text)
        is_name = Path(adapter.name).name == adapter.name and adapter.name not in ("", "..")
        if not is_name or not adapter.name.isprintable() or len(adapter.name.encode()) > MAX_NAME_BYTES:
            raise InputError(
                f"--adapter {shown_path(text)}: {quoted(adapter.name)} cannot be the name of a folder; write "
                "NAME=ADAPTER."
            )
        # Some file systems do not distinguish upper and lower case.
        other = named.setdefault(adapter.name.casefold(), adapter)
        if other is not adapter:
            sources = printable(f"{other.source} {adapter.source}", 600)
            raise InputError(f"--adapter {sources}: both are called {adapter.name}; write NAME=ADAPTER.")
        adapters.append(adapter)
    return adapters


def read_max_text_len(args: argparse.Namespace, base_model: str) -> int:
    """Return the maximum number of tokens in a prompt of the base model. Only its config is loaded."""
    by_adapter = hint("The adapter names this base model; pass --model_name_or_path.")
    with nullcontext() if args.model_name_or_path or not args.adapter else by_adapter:
        return load_base_config(base_model).max_text_len


def choose_class_names(given: list[str] | None, adapter: SavedAdapter | None) -> list[str]:
    """Return the classes to detect.

    Args:
        given: The names or captions of `--class_names`. None for the classes that the adapter was trained on.
        adapter: The adapter. None for the base model.

    Raises:
        InputError: There are no names, or a name is given twice.
    """
    if given:
        class_names = [clean_name(name) for text in given for name in split_caption(text)]
    elif adapter:
        with hint("Pass --class_names."):
            class_names = read_class_names(adapter)
    else:
        raise InputError("--class_names: is needed without an --adapter that has class names.")
    if not class_names:
        raise InputError(f"{adapter.source if adapter else '--class_names'}: has no class name.")
    for phrase, number in Counter(class_prompt([name]) for name in class_names).items():
        if number > 1:
            name = shorten(phrase.removesuffix("."), MAX_QUOTED)
            raise InputError(f"class names: {name} is given {number} times.")
    return class_names


def prepare_results(args: argparse.Namespace, base_model: str, adapters: list[SavedAdapter]) -> list[Results]:
    """Load everything for detecting with each adapter, or with the base model if there are no adapters."""
    max_text_len = read_max_text_len(args, base_model)
    results = []
    detectors: list[SavedAdapter | None] = [*adapters] or [None]
    for adapter in detectors:
        class_names = choose_class_names(args.class_names, adapter)
        processor = load_processor(adapter, base_model)
        chunks = split_classes(class_names, processor.tokenizer, max_text_len)
        suggested = read_threshold(adapter) if adapter else None
        threshold = next(t for t in (args.threshold, suggested, DEFAULT_THRESHOLD) if t is not None)
        name = adapter.name if adapter and len(adapters) > 1 else ""
        folder = args.output_dir / name
        results.append(Results(name, folder, processor, class_names, chunks, threshold, suggested))
    return results


def make_folders(args: argparse.Namespace, paths: list[Path], results: list[Results]) -> None:
    """Make the folders of the results, unless they exist, and check that they can be written.

    Args:
        args: The flags.
        paths: The images, unless `--watch` looks for them.
        results: The results.

    Raises:
        InputError: A folder cannot be written, or a result could replace an input.
    """
    sources = {path.resolve() for path in ({path.parent for path in paths} or args.inputs)}
    inputs = absolute_folders(args.inputs)
    subfolders = {relative_name(path, inputs).parent for path in paths} | {Path()}
    for result in results:
        for folder in (result.folder / subfolder for subfolder in subfolders):
            target = folder.resolve()
            # With --watch, a result in a watched folder would be a new image.
            if target in sources or (args.watch and any(target in source.parents for source in sources)):
                raise InputError(f"--output_dir: {folder} has the input images, which would be overwritten.")
        for name in {as_text(relative_name(path, inputs)) for path in paths}:
            result.check_free(name)
        check_writable(result.folder, "output_dir")


def detect_all(args: argparse.Namespace, paths: list[Path], model: Any, results: list[Results]) -> None:
    """Detect in all images, and write the results.

    Args:
        args: The flags.
        paths: The images, unless `--watch` looks for them.
        model: The base model, with the adapters in the order of `results`.
        results: The results to add to.
    """
    taken: set[str] = set()
    num_written = None
    folders = absolute_folders(args.inputs)
    looks = watch(args.inputs, args.output_dir) if args.watch else [read_images(paths, args.skip_bad_images)]
    bar = tqdm(total=None if args.watch else len(paths), desc="watching" if args.watch else "detecting", unit="image")
    try:
        for images in looks:
            for batch in batches(images, args.batch_size):
                names = [free_name(relative_name(path, folders), taken) for path, _ in batch]
                pictures = [image for _, image in batch]
                for number, result in enumerate(results):
                    if args.adapter:
                        model.set_adapter(f"adapter{number}")
                    with hint(f"images[0] is {shown_path(batch[0][0])}."):
                        found = detect(
                            model,
                            result.processor,
                            pictures,
                            result.class_names,
                            result.chunks,
                            threshold=result.threshold,
                            max_detections=None,
                        )
                    for (path, image), name, detections in zip(batch, names, found, strict=True):
                        result.add(path, name, image, detections, model.config.num_queries)
                bar.update(len(batch))
            # With --watch, results are written after the first look, so that the file always exists, and after each
            # look with new images.
            if len(taken) != num_written:
                num_written = len(taken)
                for result in results:
                    result.write()
    finally:
        bar.close()
        # Also after an error or Ctrl-C, so that the next run knows which images it may replace.
        if len(taken) != num_written and taken:
            for result in results:
                result.write()


def run(args: argparse.Namespace, model_name_or_path: str) -> None:
    limit_waiting()
    # All input is checked before the weights are loaded.
    check_args(args)
    paths = [] if args.watch else find_images(args.inputs, args.skip_bad_images, args.output_dir)
    adapters = find_adapters(args)
    with hint("Choose one by --model_name_or_path."):
        base_model = args.model_name_or_path or (common_base_model(adapters) if adapters else model_name_or_path)
    results = prepare_results(args, base_model, adapters)
    make_folders(args, paths, results)
    with only_writer(args.output_dir, "output_dir"):
        run_alone(args, paths, base_model, adapters, results)


def run_alone(
    args: argparse.Namespace, paths: list[Path], base_model: str, adapters: list[SavedAdapter], results: list[Results]
) -> None:
    """Detect, while no other command writes to the output folder."""
    for result in results:
        print(result.introduction())

    model: Any = load_detector(base_model, adapters).to(Accelerator().device)
    detect_all(args, paths, model, results)
    for result in results:
        print(result.summary())
        if result.full:
            print(
                f"The detector found as many objects as it can, {model.config.num_queries}, in "
                f"{counted(len(result.full), 'image')}: {enumerated(result.full)}. There may be more objects; "
                "cut such images into parts."
            )


def main(description: str | None = __doc__, program: str = "sdpt-detect", model_name_or_path: str = BASE_MODEL) -> None:
    """Run the command with the flags in `sys.argv`.

    Args:
        description: Text for `--help`.
        program: Name of the program, for error messages.
        model_name_or_path: The base model that detects if neither `--model_name_or_path` nor `--adapter` is given.
    """
    args = parse_args(description, model_name_or_path)
    print_any_name()
    with one_line_errors(program, {name: name for name in vars(args)} | RENAMED):
        run(args, model_name_or_path)


if __name__ == "__main__":
    main()
