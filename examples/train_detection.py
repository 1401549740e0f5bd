# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Tune a grounded detector with SDPT and measure what it gains.

    accelerate launch examples/train_detection.py

Without flags, this takes the small base model in `examples/host` and the built-in task "twemoji": pictograms of known
names in a drawing style that the base model has never seen. The script measures COCO AP of the base model, trains,
measures again, and saves the adapter, `metrics.json` and `detections.png` in the output folder. "Before" is always the
base model without an adapter.

With your own photos and boxes in COCO format:

    accelerate launch examples/train_detection.py --model_name_or_path IDEA-Research/grounding-dino-tiny \\
        --dataset_name path/to/folder --output_dir my-adapter
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from peft_sdpt import SDPTConfig, SDPTLayer
from peft_sdpt.detection import (
    DetectionSplit,
    FeatureCache,
    GroundedDetectionLoss,
    TrainingSamples,
    average_precision,
    detect,
    detect_split,
    few_shot,
    find_adapter,
    has_split,
    load_base_model,
    load_processor,
    load_splits,
    mean_boxes_per_process,
    result_of,
    save_adapter,
    set_image_size,
    split_classes,
)
from peft_sdpt.errors import InputError, one_line_errors
from peft_sdpt.files import whole_files
from peft_sdpt.model_card import CARD, carry_card, write_results
from peft_sdpt.training.averaging import averaged, trained_parameters
from peft_sdpt.training.checkpoints import Checkpoints, Progress, check_writable, claim_output_dir, latest
from peft_sdpt.training.interruption import Interruption, leave_signals_to_the_main_process
from peft_sdpt.training.launch import make_accelerator
from peft_sdpt.training.pushing import prepare_push, push
from pictograms.tasks import TASKS, write_task
from training_arguments import ADAPTER_FLAGS, FREE_FLAGS, LIBRARY_ARGUMENTS, check_args, parse_args
from training_results import describe_best, describe_last, print_report, public_name, write_report

NUM_SHOWN_IMAGES = 4


@dataclass
class Setup:
    """The data and the model of a run.

    Attributes:
        splits: Splits by name.
        validation_split: Name of the split that the best adapter is chosen on, or None.
        eval_split: Name of the split that is measured before and after.
        detector: The model with its adapter, if it has one.
        model: The model to call: `detector`, or what Accelerate made of it.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    splits: dict[str, DetectionSplit]
    validation_split: str | None
    eval_split: str
    processor: Any
    detector: nn.Module
    model: nn.Module
    cache: FeatureCache | None
    progress: Progress

    @property
    def held_out(self) -> DetectionSplit:
        return self.splits[self.eval_split]

    @property
    def validation(self) -> DetectionSplit | None:
        return self.splits[self.validation_split] if self.validation_split else None

    def detections(self, data: DetectionSplit, label: str) -> list[tuple]:
        return detect_split(
            self.model,
            self.processor,
            data,
            self.args.per_device_eval_batch_size,
            self.accelerator,
            label,
            num_workers=self.args.dataloader_num_workers,
        )


@dataclass
class Training:
    """What trains the adapter of a `Setup`."""

    samples: TrainingSamples
    loader: DataLoader
    trained: nn.ParameterList
    optimizer: torch.optim.Optimizer
    scheduler: Any
    average: AveragedModel | None
    checkpoints: Checkpoints
    steps_per_epoch: int
    max_steps: int
    resumed: bool


# ---- prepare


def prepare(args: argparse.Namespace, accelerator: Accelerator) -> Setup:
    """Read the data, load the model, and check that they suit each other."""
    adapter = find_adapter(args.adapter) if args.adapter else None
    splits, validation_split, eval_split = read_data(args, accelerator)
    processor = load_processor(adapter, args.model_name_or_path)
    if args.image_size:
        set_image_size(processor, args.image_size)
    detector = load_model(args, adapter and str(adapter.folder)).to(accelerator.device)
    cache = FeatureCache(args.cache_features, detector) if args.cache_features else None
    if cache and cache.leaves_out_dropout:
        accelerator.print("--cache_features: the backbones have dropout, and stored features are computed without it")
    if args.image_size:
        try:
            detect(detector.eval(), processor, [Image.new("RGB", (args.image_size,) * 2)], ["object"], [[0]])
        except RuntimeError as error:  # for instance, an image with fewer positions than the model has queries
            raise InputError(f"--image_size {args.image_size}: does not suit this base model ({error}).") from None
    try:
        split_classes(splits[eval_split].class_names, processor.tokenizer, detector.config.max_text_len)
    except ValueError as error:
        raise InputError(f"{args.dataset_name}: {error}") from None
    return Setup(
        args,
        accelerator,
        splits,
        validation_split,
        eval_split,
        processor,
        detector,
        model=detector,
        cache=cache,
        progress=Progress(),
    )


def load_model(args: argparse.Namespace, adapter: str | None) -> nn.Module:
    """Load the base model, with a saved adapter, a new one, or none."""
    model = load_base_model(args.model_name_or_path)
    if adapter:
        try:
            return PeftModel.from_pretrained(model, adapter, is_trainable=not args.eval_only)
        except Exception as error:  # a damaged folder can raise anything
            raise InputError(f"--adapter {args.adapter}: does not load on this base model ({error}).") from None
    if args.eval_only:
        return model
    fields = {name: getattr(args, name) for name in ADAPTER_FLAGS}
    config = SDPTConfig(**{name: value for name, value in fields.items() if value is not None})
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"--model_name_or_path {args.model_name_or_path}: {error}") from None


def read_data(args: argparse.Namespace, accelerator: Accelerator) -> tuple[dict[str, DetectionSplit], str | None, str]:
    """Read the splits. Returns them by name, and the names of the validation split, if any, and the held-out split."""
    dataset = args.dataset_name
    if dataset in TASKS:
        dataset = str(args.output_dir / "data" / dataset)
        with accelerator.main_process_first():
            write_task(args.dataset_name, Path(dataset), disable_progress=not accelerator.is_main_process)
    validation = args.validation_split or ("val" if has_split(dataset, "val") else None)
    held_out = args.eval_split or ("test" if has_split(dataset, "test") else validation or "val")
    names = {held_out} if args.eval_only else {args.train_split, held_out} | ({validation} if validation else set())
    splits = load_splits(
        dataset,
        names,
        accelerator,
        bbox_format=args.bbox_format,
        class_names_file=args.class_names_file,
        class_names_column=args.class_names_column,
        skip_bad_boxes=args.skip_bad_boxes,
        skip_bad_images=args.skip_bad_images,
    )
    if args.shots and not args.eval_only:
        splits[args.train_split] = draw_shots(args, accelerator, splits[args.train_split])
    return splits, validation, held_out


def draw_shots(args: argparse.Namespace, accelerator: Accelerator, train: DetectionSplit) -> DetectionSplit:
    """Keep `--shots` images per class, and write down which."""
    drawn = train.subset(few_shot(train, args.shots, args.seed))
    for label, name in enumerate(train.class_names):
        num_images = sum(label in labels for labels in train.labels)
        if num_images < args.shots:
            accelerator.print(f"--shots {args.shots}: class {name!r} is on {num_images} images, all of them taken")
    if accelerator.is_main_process:
        sample = {"shots": args.shots, "seed": args.seed, "image_ids": drawn.image_ids}
        with whole_files(args.output_dir) as folder:
            (folder / "shots.json").write_text(json.dumps(sample, indent=2) + "\n")
    return drawn


def prepare_training(setup: Setup) -> Training:
    """Make the samples, the optimizer and the checkpoints, and go on from a checkpoint if that is asked for."""
    args, accelerator, detector = setup.args, setup.accelerator, setup.detector
    train = setup.splits[args.train_split]
    samples_per_step = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(train) / samples_per_step)
    max_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    samples = TrainingSamples(
        train,
        max_steps * samples_per_step,
        setup.processor,
        detector.config.max_text_len,
        args.seed,
        augmentation=not args.no_augmentation,
    )
    if setup.cache and args.per_device_train_batch_size > 1 and len(set(train.sizes)) > 1:
        accelerator.print(
            "--cache_features: images of several sizes are padded to the largest of their batch, and stored at each "
            "size; --per_device_train_batch_size 1, with --gradient_accumulation_steps, stores each once"
        )
    loader = DataLoader(
        samples,
        batch_size=args.per_device_train_batch_size,
        collate_fn=samples.collate,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=leave_signals_to_the_main_process,
        # Starting a loader draws from its generator. The default one belongs to dropout, and a resumed run would
        # draw once more.
        generator=torch.Generator(),
    )
    trained = nn.ParameterList(trained_parameters(detector))
    optimizer = torch.optim.AdamW(trained, args.learning_rate, weight_decay=args.weight_decay)
    setup.model, optimizer, loader = accelerator.prepare(detector, optimizer, loader)
    # Not prepared: it counts optimizer steps, whatever the number of processes.
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, max_steps)
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay)) if args.ema_decay else None
    accelerator.register_for_checkpointing(scheduler, setup.progress, *([average] if average else []))
    checkpoints = Checkpoints(
        accelerator,
        args.output_dir,
        lambda folder: save_adapter(folder, detector, setup.processor, train.class_names),
        describe_run(setup, max_steps, samples_per_step),
        args.checkpoints_total_limit,
    )
    resumed = resume(setup, checkpoints)
    return Training(
        samples, loader, trained, optimizer, scheduler, average, checkpoints, steps_per_epoch, max_steps, resumed
    )


def describe_run(setup: Setup, max_steps: int, samples_per_step: int) -> dict[str, Any]:
    """Everything that decides the result of a run. A run resumes only from checkpoints of the same description."""
    args, accelerator, cache = setup.args, setup.accelerator, setup.cache
    return {f"--{name}": str(value) for name, value in vars(args).items() if name not in FREE_FLAGS} | {
        "training steps": max_steps,
        "images per step": samples_per_step,
        "processes": accelerator.num_processes,
        "mixed precision": accelerator.mixed_precision,
        # None for a base model without dropout, where stored features change nothing.
        "dropout in backbones": "left out, by --cache_features" if cache and cache.leaves_out_dropout else None,
        "training images": setup.splits[args.train_split].fingerprint(),
        "validation images": setup.validation.fingerprint() if setup.validation else None,
        "evaluation images": setup.held_out.fingerprint(),
    }


def resume(setup: Setup, checkpoints: Checkpoints) -> bool:
    """Load the checkpoint that `--resume_from_checkpoint` names. Returns whether there was one."""
    args = setup.args
    if not args.resume_from_checkpoint:
        return False
    checkpoint = latest(args.output_dir) if args.resume_from_checkpoint == "latest" else args.resume_from_checkpoint
    if not checkpoint:
        setup.accelerator.print(f"{args.output_dir} has no checkpoint yet: starting")
        return False
    checkpoints.load(Path(checkpoint))
    if not (args.output_dir / "best").is_dir():  # it stayed in the folder of that checkpoint
        setup.progress.best = {}
    setup.accelerator.print(f"going on from {checkpoint}")
    return True


# ---- train


def train(setup: Setup, training: Training) -> list[str]:
    """Train the adapter, validate and save checkpoints on the way, and save the last adapter.

    Returns:
        The names of the files of the last adapter, in the main process.
    """
    args, accelerator, progress = setup.args, setup.accelerator, setup.progress
    validation_steps = args.validation_steps or training.steps_per_epoch
    checkpointing_steps = training.steps_per_epoch if args.checkpointing_steps == "epoch" else args.checkpointing_steps
    if args.with_tracking:
        accelerator.init_trackers("train_detection", {name: str(value) for name, value in vars(args).items()})
        if not progress.step:
            accelerator.log({f"before/{name}": value for name, value in progress.before["metrics"].items()}, step=0)
    if not setup.validation:
        accelerator.print(f"{args.dataset_name} has no split val: no best adapter is kept, only the last")
    # The run may have been killed between the checkpoint and the validation of the same step.
    if training.resumed and progress.step % validation_steps == 0:
        validate(setup, training)
    loss_function = GroundedDetectionLoss(setup.detector.config)
    setup.model.train()
    stored = setup.cache.used(training.samples.asks_all) if setup.cache else nullcontext()
    bar = tqdm(
        total=training.max_steps,
        initial=progress.step,
        desc="training",
        disable=not accelerator.is_local_main_process,
    )
    with Interruption(accelerator) as interruption, bar, stored:
        start = time.perf_counter()
        for batches in remaining_steps(setup, training):
            loss = train_step(setup, training, loss_function, batches)
            progress.step += 1
            progress.seconds += time.perf_counter() - start
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if args.with_tracking:
                log_step(setup, loss, training.scheduler.get_last_lr()[0])
            stopped = interruption.asked_for()
            if stopped or (checkpointing_steps and progress.step % checkpointing_steps == 0):
                training.checkpoints.save(progress.step)
            if stopped:
                raise KeyboardInterrupt(
                    f"stopped after step {progress.step} of {training.max_steps}; "
                    "go on with --resume_from_checkpoint latest"
                )
            if progress.step % validation_steps == 0:
                validate(setup, training)
            start = time.perf_counter()
    names = save(setup, training, args.output_dir)
    validate(setup, training)
    return names


def remaining_steps(setup: Setup, training: Training) -> Iterator[list[tuple]]:
    """Yield the batches of each optimizer step. If an image vanishes during the run, save a checkpoint first."""
    accumulated = setup.args.gradient_accumulation_steps
    batches = setup.accelerator.skip_first_batches(training.loader, setup.progress.step * accumulated)
    iterator = iter(batches)
    try:
        while step := list(itertools.islice(iterator, accumulated)):
            yield step
    except InputError:
        # With several processes, the others are in the middle of a step that never ends.
        if setup.accelerator.num_processes == 1 and setup.progress.step:
            training.checkpoints.save(setup.progress.step)
        raise


def train_step(
    setup: Setup, training: Training, loss_function: GroundedDetectionLoss, batches: list[tuple]
) -> torch.Tensor:
    """Take one optimizer step. Returns the loss of its batches as if they were one batch."""
    args, accelerator = setup.args, setup.accelerator
    number = setup.progress.step + 1
    # The boxes of all batches of the step, so that their losses add up to the loss of one large batch.
    num_boxes = mean_boxes_per_process([label for _, labels in batches for label in labels])
    step_loss = torch.zeros((), device=accelerator.device)
    for index, (inputs, labels) in enumerate(batches, 1):
        # Processes exchange gradients once per step.
        with nullcontext() if index == len(batches) else accelerator.no_sync(setup.model):
            outputs = setup.model(**inputs)
            if not outputs.pred_boxes.isfinite().all():
                raise InputError(f"boxes are not finite any more at step {number}: lower --learning_rate.")
            loss = loss_function(outputs, labels, num_boxes)
            accelerator.backward(loss)
        step_loss += loss.detach()
    norm = accelerator.clip_grad_norm_(setup.model.parameters(), args.max_grad_norm)
    # Checked before the step, so that no checkpoint can hold such prompts. In fp16 the gradient scaler handles this.
    if accelerator.scaler is None and not norm.isfinite():
        raise InputError(f"gradients are not finite any more at step {number}: lower --learning_rate.")
    training.optimizer.step()
    training.optimizer.zero_grad()
    if not accelerator.optimizer_step_was_skipped:
        training.scheduler.step()
        if training.average:
            training.average.update_parameters(training.trained)
    return step_loss


def validate(setup: Setup, training: Training) -> None:
    """Measure the adapter on the validation split, unless this step was validated, and save it if it is the best."""
    args, progress = setup.args, setup.progress
    if not setup.validation or progress.validated == progress.step:
        return
    with averaged(setup.detector, training.average):
        metrics = average_precision(setup.validation, setup.detections(setup.validation, "validating"))
    progress.validated = progress.step
    if metrics["AP"] > progress.best.get("AP", -1):
        progress.best = {**metrics, "step": progress.step}
        results = describe_best(args.dataset_name, setup.validation_split, progress.best)
        save(setup, training, args.output_dir / "best", results)
    setup.accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=progress.step)


def save(setup: Setup, training: Training, folder: Path, results: str | None = None) -> list[str]:
    """Save the adapter, or its moving average, with results in its model card. Returns the names of the files."""
    if not setup.accelerator.is_main_process:
        return []
    class_names = setup.splits[setup.args.train_split].class_names
    with averaged(setup.detector, training.average), whole_files(folder) as unfinished:
        carry_card(folder, unfinished)
        save_adapter(unfinished, setup.detector, setup.processor, class_names)
        write_results(unfinished / CARD, results)
        return sorted(path.name for path in unfinished.iterdir())


def log_step(setup: Setup, loss: torch.Tensor, learning_rate: float) -> None:
    """Send the loss, the learning rate and the mean norm of each layer's prompts to the trackers."""
    values = {"loss": setup.accelerator.reduce(loss, reduction="mean").item(), "learning_rate": learning_rate}
    layers = [module for module in setup.detector.modules() if isinstance(module, SDPTLayer)]
    for index, layer in enumerate(layers):
        norms = torch.cat([prompts.detach().norm(dim=-1) for prompts in trained_parameters(layer)])
        values[f"prompt_norm/layer_{index}"] = norms.mean().item()
    setup.accelerator.log(values, step=setup.progress.step)


# ---- evaluate and report


def evaluate(setup: Setup, label: str, average: AveragedModel | None = None) -> dict[str, Any]:
    """Measure the model, or its moving average: AP on the held-out split, and the detections in its first images."""
    with averaged(setup.detector, average):
        rows = setup.detections(setup.held_out, label)
    shown = [result_of(image, rows) for image in range(min(NUM_SHOWN_IMAGES, len(setup.held_out)))]
    return {"metrics": average_precision(setup.held_out, rows), "shown": shown}


def report(setup: Setup, after: dict[str, Any] | None) -> None:
    """Print the results, and write them, the shown images and the model card."""
    args, progress, held_out = setup.args, setup.progress, setup.held_out
    record = {
        "before": progress.before["metrics"],
        "after": after and after["metrics"],
        "best": progress.best or None,
        "trainable_parameters": 0 if args.eval_only else sum(p.numel() for p in trained_parameters(setup.detector)),
        "total_parameters": sum(parameter.numel() for parameter in setup.detector.parameters()),
        "train_seconds": round(progress.seconds, 1),
        "args": {name: public_name(value) for name, value in vars(args).items()},
    }
    shown = [held_out.open_image(image) for image in range(min(NUM_SHOWN_IMAGES, len(held_out)))]
    detections = {"before": progress.before["shown"]} | ({"after": after["shown"]} if after else {})
    size = f"{len(held_out)} images of {len(held_out.class_names)} classes"
    card = None
    if not args.eval_only:
        data = f"`{public_name(args.dataset_name)}`, split `{setup.eval_split}`, {size}"
        card = describe_last(data, progress.step, record)
    write_report(args.output_dir, record, shown, detections, held_out.class_names, card)
    print_report(args.output_dir, f"{args.dataset_name}, {setup.eval_split} split of {size}", record)


def run(args: argparse.Namespace) -> None:
    check_args(args)
    accelerator = make_accelerator(
        args.mixed_precision,
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
    )
    set_seed(args.seed)
    if not args.eval_only:
        claim_output_dir(args.output_dir, accelerator, resuming=bool(args.resume_from_checkpoint))
    elif accelerator.is_main_process:
        check_writable(args.output_dir)
    # Removed from the arguments, which are written down.
    token = vars(args).pop("hub_token")
    hub = prepare_push(args.hub_model_id, token, accelerator) if args.push_to_hub else None

    setup = prepare(args, accelerator)
    training = None if args.eval_only else prepare_training(setup)
    if not setup.progress.before:  # a checkpoint may hold it
        without = setup.detector.disable_adapter() if isinstance(setup.detector, PeftModel) else nullcontext()
        with without:
            setup.progress.before = evaluate(setup, "before")
    after, names = None, []
    if training:
        names = train(setup, training)
        after = evaluate(setup, "after", training.average)
        values = {f"after/{name}": value for name, value in after["metrics"].items()}
        accelerator.log(values, step=setup.progress.step)
    elif args.adapter:
        after = evaluate(setup, "after")
    if accelerator.is_main_process:
        report(setup, after)

    # Frees the wrapper of several processes before their group ends. If it is the last to hold the group, torch 2.13
    # keeps Python's lock while it waits for a thread of gloo that may need it: this was seen to hang.
    (setup.model,) = accelerator.free_memory(setup.model)
    accelerator.end_training()
    if hub:
        best = [f"best/{name}" for name in names if setup.progress.best]
        names = [*names, "metrics.json", "detections.png", *best]
        print(f"pushed to {push(hub, args.hub_model_id, args.output_dir, names)}")


def main() -> None:
    with one_line_errors("train_detection.py", LIBRARY_ARGUMENTS):
        run(parse_args(__doc__))


if __name__ == "__main__":
    main()
