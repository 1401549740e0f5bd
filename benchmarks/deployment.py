# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measure the ways to run a tuned detector, as ratios to the tuned model in eager PyTorch, in one run.

    python -m benchmarks.deployment --model small-host --adapter FOLDER --dataset_name FOLDER
    python -m benchmarks.deployment --model grounding-dino-tiny

The first command measures the small base model of examples/. With an adapter and the test images of a data set, it also
measures AP. The second one measures a base model of full size with random weights. All ways detect the same classes in
the same image, in rounds, each way once per round. Then a batch of images with an adapter each is measured. Results are
saved in results.json. The command needs the extra `benchmarks`, and torchao for int8.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoProcessor

from peft_sdpt import SDPTConfig
from peft_sdpt.deployment import ExportedDetector, bake, export_onnx, export_program
from peft_sdpt.deployment.baking import BakedFusionLayer
from peft_sdpt.detection import average_precision, class_prompt, detect_split, load_base_model, load_split

from . import EXAMPLES
from .peers import LORA_TARGETS, with_peft
from .results import (
    DOCS,
    RESULTS,
    Help,
    add_device,
    add_render,
    check_device,
    check_render,
    device_name,
    put_into,
    table,
    versions,
    write,
)
from .speed.full_hosts import MODELS
from .speed.measuring import in_turns, quartiles

SMALL = "small-host"
CLASSES = ["red blood cell", "platelet", "white blood cell", "parasite", "crystal", "yeast"]
TUNED = "tuned"
LABELS = {
    "base": "base model",
    TUNED: "tuned, in Python",
    "baked": "baked",
    "compiled": "baked and compiled",
    "program": "exported program",
    "int8": "baked, int8 weights",
    "int8-dynamic": "baked, int8 weights and activations",
    "onnx": "ONNX, onnxruntime",
}
USERS = {
    "switching": "SDPT, one call per user, `set_adapter` between",
    "mixed": "**SDPT, one batch, `adapter_names`**",
    "merged": "LoRA merged, one model per user",
    "lora": "LoRA, one call per user, `set_adapter` between",
    "lora-mixed": "LoRA, one batch, `adapter_names`",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deployment", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("--model", choices=(SMALL, *MODELS), default=SMALL, help="Base model.")
    parser.add_argument("--adapter", help="Folder of a saved adapter of this base model. None for a random one.")
    parser.add_argument("--dataset_name", help="Data set in whose test images AP is measured.")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="Size of the image.")
    parser.add_argument("--users", type=int, default=4, help="Number of adapters in a batch.")
    parser.add_argument("--repeats", type=int, default=7, help="Minimum number of rounds. Quick models take more.")
    parser.add_argument("--only", nargs="+", choices=tuple(LABELS), default=list(LABELS), help="Ways to measure.")
    parser.add_argument("--output_dir", type=Path, default=Path("deployment-results"), help="Folder for the results.")
    add_device(parser)
    add_render(parser, "tables of these results.json into docs/deployment.md")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Check the flags.

    Raises:
        ValueError: The value of a flag is not allowed.
    """
    check_device(args.device)
    for name, least in (("repeats", 3), ("users", 2)):
        if (value := getattr(args, name)) < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    if TUNED not in args.only:
        raise ValueError(f"--only {' '.join(args.only)}: must have {TUNED}, which ratios refer to")
    if args.dataset_name and not args.adapter:
        raise ValueError(f"--dataset_name {args.dataset_name}: AP needs --adapter, because a random one finds nothing")
    check_render(args.render)


def load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return the base model and a processor. Models of full size have random weights."""
    processor = AutoProcessor.from_pretrained(EXAMPLES / "host")
    if args.model == SMALL:
        return load_base_model(EXAMPLES / "host").to(args.device), processor
    torch.manual_seed(0)
    return MODELS[args.model]().to(args.device).eval(), processor


def tune(host: nn.Module, adapter: str | None = None, seed: int = 1) -> PeftModel:
    """Put an adapter on a base model: a saved one, or a random one that has an effect."""
    if adapter is not None:
        return PeftModel.from_pretrained(host, adapter).eval()
    torch.manual_seed(seed)
    return get_peft_model(host, SDPTConfig(init_weights=False)).eval()


class Ways:
    """The ways to run one tuned detector: how to prepare each, what it takes on the disk, and how to call it."""

    def __init__(self, model: PeftModel, processor: Any, size: tuple[int, int], folder: Path) -> None:
        self.model, self.processor, self.size, self.folder = model, processor, size, folder
        self.text = dict(processor.tokenizer([class_prompt(CLASSES)], return_tensors="pt").to(model.device))

    def prepare(self, name: str) -> tuple[nn.Module | Callable[..., Any], int]:
        """Return the model of a way, which takes `pixel_values`, and its bytes on the disk."""
        if name in ("base", TUNED):
            model = copy.deepcopy(self.model).unload() if name == "base" else self.model
            return self._with_text(model), bytes_of(model)
        if name == "program":
            file = self.folder / "detector.pt2"
            size = self._export(export_program, file)
            program = torch.export.load(file).module()
            mask = torch.ones(1, *self.size, dtype=torch.long, device=self.model.device)
            return lambda pixel_values: program(pixel_values=pixel_values, pixel_mask=mask), size
        if name == "onnx":
            return self._onnx()
        baked = bake(self.model)
        if name.startswith("int8"):
            quantise(baked, dynamic=name.endswith("dynamic"))
        return self._with_text(torch.compile(baked) if name == "compiled" else baked), bytes_of(baked)

    def _with_text(self, model: nn.Module) -> Callable[..., Any]:
        return functools.partial(model, **self.text)

    def _onnx(self) -> tuple[Callable[..., Any], int]:
        import onnxruntime

        file = self.folder / "detector.onnx"
        size = self._export(export_onnx, file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        mask = np.ones((1, *self.size), dtype=np.int64)
        return (
            lambda pixel_values: session.run(None, {"pixel_values": pixel_values.numpy(), "pixel_mask": mask}),
            size,
        )

    def _export(self, export: Callable[..., ExportedDetector], file: Path) -> int:
        """Write a file for images of one size. Returns the bytes of the file."""
        return export(self.model, self.processor, CLASSES, file, fixed_size=self.size, check=False).num_bytes


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of the weights of a model, as they are stored. Memory that tensors share counts once."""
    tensors: list[torch.Tensor] = []
    for tensor in (*model.parameters(), *model.buffers()):
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        tensors += [tensor] if names is None else [getattr(tensor, name) for name in names]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def quantise(baked: nn.Module, dynamic: bool) -> None:
    """Quantise the linear layers of a baked model in place, except those in its fusion layers."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    fusion = {part for layer in baked.modules() if isinstance(layer, BakedFusionLayer) for part in layer.modules()}
    quantize_(
        baked,
        Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and module not in fusion,
    )


@torch.no_grad()
def measure_ways(args: argparse.Namespace, model: PeftModel, processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Measure time, bytes and preparation of each way, for one image."""
    ways = Ways(model, processor, size, args.output_dir)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, *size, generator=generator).to(args.device)
    subjects, results = {}, {}
    for name in args.only:
        say(f"preparing: {LABELS[name]}")
        start = cpu_seconds()
        try:
            forward, size_in_bytes = ways.prepare(name)
        except ImportError as error:
            say(f"left out: {LABELS[name]} ({error})")
            continue
        forward(pixel_values=pixels)  # compiles
        results[name] = {"preparation": cpu_seconds() - start, "bytes": size_in_bytes}
        run = functools.partial(forward, pixel_values=pixels)
        run()
        subjects[name] = lambda run=run: run
    for name, seconds in in_turns(subjects, args.repeats, args.device).items():
        results[name]["seconds"] = seconds
    return results


def cpu_seconds() -> float:
    """Return the time that this process and the compilers that it has called have spent on a CPU."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure_precision(args: argparse.Namespace, model: PeftModel, processor: Any) -> dict[str, float]:
    """Measure AP of the ways that can detect in a data set."""
    data = load_split(args.dataset_name, "test")
    accelerator = Accelerator(cpu=args.device == "cpu")
    models: dict[str, Callable[[], nn.Module]] = {
        "base": lambda: copy.deepcopy(model).unload(),
        TUNED: lambda: model,
        "baked": lambda: bake(model),
        "int8": lambda: quantised(model, False),
        "int8-dynamic": lambda: quantised(model, True),
    }
    precision = {}
    for name, make in models.items():
        if name in args.only:
            say(f"AP: {LABELS[name]}")
            rows = detect_split(make(), processor, data, 8, accelerator)
            precision[name] = average_precision(data, rows)["AP"]
    return precision


def quantised(model: nn.Module, dynamic: bool) -> nn.Module:
    baked = bake(model)
    quantise(baked, dynamic)
    return baked


@torch.no_grad()
def measure_users(args: argparse.Namespace, host: nn.Module, processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Measure time and memory of a batch of images, each of another user with an adapter of their own."""
    users = [f"user{number}" for number in range(args.users)]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(users), 3, *size, generator=generator).to(args.device)
    text = dict(processor.tokenizer([class_prompt(CLASSES)] * len(users), return_tensors="pt").to(args.device))

    sdpt = get_peft_model(copy.deepcopy(host), SDPTConfig(init_weights=False), adapter_name=users[0])
    # In the layers that LoRA is usually put in, with the rank that has about as many parameters as the papers'.
    config = LoraConfig(r=8, target_modules=LORA_TARGETS, init_lora_weights=False)
    lora = with_peft(copy.deepcopy(host), config)
    lora.base_model.delete_adapter("default")
    for user in users:
        if user != users[0]:
            sdpt.add_adapter(user, SDPTConfig(init_weights=False))
        lora.add_adapter(user, config)
    sdpt.eval()
    lora.eval()
    merged = [with_peft(copy.deepcopy(host), config).merge_and_unload().eval() for _ in users]

    def one(model: nn.Module, number: int) -> Any:
        inputs = {name: tensor[number : number + 1] for name, tensor in text.items()}
        return model(pixel_values=pixels[number : number + 1], **inputs)

    def switching(model: PeftModel) -> None:
        for number, user in enumerate(users):
            model.set_adapter(user)
            one(model, number)

    runs: dict[str, tuple[Callable[[], Any], list[nn.Module]]] = {
        "switching": (lambda: switching(sdpt), [sdpt]),
        "mixed": (lambda: sdpt(pixel_values=pixels, **text, adapter_names=users), [sdpt]),
        "merged": (lambda: [one(model, number) for number, model in enumerate(merged)], merged),
        "lora": (lambda: switching(lora), [lora]),
        "lora-mixed": (lambda: lora(pixel_values=pixels, **text, adapter_names=users), [lora]),
    }
    results: dict[str, Any] = {name: {"bytes": sum(map(bytes_of, models))} for name, (_, models) in runs.items()}
    for name, (run, _) in runs.items():
        say(f"{len(users)} users: {name}")
        run()
    subjects = {name: lambda run=run: run for name, (run, _) in runs.items()}
    for name, seconds in in_turns(subjects, args.repeats, args.device).items():
        results[name]["seconds"] = seconds
    results["base"] = {"bytes": bytes_of(host)}
    return results


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    host, processor = load(args)
    size = tuple(args.image_size or ((96, 128) if args.model == SMALL else (480, 640)))
    results: dict[str, Any] = {
        "machine": {"name": device_name(args.device), **versions(), "threads": torch.get_num_threads()},
        "date": time.strftime("%Y-%m-%d"),
        "model": args.model,
        "size": size,
        "users": args.users,
    }
    model = tune(copy.deepcopy(host), args.adapter)
    results["ways"] = measure_ways(args, model, processor, size)
    if args.dataset_name:
        for name, precision in measure_precision(args, model, processor).items():
            results["ways"].setdefault(name, {})["ap"] = precision
    write(args.output_dir / RESULTS, json.dumps(results, indent=1) + "\n")
    results["many"] = measure_users(args, host, processor, size)
    write(args.output_dir / RESULTS, json.dumps(results, indent=1) + "\n")
    print(report(results))


def ratio(results: dict[str, Any], name: str, reference: str) -> str:
    """Return median and quartiles of the ratio of times in the same round."""
    pairs = zip(results[name]["seconds"], results[reference]["seconds"], strict=True)
    low, median, high = quartiles([seconds / reference_seconds for seconds, reference_seconds in pairs])
    return f"**{median:.2f}** ({low:.2f} to {high:.2f})"


def report(results: dict[str, Any]) -> str:
    """Return the tables of a run in Markdown."""
    machine, ways, many = results["machine"], results["ways"], results["many"]
    height, width = results["size"]
    rounds = len(ways[TUNED]["seconds"])
    lines = [
        f"### {results['model']}, {height}x{width} pixels",
        "",
        f"Measured on {results['date']} on {machine['name']} with {machine['threads']} thread"
        f"{'s' if machine['threads'] > 1 else ''}, float32, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, peft {machine['peft']}; {rounds} rounds. Medians, with quartiles in brackets.",
        "",
    ]
    has_ap = any("ap" in way for way in ways.values())
    rows = []
    for name, way in ways.items():
        time_of = "1" if name == TUNED else ratio(ways, name, TUNED)
        row = [LABELS[name], time_of, f"{way['bytes'] / 1e6:.0f} MB", f"{way['preparation']:.1f} s"]
        rows.append(row + ([f"{100 * way['ap']:.1f}" if "ap" in way else ""] if has_ap else []))
    head = ["way", "time of an image", "weights or file", "CPU time of preparation and first call"] + ["AP"] * has_ap
    lines += [table(head, rows)]
    if many:
        base = many["base"]["bytes"]
        users = [
            [
                label,
                "1" if name == "mixed" else ratio(many, name, "mixed"),
                f"{many[name]['bytes'] / base:.2f}",
            ]
            for name, label in USERS.items()
        ]
        head = [f"{results['users']} users with an adapter each", "time of a batch", "weights, base model = 1"]
        lines += [table(head, users)]
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    # A warning of transformers about a call in PEFT, which does not affect the results.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    try:
        check_args(args)
        if args.render:
            texts = [report(json.loads(file.read_text(encoding="utf-8"))) for file in args.render]
            put_into(DOCS / "deployment.md", "\n".join(texts))
        else:
            run(args)
    except ValueError as error:
        print(f"benchmarks.deployment: {error}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
