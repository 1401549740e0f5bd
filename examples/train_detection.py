# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Tune a grounded detector with SDPT and measure what it gains.

    accelerate launch examples/train_detection.py

With no flags it takes the small host in `examples/host` and the built-in task "twemoji": pictograms of known names in a
drawing style that the host has never seen. It measures COCO AP of the bare host, trains, measures again, and saves the
adapter, `metrics.json` and `detections.png` in the output folder. "Before" is always the bare host.

With your own photographs, boxes in COCO format:

    accelerate launch examples/train_detection.py --model_name_or_path IDEA-Research/grounding-dino-tiny \\
        --dataset_name path/to/folder --output_dir my-adapter
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForZeroShotObjectDetection, get_scheduler

from adapters import Adapter, find_adapter, load_processor, set_picture_size
from checkpoints import (
    Checkpoints,
    Progress,
    carry_card,
    latest,
    remove_unfinished,
    write_adapter,
    write_results,
)
from coco_data import DetectionSplit, check_pictures, few_shot, has_split, load_split, require_same_classes
from coco_metrics import average_precision, detect, detect_split, result_of
from errors import InputError, one_line_errors
from feature_cache import FeatureCache
from files import whole_files
from interruption import Interruption, leave_signals_to_the_main_process
from moving_average import averaged, trained_parameters
from peft_sdpt import SDPTConfig, SDPTLayer
from peft_sdpt.grounding import split_classes
from peft_sdpt.loss import GroundedDetectionLoss, mean_boxes_a_process
from peft_sdpt.model_card import CARD
from pictograms.tasks import TASKS, write_task
from pictures import side_by_side
from pushing import prepare_push, push
from training_data import TrainingSamples

HERE = Path(__file__).resolve().parent
SHOWN_PICTURES = 4
# Flags that make a new adapter; a field that is not asked for keeps the default of `SDPTConfig`.
ADAPTER_FLAGS = ("num_virtual_tokens", "pinv_rtol", "prompt_dropout")
# Flags that a resumed run may change: they say where and how, not what. Those on data are told by the data itself.
FREE_FLAGS = (
    *("output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps"),
    *("with_tracking", "report_to", "per_device_eval_batch_size", "dataloader_num_workers"),
    "cache_features",
    *("push_to_hub", "hub_model_id"),
    *("skip_bad_images", "skip_bad_boxes"),
    *("dataset_name", "train_split", "validation_split", "eval_split", "bbox_format", "shots"),
    *("class_names_file", "class_names_column"),
    # As what they come to below.
    *("num_train_epochs", "max_train_steps", "per_device_train_batch_size", "mixed_precision"),
)
# Those of transformers that need nothing but a number of steps.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


def parse_args() -> argparse.Namespace:
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Shows the defaults, and the text above as it stands."""

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset_name",
        default="twemoji",
        help="A folder with boxes in COCO format (of its own, a Roboflow export, ODinW or COCO itself), a Hub id with "
        f"the columns image and objects, or a built-in task: {', '.join(TASKS)}.",
    )
    data.add_argument("--train_split", default="train", help="Split to train on.")
    data.add_argument(
        "--validation_split", help="Split that tells which adapter is the best. If not given: val, if there is one."
    )
    data.add_argument(
        "--eval_split", help="Split to measure on. If not given: test if the data has one, else the validation split."
    )
    data.add_argument(
        "--bbox_format",
        default="xywh",
        choices=("xywh", "xyxy"),
        help="What the four numbers of a box are: its corner, width and height as in COCO, or two corners. In pixels.",
    )
    data.add_argument("--class_names_file", help='JSON with names for prompts: {"RBC": "red blood cell"}.')
    data.add_argument(
        "--class_names_column", help="Field of the categories (COCO) or the objects (Hub) to take class names from."
    )
    data.add_argument("--shots", type=int, help="Train on this many images a class, drawn with --seed.")
    data.add_argument("--skip_bad_images", action="store_true", help="Leave out images that do not open.")
    data.add_argument("--skip_bad_boxes", action="store_true", help="Leave out boxes that are empty or outside.")
    data.add_argument(
        "--no_augmentation", action="store_true", help="No flips, scale jitter and crops of the training images."
    )
    data.add_argument("--image_size", type=int, help="Shorter side in pixels. If not given: the processor's own.")
    data.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that read images.")

    host = parser.add_argument_group("host and adapter")
    host.add_argument(
        "--model_name_or_path",
        default=str(HERE / "host"),
        help="Folder or Hub id of a Grounding DINO kind of detector.",
    )
    host.add_argument("--adapter", help="Folder or Hub id of a saved adapter to evaluate or to go on from.")
    host.add_argument(
        "--num_virtual_tokens",
        type=int,
        help="Unified prototype tokens a fusion layer. If not given: that of SDPTConfig, as the next two.",
    )
    host.add_argument(
        "--pinv_rtol",
        type=float,
        help="Drop singular values of the frozen projections below this share of the largest when inverting them.",
    )
    host.add_argument("--prompt_dropout", type=float, help="Dropout probability on the prototype tokens.")

    train = parser.add_argument_group("training")
    train.add_argument("--num_train_epochs", type=int, default=3, help="Times through the training images.")
    train.add_argument("--max_train_steps", type=int, help="Optimizer steps in all; overrides --num_train_epochs.")
    train.add_argument("--per_device_train_batch_size", type=int, default=12, help="Images a process and batch.")
    train.add_argument("--per_device_eval_batch_size", type=int, default=16, help="Images a process and batch.")
    train.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Batches a step.")
    train.add_argument(
        "--learning_rate", type=float, default=0.3, help="Prompts want rates two orders above those of weights."
    )
    train.add_argument("--weight_decay", type=float, default=0.0, help="Of AdamW.")
    train.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    train.add_argument("--lr_scheduler_type", default="cosine", choices=SCHEDULERS, help="One of transformers.")
    train.add_argument("--num_warmup_steps", type=int, default=10, help="Steps in which the learning rate rises.")
    train.add_argument(
        "--ema_decay",
        type=float,
        help="Evaluate and save the exponential moving average of the prompts, with this decay a step.",
    )
    train.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), help="If not given: what `accelerate config` says."
    )
    train.add_argument(
        "--cache_features",
        metavar="FOLDER",
        help="Keep there what the frozen backbones make of each picture and prompt, and compute it once. Needs "
        "--no_augmentation.",
    )
    train.add_argument("--seed", type=int, default=0, help="Of everything that is random.")

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=Path, default=Path("sdpt-detection"), help="Where all of it goes.")
    output.add_argument(
        "--validation_steps", type=int, help="Validate every so many optimizer steps. If not given: each epoch."
    )
    output.add_argument(
        "--checkpointing_steps",
        help="Save a checkpoint to resume from, the folder step_N, every so many optimizer steps, or each `epoch`.",
    )
    output.add_argument("--checkpoints_total_limit", type=int, help="Keep the newest so many.")
    output.add_argument(
        "--resume_from_checkpoint", help="A folder step_N, or `latest`: the newest of --output_dir, if there is one."
    )
    output.add_argument("--with_tracking", action="store_true", help="Log loss, learning rate, AP and prompt norms.")
    output.add_argument("--report_to", default="tensorboard", help="A tracker that Accelerate knows, or `all`.")
    output.add_argument(
        "--push_to_hub", action="store_true", help="Upload the adapters, last and best, to the Hub at the end."
    )
    output.add_argument("--hub_model_id", help="The repository to push to, user/name. It is made if it is not there.")
    output.add_argument("--hub_token", help="A token that may write there. If not given: that of `hf auth login`.")
    output.add_argument(
        "--eval_only", action="store_true", help="Measure the host, and --adapter on it, without training."
    )
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    if args.checkpointing_steps not in (None, "epoch"):
        try:
            args.checkpointing_steps = int(args.checkpointing_steps)
        except ValueError:
            raise InputError(
                f"--checkpointing_steps {args.checkpointing_steps}: must be a number of steps or `epoch`."
            ) from None
    for name in ("num_train_epochs", "max_train_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
                 "gradient_accumulation_steps", "num_virtual_tokens", "image_size", "shots", "validation_steps",
                 "checkpointing_steps", "checkpoints_total_limit"):  # fmt: skip
        value = getattr(args, name)
        if value not in (None, "epoch") and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1.")
    for name in ("learning_rate", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must be positive and finite.")
    for name, most in (("weight_decay", math.inf), ("num_warmup_steps", math.inf), ("seed", 2**32),
                       ("dataloader_num_workers", math.inf), ("prompt_dropout", 1)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not 0 <= value < most:
            raise InputError(f"--{name} {value}: must be at least 0 and below {most}.")
    for name in ("pinv_rtol", "ema_decay"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1:
            raise InputError(f"--{name} {value}: must be above 0 and below 1.")
    for name in ("dataset_name", "adapter", "model_name_or_path", "resume_from_checkpoint", "hub_model_id",
                 "cache_features"):  # fmt: skip
        if getattr(args, name) == "":
            raise InputError(f"--{name}: is empty.")
    for name in ADAPTER_FLAGS:
        if args.adapter and getattr(args, name) is not None:
            raise InputError(f"--{name}: belongs to the adapter, and --adapter {args.adapter} brings its own.")
    if args.eval_only and args.resume_from_checkpoint:
        raise InputError("--resume_from_checkpoint: goes on training; to evaluate a checkpoint pass it as --adapter.")
    if args.cache_features and args.eval_only:
        raise InputError("--cache_features: is for pictures that are seen again, and --eval_only sees each once.")
    if args.cache_features and not args.no_augmentation:
        raise InputError(
            "--cache_features: augmentation makes other pictures in each epoch, which are never seen again; give "
            "--no_augmentation, or leave it out."
        )
    if args.push_to_hub and not args.hub_model_id:
        raise InputError("--push_to_hub: needs --hub_model_id user/name.")
    if args.hub_model_id and args.hub_model_id.count("/") != 1:
        raise InputError(f"--hub_model_id {args.hub_model_id}: must be user/name.")
    if args.push_to_hub and args.eval_only:
        raise InputError("--push_to_hub: uploads what training makes, and --eval_only does not train.")
    if args.hub_model_id and not args.push_to_hub:
        raise InputError(f"--hub_model_id {args.hub_model_id}: nothing is uploaded without --push_to_hub.")
    if args.with_tracking and args.report_to not in (there := [*map(str, get_available_trackers()), "all"]):
        raise InputError(
            f"--report_to {args.report_to}: not installed (`pip install {args.report_to}`) or unknown to Accelerate; "
            f"there is {there}."
        )


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=args.report_to if args.with_tracking else None,
            project_dir=args.output_dir,
        )
    except ValueError as error:
        raise InputError(f"--mixed_precision {args.mixed_precision}: {error}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > accelerator.num_processes:
        raise InputError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, and Accelerate sees "
            f"{accelerator.num_processes}: on the CPU, set ACCELERATE_USE_CPU=true."
        )
    launched = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if launched and accelerator.device.type == "cpu":
        # accelerate 1.15 has no launcher for several processes on the CPU of one machine.
        print(
            "`accelerate launch --cpu --num_processes N` starts one process. For N on the CPU: "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N examples/train_detection.py",
            file=sys.stderr,
        )
    return accelerator


def make_output_dir(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Find out now, not after hours, whether the results can be written, and whether they would mix with others."""
    if accelerator.is_main_process:
        try:
            with whole_files(args.output_dir):
                pass
        except InputError as error:
            raise InputError(f"--output_dir {error}") from None
        if not args.eval_only:  # a run may be at work there
            remove_unfinished(args.output_dir)
    accelerator.wait_for_everyone()
    there = latest(args.output_dir)
    if there and not args.eval_only and not args.resume_from_checkpoint:
        raise InputError(
            f"--output_dir {args.output_dir}: has {there.name} of an earlier run; go on from it with "
            "--resume_from_checkpoint latest, or choose another folder."
        )


def may_push(args: argparse.Namespace, accelerator: Accelerator) -> HfApi | None:
    """Find out now, not after hours, whether the results can be pushed; returns what the main process pushes with."""
    # Not to be written down with the other arguments.
    token, api, problem = vars(args).pop("hub_token"), None, None
    if args.push_to_hub and accelerator.is_main_process:
        try:
            api = prepare_push(args.hub_model_id, token)
        except InputError as error:
            problem = str(error)
    if problem := broadcast_object_list([problem])[0]:
        raise InputError(problem)
    return api


def use_all_cores(accelerator: Accelerator) -> None:
    """Share the cores among the processes of this machine where each has one thread.

    One thread is what `accelerate launch` (1.15) sets without `--num_cpu_threads_per_process`; a wish for exactly one
    looks the same and is not heard.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(cores_a_process(accelerator))


def cores_a_process(accelerator: Accelerator) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))


def load_host(args: argparse.Namespace, adapter: Adapter | None) -> tuple:
    """Processor and detector, with the adapter that is asked for: a saved one, a new one, or none."""
    name = args.model_name_or_path
    processor = load_processor(adapter, name)
    try:
        model = AutoModelForZeroShotObjectDetection.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"--model_name_or_path {name}: no detector to load ({error}).") from None
    if args.image_size:
        set_picture_size(processor, args.image_size)
    if adapter:
        try:
            model = PeftModel.from_pretrained(model, str(adapter.folder), is_trainable=not args.eval_only)
        except Exception as error:  # whatever a damaged folder or an adapter of another host brings up
            raise InputError(f"--adapter {args.adapter}: does not load on this host ({error}).") from None
    elif not args.eval_only:
        config = SDPTConfig(**{name: getattr(args, name) for name in ADAPTER_FLAGS if getattr(args, name) is not None})
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"--model_name_or_path {name}: {error}") from None
    return processor, model


def read_data(args: argparse.Namespace, accelerator: Accelerator) -> tuple[dict[str, DetectionSplit], str | None, str]:
    """The splits by name, and the names of the one to validate on, None without one, and of the one to measure on."""
    dataset = args.dataset_name
    if dataset in TASKS:
        dataset = str(args.output_dir / "data" / dataset)
        with accelerator.main_process_first():
            write_task(args.dataset_name, Path(dataset), disable_progress=not accelerator.is_main_process)
    validation = args.validation_split or ("val" if has_split(dataset, "val") else None)
    held_out = args.eval_split or ("test" if has_split(dataset, "test") else validation or "val")
    names = {held_out} if args.eval_only else {args.train_split, held_out} | ({validation} if validation else set())
    splits = {
        name: load_split(
            *(dataset, name, args.bbox_format, args.class_names_file, args.class_names_column, args.skip_bad_boxes)
        )
        for name in sorted(names)
    }
    require_same_classes(splits, dataset)
    for name, data in splits.items():
        # A share each; every process must leave out the same.
        mine = range(accelerator.process_index, len(data), accelerator.num_processes)
        problems = check_pictures(data, mine, cores_a_process(accelerator), not accelerator.is_local_main_process)
        bad = dict(sorted(gather_object(list(problems.items()))))
        if bad and not args.skip_bad_images:
            first = next(iter(bad.values()))
            raise InputError(f"{first} {len(bad)} such in split {name!r}; --skip_bad_images leaves them out.")
        for problem in (*data.left_out, *bad.values()):
            accelerator.print(f"left out: {problem}")
        splits[name] = data.subset([image for image in range(len(data)) if image not in bad])
        if not splits[name].has_objects():
            raise InputError(f"{dataset}: split {name!r} has no objects left.")
    if args.shots and not args.eval_only:
        train = splits[args.train_split]
        splits[args.train_split] = train.subset(few_shot(train, args.shots, args.seed))
        for label, name in enumerate(train.class_names):
            there = sum(label in labels for labels in train.labels)
            if there < args.shots:
                accelerator.print(f"--shots {args.shots}: class {name!r} is on {there} images, all of them taken")
        if accelerator.is_main_process:
            sample = {"shots": args.shots, "seed": args.seed, "image_ids": splits[args.train_split].image_ids}
            with whole_files(args.output_dir) as folder:
                (folder / "shots.json").write_text(json.dumps(sample, indent=2) + "\n")
    return splits, validation, held_out


def run(args: argparse.Namespace) -> None:
    check_args(args)
    accelerator = make_accelerator(args)
    use_all_cores(accelerator)
    set_seed(args.seed)
    make_output_dir(args, accelerator)
    hub = may_push(args, accelerator)
    adapter = find_adapter(args.adapter) if args.adapter else None

    # Data
    splits, validation_split, eval_split = read_data(args, accelerator)
    held_out = splits[eval_split]

    # Host and adapter
    processor, detector = load_host(args, adapter)
    model = detector.to(accelerator.device)
    cache = FeatureCache(Path(args.cache_features), detector) if args.cache_features else None
    if cache and cache.leaves_out_dropout:
        accelerator.print("--cache_features: the host's backbones have dropout, which stored features are without")
    if args.image_size:
        try:
            detect(model.eval(), processor, [Image.new("RGB", (args.image_size,) * 2)], ["object"], [[0]])
        except RuntimeError as error:  # fewer places in the picture than the host has queries, and the like
            raise InputError(f"--image_size {args.image_size}: does not suit this host ({error}).") from None
    try:
        split_classes(held_out.class_names, processor.tokenizer, model.config.max_text_len)
    except ValueError as error:
        raise InputError(f"{args.dataset_name}: {error}") from None
    total = sum(p.numel() for p in model.parameters())
    trainable = 0 if args.eval_only else sum(p.numel() for p in trained_parameters(model))
    progress = Progress()

    def detections(data: DetectionSplit, label: str) -> list[tuple]:
        return detect_split(
            model,
            processor,
            data,
            args.per_device_eval_batch_size,
            accelerator,
            label,
            num_workers=args.dataloader_num_workers,
        )

    def measure(label: str) -> dict:
        rows = detections(held_out, label)
        shown = [result_of(image, rows) for image in range(min(SHOWN_PICTURES, len(held_out)))]
        return {"metrics": average_precision(held_out, rows), "shown": shown}

    if not args.eval_only:
        train, validation = splits[args.train_split], splits.get(validation_split)
        global_batch_size = args.per_device_train_batch_size * accelerator.num_processes
        samples_per_step = global_batch_size * args.gradient_accumulation_steps
        steps_per_epoch = math.ceil(len(train) / samples_per_step)
        max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
        samples = TrainingSamples(
            train,
            max_train_steps * samples_per_step,
            processor,
            model.config.max_text_len,
            args.seed,
            augmentation=not args.no_augmentation,
        )
        if cache and args.per_device_train_batch_size > 1 and len(set(train.sizes)) > 1:
            accelerator.print(
                "--cache_features: pictures of several sizes are padded to the largest of their batch, and kept at "
                "each size; --per_device_train_batch_size 1, with --gradient_accumulation_steps, keeps each once"
            )
        loader = DataLoader(
            samples,
            batch_size=args.per_device_train_batch_size,
            collate_fn=samples.collate,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=leave_signals_to_the_main_process,
            # Its own, or starting the loader would draw from the one of dropout, once more in each resumed run.
            generator=torch.Generator(),
        )
        trained = torch.nn.ParameterList(trained_parameters(model))
        optimizer = torch.optim.AdamW(trained, args.learning_rate, weight_decay=args.weight_decay)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        # Not prepared: it counts optimizer steps, whatever the number of processes.
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, max_train_steps)
        average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay)) if args.ema_decay else None
        accelerator.register_for_checkpointing(scheduler, progress, *([average] if average else []))
        this_run = {f"--{name}": str(value) for name, value in vars(args).items() if name not in FREE_FLAGS} | {
            "training steps": max_train_steps,
            "images a step": samples_per_step,
            "processes": accelerator.num_processes,
            "mixed precision": accelerator.mixed_precision,
            # None for a host without: then stored features change nothing.
            "dropout in backbones": "left out, by --cache_features" if cache and cache.leaves_out_dropout else None,
            "training images": train.fingerprint(),
            "validation images": validation.fingerprint() if validation else None,
            "evaluation images": held_out.fingerprint(),
        }

        def write(folder: Path) -> None:
            write_adapter(folder, detector, processor, train.class_names)

        checkpoints = Checkpoints(accelerator, args.output_dir, write, this_run, args.checkpoints_total_limit)
        if args.resume_from_checkpoint == "latest":
            resumed = latest(args.output_dir)
        else:
            resumed = args.resume_from_checkpoint and Path(args.resume_from_checkpoint)
        if resumed:
            checkpoints.load(resumed)
            if not (args.output_dir / "best").is_dir():  # it stayed where that checkpoint is
                progress.best = {}
            accelerator.print(f"going on from {resumed}")
        elif args.resume_from_checkpoint:
            accelerator.print(f"{args.output_dir} has no checkpoint yet: starting")

    if not progress.before:
        with detector.disable_adapter() if isinstance(detector, PeftModel) else nullcontext():
            progress.before = measure("before")
    after = None

    if not args.eval_only:
        loss_function = GroundedDetectionLoss(detector.config)
        validation_steps = args.validation_steps or steps_per_epoch
        checkpointing_steps = steps_per_epoch if args.checkpointing_steps == "epoch" else args.checkpointing_steps
        if args.with_tracking:
            accelerator.init_trackers("train_detection", {name: str(value) for name, value in vars(args).items()})
            if not progress.step:
                accelerator.log({f"before/{name}": value for name, value in progress.before["metrics"].items()}, step=0)
        if not validation_split:
            accelerator.print(f"{args.dataset_name} has no split val: no best adapter is kept, only the last")

        def save(folder: Path, results: str | None = None) -> list[str]:
            """Save the adapter, with what its card says of results; gives the names of the files."""
            if not accelerator.is_main_process:
                return []
            with averaged(detector, average), whole_files(folder) as unfinished:
                carry_card(folder, unfinished)
                write(unfinished)
                write_results(unfinished / CARD, results)
                return sorted(path.name for path in unfinished.iterdir())

        def validate() -> None:
            with averaged(detector, average):
                metrics = average_precision(validation, detections(validation, "validating"))
            progress.validated = progress.step
            if metrics["AP"] > progress.best.get("AP", -1):
                progress.best = metrics | {"step": progress.step}
                save(args.output_dir / "best", describe_best(args, validation_split, progress.best))
            accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=progress.step)

        def whole_steps(batches: Iterable) -> Iterator[list[tuple]]:
            """The batches of each step; if a picture vanishes in mid-run, what is trained by then is saved first."""
            batches = iter(batches)
            try:
                while step := list(itertools.islice(batches, args.gradient_accumulation_steps)):
                    yield step
            except InputError:
                # Other processes are in the middle of a step that never ends.
                if accelerator.num_processes == 1 and progress.step:
                    checkpoints.save(progress.step)
                raise

        if resumed and validation and progress.step % validation_steps == 0 and progress.validated < progress.step:
            validate()
        bar = tqdm(
            total=max_train_steps,
            initial=progress.step,
            desc="training",
            disable=not accelerator.is_local_main_process,
        )
        model.train()
        batches = accelerator.skip_first_batches(loader, progress.step * args.gradient_accumulation_steps)
        # Validation between steps takes its features from there as well.
        with Interruption(accelerator) as interruption, bar, cache.used(samples.asks_all) if cache else nullcontext():
            start = time.perf_counter()
            for step in whole_steps(batches):
                # Of all batches of the step: their losses add up to that of one large batch.
                num_boxes = mean_boxes_a_process([label for _, labels in step for label in labels])
                step_loss = 0.0
                for number, (inputs, labels) in enumerate(step, 1):
                    # Gradients of several processes meet once a step.
                    with nullcontext() if number == len(step) else accelerator.no_sync(model):
                        outputs = model(**inputs)
                        if not outputs.pred_boxes.isfinite().all():
                            raise InputError(
                                f"boxes are not finite any more at step {progress.step + 1}: lower --learning_rate."
                            )
                        loss = loss_function(outputs, labels, num_boxes)
                        accelerator.backward(loss)
                    step_loss += loss.detach()
                norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                # In fp16 that is what the gradient scaler is for. Before the step: no checkpoint must get to hold it.
                if accelerator.scaler is None and not norm.isfinite():
                    raise InputError(
                        f"gradients are not finite any more at step {progress.step + 1}: lower --learning_rate."
                    )
                optimizer.step()
                optimizer.zero_grad()
                if not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                    if average:
                        average.update_parameters(trained)
                progress.step += 1
                progress.seconds += time.perf_counter() - start
                bar.update()
                bar.set_postfix(loss=f"{step_loss.item():.3f}")
                if args.with_tracking:
                    log_step(accelerator, detector, step_loss, scheduler.get_last_lr()[0], progress.step)
                stopped = interruption.asked_for()
                if stopped or (checkpointing_steps and progress.step % checkpointing_steps == 0):
                    checkpoints.save(progress.step)
                if stopped:
                    raise KeyboardInterrupt(
                        f"stopped after step {progress.step} of {max_train_steps}; "
                        "go on with --resume_from_checkpoint latest"
                    )
                if validation and progress.step % validation_steps == 0:
                    validate()
                start = time.perf_counter()
        names = save(args.output_dir)
        if validation and progress.validated < progress.step:
            validate()
        with averaged(detector, average):
            after = measure("after")
        accelerator.log({f"after/{name}": value for name, value in after["metrics"].items()}, step=progress.step)
    elif args.adapter:
        after = measure("after")
    if accelerator.is_main_process:
        report(args, progress, after, held_out, eval_split, trainable, total)
    # The wrapper of several processes goes before their group. If it is the last to hold the group, torch 2.13 keeps
    # Python's lock while it waits for gloo's thread, which may need that lock to end its last work: seen to hang.
    (model,) = accelerator.free_memory(model)
    accelerator.end_training()
    if hub:
        names += ["metrics.json", "detections.png", *(f"best/{name}" for name in names if progress.best)]
        print(f"pushed to {push(hub, args.hub_model_id, args.output_dir, names)}")


def log_step(accelerator: Accelerator, detector: PeftModel, loss: torch.Tensor, rate: float, step: int) -> None:
    values = {"loss": accelerator.reduce(loss, reduction="mean").item(), "learning_rate": rate}
    layers = [module for module in detector.modules() if isinstance(module, SDPTLayer)]
    for index, layer in enumerate(layers):
        norms = torch.cat([tokens.detach().norm(dim=-1) for tokens in trained_parameters(layer)])
        values[f"prompt_norm/layer_{index}"] = norms.mean().item()
    accelerator.log(values, step=step)


def describe_best(args: argparse.Namespace, split: str, metrics: dict) -> str:
    """What the card of the best adapter says."""
    return (
        f"## Results\n\nOf all adapters of a training run on `{data_name(args)}`, this one, of step {metrics['step']}, "
        f"has the highest AP on the split `{split}`, by which it was chosen.\n\n{table({'validation': metrics})}"
    )


def describe_last(
    args: argparse.Namespace, split: str, held_out: DetectionSplit, progress: Progress, metrics: dict
) -> str:
    """What the card of the last adapter says."""
    best = progress.best and f"`best/` has the adapter of highest AP in validation, {progress.best['AP']:.3f}."
    paragraphs = [
        "## Results",
        f"COCO AP on `{data_name(args)}`, split `{split}`, {len(held_out)} images of {len(held_out.class_names)} "
        f"classes, after {progress.step} training steps; `metrics.json` has the arguments.",
        table({"before, the host alone": metrics["before"], "after": metrics["after"]}),
        "![Detections before and after](detections.png)",
        best,
    ]
    return "\n\n".join(filter(None, paragraphs))


def data_name(args: argparse.Namespace) -> str:
    """What to call the data in public: of a folder, its last part."""
    return Path(args.dataset_name).resolve().name if is_path(args.dataset_name) else args.dataset_name


def is_path(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and Path(value).exists())


def table(rows: dict[str, dict]) -> str:
    """Metrics in Markdown, a row each."""
    names = ("AP", "AP50", "AP75")
    lines = [["", *names], ["---"] * 4, *([row, *(f"{m[name]:.3f}" for name in names)] for row, m in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(
    args: argparse.Namespace,
    progress: Progress,
    after: dict | None,
    held_out: DetectionSplit,
    eval_split: str,
    trainable: int,
    total: int,
) -> None:
    """Print the results, and write them and the pictures."""
    results = {"before": progress.before} | ({"after": after} if after else {})
    metrics = {
        "before": progress.before["metrics"],
        "after": after and after["metrics"],
        "best": progress.best or None,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "train_seconds": round(progress.seconds, 1),
        # Of paths the last part: this may be published, and where things lay is nobody's business.
        "args": {name: Path(v).resolve().name if is_path(v) else v for name, v in vars(args).items()},
    }
    # An evaluation leaves the record of the training run beside it alone.
    prefix = "eval_" if args.eval_only else ""
    shown = [held_out.open_image(i) for i in range(min(SHOWN_PICTURES, len(held_out)))]
    columns = {name: result["shown"] for name, result in results.items()}
    with whole_files(args.output_dir) as folder:
        (folder / f"{prefix}metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        side_by_side(shown, columns, held_out.class_names).save(folder / f"{prefix}detections.png")
        if not args.eval_only:
            shutil.copyfile(args.output_dir / CARD, folder / CARD)
            write_results(folder / CARD, describe_last(args, eval_split, held_out, progress, metrics))
    print(f"\n{args.dataset_name}, {eval_split} split of {len(held_out)} images, {len(held_out.class_names)} classes")
    print(f"{'':8}{'AP':>8}{'AP50':>8}{'AP75':>8}")
    for name, result in results.items():
        print(f"{name:8}" + "".join(f"{result['metrics'][key]:8.3f}" for key in ("AP", "AP50", "AP75")))
    if not args.eval_only:
        share = f"{100 * trainable / total:.3f} %"
        print(f"trained {trainable:,} of {total:,} parameters ({share}) in {progress.seconds:.0f} s")
        print(f"the adapter: {args.output_dir}/adapter_model.safetensors")
    if progress.best:
        print(f"the best on validation, AP {progress.best['AP']:.3f} at step {progress.best['step']}: "
              f"{args.output_dir}/best")  # fmt: skip
    print(f"wrote {args.output_dir}/{prefix}metrics.json and {prefix}detections.png")


def main() -> None:
    with one_line_errors("train_detection.py"):
        run(parse_args())


if __name__ == "__main__":
    main()
