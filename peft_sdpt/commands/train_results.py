# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The results of `sdpt-train`: on the screen, in files, and in the model cards of its adapters."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..detection import Detections, DetectionSplit, draw_report, side_by_side, write_threshold
from ..detection.analysis import count_objects
from ..detection.charts import describe_error, most_frequent, worst_and_best
from ..errors import InputError
from ..files import read_json, whole_file, whole_files
from ..model_card import CARD, code, plain, write_licence, write_section
from ..training import Progress
from ..wording import counted, printable, quoted, shorten
from .train_arguments import describe_attack

METRICS = ("AP", "AP50", "AP75")
# Number of images of the evaluation split in `detections.png`.
NUM_SHOWN_IMAGES = 4
# Number of points of the curve of the loss in `metrics.json`.
NUM_POINTS = 500
# How a data set without splits was divided.
SPLITS_FILE = "splits.json"
# Numbers of classes and of errors on the screen, and in a model card.
ON_SCREEN, IN_CARD = 6, 20


def read_division(args: argparse.Namespace, data: DetectionSplit) -> dict[str, list[int]] | None:
    """Return how an earlier run divided a data set without splits, so that no training image is measured.

    Args:
        args: The flags. The record is looked for in the output folder, and in the folder of the adapter or above it.
        data: The whole data set.

    Returns:
        The indices of the images in each part. None if there is no record.

    Raises:
        InputError: The record is damaged, or does not list an image of the data set.
    """
    adapter = Path(args.adapter) if args.adapter else args.output_dir
    places = (args.output_dir / SPLITS_FILE, adapter / SPLITS_FILE, adapter.parent / SPLITS_FILE)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None
    try:
        ids = read_json(file)["image_ids"]
        parts = {name: list(ids[name]) for name in ("train", "val", "test")}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: has no `image_ids` of train, val and test ({quoted(error, 200)}).") from None
    part_of = {str(image_id): name for name, part in parts.items() for image_id in part}
    divided: dict[str, list[int]] = {name: [] for name in parts}
    for index, image_id in enumerate(data.image_ids):
        if str(image_id) not in part_of:
            raise InputError(
                f"{file}: does not list the image {quoted(image_id)}; another --output_dir divides the data set anew."
            )
        divided[part_of[str(image_id)]].append(index)
    return divided


def report_division(args: argparse.Namespace, splits: dict[str, DetectionSplit]) -> None:
    """Print how a data set without splits was divided, and save the ids of the images in `splits.json`."""
    sizes = ", ".join(f"{len(data)} {name}" for name, data in splits.items())
    print(f"the data set has no splits; its images are divided: {sizes} (see {SPLITS_FILE})")
    if not (args.output_dir / SPLITS_FILE).is_file():
        record = {"seed": args.seed, "image_ids": {name: data.image_ids for name, data in splits.items()}}
        with whole_files(args.output_dir) as folder:
            (folder / SPLITS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def report_shots(output_dir: Path, shots: int, seed: int, train: DetectionSplit, drawn: DetectionSplit) -> None:
    """Print the classes with too few images for `--shots`, and save the ids of the drawn images in `shots.json`."""
    images_of = Counter(
        label
        for labels, crowds in zip(train.labels, train.crowds, strict=True)
        for label in {label for label, crowd in zip(labels, crowds, strict=True) if not crowd}
    )
    for label, name in enumerate(train.class_names):
        num_images = images_of[label]
        if num_images < shots:
            print(
                f"--shots {shots}: class {quoted(name)} is on {counted(num_images, 'image')} only; all of them are used"
            )
    record = {"shots": shots, "seed": seed, "image_ids": drawn.image_ids}
    with whole_files(output_dir) as folder:
        (folder / "shots.json").write_text(json.dumps(record, indent=2) + "\n")


@dataclass
class Shown:
    """The images in `detections.png`.

    Attributes:
        data: A split with the images.
        columns: Maps a heading to the detections in each image.
        threshold: Lowest score to draw.
        reason: Why this threshold was chosen.
    """

    data: DetectionSplit
    columns: dict[str, list[Detections]]
    threshold: float
    reason: str


def print_images(
    splits: dict[str, DetectionSplit], measured: Collection[str | None], max_detections: int, num_queries: int
) -> None:
    """Print the number of images without objects, and of images with too many objects.

    Args:
        splits: The splits by name.
        measured: Names of the splits that are measured.
        max_detections: Value of `--max_detections`.
        num_queries: Number of queries of the detector.
    """
    for split, data in splits.items():
        numbers = [len(crowds) - sum(crowds) for crowds in data.crowds]
        if empty := numbers.count(0):
            have = "has" if empty == 1 else "have"
            print(f"{split}: {empty:,} of {counted(len(data), 'image')} {have} no objects")
        too_many = sum(number > num_queries for number in numbers)
        if too_many:
            print(
                f"{split}: {counted(too_many, 'image')} with more objects than the {num_queries} queries of the "
                "detector, which cannot find all of them"
            )
        crowded = sum(number > max_detections for number in numbers)
        if crowded and split in measured:
            have = "has" if crowded == 1 else "have"
            enough = -(-max(numbers) // 100) * 100
            print(
                f"{split}: {counted(crowded, 'image')} {have} more than {counted(max_detections, 'object')}, and AP "
                f"counts the {max_detections} best detections per image; --max_detections {enough} counts more"
            )


def make_record(
    args: argparse.Namespace,
    progress: Progress,
    after: dict[str, Any] | None,
    data: DetectionSplit,
    thresholds: dict[str, Any],
    **numbers: Any,
) -> dict[str, Any]:
    """Return the content of `metrics.json`.

    Args:
        args: The flags of the run.
        progress: Its progress, with the results of the base model in `before`.
        after: Results with the adapter, or None.
        data: The evaluation split.
        thresholds: Suggested score thresholds: `all` for all classes together, and `classes` for each class.
        numbers: Other entries.
    """
    before = progress.before
    after_classes = after["classes"] if after else [None] * len(data.class_names)
    columns = (data.class_names, count_objects(data), before["classes"], after_classes, thresholds["classes"])
    return {
        "before": before["metrics"],
        "after": after and after["metrics"],
        "best": progress.best or None,
        "threshold": thresholds["all"],
        **numbers,
        "classes": {
            name: {"objects": objects, "before": first, "after": then, "threshold": threshold}
            for name, objects, first, then, threshold in zip(*columns, strict=True)
        },
        "precision_recall": {
            "recall": [point / 100 for point in range(101)],
            "before": before["precision"],
            "after": after and after["precision"],
        },
        "curves": {"loss": curve(progress.losses), "validation": progress.validations},
        "train_seconds": round(progress.seconds, 1),
        "args": {name: public_name(value) for name, value in vars(args).items()},
    }


def curve(losses: list[float]) -> dict[str, list]:
    """Return at most `NUM_POINTS` points of a curve. A point has the mean of several steps, and the last of them."""
    width = -(-len(losses) // NUM_POINTS) or 1
    parts = [losses[start : start + width] for start in range(0, len(losses), width)]
    return {
        "step": [min(width * (index + 1), len(losses)) for index in range(len(parts))],
        "value": [round(sum(part) / len(part), 5) for part in parts],
    }


def write_report(
    args: argparse.Namespace,
    record: dict[str, Any],
    shown: Shown,
    data: DetectionSplit,
    split: str,
    processor: Any,
    card: dict[str, Any],
) -> list[str]:
    """Write `metrics.json`, the pictures, the threshold and the model card.

    The numbers are written first. If a picture cannot be drawn, the function prints this and goes on.

    The files of an evaluation start with `eval_`, so that they do not replace those of a training run in the same
    folder. It writes no threshold and no model card.

    Args:
        args: The flags of the run.
        record: Content of `metrics.json`.
        shown: Content of `detections.png`.
        data: The evaluation split.
        split: Its name.
        processor: The processor of the model.
        card: Arguments of `save_adapter` for the model card.

    Returns:
        The names of the files.
    """
    prefix = "eval_" if args.eval_only else ""
    title = f"boxes with a score of at least {shown.threshold:g}, {shown.reason}"
    pictures: dict[str, Callable[[Path], object]] = {
        f"{prefix}report.png": lambda file: draw_report(record, file),
        f"{prefix}detections.png": lambda file: side_by_side(shown.data, shown.columns, shown.threshold, title).save(
            file, format="PNG"
        ),
    }
    with whole_files(args.output_dir) as folder:
        (folder / f"{prefix}metrics.json").write_text(to_json(record), encoding="utf-8")
        names = {path.name for path in folder.iterdir()}
    names |= {name for name, draw in pictures.items() if is_drawn(args.output_dir / name, draw)}
    if not args.eval_only:
        with whole_files(args.output_dir) as folder:
            shutil.copyfile(args.output_dir / CARD, folder / CARD)
            write_threshold(folder, processor, data.class_names, card["threshold"], card["source"])
            where = f"{code(public_name(args.dataset_name))}, split {code(split)}, {size_of(data)}"
            write_section(folder / CARD, "results", describe_last(where, record, names))
            names |= {path.name for path in folder.iterdir()}
    return sorted(names)


def is_drawn(file: Path, draw: Callable[[Path], object]) -> bool:
    """Draw a picture. If this fails, print the reason and remove an older picture of this name. Return the success."""
    try:
        with whole_file(file) as unfinished:
            draw(unfinished)
    except Exception as error:  # an image may have been removed, the disk may be full, and fonts can fail in any way
        print(f"{file.name} could not be drawn: {printable(str(error) or repr(error), 300)}")
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        return False
    return True


def write_best_card(folder: Path, processor: Any, class_names: list[str], card: dict[str, Any]) -> None:
    """Write the licence and the section on detection into the model card of the best adapter.

    The arguments are those of `write_threshold`, and `card` is that of `write_report`.
    """
    with whole_files(folder) as unfinished:
        shutil.copyfile(folder / CARD, unfinished / CARD)
        write_threshold(unfinished, processor, class_names, card["threshold"], card["source"])
        write_licence(unfinished / CARD, card["licence"])


def to_json(record: dict[str, Any]) -> str:
    """Return a record as JSON, with lists of numbers on one line."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    # Strings have no line breaks in JSON, so this matches no string.
    return re.sub(r"\[\n[^\[\]{}\"]*\]", lambda match: " ".join(match[0].split()), text) + "\n"


def print_report(
    args: argparse.Namespace, record: dict[str, Any], data: DetectionSplit, split: str, written: Collection[str]
) -> None:
    """Print the results. The arguments are those of `write_report`, and the names of the files that it wrote."""
    print(f"\n{args.dataset_name}, {split} split of {size_of(data)}")
    whens = [when for when in ("before", "after") if record[when]]
    print(f"{'':8}" + "".join(f"{name:>8}" for name in METRICS))
    for when in whens:
        print(f"{when:8}" + "".join(f"{record[when][key]:8.3f}" for key in METRICS))
    shown, after_gap = worst_and_best(record["classes"], ON_SCREEN)
    print(f"\n{'AP of each class' if not after_gap else 'AP of the worst and best classes':32}", end="")
    print("".join(f"{when:>8}" for when in whens) + f"{'objects':>9}")
    for name in shown:
        if after_gap and name == after_gap[0]:
            print("  ...")
        entry = record["classes"][name]
        print(f"  {shorten(name, 28):30}" + "".join(f"{entry[when]['AP']:8.3f}" for when in whens), end="")
        print(f"{entry['objects']:9,}")
    at = record["at_threshold"]
    print(f"\nat a score of at least {at['threshold']:g}: F1 {at['f1']:.3f}, ", end="")
    print(f"precision {at['precision']:.3f}, recall {at['recall']:.3f}")
    for kind, errors in most_frequent(record["errors"], ON_SCREEN // 2).items():
        listed = ", ".join(f"{shorten(describe_error(error), 60)} ({error['count']:,})" for error in errors)
        print(f"  {kind + ':':11} {listed}")
    print()
    if trained := record["trainable_parameters"]:
        total = record["total_parameters"]
        share = f"{100 * trained / total:.3f} %"
        print(f"trained {trained:,} of {total:,} parameters ({share}) in {record['train_seconds']:.0f} s")
        print(f"adapter: {args.output_dir}/adapter_model.safetensors")
    if best := record["best"]:
        print(f"best adapter, validation AP {best['AP']:.3f} at step {best['step']}: {args.output_dir}/best")
    if suggested := record["threshold"]:
        print(f"suggested score threshold: {suggested['threshold']:g}, from the split {suggested['split']}")
    if describe_attack(record["args"]):
        print("AP is that of unchanged images. `sdpt-robustness` measures AP under attacks")
    files = [name for name in written if name.endswith(("metrics.json", "report.png", "detections.png"))]
    print(f"wrote {', '.join(files)} in {args.output_dir}")


def size_of(data: DetectionSplit) -> str:
    return f"{counted(len(data), 'image')} of {counted(len(data.class_names), 'class', 'classes')}"


def describe_best(dataset_name: str, split: str, metrics: dict[str, float]) -> str:
    """Return the results for the model card of the adapter with the highest AP on the validation split."""
    return (
        f"## Results\n\nThis adapter has the highest AP on the split {code(split)} of all adapters of a training run "
        f"on {code(public_name(dataset_name))}. It was chosen by that AP, at step {metrics['step']}.\n\n"
        f"{table({'validation': metrics})}"
    )


def describe_last(data: str, record: dict[str, Any], files: Collection[str]) -> str:
    """Return the results for the model card of the adapter after the last training step.

    Args:
        data: Description of the evaluation data in Markdown.
        record: Content of `metrics.json`.
        files: Names of the files beside the card.
    """
    steps = record["curves"]["loss"]["step"][-1]
    attack = describe_attack(record["args"])
    shown, after_gap = worst_and_best(record["classes"], IN_CARD)
    at = record["at_threshold"]
    classes = []
    for name in shown:
        entry = record["classes"][name]
        values = (f"{entry[when]['AP']:.3f}" for when in ("before", "after"))
        classes.append([plain(name), *values, f"{entry['objects']:,}"])
    paragraphs = [
        "## Results",
        f"COCO AP on {data}, after {counted(steps, 'training step')}. `metrics.json` has all numbers and the "
        "arguments of the run.",
        table({"before, the base model alone": record["before"], "after": record["after"]}),
        *([f"It was trained on attacked images, with `{attack}`. AP is that of unchanged images."] if attack else []),
        f"AP of the {IN_CARD // 2} worst and the {IN_CARD // 2} best classes:" if after_gap else "AP of each class:",
        markdown(["", "before", "after", "objects"], classes),
        f"At a score of at least {at['threshold']:g}: F1 {at['f1']:.3f}, precision {at['precision']:.3f}, recall "
        f"{at['recall']:.3f}, at IoU 0.5.",
    ]
    if record["errors"]:
        paragraphs.append("Most frequent errors at this score:")
        kinds = most_frequent(record["errors"], IN_CARD // 4).values()
        lines = [f"- {plain(describe_error(error))}: {error['count']:,}" for errors in kinds for error in errors]
        paragraphs.append("\n".join(lines))
    pictures = {
        "report.png": "Curves and charts of the training",
        "detections.png": "Objects, and detections before and after",
    }
    paragraphs += [f"![{text}]({name})" for name, text in pictures.items() if name in files]
    if record["best"]:
        paragraphs.append(f"`best/` holds the adapter with the highest validation AP, {record['best']['AP']:.3f}.")
    return "\n\n".join(paragraphs)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of metrics, with one row for each entry."""
    return markdown(["", *METRICS], [[name, *(f"{row[key]:.3f}" for key in METRICS)] for name, row in rows.items()])


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [heading, ["---"] * len(heading), *rows])


def public_name(value: Any) -> Any:
    """Return only the last part of a path, so that the value can be published. Return any other value as it is."""
    is_path = isinstance(value, Path) or (isinstance(value, str) and os.path.exists(value))
    return Path(value).resolve().name if is_path else value
