# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""How `train_detection.py` shows its results: on the screen, in files, and in the model cards of its adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from peft_sdpt.detection import side_by_side
from peft_sdpt.files import whole_files
from peft_sdpt.model_card import CARD, write_results

METRICS = ("AP", "AP50", "AP75")


def write_report(
    output_dir: Path,
    record: dict[str, Any],
    images: list[Image.Image],
    detections: dict[str, list[dict]],
    class_names: list[str],
    card: str | None,
) -> None:
    """Write `metrics.json`, `detections.png` and the results in the model card, all or none of them.

    Args:
        output_dir: Folder to write to.
        record: What `metrics.json` holds.
        images: Images to show.
        detections: Maps a heading to the detections in each image.
        class_names: Names of the classes.
        card: Results for the model card. None for an evaluation, whose files start with `eval_`, so that the record
            of a training run in the same folder stays.
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
        data: What the metrics were measured on.
        record: What `metrics.json` holds.
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
        print(f"the adapter: {output_dir}/adapter_model.safetensors")
    if best := record["best"]:
        print(f"the best on validation, AP {best['AP']:.3f} at step {best['step']}: {output_dir}/best")
    prefix = "" if trained else "eval_"
    print(f"wrote {output_dir}/{prefix}metrics.json and {prefix}detections.png")


def describe_best(dataset_name: str, split: str, metrics: dict[str, float]) -> str:
    """Results in the card of the adapter with the highest AP on the validation split."""
    return (
        f"## Results\n\nThis adapter has the highest AP on the split `{split}` of all adapters of a training run on "
        f"`{public_name(dataset_name)}`. It was chosen by that AP, at step {metrics['step']}.\n\n"
        f"{table({'validation': metrics})}"
    )


def describe_last(data: str, steps: int, record: dict[str, Any]) -> str:
    """Results in the card of the adapter after the last training step.

    Args:
        data: What the metrics were measured on, in Markdown.
        steps: Number of training steps.
        record: What `metrics.json` holds.
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
    """A Markdown table of metrics, with one row for each entry."""
    lines = [["", *METRICS], ["---"] * (len(METRICS) + 1)]
    lines += [[name, *(f"{metrics[key]:.3f}" for key in METRICS)] for name, metrics in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def public_name(value: Any) -> Any:
    """The last part of a path, and any other value as it is: a card should not publish where files lie."""
    is_path = isinstance(value, Path) or (isinstance(value, str) and Path(value).exists())
    return Path(value).resolve().name if is_path else value
