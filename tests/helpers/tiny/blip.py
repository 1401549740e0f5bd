# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""BLIP with its head of image-text matching, and the Q-Formers of its successors."""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipTextConfig,
    BlipVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    InstructBlipVideoQFormerConfig,
    InstructBlipVideoQFormerModel,
    LlamaConfig,
)

from . import Case, on_meta, randomise

WIDTH, IMAGE_WIDTH, LENGTH = 32, 40, 5
VISION = {
    "hidden_size": IMAGE_WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 60,
    "hidden_size": WIDTH,
    "encoder_hidden_size": IMAGE_WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
# Q-Formers attend to the image in every other layer: of three here in the first and the last.
QFORMER = {**TEXT, "cross_attention_frequency": 2, "num_hidden_layers": 3}


def text_inputs(padding):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (2, LENGTH), generator=generator)
    return {
        "input_ids": F.pad(ids, (0, padding)),
        "attention_mask": F.pad(torch.tensor([[1] * LENGTH, [1] * 3 + [0] * 2]), (0, padding)),
    }


def with_pixels(padding):
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, **text_inputs(padding)}


def make_blip():
    torch.manual_seed(0)
    config = BlipConfig(text_config=BlipTextConfig(**TEXT), vision_config=BlipVisionConfig(**VISION), projection_dim=16)
    return randomise(BlipForImageTextRetrieval(config))


def blip_outputs(model, inputs):
    result = model(**inputs)
    return torch.cat([result.itm_score, result.question_embeds[:, :3].flatten(1)], dim=1)


def make_blip_2():
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION),
        qformer_config=Blip2QFormerConfig(**QFORMER, use_qformer_text_input=True),
        num_query_tokens=4,
        image_text_hidden_size=16,
    )
    return randomise(Blip2ForImageTextRetrieval(config))


def blip_2_outputs(model, inputs):
    return model(**inputs, use_image_text_matching_head=True).logits_per_image


def qformer_inputs(padding):
    generator = torch.Generator().manual_seed(2)
    inputs = text_inputs(padding)
    # Queries come before the text, and so do their places in the mask.
    return {
        **inputs,
        "attention_mask": F.pad(inputs["attention_mask"], (4, 0), value=1),
        "query_embeds": torch.randn(2, 4, WIDTH, generator=generator),
        "encoder_hidden_states": torch.randn(2, 6, IMAGE_WIDTH, generator=generator),
        # The second picture has fewer patches.
        "encoder_attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
    }


def make_qformer(config_class, model_class):
    torch.manual_seed(0)
    return randomise(model_class(config_class(**QFORMER)))


def qformer_outputs(model, inputs):
    return model(**inputs).last_hidden_state[:, :4].flatten(1)


CASES = [
    Case(
        name="blip",
        make=make_blip,
        inputs=with_pixels,
        outputs=blip_outputs,
        layers={f"text_encoder.encoder.layer.{index}": WIDTH for index in range(2)},
        # Salesforce/blip-itm-base-coco; the numbers are the defaults.
        full_size=lambda: on_meta(BlipForImageTextRetrieval, BlipConfig()),
        full_size_layers=12,
        mixed_batches=False,
    ),
    Case(
        name="blip_2",
        make=make_blip_2,
        inputs=with_pixels,
        outputs=blip_2_outputs,
        layers={f"qformer.encoder.layer.{index}": WIDTH for index in (0, 2)},
        # Salesforce/blip2-itm-vit-g.
        full_size=lambda: on_meta(
            Blip2ForImageTextRetrieval,
            Blip2Config(qformer_config=Blip2QFormerConfig(vocab_size=30523, use_qformer_text_input=True)),
        ),
        full_size_layers=6,
    ),
    *(
        Case(
            name=name,
            make=partial(make_qformer, config_class, model_class),
            inputs=qformer_inputs,
            outputs=qformer_outputs,
            layers={f"encoder.layer.{index}": WIDTH for index in (0, 2)},
            # Salesforce/instructblip-vicuna-7b.
            full_size=partial(on_meta, whole_class, whole_config(text_config=LlamaConfig(vocab_size=32001))),
            full_size_layers=6,
        )
        for name, config_class, model_class, whole_config, whole_class in (
            (
                "instructblip",
                InstructBlipQFormerConfig,
                InstructBlipQFormerModel,
                InstructBlipConfig,
                InstructBlipForConditionalGeneration,
            ),
            (
                "instructblipvideo",
                InstructBlipVideoQFormerConfig,
                InstructBlipVideoQFormerModel,
                InstructBlipVideoConfig,
                InstructBlipVideoForConditionalGeneration,
            ),
        )
    ),
]
