# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The flags of `sdpt-train`, and the rules for their values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers

from ..detection import BOX_FORMATS
from ..detection.adversarial import STEPS
from ..detection.attacks import LOSSES
from ..detection.prediction import MAX_DETECTIONS
from ..errors import InputError
from ..files import output_folder
from ..training import LORA_LEARNING_RATE

BASE_MODEL = "IDEA-Research/grounding-dino-tiny"
# Writes a built-in data set to a folder in COCO format. The second argument tells whether to hide the progress bar.
Task = Callable[[Path, bool], object]
# Flags for reading the data, which are arguments of `load_splits` with the same names.
DATA_FLAGS = (
    "bbox_format",
    "class_names_file",
    "class_names_column",
    "skip_bad_boxes",
    "skip_bad_images",
    "allow_outside_images",
)
# Flags for a new adapter, which are fields of `SDPTConfig`. A flag that is not given keeps the default of the field.
ADAPTER_FLAGS = ("num_virtual_tokens", "pinv_rtol", "prompt_dropout", "lora_rank")
# Flags of the attack in adversarial training, and the defaults of two of them.
ATTACK_FLAGS = ("adv_eps", "adv_steps", "adv_weight", "adv_loss")
ADV_EPS, ADV_WEIGHT = 2.0, 1.0
# Flags that a resumed run may change, because they do not change its result, or because a checkpoint holds their effect
# in another form: fingerprints of the data, and numbers of steps, images and processes.
FREE_FLAGS = (
    *("output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps"),
    *("with_tracking", "report_to", "per_device_eval_batch_size", "dataloader_num_workers"),
    "cache_features",
    *("push_to_hub", "hub_model_id", "license"),
    *("dataset_name", "train_split", "validation_split", "eval_split", "shots", *DATA_FLAGS),
    *("num_train_epochs", "max_train_steps", "per_device_train_batch_size", "mixed_precision"),
)
# Arguments of the library whose flags have other names, or need a value.
RENAMED = {
    "adapters": "adapter",
    "cache_folder": "cache_features",
    "checkpoint": "resume_from_checkpoint",
    "loss": "adv_loss",
    "repo_id": "hub_model_id",
    "resuming": "resume_from_checkpoint latest",
    "source": "adapter",
    "token": "hub_token",
}
# The schedulers of transformers that need only a number of steps.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


def parse_args(
    description: str | None, model_name_or_path: str, dataset_name: str | None, tasks: Collection[str]
) -> argparse.Namespace:
    """Parse the flags in `sys.argv`. The arguments are those of `train.main`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Help, allow_abbrev=False)
    add_data_flags(parser.add_argument_group("data"), dataset_name, tasks)
    add_model_flags(parser.add_argument_group("base model and adapter"), model_name_or_path)
    add_training_flags(parser.add_argument_group("training"))
    add_adversarial_flags(parser.add_argument_group("adversarial training"))
    add_output_flags(parser.add_argument_group("output"))
    return parser.parse_args()


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the description."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # If a flag has no default value, its help text describes the default.
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_reading_flags(group: argparse._ArgumentGroup, dataset_name: str | None, tasks: Collection[str]) -> None:
    """Add the flags that tell which data set is read, and how."""
    built_in = f", or a built-in task: {', '.join(tasks)}" if tasks else ""
    group.add_argument(
        "--dataset_name",
        default=dataset_name,
        required=dataset_name is None,
        help="A folder with images and boxes (COCO, YOLO, Pascal VOC, LabelMe, imagefolder or Parquet), or the Hub id "
        f"of a data set with the columns image and objects{built_in}.",
    )
    group.add_argument(
        "--bbox_format",
        default="xywh",
        choices=tuple(BOX_FORMATS),
        help="Format of the boxes in a COCO file or in a data set on the Hub: corner, width and height, as in COCO; "
        "two corners; or centre, width and height. Boxes are in pixels. With relative_, they are fractions of the "
        "image size.",
    )
    group.add_argument(
        "--class_names_file",
        help='JSON file that maps class names of the data set to names for prompts: {"RBC": "red blood cell"}.',
    )
    group.add_argument(
        "--class_names_column",
        help="Field with the class names, in the categories of a COCO file or in the objects of a Hub data set.",
    )
    group.add_argument("--skip_bad_images", action="store_true", help="Leave out images that cannot be opened.")
    group.add_argument(
        "--skip_bad_boxes", action="store_true", help="Leave out boxes that are empty or outside their image."
    )
    group.add_argument(
        "--allow_outside_images",
        action="store_true",
        help='Read images outside the folder of the data set, which are named by an absolute path or with "..". '
        "Use it only for data that you trust.",
    )
    group.add_argument(
        "--image_size", type=int, help="Shorter side of the resized images in pixels. Default: that of the processor."
    )


def add_data_flags(group: argparse._ArgumentGroup, dataset_name: str | None, tasks: Collection[str]) -> None:
    add_reading_flags(group, dataset_name, tasks)
    group.add_argument("--train_split", default="train", help="Split to train on.")
    group.add_argument(
        "--validation_split", help="Split for choosing the best adapter. Default: val, if the data set has it."
    )
    group.add_argument(
        "--eval_split",
        help="Split for measuring AP before and after training. Default: test, if the data set has it, else the "
        "validation split.",
    )
    group.add_argument("--shots", type=int, help="Number of training images per class, drawn with --seed.")
    group.add_argument(
        "--no_augmentation",
        action="store_true",
        help="Train without random flips, scale jitter and crops of the images.",
    )
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Number of processes that read images.")


def add_model_flags(group: argparse._ArgumentGroup, model_name_or_path: str) -> None:
    group.add_argument(
        "--model_name_or_path",
        default=model_name_or_path,
        help="Folder or Hub id of the base model, a Grounding DINO, MM Grounding DINO or LLMDet.",
    )
    group.add_argument(
        "--adapter", help="Folder or Hub id of a saved adapter to evaluate, or to continue training from."
    )
    group.add_argument(
        "--num_virtual_tokens",
        type=int,
        help="Number of unified prototype tokens per fusion layer. This flag and the next two have the defaults of "
        "SDPTConfig.",
    )
    group.add_argument(
        "--pinv_rtol",
        type=float,
        help="Singular values of the frozen projections below this fraction of the largest one are dropped in the "
        "inverse.",
    )
    group.add_argument("--prompt_dropout", type=float, help="Dropout probability of the prototype tokens.")
    group.add_argument(
        "--lora_rank",
        type=int,
        help="Also train LoRA of this rank outside the fusion layers, as a part of the adapter. Default: none.",
    )


def add_training_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num_train_epochs", type=int, default=3, help="Number of training epochs.")
    group.add_argument(
        "--max_train_steps", type=int, help="Total number of optimizer steps. Overrides --num_train_epochs."
    )
    group.add_argument(
        "--per_device_train_batch_size", type=int, default=12, help="Batch size per device for training."
    )
    group.add_argument(
        "--per_device_eval_batch_size", type=int, default=16, help="Batch size per device for evaluation."
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        help="Number of batches to accumulate per optimizer step.",
    )
    group.add_argument(
        "--learning_rate",
        type=float,
        default=0.3,
        help="Initial learning rate, after warmup. Prompts need rates about a hundred times higher than weights.",
    )
    group.add_argument(
        "--lora_learning_rate",
        type=float,
        default=LORA_LEARNING_RATE,
        help="Initial learning rate of LoRA, after warmup. --learning_rate is that of the prompts.",
    )
    group.add_argument("--weight_decay", type=float, default=0.0, help="Weight decay of AdamW.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Maximum gradient norm, for clipping.")
    group.add_argument(
        "--lr_scheduler_type", default="cosine", choices=SCHEDULERS, help="Learning rate scheduler of transformers."
    )
    group.add_argument(
        "--num_warmup_steps", type=int, default=10, help="Number of steps in which the learning rate rises."
    )
    group.add_argument(
        "--ema_decay",
        type=float,
        help="Evaluate and save the exponential moving average of the prompts, with this decay per step.",
    )
    group.add_argument(
        "--max_detections",
        type=int,
        default=MAX_DETECTIONS,
        help="Number of best detections per image that count in evaluation.",
    )
    group.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="Mixed precision. Default: the setting of `accelerate config`.",
    )
    group.add_argument(
        "--cache_features",
        metavar="FOLDER",
        help="Store the features of the frozen backbones for each image and prompt in this folder, and compute them "
        "only once. Needs --no_augmentation.",
    )
    group.add_argument("--seed", type=int, default=0, help="Seed for reproducible training.")


def add_adversarial_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adversarial",
        choices=("none", *STEPS),
        default="none",
        help="Train on attacked images. bank: attack each image once, before training, without the adapter (AdvPT). "
        "fast: one gradient step in each training step. pgd: several. free: train on each batch several times, and "
        "attack it by the gradients of training. See docs/robustness.md.",
    )
    group.add_argument(
        "--adv_eps", type=float, help=f"Largest change of a pixel value, which is from 0 to 255. Default: {ADV_EPS:g}."
    )
    steps = ", ".join(f"{number} for {name}" for name, number in STEPS.items() if name != "fast")
    group.add_argument(
        "--adv_steps",
        type=int,
        help="Number of gradient steps of an attack; for free, the number of times to train on each batch. Default: "
        f"{steps}. fast has one.",
    )
    group.add_argument(
        "--adv_weight",
        type=float,
        help="Weight of the attacked images in the loss. If it is below 1, clean images get the rest. Default: "
        f"{ADV_WEIGHT:g}.",
    )
    group.add_argument(
        "--adv_loss",
        choices=tuple(LOSSES),
        help="What the attack raises: " + "; ".join(f"{name} {what}" for name, what in LOSSES.items()) + ". Default: "
        "features for bank, else all.",
    )


def add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output_dir", type=output_folder, default=Path("sdpt-detection"), help="Folder for all results."
    )
    group.add_argument(
        "--validation_steps", type=int, help="Number of optimizer steps between validations. Default: one epoch."
    )
    group.add_argument(
        "--checkpointing_steps",
        help="Number of optimizer steps between checkpoints, or `epoch`. Checkpoints are folders step_N. Default: save "
        "no checkpoints.",
    )
    group.add_argument(
        "--checkpoints_total_limit", type=int, help="Maximum number of checkpoints. The oldest are removed."
    )
    group.add_argument(
        "--resume_from_checkpoint",
        help="Resume from a folder step_N, or from `latest`: the newest checkpoint in --output_dir, if there is one.",
    )
    group.add_argument(
        "--with_tracking", action="store_true", help="Log the loss, the learning rate, AP and the norms of the prompts."
    )
    group.add_argument(
        "--report_to", default="tensorboard", help="Tracker to log to: one that Accelerate knows, or `all`."
    )
    group.add_argument(
        "--push_to_hub", action="store_true", help="Upload the last and the best adapter to the Hub after training."
    )
    group.add_argument("--hub_model_id", help="Repository to push to, user/name. It is created if it does not exist.")
    group.add_argument(
        "--license",
        help="Licence of the adapter for its model card, such as apache-2.0. Default: that of the base model, if its "
        "model card names one.",
    )
    group.add_argument(
        "--hub_token", help="Token with write access to the repository. Default: the token of `hf auth login`."
    )
    group.add_argument(
        "--eval_only",
        action="store_true",
        help="Only measure AP of the base model, and of --adapter on it, without training.",
    )


def flags_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the flag for each argument of the library, for error messages."""
    return {name: name for name in vars(args)} | RENAMED


def describe_run(args: argparse.Namespace) -> dict[str, str]:
    """Return the flags that determine the result of a run. Only a run with the same values can resume it."""
    # Runs of the time before there were attacks have no such flags.
    left_out = (*FREE_FLAGS, *(("adversarial", *ATTACK_FLAGS) if args.adversarial == "none" else ()))
    return {f"--{name}": str(value) for name, value in vars(args).items() if name not in left_out}


def describe_attack(args: Mapping[str, Any]) -> str:
    """Return the flags of adversarial training as a text, for people. It is empty without adversarial training."""
    if args.get("adversarial", "none") == "none":
        return ""
    values = {name: args[name] for name in ("adversarial", *ATTACK_FLAGS)}
    return " ".join(
        f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}" for name, value in values.items()
    )


def check_args(args: argparse.Namespace) -> None:
    """Check the flags, and convert `--checkpointing_steps` to a number.

    Raises:
        InputError: The value of a flag is not allowed, or flags contradict each other.
    """
    if args.checkpointing_steps not in (None, "epoch"):
        try:
            args.checkpointing_steps = int(args.checkpointing_steps)
        except ValueError:
            raise InputError(
                f"--checkpointing_steps {args.checkpointing_steps}: must be a number of steps or `epoch`."
            ) from None
    check_values(args)
    check_combinations(args)
    check_attack(args)
    trackers = [*map(str, get_available_trackers()), "all"]
    if args.with_tracking and args.report_to not in trackers:
        raise InputError(
            f"--report_to {args.report_to}: is not installed (`pip install {args.report_to}`) or unknown to "
            f"Accelerate; must be one of {', '.join(trackers)}."
        )


def check_values(args: argparse.Namespace) -> None:
    for name in ("num_train_epochs", "max_train_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
                 "gradient_accumulation_steps", "num_virtual_tokens", "lora_rank", "image_size", "shots",
                 "validation_steps", "checkpointing_steps", "checkpoints_total_limit", "max_detections",
                 "adv_steps"):  # fmt: skip
        value = getattr(args, name)
        if value not in (None, "epoch") and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1.")
    for name in ("learning_rate", "lora_learning_rate", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must be positive and finite.")
    for name, limit in (("weight_decay", math.inf), ("num_warmup_steps", math.inf), ("seed", 2**32),
                        ("dataloader_num_workers", math.inf), ("prompt_dropout", 1)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not 0 <= value < limit:
            raise InputError(f"--{name} {value}: must be at least 0 and below {limit}.")
    if args.adv_eps is not None and not 0 <= args.adv_eps <= 255:
        raise InputError(f"--adv_eps {args.adv_eps}: must be at least 0 and at most 255.")
    if args.adv_weight is not None and not 0 < args.adv_weight <= 1:
        raise InputError(f"--adv_weight {args.adv_weight}: must be above 0 and at most 1.")
    for name in ("pinv_rtol", "ema_decay"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1:
            raise InputError(f"--{name} {value}: must be above 0 and below 1.")
    for name in ("dataset_name", "adapter", "model_name_or_path", "resume_from_checkpoint", "hub_model_id",
                 "cache_features", "license"):  # fmt: skip
        if getattr(args, name) == "":
            raise InputError(f"--{name}: is empty.")
    if args.hub_model_id and args.hub_model_id.count("/") != 1:
        raise InputError(f"--hub_model_id {args.hub_model_id}: must be user/name.")
    if args.license and not re.fullmatch(r"[a-z0-9.+-]+", args.license):
        raise InputError(f"--license {args.license}: must be an identifier of the Hub, such as apache-2.0.")


def check_attack(args: argparse.Namespace) -> None:
    """Check the flags of adversarial training, and set those that are not given to their defaults."""
    method = args.adversarial
    if method == "none" or args.eval_only:
        for name in ("adversarial", *ATTACK_FLAGS):
            if getattr(args, name) not in (None, "none"):
                needs = "cannot be used with --eval_only" if args.eval_only else "needs --adversarial"
                raise InputError(f"--{name} {getattr(args, name)}: {needs}.")
        return
    if method == "bank" and not args.no_augmentation:
        raise InputError(
            "--adversarial bank: attacks each image once, so augmented images would not be attacked; add "
            "--no_augmentation."
        )
    if method != "bank" and args.cache_features:
        raise InputError(
            f"--cache_features: cannot be used with --adversarial {method}, which changes the images in each step."
        )
    if method == "fast" and args.adv_steps not in (None, 1):
        raise InputError(f"--adv_steps {args.adv_steps}: --adversarial fast has one step; use pgd for more.")
    if method == "free" and args.adv_loss not in (None, "all"):
        raise InputError(f"--adv_loss {args.adv_loss}: --adversarial free attacks by the gradients of training, all.")
    defaults = (ADV_EPS, STEPS[method], ADV_WEIGHT, "features" if method == "bank" else "all")
    for name, default in zip(ATTACK_FLAGS, defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
    steps = args.checkpointing_steps
    if method == "free" and isinstance(steps, int) and steps % args.adv_steps:
        raise InputError(
            f"--checkpointing_steps {steps}: must be a multiple of --adv_steps {args.adv_steps}, because --adversarial "
            "free trains on each batch that many times, and a run resumes with a new batch."
        )


def check_combinations(args: argparse.Namespace) -> None:
    for name in ADAPTER_FLAGS:
        if args.adapter and getattr(args, name) is not None:
            raise InputError(f"--{name}: cannot be changed, because --adapter {args.adapter} has its own value.")
    if args.lora_learning_rate != LORA_LEARNING_RATE and not args.lora_rank and not args.adapter:
        raise InputError(f"--lora_learning_rate {args.lora_learning_rate}: needs --lora_rank.")
    if args.eval_only and args.resume_from_checkpoint:
        raise InputError(
            "--resume_from_checkpoint: cannot be used with --eval_only; to evaluate a checkpoint, pass it as --adapter."
        )
    if args.cache_features and args.eval_only:
        raise InputError("--cache_features: cannot be used with --eval_only, which reads each image only once.")
    if args.cache_features and not args.no_augmentation:
        raise InputError(
            "--cache_features: augmentation changes the images in each epoch, so stored features would never be used "
            "again; add --no_augmentation, or remove this flag."
        )
    if args.push_to_hub and not args.hub_model_id:
        raise InputError("--push_to_hub: needs --hub_model_id user/name.")
    if args.push_to_hub and args.eval_only:
        raise InputError("--push_to_hub: cannot be used with --eval_only, which trains no adapter.")
    if args.hub_model_id and not args.push_to_hub:
        raise InputError(f"--hub_model_id {args.hub_model_id}: nothing is uploaded without --push_to_hub.")
