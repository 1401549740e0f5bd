# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measure how robust a detector is: AP under attacks, common corruptions, and purifiers.

    sdpt-robustness --dataset_name path/to/folder --adapter my-adapter

The command writes `robustness.json` after each part, and at the end a table, `robustness.md`, and a picture,
`robustness.png`. The same command goes on where an earlier one stopped: parts with the same settings are not measured
again. docs/robustness.md explains the table.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..detection import (
    DetectionSplit,
    SavedAdapter,
    average_precision,
    check_image_size,
    choose_images,
    common_base_model,
    find_adapter,
    find_splits,
    load_base_config,
    load_detector,
    load_processor,
    load_splits,
    lowest_rows,
    mean_precision_under_corruption,
    only_split,
    parse_purifier,
    read_threshold,
    set_image_size,
    split_classes,
)
from ..detection.attacks import Attack
from ..detection.corruptions import CORRUPTIONS, check_corruption
from ..detection.data import shuffled
from ..detection.formats import matching_split
from ..detection.prediction import DEFAULT_THRESHOLD
from ..detection.purification import Purifier
from ..detection.robustness import Adversary, Change, RandomSigns, corrupt_split, detect_changed
from ..detection.saved_adapter import FILES
from ..downloads import limit_waiting
from ..errors import InputError, hint, one_line_errors
from ..files import output_folder, whole_file
from ..training import claim_output_dir, make_accelerator
from ..wording import counted
from . import print_any_name
from .robustness_results import Measurements, Shown, draw_attack, make_tables, part_name
from .train import find_dataset
from .train_arguments import BASE_MODEL, DATA_FLAGS, Help, Task, add_reading_flags
from .train_results import NUM_SHOWN_IMAGES, read_division

# What each attack of --attack is, for the table. "pgd" comes first: of equal attacks, the first is the lowest.
ATTACKS = {
    "pgd": "PGD through the prompts",
    "features": "on the features of the backbone (AdvPT)",
    "transfer": "PGD on the base model, transferred",
    "vanish": "vanish (TOG)",
}
# The losses of `Attack` that are not "all".
LOSSES = {"features": "features", "vanish": "vanish"}
NONE, ALL = "none", "all"
# Arguments of the library whose flag has another name.
RENAMED = {"adapters": "adapter", "source": "adapter"}


def parse_args(
    description: str | None, model_name_or_path: str, dataset_name: str | None, tasks: Mapping[str, Task]
) -> argparse.Namespace:
    """Parse the flags in `sys.argv`. The arguments are those of `main`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Help, allow_abbrev=False)
    group = parser.add_argument_group("data")
    add_reading_flags(group, dataset_name, list(tasks))
    group.add_argument(
        "--eval_split",
        help="Split to measure on. Default: test, if the data set has it, else val. If the data set has no splits, the "
        "images that training held out, or all images.",
    )
    group.add_argument("--num_images", type=int, help="Number of images, drawn with --seed. Default: all.")
    group = parser.add_argument_group("base model and adapter")
    group.add_argument("--adapter", help="Folder or Hub id of a saved adapter. Without it, the base model is measured.")
    group.add_argument(
        "--model_name_or_path",
        help="Folder or Hub id of the base model. Default: the one that the adapter was trained on, or "
        f"{model_name_or_path} without an adapter.",
    )
    group = parser.add_argument_group("attacks")
    group.add_argument(
        "--attack",
        nargs="+",
        default=list(ATTACKS),
        choices=[*ATTACKS, NONE],
        help="Attacks: on the whole detector, on the features of its backbone, on the base model, or so that nothing "
        "is found.",
    )
    group.add_argument(
        "--eps", nargs="+", type=float, default=[1, 2, 4, 8], help="Largest changes of a pixel, of 255 levels."
    )
    group.add_argument("--steps", type=int, default=20, help="Number of steps of each attack.")
    group.add_argument(
        "--restarts", type=int, default=1, help="Number of random starts. For each image, the worst one counts."
    )
    group = parser.add_argument_group("corruptions and purifiers")
    group.add_argument(
        "--corruptions",
        nargs="+",
        default=[ALL],
        metavar="NAME",
        help=f"Corruptions of ImageNet-C, all or none: {', '.join(CORRUPTIONS)}.",
    )
    group.add_argument(
        "--severities", nargs="+", type=int, default=[1, 3, 5], help="Severities of the corruptions, from 1 to 5."
    )
    group.add_argument(
        "--purify",
        nargs="+",
        default=["jpeg:75", "bits:4"],
        metavar="PURIFIER",
        help="Purifiers: JPEG of a quality, a number of bits per channel, or none.",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--per_device_eval_batch_size", type=int, default=16, help="Batch size.")
    group.add_argument("--seed", type=int, default=0, help="Seed of everything that is random.")
    group.add_argument("--output_dir", type=output_folder, default=Path("robustness"), help="Folder for the results.")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Check the flags, and put the values for `all` and `none` in their place.

    Raises:
        InputError: The value of a flag is not allowed.
    """
    for name in ("num_images", "steps", "restarts", "image_size", "per_device_eval_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1.")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: must be at least 0 and below {2**32}.")
    for eps in args.eps:
        if not 0 < eps <= 255:
            raise InputError(f"--eps {eps:g}: must be above 0 and at most 255, because a pixel has 255 levels.")
    for name in ("dataset_name", "adapter", "model_name_or_path"):
        if getattr(args, name) == "":
            raise InputError(f"--{name}: is empty.")
    for name in ("attack", "corruptions", "purify"):
        if getattr(args, name) == [NONE]:
            setattr(args, name, [])
        elif NONE in getattr(args, name):
            raise InputError(f"--{name} {NONE}: cannot be used with other values.")
    if args.corruptions == [ALL]:
        args.corruptions = list(CORRUPTIONS)
    for name in args.corruptions:
        for severity in args.severities:
            check_corruption(name, severity)
    # Sorted, so that the table does not depend on the order of the flags.
    for name in ("eps", "severities", "purify"):
        setattr(args, name, sorted(set(getattr(args, name))))
    for name, order in (("attack", ATTACKS), ("corruptions", CORRUPTIONS)):
        setattr(args, name, sorted(set(getattr(args, name)), key=[*order].index))
    args.purify = [parse_purifier(text) for text in args.purify]


@dataclass
class Job:
    """A change of the images, and the parts that are measured with it.

    Attributes:
        label: What is done, for the progress bar.
        settings: What the change depends on.
        parts: Maps the name of each part to the purifier in front of the detector, or None.
        change: The change of pixels, or None.
        corruption: Name and severity of a corruption of the images, or None.
    """

    label: str
    settings: dict[str, Any]
    parts: dict[str, Purifier | None]
    change: Callable[[], Change] | None = None
    corruption: tuple[str, int] | None = None


@dataclass
class Setup:
    """What is measured.

    Attributes:
        data: The split.
        indices: Indices of the images to measure on.
        model: The `PeftModel`, or the base model.
    """

    args: argparse.Namespace
    data: DetectionSplit
    indices: list[int]
    model: Any
    processor: Any
    adapter: SavedAdapter | None
    base_model: str
    part: DetectionSplit = field(init=False)

    def __post_init__(self) -> None:
        self.part = self.data.subset(self.indices)

    @property
    def without_prompts(self) -> Callable[[], Any] | None:
        """A context in which the model is the base model. None if it is always."""
        return self.model.disable_adapter if self.adapter else None

    def attack(self, name: str, eps: float) -> Attack:
        return Attack(eps / 255, self.args.steps, restarts=self.args.restarts, loss=LOSSES.get(name, "all"))

    def adversary(self, name: str, eps: float, purify: Purifier | None = None) -> Adversary:
        return Adversary(
            self.model,
            self.processor,
            self.data,
            self.attack(name, eps),
            attacked=self.without_prompts if name == "transfer" else None,
            purify=purify,
            seed=self.args.seed,
        )

    def settings(self) -> dict[str, Any]:
        """Return what all parts depend on, by flag."""
        content = b""
        if self.adapter:
            content = b"".join((self.adapter.folder / name).read_bytes() for name in FILES[:2])
        is_folder = os.path.isdir(self.base_model)
        return {
            "--model_name_or_path": str(Path(self.base_model).resolve()) if is_folder else self.base_model,
            "--adapter": hashlib.sha256(content).hexdigest()[:16] if self.adapter else None,
            "the images": self.part.fingerprint(),
            "the image size": dict(self.processor.image_processor.size),
            "--seed": self.args.seed,
        }

    def jobs(self) -> Iterator[Job]:
        """Yield everything to measure, the quickest first."""
        args = self.args
        purified = {part_name("clean", purify=purify): purify for purify in args.purify}
        yield Job("unchanged", {}, {part_name("clean"): None, **purified})
        for name in args.corruptions:
            for severity in args.severities:
                key = part_name(name, severity)
                yield Job(key, {}, {key: None}, corruption=(name, severity))
        attacks = [name for name in args.attack if self.adapter or name != "transfer"]
        for eps in args.eps if attacks else ():
            key = part_name("signs", eps)
            yield Job(key, {}, {key: None}, partial(RandomSigns, self.processor, eps / 255, args.seed))
        for eps in args.eps:
            for name in attacks:
                parts: dict[str, Purifier | None] = {part_name(name, eps): None}
                if name in ("pgd", "transfer"):
                    parts |= {part_name(name, eps, purify): purify for purify in args.purify}
                yield Job(part_name(name, eps), self._steps(), parts, partial(self.adversary, name, eps))
            for purify in args.purify if "pgd" in attacks else ():
                key = part_name("adaptive", eps, purify)
                yield Job(key, self._steps(), {key: purify}, partial(self.adversary, "pgd", eps, purify))

    def _steps(self) -> dict[str, Any]:
        return {"steps": self.args.steps, "restarts": self.args.restarts}


def prepare(args: argparse.Namespace, accelerator: Any, tasks: Mapping[str, Task], model_name_or_path: str) -> Setup:
    """Read the data, load the model, and check that they fit together."""
    adapter = find_adapter(args.adapter) if args.adapter else None
    with hint("Choose one by --model_name_or_path."):
        base_model = args.model_name_or_path or (common_base_model([adapter]) if adapter else model_name_or_path)
    # Called for its error, before the data set is read.
    load_base_config(base_model)
    data = read_data(args, accelerator, tasks)
    number = min(args.num_images or len(data), len(data))
    indices = sorted(shuffled(data, range(len(data)), args.seed)[:number])
    if not data.subset(indices).has_objects():
        raise InputError(f"--num_images {number}: none of these images has an object; take more, or another --seed.")
    processor = load_processor(adapter, base_model)
    if args.image_size:
        set_image_size(processor, args.image_size)
    model: Any = load_detector(base_model, [adapter] if adapter else []).to(accelerator.device)
    check_image_size(model, processor, args.image_size, [data.sizes[index] for index in indices])
    # Called for its error: a class name that does not fit into a prompt should end the run before it starts.
    split_classes(data.class_names, processor.tokenizer, model.config.max_text_len)
    return Setup(args, data, indices, model, processor, adapter, base_model)


def read_data(args: argparse.Namespace, accelerator: Any, tasks: Mapping[str, Task]) -> DetectionSplit:
    """Read the split to measure on."""
    dataset = find_dataset(args, accelerator, tasks)
    options = {name: getattr(args, name) for name in DATA_FLAGS}
    existing = find_splits(dataset)
    whole = None if args.eval_split else only_split(existing)
    if whole:
        data = load_splits(dataset, [whole], accelerator, **options)[whole]
        if parts := read_division(args, data):
            return data.subset(parts["test"])
        print("the data set has no splits; all of its images are measured, also those that an adapter was trained on")
        return data
    split = args.eval_split or ("test" if matching_split(existing, "test") else "val")
    return load_splits(dataset, [split], accelerator, **options)[split]


def measure(setup: Setup, measurements: Measurements) -> None:
    """Measure the parts that are missing."""
    args = setup.args
    for job in setup.jobs():
        missing = {name: purify for name, purify in job.parts.items() if not measurements.has(name, job.settings)}
        if not missing:
            continue
        begin = time.monotonic()
        data = corrupt_split(setup.data, *job.corruption, args.seed) if job.corruption else setup.data
        found = detect_changed(
            setup.model,
            setup.processor,
            data,
            job.change() if job.change else None,
            args.per_device_eval_batch_size,
            list(missing.values()),
            indices=setup.indices,
            label=job.label,
        )
        seconds = time.monotonic() - begin
        for name, rows in zip(missing, found, strict=True):
            precision = average_precision(setup.part, rows)
            measurements.add(name, job.settings, rows, precision, seconds)
            print(f"{name}: AP {precision['AP']:.3f} (AP50 {precision['AP50']:.3f})", flush=True)


def summarise(setup: Setup, measurements: Measurements, parts: Collection[str]) -> dict[str, Any]:
    """Compute what follows from these parts: the lowest of all attacks per image, mPC and rPC."""
    args = setup.args
    summary: dict[str, Any] = {}
    kinds = {None: args.attack, **{purify: ["adaptive", "pgd", "transfer"] for purify in args.purify}}
    for purify, kinds_of_attacks in kinds.items():
        for eps in args.eps:
            names = [part_name(kind, eps, purify) for kind in kinds_of_attacks]
            names = [name for name in names if name in parts]
            if len(names) > 1:
                rows = lowest_rows(setup.part, [measurements.rows(name) for name in names])
                # AP is no mean over images, so that one attack on all images can be lower than the worst of each.
                choices = [average_precision(setup.part, rows), *map(measurements.precision, names)]
                summary[part_name("lowest", eps, purify)] = min(choices, key=lambda precision: precision["AP"])
    if args.corruptions:
        table = {
            name: {severity: measurements.precision(part_name(name, severity))["AP"] for severity in args.severities}
            for name in args.corruptions
        }
        clean = measurements.precision(part_name("clean"))["AP"]
        summary |= mean_precision_under_corruption(table, clean)
    return summary


def run(args: argparse.Namespace, tasks: Mapping[str, Task], model_name_or_path: str) -> None:
    limit_waiting()
    check_args(args)
    accelerator = make_accelerator("no")
    if accelerator.num_processes > 1:
        raise InputError(f"this command needs one process, but {accelerator.num_processes} were started.")
    with claim_output_dir(args.output_dir, accelerator, None):
        setup = prepare(args, accelerator, tasks, model_name_or_path)
        measurements = Measurements(args.output_dir, setup.settings())
        # The folder may have other parts, of earlier runs.
        is_there = {name: measurements.has(name, job.settings) for job in setup.jobs() for name in job.parts}
        images, parts = counted(len(setup.indices), "image"), counted(len(is_there), "part")
        print(f"{images}, {parts}, of which {sum(is_there.values())} are there", flush=True)
        try:
            measure(setup, measurements)
            summary = summarise(setup, measurements, is_there)
            precisions = {name: measurements.precision(name) for name in is_there}
            text = make_tables(precisions, summary, args, ATTACKS, setup.base_model)
            measurements.finish(summary, text)
            if args.attack and (not all(is_there.values()) or not measurements.picture.is_file()):
                draw(setup, measurements)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on.") from None
    print(text)


def draw(setup: Setup, measurements: Measurements) -> None:
    """Draw a few images: as they are, attacked, and defended by the adapter."""
    args = setup.args
    # A value in the middle, where a defence shows best.
    eps = args.eps[(len(args.eps) - 1) // 2]
    base_model = setup.without_prompts or nullcontext
    columns: dict[str, Shown] = {
        "base model": (None, base_model),
        f"base model, attacked at {eps:g}/255": (setup.adversary("transfer", eps), base_model),
    }
    if setup.adapter:
        columns["with the adapter, attacked through it"] = (setup.adversary("pgd", eps), nullcontext)
    shown = [setup.indices[number] for number in choose_images(setup.part, NUM_SHOWN_IMAGES)]
    threshold = read_threshold(setup.adapter) if setup.adapter else None
    threshold = DEFAULT_THRESHOLD if threshold is None else threshold
    image = draw_attack(setup.model, setup.processor, setup.data, shown, columns, eps, threshold)
    with whole_file(measurements.picture) as unfinished:
        image.save(unfinished, format="PNG")


def main(
    description: str | None = __doc__,
    program: str = "sdpt-robustness",
    model_name_or_path: str = BASE_MODEL,
    dataset_name: str | None = None,
    tasks: Mapping[str, Task] | None = None,
) -> None:
    """Run the command with the flags in `sys.argv`.

    Args:
        description: Text for `--help`.
        program: Name of the program, for error messages.
        model_name_or_path: The base model that is measured if neither `--model_name_or_path` nor `--adapter` is given.
        dataset_name: Default of `--dataset_name`. None if the user must pass the flag.
        tasks: Built-in data sets by name. Each is a function that writes the data set as a COCO folder.
    """
    args = parse_args(description, model_name_or_path, dataset_name, tasks or {})
    print_any_name()
    with one_line_errors(program, {name: name for name in vars(args)} | RENAMED):
        run(args, tasks or {}, model_name_or_path)


if __name__ == "__main__":
    main()
