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
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, get_scheduler

from coco_data import DetectionSplit, centre_boxes, has_test_split, load_split
from coco_metrics import detect, evaluate
from errors import InputError, one_line_errors
from peft_sdpt import SDPTConfig
from peft_sdpt.grounding import class_prompt, phrase_lengths, split_classes
from peft_sdpt.loss import GroundedDetectionLoss
from pictograms.tasks import TASKS, write_task
from pictures import side_by_side

HERE = Path(__file__).resolve().parent
SHOWN_PICTURES = 4
# Flags that make a new adapter; a field that is not asked for keeps the default of `SDPTConfig`.
ADAPTER_FLAGS = ("num_virtual_tokens", "pinv_rtol")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path",
        default=str(HERE / "host"),
        help="Folder or Hub id of a Grounding DINO kind of detector.",
    )
    parser.add_argument(
        "--dataset_name",
        default="twemoji",
        help=f"A folder in COCO format (train.json, val.json, images/), a Hub id with the columns image and objects, "
        f"or a built-in task: {', '.join(TASKS)}.",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("sdpt-detection"))
    parser.add_argument("--eval_split", help="Split to measure on. Default: test if the data has one, else val.")
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--max_train_steps", type=int, help="Optimizer steps in all; overrides --num_train_epochs.")
    parser.add_argument("--per_device_train_batch_size", type=int, default=12)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=16)
    parser.add_argument(
        "--learning_rate", type=float, default=0.2, help="Prompts want rates two orders above those of weights."
    )
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--lr_scheduler_type", default="cosine", choices=SCHEDULERS)
    parser.add_argument("--num_warmup_steps", type=int, default=10)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--num_virtual_tokens", type=int, help="Unified prototype tokens a fusion layer. Default: that of SDPTConfig."
    )
    parser.add_argument(
        "--pinv_rtol",
        type=float,
        help="Drop singular values of the frozen projections below this share of the largest when inverting them. "
        "Default: the full inverse of the paper.",
    )
    parser.add_argument("--image_size", type=int, help="Shorter side in pixels. Default: the processor's own.")
    parser.add_argument(
        "--eval_only", action="store_true", help="Measure the host, and --adapter on it, without training."
    )
    parser.add_argument("--adapter", help="Folder or Hub id of a saved adapter to evaluate or to go on from.")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    for name in ("num_train_epochs", "max_train_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
                 "gradient_accumulation_steps", "num_virtual_tokens", "image_size"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1.")
    for name in ("learning_rate", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must be positive and finite.")
    for name, most in (("weight_decay", math.inf), ("num_warmup_steps", math.inf), ("seed", 2**32)):
        if not 0 <= getattr(args, name) < most:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 0 and below {most}.")
    if args.pinv_rtol is not None and not 0 < args.pinv_rtol < 1:
        raise InputError(f"--pinv_rtol {args.pinv_rtol}: must be above 0 and below 1.")
    for name in ADAPTER_FLAGS:
        if args.adapter and getattr(args, name) is not None:
            raise InputError(f"--{name}: belongs to the adapter, and --adapter {args.adapter} brings its own.")


def use_all_cores(accelerator: Accelerator) -> None:
    """Share the cores among the processes of this machine where each has one thread.

    One thread is what `accelerate launch` (1.15) sets without `--num_cpu_threads_per_process`; a wish for exactly one
    looks the same and is not heard.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, cores // local_processes))


def load_host(args: argparse.Namespace) -> tuple:
    """Processor and detector, with the adapter that is asked for: a saved one, a new one, or none."""
    name = args.model_name_or_path
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForZeroShotObjectDetection.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"--model_name_or_path {name}: no detector to load ({error}).") from None
    if args.image_size:
        # 800 by 1333 is the ratio that detectors are trained with.
        longest = round(args.image_size * 1333 / 800)
        processor.image_processor.size = {"shortest_edge": args.image_size, "longest_edge": longest}
    if args.adapter:
        try:
            return processor, PeftModel.from_pretrained(model, args.adapter, is_trainable=not args.eval_only)
        except Exception as error:  # whatever a damaged folder or another tuner's adapter brings up
            raise InputError(f"--adapter {args.adapter}: no SDPT adapter that loads on this host ({error}).") from None
    if not args.eval_only:
        config = SDPTConfig(**{name: getattr(args, name) for name in ADAPTER_FLAGS if getattr(args, name) is not None})
        try:
            return processor, get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"--model_name_or_path {name}: {error}") from None
    return processor, model


class Collator:
    """Makes a batch of a split: pictures through the processor, a prompt an image, labels in the prompt's order.

    Where the classes do not all fit one prompt, an image is asked for its own classes and as many random others as fit.
    """

    def __init__(self, data: DetectionSplit, processor, max_text_len: int):
        self.data, self.processor = data, processor
        # [CLS] and [SEP] have their place too.
        self.room = max_text_len - 2
        self.lengths = phrase_lengths(data.class_names, processor.tokenizer)

    def __call__(self, images: list[int]) -> tuple[dict, list[dict]]:
        pictures = [self.data.open_image(i) for i in images]
        prompts, labels = [], []
        for image, picture in zip(images, pictures, strict=True):
            asked = self._ask(self.data.labels[image])
            prompts.append(class_prompt([self.data.class_names[c] for c in asked]))
            position = {c: i for i, c in enumerate(asked)}
            objects = zip(self.data.boxes[image], self.data.labels[image], self.data.crowds[image], strict=True)
            kept = [(box, position[c]) for box, c, crowd in objects if c in position and not crowd]
            labels.append(
                {
                    "class_labels": torch.tensor([c for _, c in kept], dtype=torch.long),
                    "boxes": centre_boxes([box for box, _ in kept], picture.size),
                }
            )
        inputs = self.processor.image_processor(pictures, return_tensors="pt")
        inputs |= self.processor.tokenizer(prompts, padding=True, return_tensors="pt")
        return dict(inputs), labels

    def _ask(self, present: list[int]) -> list[int]:
        classes = range(len(self.lengths))
        if sum(self.lengths) <= self.room:
            return list(classes)
        own = set(present)
        asked, room = [], self.room
        for c in [*sorted(own), *(c for c in torch.randperm(len(classes)).tolist() if c not in own)]:
            if self.lengths[c] > room:
                break
            asked.append(c)
            room -= self.lengths[c]
        return asked


def run(args: argparse.Namespace) -> None:
    check_args(args)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # The same order of images whatever the number of processes.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    use_all_cores(accelerator)
    set_seed(args.seed)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {args.output_dir}: cannot be made ({error}).") from None

    # Data
    dataset = args.dataset_name
    if dataset in TASKS:
        dataset = str(args.output_dir / "data" / dataset)
        with accelerator.main_process_first():
            write_task(args.dataset_name, Path(dataset), disable_progress=not accelerator.is_main_process)
    eval_split = args.eval_split or ("test" if has_test_split(dataset) else "val")
    held_out = load_split(dataset, eval_split)
    train = None if args.eval_only else load_split(dataset, "train")
    if train and train.class_names != held_out.class_names:
        raise InputError(f"{dataset}: the splits train and {eval_split} name different classes.")

    # Host and adapter
    processor, model = load_host(args)
    model.to(accelerator.device)
    shown = [held_out.open_image(i) for i in range(min(SHOWN_PICTURES, len(held_out)))]
    try:
        chunks = split_classes(held_out.class_names, processor.tokenizer, model.config.max_text_len)
    except ValueError as error:
        raise InputError(f"{dataset}: {error}") from None

    def measure(label: str) -> tuple[dict, list[dict]]:
        metrics = evaluate(model, processor, held_out, args.per_device_eval_batch_size, accelerator, label)
        model.eval()
        with accelerator.autocast():
            return metrics, detect(accelerator.unwrap_model(model), processor, shown, held_out.class_names, chunks)

    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        before, shown_before = measure("before")
    after, shown_after = None, None
    total = sum(p.numel() for p in model.parameters())
    trainable = 0 if args.eval_only else sum(p.numel() for p in model.parameters() if p.requires_grad)

    seconds = 0.0
    if not args.eval_only:
        loss_function = GroundedDetectionLoss(model.config)
        loader = DataLoader(
            range(len(train)),
            batch_size=args.per_device_train_batch_size,
            shuffle=True,
            collate_fn=Collator(train, processor, model.config.max_text_len),
        )
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], args.learning_rate, weight_decay=args.weight_decay
        )
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
        max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
        # Not prepared: it counts optimizer steps, whatever the number of processes.
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, max_train_steps)

        model.train()
        start = time.perf_counter()
        bar = tqdm(total=max_train_steps, desc="training", disable=not accelerator.is_local_main_process)
        step = 0
        while step < max_train_steps:
            for inputs, labels in loader:
                with accelerator.accumulate(model):
                    outputs = model(**inputs)
                    if not outputs.pred_boxes.isfinite().all():
                        bar.close()
                        raise InputError(f"boxes are not finite any more at step {step + 1}: lower --learning_rate.")
                    loss = loss_function(outputs, labels)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()
                    if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                        scheduler.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    step += 1
                    bar.update()
                    bar.set_postfix(loss=f"{loss.item():.3f}")
                if step == max_train_steps:
                    break
        bar.close()
        seconds = time.perf_counter() - start
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(args.output_dir)
            processor.save_pretrained(args.output_dir)
    if args.adapter or not args.eval_only:
        after, shown_after = measure("after")

    # Report
    if accelerator.is_main_process:
        metrics = {
            "before": before,
            "after": after,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "train_seconds": round(seconds, 1),
            "args": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        }
        # An evaluation leaves the record of the training run beside it alone.
        prefix = "eval_" if args.eval_only else ""
        (args.output_dir / f"{prefix}metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        columns = {"before": shown_before} | ({"after": shown_after} if shown_after else {})
        side_by_side(shown, columns, held_out.class_names).save(args.output_dir / f"{prefix}detections.png")
        print(
            f"\n{args.dataset_name}, {eval_split} split of {len(held_out)} images, {len(held_out.class_names)} classes"
        )
        print(f"{'':8}{'AP':>8}{'AP50':>8}{'AP75':>8}")
        for name, row in (("before", before), ("after", after)):
            if row:
                print(f"{name:8}{row['AP']:8.3f}{row['AP50']:8.3f}{row['AP75']:8.3f}")
        if not args.eval_only:
            share = f"{100 * trainable / total:.3f} %"
            print(f"trained {trainable:,} of {total:,} parameters ({share}) in {seconds:.0f} s")
            print(f"the adapter: {args.output_dir}/adapter_model.safetensors")
        print(f"wrote {args.output_dir}/{prefix}metrics.json and {prefix}detections.png")
    accelerator.end_training()


def main() -> None:
    with one_line_errors("train_detection.py"):
        run(parse_args())


if __name__ == "__main__":
    main()
