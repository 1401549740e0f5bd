# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The flags of `train_detection.py`, and the rules for their values."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from accelerate.tracking import get_available_trackers

from peft_sdpt.errors import InputError
from pictograms.tasks import TASKS

HERE = Path(__file__).resolve().parent
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
# Arguments of the library, with the flags that set them.
LIBRARY_ARGUMENTS = {
    **{
        name: name
        for name in ("dataset_name", "bbox_format", "class_names_column", "skip_bad_images", "skip_bad_boxes")
    },
    **{name: name for name in ("adapter", "model_name_or_path", "mixed_precision", "output_dir")},
    "resume_from_checkpoint": "resume_from_checkpoint",
    "cache_folder": "cache_features",
    "checkpoint": "resume_from_checkpoint",
    "repo_id": "hub_model_id",
    "token": "hub_token",
}
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


def parse_args(description: str) -> argparse.Namespace:
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Shows the defaults, and the text above as it stands."""

    parser = argparse.ArgumentParser(description=description, formatter_class=Help, allow_abbrev=False)
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
