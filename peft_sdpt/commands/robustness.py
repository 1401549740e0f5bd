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
import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..detection import (
    DetectionSplit,
    Purifier,
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
    read_class_names,
    read_threshold,
    set_image_size,
    split_classes,
)
from ..detection.attacks import Attack
from ..detection.corruptions import CORRUPTIONS, check_corruption
from ..detection.data import shuffled
from ..detection.formats import matching_split
from ..detection.grounding import clean_name
from ..detection.prediction import DEFAULT_THRESHOLD
from ..detection.robustness import Adversary, Change, RandomSigns, corrupt_split, detect_changed
from ..detection.saved_adapter import CLASS_NAMES_FILE, FILES
from ..detection.stored_tensors import digest
from ..downloads import limit_waiting
from ..errors import InputError, hint, one_line_errors
from ..files import output_folder, whole_file
from ..training import claim_output_dir, make_accelerator
from ..wording import counted, enumerated, printable
from . import print_any_name
from .robustness_results import Measurements, Shown, draw_attack, make_tables, part_name
from .train import find_dataset
from .train_arguments import BASE_MODEL, DATA_FLAGS, Help, Task, add_reading_flags
from .train_results import NUM_SHOWN_IMAGES, read_division

# What each attack of --attack is, for the table. "pgd" comes first: of equal attacks, the first is the lowest.
ATTACKS = {
    "pgd": "PGD, adaptive",
    "features": "on the features of the backbone (AdvPT)",
    "transfer": "PGD on the base model, transferred",
    "vanish": "vanish (TOG)",
}
# The losses of `Attack` that are not "all".
LOSSES = {"features": "features", "vanish": "vanish"}
NONE, ALL = "none", "all"
# Smallest value of --eps that is not taken for a fraction of the range of pixels.
SMALL_EPS = 0.1
# How many detections take as long as a step of an attack, which has a forward and a backward pass.
STEP_COST = 3
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
        choices=[*ATTACKS, NONE],
        help="Attacks: on the whole detector, on the features of its backbone, on the base model, or so that nothing "
        "is found. Default: all. The attack on the base model needs an adapter.",
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


def check_args(args: argparse.Namespace) -> list[str]:
    """Check the flags, and put the values for `all` and `none` in their place.

    Returns:
        Sentences that the user should read.

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
    notes = []
    if args.attack is None:
        args.attack = list(ATTACKS)
        if not args.adapter:
            args.attack.remove("transfer")
            notes.append("The attack transfer is left out, because it needs --adapter.")
    elif "transfer" in args.attack and not args.adapter:
        raise InputError("--attack transfer: needs --adapter, because it attacks the model without the adapter.")
    for name, special in (("attack", NONE), ("corruptions", NONE), ("corruptions", ALL), ("purify", NONE)):
        values = getattr(args, name)
        if special in values and values != [special]:
            raise InputError(f"--{name} {special}: cannot be used with other values.")
        if special in values:
            setattr(args, name, list(CORRUPTIONS) if special == ALL else [])
    # The severities are checked also if there are no corruptions.
    for name in args.corruptions or list(CORRUPTIONS)[:1]:
        for severity in args.severities:
            check_corruption(name, severity)
    args.purify = [parse_purifier(text) for text in args.purify]
    # Sorted, so that the table does not depend on the order of the flags.
    for name in ("eps", "severities", "purify"):
        setattr(args, name, sorted(set(getattr(args, name))))
    for name, order in (("attack", ATTACKS), ("corruptions", CORRUPTIONS)):
        setattr(args, name, sorted(set(getattr(args, name)), key=[*order].index))
    if args.attack and args.eps[0] < SMALL_EPS:
        notes.append(f"--eps is in levels of 255, so --eps {args.eps[0]:g} is less than a tenth of a level.")
    return notes


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

    @property
    def cost(self) -> int:
        """About how many detections take as long as this job."""
        return len(self.parts) + STEP_COST * self.settings.get("steps", 0) * self.settings.get("restarts", 0)


@dataclass
class Setup:
    """What is measured.

    Attributes:
        data: The split.
        split: What the split is, for the table.
        indices: Indices of the images to measure on.
        model: The `PeftModel`, or the base model.
        notes: Sentences that the user should read.
    """

    args: argparse.Namespace
    data: DetectionSplit
    split: str
    indices: list[int]
    model: Any
    processor: Any
    adapter: SavedAdapter | None
    base_model: str
    notes: list[str]
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
        """Return what all parts depend on. The keys are those of `DIFFERENCES`."""
        content = b""
        if self.adapter:
            content = b"".join((self.adapter.folder / name).read_bytes() for name in FILES[:2])
        # `load_detector` gives this name to the adapter.
        weights = [pair for pair in self.model.state_dict().items() if ".adapter0" not in pair[0]]
        return {
            "base_model": digest(part for name, value in weights for part in (name, value.cpu()))[:16],
            "adapter": hashlib.sha256(content).hexdigest()[:16] if self.adapter else None,
            "images": self.part.fingerprint(),
            "image_size": dict(self.processor.image_processor.size),
            "seed": self.args.seed,
        }

    def about(self) -> list[str]:
        """Return the lines above the table: the detector, the images, and the notes."""
        detector = f"{self.args.adapter} on {self.base_model}" if self.adapter else self.base_model
        sizes = dict(self.processor.image_processor.size)
        size = ", ".join(f"{name.replace('_', ' ')} {pixels}" for name, pixels in sizes.items())
        images = counted(len(self.indices), "image")
        lines = [
            f"Robustness of {detector}: AP (AP50).",
            f"Measured on {images} of {self.args.dataset_name} ({self.split}). Image size: {size}. Seed: "
            f"{self.args.seed}.",
            *self.notes,
        ]
        # Each is a paragraph.
        return [text for line in lines for text in (line, "")]

    def jobs(self) -> Iterator[Job]:
        """Yield everything to measure, the quickest first."""
        args = self.args
        purified = {part_name("clean", purify=purify): purify for purify in args.purify}
        yield Job("unchanged", {}, {part_name("clean"): None, **purified})
        for name in args.corruptions:
            for severity in args.severities:
                key = part_name(name, severity)
                yield Job(key, {}, {key: None}, corruption=(name, severity))
        for eps in args.eps if args.attack else ():
            key = part_name("signs", eps)
            yield Job(key, {}, {key: None}, partial(RandomSigns, self.processor, eps / 255, args.seed))
        for eps in args.eps:
            for name in args.attack:
                parts: dict[str, Purifier | None] = {part_name(name, eps): None}
                if name in ("pgd", "transfer"):
                    parts |= {part_name(name, eps, purify): purify for purify in args.purify}
                yield Job(part_name(name, eps), self._steps(), parts, partial(self.adversary, name, eps))
            for purify in args.purify if "pgd" in args.attack else ():
                key = part_name("adaptive", eps, purify)
                yield Job(key, self._steps(), {key: purify}, partial(self.adversary, "pgd", eps, purify))

    def _steps(self) -> dict[str, Any]:
        return {"steps": self.args.steps, "restarts": self.args.restarts}


def prepare(
    args: argparse.Namespace,
    accelerator: Any,
    tasks: Mapping[str, Task],
    model_name_or_path: str,
    notes: Sequence[str],
) -> Setup:
    """Read the data, load the model, and check that they fit together. The setup gets these notes and more."""
    adapter = find_adapter(args.adapter) if args.adapter else None
    with hint("Choose one by --model_name_or_path."):
        base_model = args.model_name_or_path or (common_base_model([adapter]) if adapter else model_name_or_path)
    # Called for its error, before the data set is read.
    load_base_config(base_model)
    data, split = read_data(args, accelerator, tasks)
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
    notes = [*notes, *mismatches(adapter, base_model, data.class_names)]
    if (args.num_images or 0) > len(data):
        notes.append(f"There are only {counted(len(data), 'image')}, so all of them are measured.")
    return Setup(args, data, split, indices, model, processor, adapter, base_model, notes)


def mismatches(adapter: SavedAdapter | None, base_model: str, class_names: Sequence[str]) -> list[str]:
    """Say what was different when the adapter was trained."""
    if adapter is None:
        return []
    found = []
    if adapter.base_model and _resolved(adapter.base_model) != _resolved(base_model):
        found.append(f"The adapter was trained on another base model: {printable(adapter.base_model, 300)}.")
    if (adapter.folder / CLASS_NAMES_FILE).is_file():
        trained, names = read_class_names(adapter), [*map(clean_name, class_names)]
        if unknown := [name for name in names if name not in trained]:
            found.append(f"The adapter was not trained on these classes: {enumerated(unknown)}.")
        if missing := [name for name in trained if name not in names]:
            found.append(f"The data set does not have these classes of the adapter: {enumerated(missing)}.")
    return found


def _resolved(base_model: str) -> str:
    return str(Path(base_model).resolve()) if os.path.isdir(base_model) else base_model


def read_data(args: argparse.Namespace, accelerator: Any, tasks: Mapping[str, Task]) -> tuple[DetectionSplit, str]:
    """Read the split to measure on. Returns it with what it is, for the table."""
    dataset = find_dataset(args, accelerator, tasks)
    options = {name: getattr(args, name) for name in DATA_FLAGS}
    existing = find_splits(dataset)
    whole = None if args.eval_split else only_split(existing)
    if whole:
        data = load_splits(dataset, [whole], accelerator, **options)[whole]
        if parts := read_division(args, data):
            return data.subset(parts["test"]), "the images that training held out"
        return data, "without splits, so an adapter may have been trained on these images"
    split = args.eval_split or ("test" if matching_split(existing, "test") else "val")
    return load_splits(dataset, [split], accelerator, **options)[split], f"split {split}"


def measure(setup: Setup, measurements: Measurements) -> None:
    """Measure the parts that are missing."""
    args = setup.args
    missing = []
    for job in setup.jobs():
        parts = {name: purify for name, purify in job.parts.items() if not measurements.has(name, job.settings)}
        if parts:
            missing.append(dataclasses.replace(job, parts=parts))
    begin, done = time.monotonic(), 0
    for number, job in enumerate(missing, start=1):
        job_begin = time.monotonic()
        data = corrupt_split(setup.data, *job.corruption, args.seed) if job.corruption else setup.data
        found = detect_changed(
            setup.model,
            setup.processor,
            data,
            job.change() if job.change else None,
            args.per_device_eval_batch_size,
            list(job.parts.values()),
            indices=setup.indices,
            label=job.label,
        )
        now = time.monotonic()
        for name, rows in zip(job.parts, found, strict=True):
            precision = average_precision(setup.part, rows)
            measurements.add(name, job.settings, rows, precision, now - job_begin)
            print(f"{name}: AP {precision['AP']:.3f} (AP50 {precision['AP50']:.3f})", flush=True)
        done += job.cost
        if left := missing[number:]:
            parts_left = counted(sum(len(job.parts) for job in left), "part")
            seconds = (time.monotonic() - begin) / done * sum(job.cost for job in left)
            print(f"{parts_left} left, {about_time(seconds)}", flush=True)


def about_time(seconds: float) -> str:
    """Write an estimate of time.

    Example:
        >>> about_time(20), about_time(100), about_time(10000)
        ('less than a minute', 'about 2 minutes', 'about 3 hours')
    """
    minutes = seconds / 60
    if minutes < 1:
        return "less than a minute"
    return f"about {counted(round(minutes), 'minute')}" if minutes < 90 else f"about {round(minutes / 60)} hours"


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
        # JSON has no NaN, which is the share of a clean AP of 0.
        summary |= {
            name: value if math.isfinite(value) else None
            for name, value in mean_precision_under_corruption(table, clean).items()
        }
    return summary


def run(args: argparse.Namespace, tasks: Mapping[str, Task], model_name_or_path: str) -> None:
    limit_waiting()
    notes = check_args(args)
    accelerator = make_accelerator("no")
    if accelerator.num_processes > 1:
        raise InputError(f"this command needs one process, but {accelerator.num_processes} were started.")
    with claim_output_dir(args.output_dir, accelerator, None):
        setup = prepare(args, accelerator, tasks, model_name_or_path, notes)
        for note in setup.notes:
            print(note)
        measurements = Measurements(args.output_dir, setup.settings())
        # The folder may have other parts, of earlier runs.
        is_there = {name: measurements.has(name, job.settings) for job in setup.jobs() for name in job.parts}
        images, parts = counted(len(setup.indices), "image"), counted(len(is_there), "part")
        print(f"{images}, {parts}, {sum(is_there.values())} already measured", flush=True)
        if not all(is_there.values()):
            # The run may stop before it draws another one.
            measurements.picture.unlink(missing_ok=True)
        try:
            measure(setup, measurements)
            summary = summarise(setup, measurements, is_there)
            precisions = {name: measurements.precision(name) for name in is_there}
            text = make_tables(setup.about(), precisions, summary, args, ATTACKS)
            measurements.finish(summary, text)
            if args.attack and not measurements.picture.is_file():
                draw(setup, measurements)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on.") from None
    print(text)


def draw(setup: Setup, measurements: Measurements) -> None:
    """Draw a few images, with the detections before and under an attack, without and with the adapter."""
    args = setup.args
    # A value in the middle, where a defence shows best.
    eps = args.eps[(len(args.eps) - 1) // 2]
    attacked = f"attacked at {eps:g}/255"
    base_model = setup.without_prompts or nullcontext
    # The base model has no threshold of its own.
    columns = {
        "base model": Shown(None, base_model, DEFAULT_THRESHOLD),
        f"base model, {attacked}": Shown(setup.adversary("transfer", eps), base_model, DEFAULT_THRESHOLD),
    }
    thresholds = f"{DEFAULT_THRESHOLD:g}"
    if setup.adapter:
        own = read_threshold(setup.adapter, DEFAULT_THRESHOLD)
        assert own is not None
        columns["with the adapter"] = Shown(None, nullcontext, own)
        columns[f"with the adapter, {attacked}"] = Shown(setup.adversary("pgd", eps), nullcontext, own)
        if own != DEFAULT_THRESHOLD:
            thresholds += f" without and {own:g} with the adapter"
    shown = [setup.indices[number] for number in choose_images(setup.part, NUM_SHOWN_IMAGES)]
    title = f"boxes with a score of at least {thresholds}"
    image = draw_attack(setup.model, setup.processor, setup.data, shown, columns, eps, title)
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
