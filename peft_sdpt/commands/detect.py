# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detect objects in your images with the adapters that `sdpt-train` saved.

    sdpt-detect photo.jpg --adapter my-adapter
    sdpt-detect folder/of/photos --adapter my-adapter user/other-adapter --threshold 0.4
    sdpt-detect camera/ --adapter my-adapter --watch

The command writes each image with its boxes drawn, under the name of the image, and `detections.json`, a COCO file
whose annotations have a `score`. Several adapters are loaded on one base model. Each adapter detects in every image,
and has its own folder of results. Photos with an EXIF orientation are turned upright first, and the boxes are in pixels
of the upright image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..detection import (
    Detections,
    SavedAdapter,
    class_prompt,
    common_base_model,
    detect,
    draw_detections,
    find_adapter,
    load_detector,
    load_processor,
    read_class_names,
    split_classes,
)
from ..detection.images import SUFFIXES, batches, find_images, read_images, watch
from ..errors import InputError, hint, one_line_errors
from ..files import check_writable, output_folder, whole_files
from .train_arguments import BASE_MODEL

# Arguments of the library whose flag has another name.
RENAMED = {"adapters": "adapter", "source": "adapter"}


def parse_args(description: str | None, model_name_or_path: str) -> argparse.Namespace:
    """Parse the flags in `sys.argv`. The arguments are those of `main`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, help="Images and folders of images.")
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
        help='Classes to detect, such as "red blood cell" platelet. Default: the classes each adapter was trained on.',
    )
    parser.add_argument("--threshold", type=float, default=0.3, help="Lowest score of a detection. Default: 0.3.")
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
    if not 0 <= args.threshold < 1:
        raise InputError(f"--threshold {args.threshold}: must be at least 0 and below 1.")
    if args.batch_size < 1:
        raise InputError(f"--batch_size {args.batch_size}: must be at least 1.")
    for path in args.inputs:
        if not path.exists():
            raise InputError(f"{path}: no such image or folder.")
        if args.watch and not path.is_dir():
            raise InputError(f"{path}: is not a folder, which --watch needs.")


@dataclass
class Results:
    """The results of one adapter: a folder with the images and their COCO file.

    Attributes:
        folder: Folder to write to.
        processor: Processor of the images.
        class_names: Names of the classes.
        chunks: Class indices of each prompt, from `split_classes`.
        images, annotations: Entries of the COCO file. All ids start at 1. The id of a category is its index in
            `class_names` plus 1.
    """

    folder: Path
    processor: Any
    class_names: list[str]
    chunks: list[list[int]]
    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)

    def add(self, source: Path, name: str, image: Image.Image, detections: Detections, threshold: float) -> None:
        """Write an image with its boxes, and add them to the entries of the COCO file.

        Args:
            source: Path of the image.
            name: Name of the file to write.
            image: The image, RGB.
            detections: Its detections.
            threshold: Lowest score of a detection.
        """
        drawn = draw_detections(image, detections, self.class_names, threshold)
        # Properties of the source file, such as a compression for black and white, may not suit the new image.
        drawn.info.clear()
        with whole_files(self.folder) as folder:
            drawn.save(folder / name, quality=95)
        width, height = image.size
        entry = {"id": len(self.images) + 1, "file_name": name, "width": width, "height": height}
        self.images.append({**entry, "source": str(source)})
        columns = (detections["boxes"].tolist(), detections["scores"].tolist(), detections["labels"].tolist())
        for box, score, label in zip(*columns, strict=True):
            if score >= threshold:
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

    def write(self) -> None:
        """Write the COCO file."""
        coco = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.class_names, 1)],
        }
        with whole_files(self.folder) as folder:
            (folder / "detections.json").write_text(json.dumps(coco) + "\n")


def free_name(path: Path, taken: set[str]) -> str:
    """Return a new file name for an image, and add it to `taken`: the name of the image, or `photo-2.jpg` and so on."""
    stem, suffix = (path.stem, path.suffix) if path.suffix.lower() in SUFFIXES else (path.name, ".png")
    name, number = stem + suffix, 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}-{number}{suffix}"
    taken.add(name.casefold())
    return name


def find_adapters(args: argparse.Namespace) -> list[SavedAdapter]:
    """Find the adapters of `--adapter`. Each one has a name of its own, for the folder of its results."""
    adapters = []
    named: dict[str, SavedAdapter] = {}
    for text in args.adapter:
        name, equals, source = text.partition("=")
        # The path of a folder may have an equals sign.
        adapter = find_adapter(source, name) if equals and not Path(text).is_dir() else find_adapter(text)
        if adapter.name in ("", "..") or Path(adapter.name).name != adapter.name:
            raise InputError(f"--adapter {text}: {adapter.name!r} cannot be the name of a folder; write NAME=ADAPTER.")
        # Some file systems do not distinguish upper and lower case.
        other = named.setdefault(adapter.name.casefold(), adapter)
        if other is not adapter:
            sources = f"{other.source} {adapter.source}"
            raise InputError(f"--adapter {sources}: both are called {adapter.name}; write NAME=ADAPTER.")
        adapters.append(adapter)
    return adapters


def read_max_text_len(args: argparse.Namespace, base_model: str) -> int:
    """Return the maximum number of tokens in a prompt of the base model. Only its config is loaded."""
    try:
        max_text_len = getattr(AutoConfig.from_pretrained(base_model), "max_text_len", None)
    except (OSError, ValueError) as error:
        hint = "" if args.model_name_or_path else " The adapter names this base model; pass --model_name_or_path."
        raise InputError(f"{base_model}: cannot be loaded as a detector ({error}).{hint}") from None
    if max_text_len is None:
        raise InputError(f"{base_model}: is not a Grounding DINO or MM Grounding DINO.")
    return max_text_len


def prepare_results(args: argparse.Namespace, base_model: str, adapters: list[SavedAdapter]) -> list[Results]:
    """Load the processor and the class names of each adapter, or those for the base model if there are no adapters."""
    max_text_len = read_max_text_len(args, base_model)
    results = []
    detectors: list[SavedAdapter | None] = [*adapters] or [None]
    for adapter in detectors:
        if args.class_names:
            class_names = args.class_names
        elif adapter:
            with hint("Pass --class_names."):
                class_names = read_class_names(adapter)
        else:
            raise InputError("--class_names: is needed without an --adapter that has class names.")
        processor = load_processor(adapter, base_model)
        phrases = [class_prompt([name]) for name in class_names]
        chunks = split_classes(class_names, processor.tokenizer, max_text_len)
        if not phrases or len(set(phrases)) < len(phrases):
            raise InputError(f"class names: must be at least one, and no name twice; got {' '.join(phrases) or 'none'}")
        folder = args.output_dir / adapter.name if adapter and len(adapters) > 1 else args.output_dir
        results.append(Results(folder, processor, class_names, chunks))
    return results


def make_folders(folders: list[Path], inputs: Iterable[Path]) -> None:
    """Make the folders of the results, unless they exist, and check that they can be written.

    Args:
        folders: Folders of the results.
        inputs: Folders that images are read from.

    Raises:
        InputError: A folder cannot be written, or is also read from.
    """
    sources = {folder.resolve() for folder in inputs}
    for folder in folders:
        if folder.resolve() in sources:
            raise InputError(f"--output_dir: {folder} has the input images, which would be overwritten.")
        check_writable(folder, "output_dir")


def detect_all(args: argparse.Namespace, paths: list[Path], model: Any, results: list[Results]) -> int:
    """Detect in all images, and write the results. Returns the number of images.

    Args:
        args: The flags.
        paths: The images, unless `--watch` looks for them.
        model: The base model, with the adapters in the order of `results`.
        results: The results to add to.
    """
    taken: set[str] = set()
    num_written = None
    bar = tqdm(total=None if args.watch else len(paths), desc="watching" if args.watch else "detecting", unit="image")
    for images in watch(args.inputs) if args.watch else [read_images(paths, args.skip_bad_images)]:
        for batch in batches(images, args.batch_size):
            names = [free_name(path, taken) for path, _ in batch]
            for number, result in enumerate(results):
                if args.adapter:
                    model.set_adapter(f"adapter{number}")
                all_detections = detect(
                    model, result.processor, [image for _, image in batch], result.class_names, result.chunks
                )
                for (path, image), name, detections in zip(batch, names, all_detections, strict=True):
                    result.add(path, name, image, detections, args.threshold)
            bar.update(len(batch))
        # With --watch, results are written after the first look, so that the file always exists, and after each look
        # with new images.
        if len(taken) != num_written:
            num_written = len(taken)
            for result in results:
                result.write()
    bar.close()
    return len(taken)


def run(args: argparse.Namespace, model_name_or_path: str) -> None:
    # All input is checked before the weights are loaded.
    check_args(args)
    paths = [] if args.watch else find_images(args.inputs, args.skip_bad_images)
    adapters = find_adapters(args)
    with hint("Choose one by --model_name_or_path."):
        base_model = args.model_name_or_path or (common_base_model(adapters) if adapters else model_name_or_path)
    results = prepare_results(args, base_model, adapters)
    sources = args.inputs if args.watch else {path.parent for path in paths}
    make_folders([result.folder for result in results], sources)

    model = load_detector(base_model, adapters).to(Accelerator().device)
    num_images = detect_all(args, paths, model, results)
    objects = ", ".join(f"{len(result.annotations)} in {result.folder}" for result in results)
    print(f"images: {num_images}, objects: {objects}")


def main(description: str | None = __doc__, program: str = "sdpt-detect", model_name_or_path: str = BASE_MODEL) -> None:
    """Run the command with the flags in `sys.argv`.

    Args:
        description: Text for `--help`.
        program: Name of the program, for error messages.
        model_name_or_path: The base model that detects if neither `--model_name_or_path` nor `--adapter` is given.
    """
    args = parse_args(description, model_name_or_path)
    with one_line_errors(program, {name: name for name in vars(args)} | RENAMED):
        run(args, model_name_or_path)


if __name__ == "__main__":
    main()
