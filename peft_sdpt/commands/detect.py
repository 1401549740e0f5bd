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

`accelerate launch -m peft_sdpt.commands.detect` divides the images among several processes. `--resume` goes on with a
run that was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
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
from ..detection.saved_adapter import FILES
from ..downloads import limit_waiting
from ..errors import InputError, hint, one_line_errors
from ..files import check_writable, output_folder, read_json, remove_leftovers, whole_file
from ..training import claim_output_dir, from_main_process, make_accelerator
from ..wording import MAX_QUOTED, counted, enumerated, printable, quoted, shorten, shown_path
from . import print_any_name
from .detect_journal import WEIGHTS, Journal, PlannedImage, write_list
from .train_arguments import BASE_MODEL

RESULTS_FILE = "detections.json"
# Largest number of bytes of the name of a file or folder, on all common file systems.
MAX_NAME_BYTES = 255
# Arguments of the library whose flag has another name.
RENAMED = {"adapters": "adapter", "source": "adapter"}
# A process that is done waits so long for the slowest one. The default, ten minutes on GPUs, is too short for machines
# of different speed.
LONGEST_WAIT = timedelta(days=1)
# Largest part of the time that --watch spends on writing the COCO file again and again.
MAX_WRITING = 0.1


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
        "--resume",
        action="store_true",
        help="Go on with a run that was interrupted or killed. The flags and images must be those of that run. The "
        "number of processes may differ. If there is nothing to resume, the command starts from the beginning. If the "
        "results are complete, it does nothing.",
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
    if args.watch and args.resume:
        raise InputError("--resume: cannot be used with --watch.")
    if os.path.lexists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise InputError(f"--output_dir {shown_path(args.output_dir)}: is not a folder.")
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
        num_images: Number of images in the COCO file.
        found: Number of objects of each class, by index.
        empty: Names and best scores of the images in which nothing was found.
        full: Names of the images in which all queries of the detector found an object.
        ours: Names of the images that an earlier run wrote into the folder, and that may be replaced. None if they are
            not known yet.
    """

    name: str
    folder: Path
    processor: Any
    class_names: list[str]
    chunks: list[list[int]]
    threshold: float
    suggested: float | None = None
    num_images: int = 0
    found: Counter[int] = field(default_factory=Counter)
    empty: list[tuple[str, float]] = field(default_factory=list)
    full: list[str] = field(default_factory=list)
    ours: set[str] | None = None

    def check_free(self, name: str, journal: Journal) -> None:
        """Raise an `InputError` if a result would replace a file that this command did not write."""
        if os.path.lexists(self.folder / name) and name not in self.find_ours(journal):
            raise InputError(f"--output_dir: {self.folder / name} exists, and this command did not write it.")

    def find_ours(self, journal: Journal) -> set[str]:
        """Return the names of the images that an earlier run wrote, or may have written before it was killed."""
        if self.ours is None:
            self.ours = journal.planned_names()
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                self.ours |= {image["file_name"] for image in read_json(self.folder / RESULTS_FILE)["images"]}
        return self.ours

    def write_image(self, name: str, image: Image.Image, detections: Detections) -> None:
        """Write an image with its boxes.

        Args:
            name: Path of the file to write, relative to the folder of the results.
            image: The image, RGB.
            detections: Its detections.
        """
        drawn = draw_detections(image, detections, self.class_names, threshold=0.0)  # all of them score enough
        # Properties of the source file, such as a compression for black and white, may not suit the new image.
        drawn.info.clear()
        file = self.folder / name
        # Encoded in memory, because Pillow 12 raises no error if the disk is full and only a part of a JPEG is written.
        encoded = io.BytesIO()
        encoded.name = file.name  # Pillow takes the format from the suffix
        drawn.save(encoded, quality=95)
        with whole_file(file) as unfinished:
            unfinished.write_bytes(encoded.getvalue())

    def write(self, journal: Journal, number: int) -> None:
        """Write the COCO file, one entry after the other, and count what is in it.

        The ids of images, annotations and categories start at 1. The id of a category is its index in `class_names`
        plus 1.

        Args:
            journal: What was found in all images.
            number: Number of this adapter in the journal.
        """
        self.num_images, self.found, self.empty, self.full = 0, Counter(), [], []
        categories = [{"id": i, "name": name} for i, name in enumerate(self.class_names, 1)]
        with (
            whole_file(self.folder / RESULTS_FILE) as unfinished,
            open(unfinished, "w", encoding="utf-8") as file,
        ):
            file.write('{"images": ')
            write_list(file, self._images(journal, number))
            file.write(', "annotations": ')
            write_list(file, self._annotations(journal, number))
            file.write(f', "categories": {json.dumps(categories)}}}\n')

    def _images(self, journal: Journal, number: int) -> Iterator[dict[str, Any]]:
        for entry in journal.images():
            self.num_images += 1
            found = entry["found"][number]
            if not found["scores"]:
                self.empty.append((entry["file_name"], found["best_score"]))
            if found["full"]:
                self.full.append(printable(entry["file_name"]))
            yield {
                "id": self.num_images,
                **{name: entry[name] for name in ("file_name", "width", "height", "source")},
                "best_score": found["best_score"],
            }

    def _annotations(self, journal: Journal, number: int) -> Iterator[dict[str, Any]]:
        annotation = 0
        for image, entry in enumerate(journal.images(), 1):
            found = entry["found"][number]
            for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
                annotation += 1
                self.found[label] += 1
                yield {
                    "id": annotation,
                    "image_id": image,
                    "category_id": label + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "score": score,
                    "iscrowd": 0,
                }

    def introduction(self) -> str:
        """Say which classes are looked for, with which threshold."""
        classes = counted(len(self.class_names), "class", "classes")
        names = enumerated(shorten(name, MAX_QUOTED) for name in self.class_names)
        lines = [f"looking for {classes}: {names} ({self._threshold()})"]
        return "\n".join(map(self._named, [*lines, *names_as_words(self.class_names)]))

    def summary(self) -> str:
        """Say in one line what was found."""
        per_class = [
            f"{shorten(self.class_names[label], MAX_QUOTED)}: {count}" for label, count in self.found.most_common()
        ]
        objects = counted(self.found.total(), "object") + (f" ({enumerated(per_class)})" if per_class else "")
        text = f"{counted(self.num_images, 'image')}, {objects}."
        if self.empty:
            # Scores are rounded down, so that none looks like the threshold.
            best = [
                f"{printable(name)} {math.floor(score * 1000) / 1000}"
                for name, score in sorted(self.empty, key=lambda image: -image[1])
            ]
            text += f" Nothing was found in {counted(len(self.empty), 'image')} ({self._threshold()}), where the best "
            text += f"{'score is' if len(self.empty) == 1 else 'scores are'}: {enumerated(best)}."
        return self._named(f"{text} Results: {self.folder}")

    def _threshold(self) -> str:
        if self.suggested is None:
            return f"threshold {self.threshold}"
        if self.suggested == self.threshold:
            return f"threshold {self.threshold}, as the adapter suggests"
        return f"threshold {self.threshold}; the adapter suggests {self.suggested}"

    def _named(self, text: str) -> str:
        return f"{self.name}: {text}" if self.name else text


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
    check_class_names(class_names)
    return class_names


def check_class_names(class_names: list[str]) -> None:
    """Raise an `InputError` if two names make the same prompt, because both would get the same scores."""
    for phrase, number in Counter(class_prompt([name]) for name in class_names).items():
        if number > 1:
            name = shorten(phrase.removesuffix("."), MAX_QUOTED)
            raise InputError(f"class names: {name} is given {number} times.")


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


# The images of one batch: the path of each one, and what the journal has of it.
Batch = list[tuple[Path, PlannedImage]]


def plan(args: argparse.Namespace) -> list[Batch]:
    """Find the images, and divide them into batches.

    A batch depends only on the images and the batch size. So the results are the same for any number of processes, and
    for runs that were resumed.
    """
    sizes = find_images(args.inputs, args.skip_bad_images, args.output_dir)
    folders, taken = absolute_folders(args.inputs), set[str]()
    return [
        [
            (path, PlannedImage(source_of(path), free_name(relative_name(path, folders), taken), *size))
            for path, size in batch
        ]
        for batch in batches(sizes.items(), args.batch_size, lambda size: size)
    ]


def source_of(path: Path) -> str:
    """Return the absolute path of an image as text."""
    return as_text(os.path.abspath(path))


def settings_of(
    args: argparse.Namespace, base_model: str, adapters: list[SavedAdapter], results: list[Results]
) -> dict[str, Any]:
    """Return what the results depend on besides the images, by flag. A run can be resumed only with the same values."""
    digests = {}
    for adapter in adapters:
        content = b"".join((adapter.folder / name).read_bytes() for name in FILES[:2])  # the config and the weights
        digests[adapter.name] = hashlib.sha256(content).hexdigest()[:16]
    return {
        "--model_name_or_path": base_model,
        "--adapter": [*digests],
        WEIGHTS: digests,
        "--class_names": [result.class_names for result in results],
        "--threshold": [result.threshold for result in results],
        "the image size": [dict(result.processor.image_processor.size) for result in results],
        "--batch_size": args.batch_size,
    }


def prepare_folders(args: argparse.Namespace, names: list[str], sources: set[Path], results: list[Results]) -> None:
    """Make the folders of the results, unless they exist, and check that they can be written.

    Args:
        args: The flags.
        names: Names of the images to write, unless `--watch` looks for them.
        sources: Folders of the input images.
        results: The results.

    Raises:
        InputError: A folder cannot be written, or a result could replace an input.
    """
    sources = {path.resolve() for path in sources}
    subfolders = {Path(name).parent for name in names} | {Path()}
    for result in results:
        for folder in (result.folder / subfolder for subfolder in subfolders):
            target = folder.resolve()
            # With --watch, a result in a watched folder would be a new image.
            if target in sources or (args.watch and any(target in source.parents for source in sources)):
                raise InputError(f"--output_dir: {folder} has the input images, which would be overwritten.")
            remove_leftovers(folder)
        check_writable(result.folder, "output_dir")


def prepare_journal(
    args: argparse.Namespace, settings: dict[str, Any], batches: list[Batch], journal: Journal, results: list[Results]
) -> set[int] | None:
    """Check the folders of the results, and begin or resume a run.

    Returns:
        The numbers of the batches that are done. None if the results are complete.
    """
    images = [image for batch in batches for _, image in batch]
    names = [image.name for image in images]
    prepare_folders(args, names, {path.parent for batch in batches for path, _ in batch} or {*args.inputs}, results)
    if args.resume and journal.has_plan():
        journal.resume(settings, images)
        total = counted(len(names), "image")
        if not journal.is_finished():
            done = journal.done()
            print(f"resuming: {sum(len(batches[number]) for number in done)} of {total} are done")
            return done
        # A user who removes a COCO file wants it made again.
        if all((result.folder / RESULTS_FILE).is_file() for result in results):
            print(f"the results of {total} in {args.output_dir} are complete; nothing is left to do.")
            return None
    for result in results:
        if args.watch:
            result.find_ours(journal)  # before the journal of the earlier run is removed
        for name in names:
            result.check_free(name, journal)
    journal.start(settings, images)
    return set()


def detect_batch(
    args: argparse.Namespace,
    model: Any,
    results: list[Results],
    images: list[tuple[Path, Image.Image]],
    names: list[str],
) -> list[dict[str, Any]]:
    """Detect in images of one size, and write the images with their boxes.

    Args:
        args: The flags.
        model: The base model, with the adapters in the order of `results`.
        results: The results of each adapter.
        images: The images with their paths.
        names: Names of the images to write.

    Returns:
        The entry of each image for the journal.
    """
    entries: list[dict[str, Any]] = []
    for (path, image), name in zip(images, names, strict=True):
        size = {"width": image.width, "height": image.height}
        entries.append({"file_name": name, **size, "source": source_of(path), "found": []})
    for number, result in enumerate(results):
        if args.adapter:
            model.set_adapter(f"adapter{number}")
        with hint(f"images[0] is {shown_path(images[0][0])}."):
            found = detect(
                model,
                result.processor,
                [image for _, image in images],
                result.class_names,
                result.chunks,
                threshold=result.threshold,
                max_detections=None,
            )
        for (_, image), entry, detections in zip(images, entries, found, strict=True):
            result.write_image(entry["file_name"], image, detections)
            entry["found"].append(
                {
                    "best_score": detections["best_score"],
                    "full": uses_all_queries(detections, result.chunks, model.config.num_queries),
                    **{name: detections[name].tolist() for name in ("boxes", "scores", "labels")},
                }
            )
    return entries


def detect_planned(
    args: argparse.Namespace,
    batches_to_do: dict[int, Batch],
    model: Any,
    results: list[Results],
    journal: Journal,
    show_progress: bool,
) -> None:
    """Detect in the images of some batches, and write the results and the journal."""
    total = sum(map(len, batches_to_do.values()))
    try:
        with tqdm(total=total, desc="detecting", unit="image", disable=not show_progress) as bar:
            for number, batch in batches_to_do.items():
                names = {path: image.name for path, image in batch}
                entries = []
                images = read_images([*names], args.skip_bad_images)
                # An image may have been replaced by one of another size.
                for group in batches(images, args.batch_size, lambda image: image.size):
                    entries += detect_batch(args, model, results, group, [names[path] for path, _ in group])
                journal.add(number, entries)
                bar.update(len(batch))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command with --resume goes on.") from None


def detect_new(args: argparse.Namespace, model: Any, results: list[Results], journal: Journal) -> None:
    """Detect in the images that come into the folders, until Ctrl-C."""
    taken: set[str] = set()
    folders = absolute_folders(args.inputs)
    number, num_written, next_writing = 0, -1, -math.inf
    with tqdm(desc="watching", unit="image") as bar:
        for images in watch(args.inputs, args.output_dir):
            for group in batches(images, args.batch_size, lambda image: image.size):
                names = [free_name(relative_name(path, folders), taken) for path, _ in group]
                for result in results:
                    for name in names:
                        result.check_free(name, journal)
                journal.add(number, detect_batch(args, model, results, group, names))
                number += 1
                bar.update(len(group))
            # Results are written after the first look, so that the file always exists, and then after looks with new
            # images. Each time takes longer than the time before, so a look may leave it to a later one.
            begin = time.monotonic()
            if number != num_written and begin >= next_writing:
                num_written = number
                write_results(results, journal)
                end = time.monotonic()
                next_writing = end + (end - begin) / MAX_WRITING


def write_results(results: list[Results], journal: Journal) -> None:
    """Write the COCO file of each adapter."""
    for number, result in enumerate(results):
        result.write(journal, number)


def run(args: argparse.Namespace, model_name_or_path: str) -> None:
    limit_waiting()
    # All input is checked before the weights are loaded.
    check_args(args)
    accelerator = make_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    if args.watch and accelerator.num_processes > 1:
        raise InputError(f"--watch: needs one process, but {accelerator.num_processes} were started.")
    batches = [] if args.watch else from_main_process(accelerator, lambda: plan(args))
    adapters = find_adapters(args)
    with hint("Choose one by --model_name_or_path."):
        base_model = args.model_name_or_path or (common_base_model(adapters) if adapters else model_name_or_path)
    results = prepare_results(args, base_model, adapters)
    settings = settings_of(args, base_model, adapters, results)
    journal = Journal(args.output_dir)
    with claim_output_dir(args.output_dir, accelerator, None):
        done = from_main_process(accelerator, lambda: prepare_journal(args, settings, batches, journal, results))
        if done is None:
            return
        to_do = [number for number in range(len(batches)) if number not in done]
        mine = {number: batches[number] for number in to_do[accelerator.process_index :: accelerator.num_processes]}
        run_alone(args, accelerator, base_model, adapters, mine, len(batches), results, journal)


def run_alone(
    args: argparse.Namespace,
    accelerator: Accelerator,
    base_model: str,
    adapters: list[SavedAdapter],
    batches_to_do: dict[int, Batch],
    num_batches: int,
    results: list[Results],
    journal: Journal,
) -> None:
    """Detect, while no other command writes to the output folder."""
    if accelerator.is_main_process:
        for result in results:
            print(result.introduction())

    model: Any = load_detector(base_model, adapters).to(accelerator.device)
    finished = False
    try:
        if args.watch:
            detect_new(args, model, results, journal)
        else:
            detect_planned(args, batches_to_do, model, results, journal, accelerator.is_main_process)
        finished = True
    finally:
        # What is done so far can be used already. With several processes, the others are still at work.
        if not finished and accelerator.num_processes == 1 and journal.done():
            write_results(results, journal)
    # Each process waits here for the others.
    files = gather_object([str(journal.file)])
    if not accelerator.is_main_process:
        return
    for file in map(Path, files):
        if file.exists():  # a process without images has none
            journal.read(file)
    # The file system of a cluster may show the files of other machines late.
    if missing := {*range(num_batches)} - journal.done():
        number = counted(len(missing), "batch", "batches")
        raise InputError(
            f"--output_dir {args.output_dir}: the results of {number} are not there; "
            "the same command with --resume goes on."
        )
    write_results(results, journal)
    journal.finish()
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
