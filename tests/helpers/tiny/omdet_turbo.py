# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""OmDet-Turbo of transformers, with transformers' own Swin."""

import torch
import torch.nn.functional as F
from transformers import CLIPTextConfig, OmDetTurboConfig, OmDetTurboForObjectDetection, SwinConfig

from . import Case, on_meta, randomise

WIDTH, TASK_LENGTH = 32, 5


def make():
    torch.manual_seed(0)
    config = OmDetTurboConfig(
        backbone_config=SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            patch_size=4,
            drop_path_rate=0.0,
            out_indices=[2, 3, 4],
        ),
        text_config=CLIPTextConfig(
            vocab_size=60,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=24,
            max_position_embeddings=16,
            eos_token_id=59,
        ),
        image_size=64,
        text_projection_in_dim=24,
        text_projection_out_dim=24,
        task_encoder_hidden_dim=48,
        class_embed_dim=24,
        num_queries=6,
        encoder_hidden_dim=WIDTH,
        encoder_in_channels=(16, 32, 64),
        vision_features_channels=(WIDTH, WIDTH, WIDTH),
        encoder_attention_heads=4,
        encoder_dim_feedforward=48,
        decoder_hidden_dim=WIDTH,
        decoder_num_heads=4,
        decoder_num_layers=2,
        decoder_dim_feedforward=48,
        decoder_num_points=2,
        # Swin has norms of its own at the end of each stage.
        apply_layernorm_after_vision_backbone=False,
    )
    return randomise(OmDetTurboForObjectDetection(config))


def inputs(padding):
    generator = torch.Generator().manual_seed(0)
    tasks = torch.randint(1, 50, (2, TASK_LENGTH), generator=generator)
    classes = torch.randint(1, 50, (4, 3), generator=generator)
    tasks[0, 4] = tasks[1, 2] = classes[:, 2] = 59
    return {
        "pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "tasks_input_ids": F.pad(tasks, (0, padding)),
        "tasks_attention_mask": F.pad(torch.tensor([[1] * 5, [1] * 3 + [0] * 2]), (0, padding)),
        "classes_input_ids": classes,
        "classes_attention_mask": torch.ones_like(classes),
        "classes_structure": torch.tensor([2, 2]),
    }


def outputs(model, inputs):
    result = model(**inputs)
    parts = (result.decoder_coord_logits, result.decoder_class_logits)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def full_size():
    """`omlab/omdet-turbo-swin-tiny-hf`, whose numbers are the defaults but for the library of the backbone."""
    swin = SwinConfig(image_size=640, out_indices=[2, 3, 4])
    config = OmDetTurboConfig(backbone_config=swin, apply_layernorm_after_vision_backbone=False)
    return on_meta(OmDetTurboForObjectDetection, config)


CASE = Case(
    name="omdet_turbo",
    make=make,
    inputs=inputs,
    outputs=outputs,
    layers={f"decoder.layers.{index}.self_attn": WIDTH for index in range(2)},
    full_size=full_size,
    full_size_layers=6,
)
