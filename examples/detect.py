# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detect objects in your pictures with the adapters that `train_detection.py` made.

    python examples/detect.py photo.jpg --adapter my-adapter
    python examples/detect.py folder/of/photos --adapter my-adapter user/other-adapter --threshold 0.4
    python examples/detect.py camera/ --adapter my-adapter --watch

Writes each picture with its boxes drawn, under its own name, and `detections.json`, a COCO file whose annotations have
a `score`. Several adapters are loaded on one host; each detects in every picture and has a folder of results.
Photographs that a camera stored turned are turned upright first: boxes are in pixels of the upright picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoConfig

from peft_sdpt.detection import (
    class_prompt,
    common_base_model,
    detect,
    draw_detections,
    find_adapters,
    load_detector,
    load_processor,
    read_class_names,
    split_classes,
)
from peft_sdpt.detection.images import SUFFIXES, batches, find_images, read_images, watch
from peft_sdpt.errors import InputError, one_line_errors
from peft_sdpt.files import whole_files

HERE = Path(__file__).resolve().parent
# Arguments of the library, with the flags that set them.
LIBRARY_ARGUMENTS = {name: name for name in ("adapter", "class_names", "model_name_or_path", "skip_bad_images")}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, help="Pictures, and folders whose pictures are all taken.")
    parser.add_argument(
        "--adapter",
        nargs="+",
        default=[],
        metavar="[NAME=]ADAPTER",
        help="Folders or Hub ids of saved adapters. A name is what its folder in --output_dir is called; default: the "
        "last part of the folder or id. Without any, the bare host detects.",
    )
    parser.add_argument(
        "--model_name_or_path",
        help="Folder or Hub id of the host. Default: the one that the adapters were trained on, or the shipped one.",
    )
    parser.add_argument(
        "--class_names",
        nargs="+",
        metavar="NAME",
        help='What to look for, such as "red blood cell" platelet. Default: the classes each adapter was trained on.',
    )
    parser.add_argument("--threshold", type=float, default=0.3, help="Lowest score that counts as a detection.")
    parser.add_argument("--batch_size", type=int, default=4, help="Pictures at a time, where they are of one size.")
    parser.add_argument("--output_dir", type=Path, default=Path("detections"))
    parser.add_argument(
        "--watch", action="store_true", help="Go on looking for new pictures in the folders, until Ctrl-C."
    )
    parser.add_argument(
        "--skip_bad_images", action="store_true", help="Leave out what does not open as a picture, and say so."
    )
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    if not 0 <= args.threshold < 1:
        raise InputError(f"--threshold {args.threshold}: must be at least 0 and below 1.")
    if args.batch_size < 1:
        raise InputError(f"--batch_size {args.batch_size}: must be at least 1.")
    for path in args.inputs:
        if not path.exists():
            raise InputError(f"{path}: no such picture or folder.")
        if args.watch and not path.is_dir():
            raise InputError(f"{path}: --watch looks into folders, and this is none.")


@dataclass
class Results:
    """What is found with one adapter: a folder with the pictures and their COCO file.

    Attributes:
        folder: where it is written.
        processor: with which pictures go in.
        class_names: names of the classes.
        chunks: from `split_classes`.
        images, annotations: of the COCO file. All ids count from 1; a category's is its place in `class_names` plus 1.
    """

    folder: Path
    processor: object
    class_names: list[str]
    chunks: list[list[int]]
    images: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)

    def add(self, source: Path, name: str, picture: Image.Image, found: dict, threshold: float) -> None:
        """Write a picture with its boxes, and keep those boxes for the COCO file.

        Args:
            source: where the picture came from.
            name: file name to write it under.
            picture: RGB.
            found: from `detect`.
            threshold: lowest score that counts.
        """
        drawn = draw_detections(picture, found, self.class_names, threshold)
        # How the file was stored, such as a compression for black and white, is not how this one can be.
        drawn.info.clear()
        with whole_files(self.folder) as folder:
            drawn.save(folder / name, quality=95)
        width, height = picture.size
        image = {"id": len(self.images) + 1, "file_name": name, "width": width, "height": height}
        self.images.append({**image, "source": str(source)})
        for box, score, label in zip(*(found[key].tolist() for key in ("boxes", "scores", "labels")), strict=True):
            if score >= threshold:
                self.annotations.append(
                    {
                        "id": len(self.annotations) + 1,
                        "image_id": image["id"],
                        "category_id": label + 1,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "score": score,
                        "iscrowd": 0,
                    }
                )

    def write(self) -> None:
        coco = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.class_names, 1)],
        }
        with whole_files(self.folder) as folder:
            (folder / "detections.json").write_text(json.dumps(coco) + "\n")


def free_name(path: Path, taken: set[str]) -> str:
    """A file name that is not taken yet, and takes it: the picture's own if that can be, or `photo-2.jpg` and so on."""
    stem, suffix = (path.stem, path.suffix) if path.suffix.lower() in SUFFIXES else (path.name, ".png")
    name, number = stem + suffix, 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}-{number}{suffix}"
    taken.add(name.casefold())
    return name


def make_folders(folders: list[Path], inputs: Iterable[Path]) -> None:
    """Make the folders of the results.

    Args:
        folders: to be made, if they are not there.
        inputs: folders that pictures are taken from.

    Raises:
        InputError: one cannot be written, or is an input.
    """
    read = {folder.resolve() for folder in inputs}
    for folder in folders:
        if folder.resolve() in read:
            raise InputError(f"--output_dir: {folder} holds the pictures themselves, which would be overwritten.")
        try:
            with whole_files(folder):
                pass
        except InputError as error:
            raise InputError(f"--output_dir {error}") from None


def run(args: argparse.Namespace) -> None:
    # What can be found wrong is, before the weights are loaded.
    check_args(args)
    paths = [] if args.watch else find_images(args.inputs, args.skip_bad_images)
    adapters = find_adapters(args.adapter)
    host = args.model_name_or_path or (common_base_model(adapters) if adapters else str(HERE / "host"))
    try:
        max_text_len = getattr(AutoConfig.from_pretrained(host), "max_text_len", None)
    except (OSError, ValueError) as error:
        hint = "" if args.model_name_or_path else " The adapter names it as its host: give --model_name_or_path."
        raise InputError(f"{host}: no detector to load ({error}).{hint}") from None
    if max_text_len is None:
        raise InputError(f"{host}: no detector of the Grounding DINO kind.")
    results = []
    for adapter in adapters or [None]:
        if not args.class_names and adapter is None:
            raise InputError("no class names: give --class_names, or an --adapter that was saved with its own.")
        class_names = args.class_names or read_class_names(adapter)
        processor = load_processor(adapter, host)
        try:
            phrases = [class_prompt([name]) for name in class_names]
            chunks = split_classes(class_names, processor.tokenizer, max_text_len)
        except ValueError as error:
            raise InputError(str(error)) from None
        if not phrases or len(set(phrases)) < len(phrases):
            raise InputError(f"class names: {' '.join(phrases) or 'none'} There must be one at least, and none twice.")
        folder = args.output_dir / adapter.name if len(adapters) > 1 else args.output_dir
        results.append(Results(folder, processor, class_names, chunks))
    make_folders([result.folder for result in results], args.inputs if args.watch else {p.parent for p in paths})

    model = load_detector(host, adapters).to(Accelerator().device)
    taken, written = set(), None
    bar = tqdm(total=None if args.watch else len(paths), desc="watching" if args.watch else "detecting", unit="picture")
    for pictures in watch(args.inputs) if args.watch else [read_images(paths, args.skip_bad_images)]:
        for batch in batches(pictures, args.batch_size):
            names = [free_name(path, taken) for path, _ in batch]
            for number, result in enumerate(results):
                if adapters:
                    model.set_adapter(f"adapter{number}")
                found = detect(
                    model, result.processor, [picture for _, picture in batch], result.class_names, result.chunks
                )
                for (path, picture), name, found_here in zip(batch, names, found, strict=True):
                    result.add(path, name, picture, found_here, args.threshold)
            bar.update(len(batch))
        # Watching: after each look that found something, and the first, so that there is a file in any case.
        if len(taken) != written:
            written = len(taken)
            for result in results:
                result.write()
    bar.close()
    objects = ", ".join(f"{len(result.annotations)} in {result.folder}" for result in results)
    print(f"pictures: {len(taken)}, objects: {objects}")


def main() -> None:
    with one_line_errors("detect.py", LIBRARY_ARGUMENTS):
        run(parse_args())


if __name__ == "__main__":
    main()
