# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Export a detector for fixed classes as one file: ONNX, which runs without PyTorch, or a program of PyTorch.

    sdpt-export --adapter my-adapter --output detector.onnx
    sdpt-export --class_names "red apple" pear --output detector.pt2

The file has the base model, the adapter, and the text of the classes. Its metadata tell how images are prepared. The
command runs the file and prints by how much it differs from the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..deployment import ExportedDetector, export_onnx, export_program
from ..deployment.exporting import check_export
from ..deployment.onnx import check_packages
from ..detection import common_base_model, find_adapter, load_base_config, load_detector, load_processor, read_threshold
from ..detection.prediction import DEFAULT_THRESHOLD
from ..downloads import limit_waiting
from ..errors import InputError, hint, one_line_errors
from ..wording import counted, enumerated, shown_path
from . import print_any_name
from .detect import choose_class_names
from .train_arguments import BASE_MODEL

EXPORTS = {".onnx": export_onnx, ".pt2": export_program}
# Arguments of the library whose flag has another name.
RENAMED = {"adapters": "adapter", "source": "adapter", "path": "output"}


def parse_args(description: str | None, model_name_or_path: str) -> argparse.Namespace:
    """Parse the flags in `sys.argv`. The arguments are those of `main`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter", help="Folder or Hub id of a saved adapter. Without it, the base model is exported."
    )
    parser.add_argument(
        "--model_name_or_path",
        help="Folder or Hub id of the base model. Default: the one that the adapter was trained on, or "
        f"{model_name_or_path} without an adapter.",
    )
    parser.add_argument(
        "--class_names",
        nargs="+",
        metavar="NAME",
        help='Classes to detect, such as "red blood cell" platelet, or a caption such as "cat . dog .". Default: the '
        "classes that the adapter was trained on.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("detector.onnx"),
        help="The file to write, .onnx or .pt2. Default: detector.onnx.",
    )
    parser.add_argument(
        "--fixed_size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="Size of all images in pixels, for engines that need a fixed size. Default: any size.",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="Lowest score of a detection, for the metadata. Default: the threshold that the adapter suggests, or "
        f"{DEFAULT_THRESHOLD} if it suggests none.",
    )
    return parser.parse_args()


def run(args: argparse.Namespace, model_name_or_path: str) -> None:
    limit_waiting()
    export = EXPORTS.get(args.output.suffix)
    if export is None:
        raise InputError(f"path={shown_path(args.output)}: must end with {' or '.join(EXPORTS)}.")
    if export is export_onnx:
        check_packages()
    adapter = find_adapter(args.adapter) if args.adapter else None
    with hint("Choose one by --model_name_or_path."):
        base_model = args.model_name_or_path or (common_base_model([adapter]) if adapter else model_name_or_path)
    class_names = choose_class_names(args.class_names, adapter)
    processor = load_processor(adapter, base_model)
    threshold = args.threshold
    if threshold is None:
        threshold = read_threshold(adapter, DEFAULT_THRESHOLD) if adapter else DEFAULT_THRESHOLD
    options = {"fixed_size": args.fixed_size and tuple(args.fixed_size), "threshold": threshold}
    # All input is checked before the weights are loaded.
    check_export(load_base_config(base_model), processor, class_names, args.output, **options)
    model = load_detector(base_model, [adapter] if adapter else [])
    print(f"exporting {counted(len(class_names), 'class', 'classes')}: {enumerated(class_names)}. This takes minutes.")
    exported = export(model, processor, class_names, args.output, **options)
    print(describe(exported))


def describe(exported: ExportedDetector) -> str:
    """Say in a few lines what was written."""
    opset = f", opset {exported.opset}" if exported.opset else ""
    lines = [f"{shown_path(exported.path)}: {exported.num_bytes / 1e6:.1f} MB{opset}"]
    for kind, values in (("inputs", exported.inputs), ("outputs", exported.outputs)):
        lines.append(f"{kind}: " + ", ".join(f"{name} ({', '.join(map(str, dims))})" for name, dims in values.items()))
    lines.append(f"largest difference to PyTorch, in 95% of the queries: {exported.difference:.1e}")
    return "\n".join(lines)


def main(description: str | None = __doc__, program: str = "sdpt-export", model_name_or_path: str = BASE_MODEL) -> None:
    """Run the command with the flags in `sys.argv`.

    Args:
        description: Text for `--help`.
        program: Name of the program, for error messages.
        model_name_or_path: The base model that is exported if neither `--model_name_or_path` nor `--adapter` is given.
    """
    args = parse_args(description, model_name_or_path)
    print_any_name()
    with one_line_errors(program, {name: name for name in vars(args)} | RENAMED):
        run(args, model_name_or_path)


if __name__ == "__main__":
    main()
