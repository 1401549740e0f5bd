# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Tune a grounded detector with SDPT on your own photos and boxes, and measure its AP before and after.

    accelerate launch -m peft_sdpt.commands.train --dataset_name path/to/folder --output_dir my-adapter

The command `sdpt-train` does the same in one process. It measures COCO AP of the base model, trains, measures again,
and saves the adapter, `metrics.json`, `report.png` and `detections.png` in the output folder. "Before" is always the
base model without an adapter.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from peft import get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..config import SDPTConfig
from ..detection import (
    DetectionSplit,
    FeatureCache,
    GroundedDetectionLoss,
    SavedAdapter,
    TrainingSamples,
    analyse_precision,
    check_image_size,
    choose_images,
    describe_images,
    detect_split,
    divide,
    few_shot,
    find_adapter,
    find_errors,
    find_splits,
    load_base_config,
    load_base_model,
    load_detector,
    load_processor,
    load_splits,
    load_trainable,
    mean_boxes_per_process,
    measure_threshold,
    only_split,
    read_threshold,
    result_of,
    save_adapter,
    set_image_size,
    split_classes,
    suggest_thresholds,
    write_adapter,
)
from ..detection.adversarial import Views, make_views
from ..detection.devices import to_cpu, to_device
from ..detection.formats import matching_split
from ..detection.prediction import DEFAULT_THRESHOLD, without_adapter
from ..detection.saved_adapter import THRESHOLD_FILE
from ..downloads import limit_waiting
from ..errors import InputError, hint, one_line_errors
from ..layer import SDPTLayer
from ..model_card import licence_of
from ..training import (
    LORA_LEARNING_RATE,
    Checkpoints,
    Interruption,
    Progress,
    averaged,
    claim_output_dir,
    make_accelerator,
    parameter_groups,
    prepare_push,
    push,
    trained_parameters,
)
from . import print_any_name
from .train_arguments import (
    ADAPTER_FLAGS,
    BASE_MODEL,
    DATA_FLAGS,
    Task,
    check_args,
    describe_attack,
    describe_run,
    flags_of,
    parse_args,
)
from .train_results import (
    NUM_SHOWN_IMAGES,
    Shown,
    describe_best,
    make_record,
    print_images,
    print_report,
    read_division,
    report_division,
    report_shots,
    write_best_card,
    write_report,
)

# Launches in which no process has the whole model.
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass
class Setup:
    """The data and the model of a run.

    Attributes:
        splits: Splits by name.
        validation_split: Name of the split for choosing the best adapter, or None.
        eval_split: Name of the split for measuring AP before and after training.
        detector: The `PeftModel`, or the base model if only that is measured.
        model: The model to call: `detector`, or what Accelerate made of it.
        licence: Metadata of the model cards.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    splits: dict[str, DetectionSplit]
    validation_split: str | None
    eval_split: str
    processor: Any
    detector: Any
    model: nn.Module
    cache: FeatureCache | None
    progress: Progress
    licence: dict[str, str] = field(default_factory=dict)

    def measure(self, split: str, label: str) -> tuple[dict[str, Any], list[tuple]]:
        """Measure the model on a split. Returns the result of `analyse_precision`, and the detections."""
        args, data = self.args, self.splits[split]
        batch_size, workers = args.per_device_eval_batch_size, args.dataloader_num_workers
        rows = detect_split(
            self.model,
            self.processor,
            data,
            batch_size,
            self.accelerator,
            label,
            workers,
            max_detections=args.max_detections,
        )
        return analyse_precision(data, rows, args.max_detections), rows

    def suggest(self, split: str, rows: list[tuple]) -> dict[str, Any]:
        """Suggest score thresholds from the detections in a split: `all` for all classes, `classes` for each class."""
        best, of_classes = suggest_thresholds(self.splits[split], rows, self.args.max_detections)
        return {"all": best and {**best, "split": split}, "classes": of_classes}

    def card(self, threshold: dict[str, Any] | None, subfolder: str = "") -> dict[str, Any]:
        """Return the arguments of `save_adapter` for the model card."""
        source = f"{self.args.hub_model_id}{subfolder}" if self.args.push_to_hub else "."
        return {"threshold": threshold, "licence": self.licence, "source": source}


class StepResult(NamedTuple):
    """Results of an optimizer step. The numbers stay on the device until they are read, because reading waits for it.

    Attributes:
        step: Number of the step.
        numbers: Scalars: the loss, whether boxes and gradients are finite, and with tracking the norms of the prompts.
        learning_rates: Learning rates after the step.
    """

    step: int
    numbers: dict[str, torch.Tensor]
    learning_rates: list[float]


@dataclass
class Training:
    """The objects that train the adapter of a `Setup`.

    Attributes:
        views: Makes the inputs that a step trains on.
        loss_function: The loss.
        unread: Results of steps that `read_results` has not read yet.
    """

    samples: TrainingSamples
    loader: DataLoader
    trained: nn.ParameterList
    optimizer: torch.optim.Optimizer
    scheduler: Any
    average: AveragedModel | None
    checkpoints: Checkpoints
    views: Views
    loss_function: GroundedDetectionLoss
    steps_per_epoch: int
    max_steps: int
    unread: list[StepResult] = field(default_factory=list)


# ---- prepare


def prepare(args: argparse.Namespace, accelerator: Accelerator, tasks: Mapping[str, Task]) -> Setup:
    """Read the data, load the model, and check that they fit together."""
    adapter = find_adapter(args.adapter) if args.adapter else None
    splits, validation_split, eval_split = read_data(args, accelerator, tasks)
    processor = load_processor(adapter, args.model_name_or_path)
    if args.image_size:
        set_image_size(processor, args.image_size)
    detector: Any = load_model(args, adapter).to(accelerator.device)
    cache = FeatureCache(args.cache_features, detector) if args.cache_features else None
    if cache and cache.leaves_out_dropout:
        accelerator.print("--cache_features: the backbones have dropout; stored features are computed without it")
    check_image_size(detector, processor, args.image_size, [size for data in splits.values() for size in data.sizes])
    # Called for its error: a class name that does not fit into a prompt should end the run before it starts.
    split_classes(splits[eval_split].class_names, processor.tokenizer, detector.config.max_text_len)
    return Setup(
        args=args,
        accelerator=accelerator,
        splits=splits,
        validation_split=validation_split,
        eval_split=eval_split,
        processor=processor,
        detector=detector,
        model=detector,
        cache=cache,
        progress=Progress(),
    )


def find_dataset(args: argparse.Namespace, accelerator: Accelerator, tasks: Mapping[str, Task]) -> str:
    """Return the folder or Hub id of the data set. A built-in one is written to the output folder."""
    dataset = args.dataset_name
    if dataset in tasks:
        dataset = str(args.output_dir / "data" / dataset)
        with accelerator.main_process_first():
            tasks[args.dataset_name](Path(dataset), not accelerator.is_main_process)
    elif os.path.isdir(dataset) and Path(dataset).resolve() in args.output_dir.resolve().parents:
        # Later runs would read its pictures as images of the data set.
        raise InputError(f"--output_dir {args.output_dir}: lies in the folder of the data set, {dataset}.")
    return dataset


def read_data(
    args: argparse.Namespace, accelerator: Accelerator, tasks: Mapping[str, Task]
) -> tuple[dict[str, DetectionSplit], str | None, str]:
    """Read the splits. Returns them by name, and the names of the validation (or None) and evaluation split."""
    dataset = find_dataset(args, accelerator, tasks)
    options = {name: getattr(args, name) for name in DATA_FLAGS}
    existing = find_splits(dataset)
    whole = None if args.validation_split or args.eval_split else only_split(existing)
    validation: str | None = "val"
    held_out = "test"
    if whole:
        if args.train_split not in ("train", whole):
            raise InputError(f"--train_split {args.train_split}: the data set has only one split, {whole}.")
        data = load_splits(dataset, [whole], accelerator, **options)[whole]
        parts = read_division(args, data) or divide(data, args.seed)
        splits = {name: data.subset(indices) for name, indices in parts.items()}
        if accelerator.is_main_process:
            report_division(args, splits)
        splits[args.train_split] = splits.pop("train")
    else:
        validation = args.validation_split or ("val" if matching_split(existing, "val") else None)
        held_out = args.eval_split or ("test" if matching_split(existing, "test") else validation or "val")
        names = [held_out] if args.eval_only else [args.train_split, *([validation] if validation else []), held_out]
        splits = load_splits(dataset, names, accelerator, **options)
    if args.shots and not args.eval_only:
        train = splits[args.train_split]
        splits[args.train_split] = drawn = train.subset(few_shot(train, args.shots, args.seed))
        if accelerator.is_main_process:
            report_shots(args.output_dir, args.shots, args.seed, train, drawn)
    return splits, validation, held_out


def load_model(args: argparse.Namespace, adapter: SavedAdapter | None) -> nn.Module:
    """Load the base model, with a saved adapter, a new adapter or none."""
    if adapter and not args.eval_only:
        return load_trainable(args.model_name_or_path, adapter)
    if args.eval_only:
        return load_detector(args.model_name_or_path, [adapter] if adapter else [])
    model = load_base_model(args.model_name_or_path)
    fields = {name: getattr(args, name) for name in ADAPTER_FLAGS}
    config = SDPTConfig(**{name: value for name, value in fields.items() if value is not None})
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"--model_name_or_path {args.model_name_or_path}: {error}") from None


def prepare_training(setup: Setup) -> Training:
    """Make the samples, the optimizer and the checkpoints, and resume from a checkpoint."""
    args, accelerator, detector, progress = setup.args, setup.accelerator, setup.detector, setup.progress
    train = setup.splits[args.train_split]
    samples_per_step = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(train) / samples_per_step)
    max_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    max_text_len, augmentation = detector.config.max_text_len, not args.no_augmentation
    loss_function = GroundedDetectionLoss(detector.config)
    views = views_of(setup, loss_function)
    # Several steps may train on the same batches. Only the first one reads images.
    num_batches = math.ceil(max_steps / views.replays)
    samples = TrainingSamples(
        train, num_batches * samples_per_step, setup.processor, max_text_len, args.seed, augmentation
    )
    if setup.cache and args.per_device_train_batch_size > 1 and len(set(train.sizes)) > 1:
        accelerator.print(
            "--cache_features: images of several sizes are padded to the largest of their batch, and stored at each "
            "padded size; --per_device_train_batch_size 1, with --gradient_accumulation_steps, stores each image once"
        )
    loader = samples.loader(args.per_device_train_batch_size, args.dataloader_num_workers)
    trained = nn.ParameterList(trained_parameters(detector).values())
    groups = parameter_groups(detector, args.learning_rate, args.lora_learning_rate)
    if len(groups) == 1 and args.lora_learning_rate != LORA_LEARNING_RATE:
        raise InputError(
            f"--lora_learning_rate {args.lora_learning_rate}: --adapter {args.adapter} has no LoRA to train."
        )
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    setup.model, optimizer, loader = accelerator.prepare(detector, optimizer, loader)
    # The loader does not move the batches. `train_step` does, so that the features of their images can be looked up by
    # the pixels on the CPU. DeepSpeed refuses the argument `device_placement` of `prepare`.
    loader.device = None
    # Not prepared by Accelerate, so that it counts optimizer steps for any number of processes.
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, max_steps)
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay)) if args.ema_decay else None
    accelerator.register_for_checkpointing(scheduler, progress, *([average] if average else []))
    stored_dropout = "left out, by --cache_features" if setup.cache and setup.cache.leaves_out_dropout else None
    fingerprints = {split: data.fingerprint() for split, data in setup.splits.items()}
    run = describe_run(args) | {
        "training steps": max_steps,
        "images per step": samples_per_step,
        "processes": accelerator.num_processes,
        "mixed precision": accelerator.mixed_precision,
        # None without dropout, because stored features then change nothing.
        "dropout in backbones": stored_dropout,
        "training images": fingerprints[args.train_split],
        "validation images": setup.validation_split and fingerprints[setup.validation_split],
        "evaluation images": fingerprints[setup.eval_split],
    }
    checkpoints = Checkpoints(
        accelerator,
        args.output_dir,
        lambda folder: write_adapter(folder, detector, setup.processor, train.class_names, licence=setup.licence),
        run,
        args.checkpoints_total_limit,
    )
    checkpoints.resume(args.resume_from_checkpoint)
    if not (args.output_dir / "best").is_dir():  # the checkpoint came from another output folder
        progress.best = {}
    # After the checkpoint is found to belong to this run, because attacking all images takes long.
    views.prepare(samples, args.per_device_eval_batch_size, accelerator)
    return Training(
        samples=samples,
        loader=loader,
        trained=trained,
        optimizer=optimizer,
        scheduler=scheduler,
        average=average,
        checkpoints=checkpoints,
        views=views,
        loss_function=loss_function,
        steps_per_epoch=steps_per_epoch,
        max_steps=max_steps,
    )


def views_of(setup: Setup, loss_function: GroundedDetectionLoss) -> Views:
    """Make what chooses the inputs of the training steps, by the flags of adversarial training."""
    args, accelerator = setup.args, setup.accelerator
    if args.adversarial != "none" and accelerator.distributed_type in SHARDED:
        raise InputError(
            f"--adversarial {args.adversarial}: needs the whole model in each process, which "
            f"{accelerator.distributed_type.value} does not have."
        )
    return make_views(
        args.adversarial,
        setup.detector,
        loss_function,
        setup.processor.image_processor,
        # Without attack, there are no values, and `make_views` needs none.
        eps=(args.adv_eps or 0.0) / 255,
        steps=args.adv_steps,
        loss=args.adv_loss,
        weight=args.adv_weight or 1.0,
        seed=args.seed,
        folder=args.output_dir / "adversaries",
        device=accelerator.device,
    )


# ---- train


def train(setup: Setup, training: Training) -> list[str]:
    """Train the adapter, with validation and checkpoints. Returns the names of the saved files, in the main process."""
    args, accelerator, progress = setup.args, setup.accelerator, setup.progress
    validation_steps = args.validation_steps or training.steps_per_epoch
    replays = training.views.replays
    checkpointing_steps = args.checkpointing_steps
    if checkpointing_steps == "epoch":
        checkpointing_steps = math.ceil(training.steps_per_epoch / replays) * replays
    if args.with_tracking:
        accelerator.init_trackers("train_detection", {name: str(value) for name, value in vars(args).items()})
        if not progress.step:
            accelerator.log({f"before/{name}": value for name, value in progress.before["metrics"].items()}, step=0)
    if attack := describe_attack(vars(args)):
        accelerator.print(f"training on attacked images: {attack}")
    if not setup.validation_split:
        accelerator.print(f"{args.dataset_name} has no split val: only the last adapter is saved, not the best")
    # A resumed run may have been killed between the checkpoint and the validation of this step.
    if progress.step % validation_steps == 0:
        validate(setup, training)
    setup.model.train()
    stored_features = setup.cache.used(training.samples.has_one_prompt) if setup.cache else nullcontext()
    hide_bar = not accelerator.is_local_main_process
    bar = tqdm(total=training.max_steps, initial=progress.step, desc="training", disable=hide_bar)
    with Interruption(accelerator) as interruption, bar, stored_features:
        start = time.perf_counter()
        for batches in remaining_steps(setup, training):
            train_step(setup, training, batches)
            progress.step += 1
            # A run resumes with new batches, so it stops after the last replay of the current ones.
            is_last_replay = progress.step % replays == 0 or progress.step == training.max_steps
            stopped = interruption.asked_for() and is_last_replay
            checkpoint_due = stopped or (checkpointing_steps and progress.step % checkpointing_steps == 0)
            validation_due = progress.step % validation_steps == 0
            # Nothing is saved before the results of all steps are read, which checks that they are finite.
            if checkpoint_due or validation_due or progress.step == training.max_steps:
                read_results(setup, training)
            progress.seconds += time.perf_counter() - start
            bar.update()
            if progress.losses:
                bar.set_postfix(loss=f"{progress.losses[-1]:.3f}")
            if checkpoint_due:
                training.checkpoints.save(progress.step)
            if stopped:
                done = f"stopped after step {progress.step} of {training.max_steps}"
                raise KeyboardInterrupt(f"{done}; resume by --resume_from_checkpoint latest")
            if validation_due:
                validate(setup, training)
            start = time.perf_counter()
    # Saved before the last validation, which may fail. The report adds what the validation suggests.
    names = save(setup, training, args.output_dir, setup.card(None))
    validate(setup, training)
    return names


def remaining_steps(setup: Setup, training: Training) -> Iterator[list[tuple]]:
    """Yield the batches of each optimizer step. If an image cannot be read any more, save a checkpoint first."""
    accumulated, replays = setup.args.gradient_accumulation_steps, training.views.replays
    done = setup.progress.step // replays
    batches = iter(setup.accelerator.skip_first_batches(training.loader, done * accumulated))
    try:
        while step := list(itertools.islice(batches, accumulated)):
            training.views.begin()
            for _ in range(min(replays, training.max_steps - setup.progress.step)):
                yield step
    except InputError:
        # With several processes, the others wait in the middle of a step and cannot take part in a checkpoint.
        if setup.accelerator.num_processes == 1 and setup.progress.step:
            read_results(setup, training)
            training.checkpoints.save(setup.progress.step)
        raise


def train_step(setup: Setup, training: Training, batches: list[tuple]) -> None:
    """Take one optimizer step, and add its results to `training.unread`."""
    args, accelerator = setup.args, setup.accelerator
    # The boxes of all batches of the step, so that the losses add up to the loss of one large batch.
    num_boxes = mean_boxes_per_process([label for _, labels in batches for label in labels])
    step_loss = torch.zeros((), device=accelerator.device)
    finite_boxes = torch.ones((), dtype=torch.bool, device=accelerator.device)
    for index, (inputs, labels) in enumerate(batches):
        objects = [{name: label[name] for name in ("class_labels", "boxes")} for label in labels]
        moved_labels = to_device(objects, accelerator.device)
        for view in training.views.of_batch(index, inputs, labels):
            # Processes exchange gradients only once per step.
            is_last = index == len(batches) - 1 and view.is_last
            with nullcontext() if is_last else accelerator.no_sync(setup.model):
                outputs = setup.model(**view.inputs)
                loss = view.weight * training.loss_function(outputs, moved_labels, num_boxes)
                # The loss has just waited for the GPU, so the results of the step before are ready. If they were read
                # at the end of their step, the GPU would be idle meanwhile.
                read_results(setup, training)
                accelerator.backward(loss)
            step_loss += loss.detach()
            finite_boxes &= outputs.pred_boxes.isfinite().all()
    norm = accelerator.clip_grad_norm_(setup.model.parameters(), args.max_grad_norm)
    training.optimizer.step()
    training.optimizer.zero_grad()
    if not accelerator.optimizer_step_was_skipped:
        training.scheduler.step()
        if training.average:
            training.average.update_parameters(training.trained)
    numbers = {
        # The loss of the batches of all processes as if they were one batch.
        "loss": accelerator.reduce(step_loss, reduction="mean"),
        "finite_boxes": finite_boxes,
        # With fp16, the gradient scaler skips steps whose gradients are not finite.
        "finite_gradients": norm.isfinite() if accelerator.scaler is None else torch.ones_like(finite_boxes),
    }
    if args.with_tracking:
        numbers |= prompt_norms(setup.detector)
    training.unread.append(StepResult(setup.progress.step + 1, numbers, training.scheduler.get_last_lr()))


def read_results(setup: Setup, training: Training) -> None:
    """Check that the results of the last steps are finite, and add their losses to the progress and the trackers.

    A step is read in the middle of the next step, or before anything is saved. So no checkpoint has prompts that are
    not finite.

    Raises:
        InputError: The boxes or gradients of a step are not finite.
    """
    unread, training.unread = training.unread, []
    for step, numbers, learning_rates in unread:
        values = {name: value.item() for name, value in zip(numbers, to_cpu(list(numbers.values())), strict=True)}
        for name in ("boxes", "gradients"):
            if not values.pop(f"finite_{name}"):
                raise InputError(f"the {name} are not finite any more at step {step}: lower {rate_flags(training)}.")
        setup.progress.losses.append(values["loss"])
        if setup.args.with_tracking:
            values |= dict(zip(("learning_rate", "lora_learning_rate"), learning_rates, strict=False))
            setup.accelerator.log(values, step=step)


def rate_flags(training: Training) -> str:
    """Return the flags of the learning rates, one for each group of parameters."""
    return " or ".join(("--learning_rate", "--lora_learning_rate")[: len(training.optimizer.param_groups)])


def validate(setup: Setup, training: Training) -> None:
    """Measure the adapter on the validation split, once per step, and save it if it is the best so far."""
    args, progress = setup.args, setup.progress
    if not setup.validation_split or progress.validated == progress.step:
        return
    with averaged(setup.detector, training.average):
        measured, rows = setup.measure(setup.validation_split, "validating")
    metrics = measured["metrics"]
    progress.validated = progress.step
    progress.validations.append({"step": progress.step, **metrics})
    progress.thresholds = setup.suggest(setup.validation_split, rows)
    if metrics["AP"] > progress.best.get("AP", -1):
        threshold = progress.thresholds["all"]
        progress.best = {**metrics, "step": progress.step, "threshold": threshold}
        results = describe_best(args.dataset_name, setup.validation_split, progress.best)
        save(setup, training, args.output_dir / "best", setup.card(threshold, "/best"), results)
    setup.accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=progress.step)


def save(setup: Setup, training: Training, folder: Path, card: dict[str, Any], results: str | None = None) -> list[str]:
    """Save the adapter, or its moving average, with its model card. Returns the names of the files."""
    if not setup.accelerator.is_main_process:
        return []
    class_names = setup.splits[setup.args.train_split].class_names
    with averaged(setup.detector, training.average):
        return save_adapter(folder, setup.detector, setup.processor, class_names, results, **card)


def prompt_norms(detector: nn.Module) -> dict[str, torch.Tensor]:
    """Compute the mean norm of the trained prompts of each layer."""
    layers = [module for module in detector.modules() if isinstance(module, SDPTLayer)]
    norms = {}
    for index, layer in enumerate(layers):
        trained = [prompts for prompts in layer.sdpt_prompts.values() if prompts.requires_grad]
        flat = [prompts.detach().norm(dim=-1).flatten() for prompts in trained]
        norms[f"prompt_norm/layer_{index}"] = torch.cat(flat).mean()
    return norms


# ---- evaluate


def evaluate(setup: Setup, label: str, average: AveragedModel | None = None) -> tuple[dict[str, Any], list[tuple]]:
    """Measure the model, or its moving average, on the evaluation split.

    Returns:
        The result of `analyse_precision` with `shown`, the detections in some images; and all detections.
    """
    with averaged(setup.detector, average):
        measured, rows = setup.measure(setup.eval_split, label)
    images = choose_images(setup.splits[setup.eval_split], NUM_SHOWN_IMAGES)
    return {**measured, "shown": [result_of(image, rows) for image in images]}, rows


def evaluate_base_model(setup: Setup) -> tuple[dict[str, Any], list[tuple]]:
    """Measure the base model without its adapter."""
    with without_adapter(setup.detector):
        return evaluate(setup, "before")


def report(setup: Setup, after: dict[str, Any] | None, rows: list[tuple], own_threshold: float | None) -> list[str]:
    """Print the results, and write them with pictures and a model card.

    Args:
        setup: The run.
        after: Results with the adapter, or None.
        rows: Detections in the evaluation split, with the adapter if there is one.
        own_threshold: Score threshold that the evaluated adapter was saved with, or None.

    Returns:
        The names of the files that belong to the adapter.
    """
    args, data = setup.args, setup.splits[setup.eval_split]
    thresholds = setup.progress.thresholds or setup.suggest(setup.eval_split, rows)
    suggested = thresholds["all"]
    if own_threshold is not None:
        threshold, reason = own_threshold, "the threshold of the adapter"
    elif suggested:
        threshold, reason = suggested["threshold"], f"which has the best F1 on the split {suggested['split']}"
    else:
        threshold, reason = DEFAULT_THRESHOLD, "the default, because no box is right"
    trained = trained_parameters(setup.detector).values()
    record = make_record(
        args,
        setup.progress,
        after,
        data,
        thresholds,
        at_threshold=measure_threshold(data, rows, threshold, args.max_detections),
        errors=find_errors(data, rows, threshold, args.max_detections),
        images={split: describe_images(each) for split, each in setup.splits.items()},
        trainable_parameters=0 if args.eval_only else sum(parameter.numel() for parameter in trained),
        total_parameters=sum(parameter.numel() for parameter in setup.detector.parameters()),
    )
    columns = {"before": setup.progress.before["shown"]} | ({"after": after["shown"]} if after else {})
    shown = Shown(data.subset(choose_images(data, NUM_SHOWN_IMAGES)), columns, threshold, reason)
    names = write_report(args, record, shown, data, setup.eval_split, setup.processor, setup.card(suggested))
    if setup.progress.best and args.push_to_hub:
        # The best adapter may come from a part of the run that was to push nothing.
        card = setup.card(setup.progress.best["threshold"], "/best")
        write_best_card(args.output_dir / "best", setup.processor, data.class_names, card)
    print_report(args, record, data, setup.eval_split, names)
    return names


def run(args: argparse.Namespace, tasks: Mapping[str, Task]) -> None:
    limit_waiting()
    check_args(args)
    # Called for its error, before anything is prepared.
    load_base_config(args.model_name_or_path)
    tracker = args.report_to if args.with_tracking else None
    accelerator = make_accelerator(args.mixed_precision, log_with=tracker, project_dir=args.output_dir)
    set_seed(args.seed)
    resuming = None if args.eval_only else bool(args.resume_from_checkpoint)
    with claim_output_dir(args.output_dir, accelerator, resuming):
        run_alone(args, accelerator, tasks)


def run_alone(args: argparse.Namespace, accelerator: Accelerator, tasks: Mapping[str, Task]) -> None:
    """Do all work of a run, while no other command writes to its output folder."""
    # The token is removed from the arguments, because they are saved in `metrics.json`.
    token = vars(args).pop("hub_token")
    hub = prepare_push(args.hub_model_id, token, accelerator) if args.push_to_hub else None
    own_threshold = read_threshold(find_adapter(args.adapter)) if args.adapter and args.eval_only else None

    setup = prepare(args, accelerator, tasks)
    if accelerator.is_main_process:
        measured = {setup.validation_split, setup.eval_split}
        print_images(setup.splits, measured, args.max_detections, setup.detector.config.num_queries)
    if accelerator.is_main_process and not args.eval_only:
        # A licence that somebody wrote into the card of the output folder stays.
        flag = {"license": args.license} if args.license else {}
        setup.licence = (
            flag
            or licence_of(args.output_dir, base_model=args.model_name_or_path)
            or licence_of(args.model_name_or_path)
        )
    training = None if args.eval_only else prepare_training(setup)
    rows: list[tuple] = []
    # A checkpoint already has the results of the base model.
    if not setup.progress.before:
        setup.progress.before, rows = evaluate_base_model(setup)
    after, names = None, []
    if training:
        names = train(setup, training)
        after, rows = evaluate(setup, "after", training.average)
    elif args.adapter:
        after, rows = evaluate(setup, "after")
    written = report(setup, after, rows, own_threshold) if accelerator.is_main_process else []
    if training and after:
        # Only after the results are saved, because a tracker may fail.
        metrics = {f"after/{name}": value for name, value in after["metrics"].items()}
        accelerator.log(metrics, step=setup.progress.step)

    # Frees the DDP wrapper before the process group ends. If the wrapper is the last to hold the group, torch 2.13
    # keeps Python's lock while it waits for a thread of gloo that may need the lock, and the process hangs.
    (setup.model,) = accelerator.free_memory(setup.model)
    accelerator.end_training()
    if hub:
        best = [f"best/{name}" for name in (*names, THRESHOLD_FILE) if setup.progress.best]
        names = [*names, *written, *best]
        repository, folder = args.hub_model_id, args.output_dir
        again = f'hf upload {repository} {folder} . --exclude "step_*/*" --exclude "data/*"'
        with hint(f"To try again: {again}"):
            print(f"pushed to {push(hub, repository, folder, names)}")


def main(
    description: str | None = __doc__,
    program: str = "sdpt-train",
    model_name_or_path: str = BASE_MODEL,
    dataset_name: str | None = None,
    tasks: Mapping[str, Task] | None = None,
) -> None:
    """Run the command with the flags in `sys.argv`.

    Args:
        description: Text for `--help`.
        program: Name of the program, for error messages.
        model_name_or_path: Default of `--model_name_or_path`.
        dataset_name: Default of `--dataset_name`. None if the user must pass the flag.
        tasks: Built-in data sets by name. Each is a function that writes the data set as a COCO folder.
    """
    args = parse_args(description, model_name_or_path, dataset_name, tasks or {})
    print_any_name()
    with one_line_errors(program, flags_of(args)):
        run(args, tasks or {})


if __name__ == "__main__":
    main()
