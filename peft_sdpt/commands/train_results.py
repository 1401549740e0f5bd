# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The results of `sdpt-train`: on the screen, in files, and in the model cards of its adapters."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from ..detection import Detections, DetectionSplit, side_by_side
from ..files import whole_files
from ..model_card import CARD, write_results
from ..training import Progress, trained_parameters

METRICS = ("AP", "AP50", "AP75")
# Number of images of the evaluation split in `detections.png`.
NUM_SHOWN_IMAGES = 4


def report_division(output_dir: Path, seed: int, splits: dict[str, DetectionSplit]) -> None:
    """Print how a data set without splits was divided, and save the ids of the images in `splits.json`."""
    sizes = ", ".join(f"{len(data)} {name}" for name, data in splits.items())
    print(f"the data set has no splits; --seed {seed} divides its images: {sizes} (see splits.json)")
    record = {"seed": seed, "image_ids": {name: data.image_ids for name, data in splits.items()}}
    with whole_files(output_dir) as folder:
        (folder / "splits.json").write_text(json.dumps(record, indent=2) + "\n")


def report_shots(output_dir: Path, shots: int, seed: int, train: DetectionSplit, drawn: DetectionSplit) -> None:
    """Print the classes with too few images for `--shots`, and save the ids of the drawn images in `shots.json`."""
    for label, name in enumerate(train.class_names):
        num_images = sum(label in labels for labels in train.labels)
        if num_images < shots:
            print(f"--shots {shots}: class {name!r} is on {num_images} images only; all of them are used")
    record = {"shots": shots, "seed": seed, "image_ids": drawn.image_ids}
    with whole_files(output_dir) as folder:
        (folder / "shots.json").write_text(json.dumps(record, indent=2) + "\n")


def report(
    args: argparse.Namespace,
    progress: Progress,
    detector: nn.Module,
    eval_split: str,
    held_out: DetectionSplit,
    after: dict[str, Any] | None,
) -> None:
    """Print the results of a run, and write them with images and a model card.

    Args:
        args: The flags of the run.
        progress: Its progress, with the results of the base model in `before`.
        detector: The model with its adapter.
        eval_split: Name of the evaluation split.
        held_out: The evaluation split.
        after: Results with the adapter, or None: `metrics`, and `shown`, the detections in the first images.
    """
    trained = trained_parameters(detector).values()
    record = {
        "before": progress.before["metrics"],
        "after": after and after["metrics"],
        "best": progress.best or None,
        "trainable_parameters": 0 if args.eval_only else sum(parameter.numel() for parameter in trained),
        "total_parameters": sum(parameter.numel() for parameter in detector.parameters()),
        "train_seconds": round(progress.seconds, 1),
        "args": {name: public_name(value) for name, value in vars(args).items()},
    }
    detections = {"before": progress.before["shown"]} | ({"after": after["shown"]} if after else {})
    images = [held_out.open_image(image) for image in range(len(detections["before"]))]
    size = f"{len(held_out)} images of {len(held_out.class_names)} classes"
    data = f"`{public_name(args.dataset_name)}`, split `{eval_split}`, {size}"
    card = None if args.eval_only else describe_last(data, progress.step, record)
    write_report(args.output_dir, record, images, detections, held_out.class_names, card)
    print_report(args.output_dir, f"{args.dataset_name}, {eval_split} split of {size}", record)


def write_report(
    output_dir: Path,
    record: dict[str, Any],
    images: list[Image.Image],
    detections: dict[str, list[Detections]],
    class_names: list[str],
    card: str | None,
) -> None:
    """Write `metrics.json`, `detections.png` and the results in the model card. Either all of them are written, or
    none.

    Args:
        output_dir: Folder to write to.
        record: Content of `metrics.json`.
        images: Images to show.
        detections: Maps a heading to the detections in each image.
        class_names: Names of the classes.
        card: Results for the model card. None for an evaluation, whose files start with `eval_`, so that they do not
            replace the files of a training run in the same folder.
    """
    prefix = "" if card else "eval_"
    with whole_files(output_dir) as folder:
        (folder / f"{prefix}metrics.json").write_text(json.dumps(record, indent=2) + "\n")
        side_by_side(images, detections, class_names).save(folder / f"{prefix}detections.png")
        if card:
            shutil.copyfile(output_dir / CARD, folder / CARD)
            write_results(folder / CARD, card)


def print_report(output_dir: Path, data: str, record: dict[str, Any]) -> None:
    """Print the results.

    Args:
        output_dir: Folder that the results are in.
        data: Description of the evaluation data.
        record: Content of `metrics.json`.
    """
    print(f"\n{data}")
    print(f"{'':8}" + "".join(f"{name:>8}" for name in METRICS))
    for name in ("before", "after"):
        if record[name]:
            print(f"{name:8}" + "".join(f"{record[name][key]:8.3f}" for key in METRICS))
    trained, total = record["trainable_parameters"], record["total_parameters"]
    if trained:
        share = f"{100 * trained / total:.3f} %"
        print(f"trained {trained:,} of {total:,} parameters ({share}) in {record['train_seconds']:.0f} s")
        print(f"adapter: {output_dir}/adapter_model.safetensors")
    if best := record["best"]:
        print(f"best adapter, validation AP {best['AP']:.3f} at step {best['step']}: {output_dir}/best")
    prefix = "" if trained else "eval_"
    print(f"wrote {output_dir}/{prefix}metrics.json and {prefix}detections.png")


def describe_best(dataset_name: str, split: str, metrics: dict[str, float]) -> str:
    """Return the results for the model card of the adapter with the highest AP on the validation split."""
    return (
        f"## Results\n\nThis adapter has the highest AP on the split `{split}` of all adapters of a training run on "
        f"`{public_name(dataset_name)}`. It was chosen by that AP, at step {metrics['step']}.\n\n"
        f"{table({'validation': metrics})}"
    )


def describe_last(data: str, steps: int, record: dict[str, Any]) -> str:
    """Return the results for the model card of the adapter after the last training step.

    Args:
        data: Description of the evaluation data in Markdown.
        steps: Number of training steps.
        record: Content of `metrics.json`.
    """
    paragraphs = [
        "## Results",
        f"COCO AP on {data}, after {steps} training steps. `metrics.json` lists the arguments of the run.",
        table({"before, the base model alone": record["before"], "after": record["after"]}),
        "![Detections before and after](detections.png)",
    ]
    if record["best"]:
        paragraphs.append(f"`best/` holds the adapter with the highest validation AP, {record['best']['AP']:.3f}.")
    return "\n\n".join(paragraphs)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of metrics, with one row for each entry."""
    lines = [["", *METRICS], ["---"] * (len(METRICS) + 1)]
    lines += [[name, *(f"{metrics[key]:.3f}" for key in METRICS)] for name, metrics in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def public_name(value: Any) -> Any:
    """Return only the last part of a path, so that the value can be published. Return any other value as it is."""
    is_path = isinstance(value, Path) or (isinstance(value, str) and Path(value).exists())
    return Path(value).resolve().name if is_path else value
