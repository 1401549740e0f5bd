# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Training and evaluating grounded detectors: data, prompts, loss, detection and average precision.

These parts work with any training loop. Install them with `pip install peft_sdpt[detection]`.
"""

from importlib.util import find_spec

from ..errors import InputError, MissingExtraError

try:
    import faster_coco_eval  # noqa: F401
    import PIL  # noqa: F401
    import scipy  # noqa: F401

    # Only looked for, because it is slow to import and first needed after training.
    if find_spec("matplotlib") is None:
        raise ImportError(name="matplotlib")
except ImportError as error:
    raise MissingExtraError(
        f"peft_sdpt.detection needs the package {error.name}: pip install peft_sdpt[detection]", name=error.name
    ) from None

from .adversarial import make_views
from .analysis import (
    analyse_precision,
    choose_images,
    describe_images,
    find_errors,
    measure_threshold,
    suggest_thresholds,
)
from .attacks import Attack, perturb
from .base_models import load_base_config
from .charts import draw_report
from .corruptions import corrupt, mean_precision_under_corruption
from .data import DetectionSplit, centre_boxes, check_images, divide, few_shot, match_classes
from .decoding import read_image
from .drawing import draw_detections, draw_objects, side_by_side
from .feature_cache import FeatureCache
from .grounding import (
    class_prompt,
    class_scores,
    class_token_maps,
    phrase_lengths,
    split_caption,
    split_classes,
)
from .loading import BOX_FORMATS, find_splits, has_split, load_split, load_splits, only_split
from .loss import GroundedDetectionLoss, mean_boxes_per_process
from .metrics import average_precision, evaluate
from .pixels import pad_small_images
from .prediction import Detections, check_image_size, detect, detect_split, result_of, rows_of
from .purification import Purifier, parse_purifier
from .robustness import attack_split, corrupt_split, detect_changed, lowest_rows
from .samples import Sample, TrainingSamples, augment
from .saved_adapter import (
    SavedAdapter,
    common_base_model,
    find_adapter,
    load_base_model,
    load_detector,
    load_processor,
    load_trainable,
    read_class_names,
    read_threshold,
    save_adapter,
    set_image_size,
    write_adapter,
    write_threshold,
)

__all__ = [
    "BOX_FORMATS",
    "Attack",
    "DetectionSplit",
    "Detections",
    "FeatureCache",
    "GroundedDetectionLoss",
    "InputError",
    "Purifier",
    "Sample",
    "SavedAdapter",
    "TrainingSamples",
    "analyse_precision",
    "attack_split",
    "augment",
    "average_precision",
    "centre_boxes",
    "check_image_size",
    "check_images",
    "choose_images",
    "class_prompt",
    "class_scores",
    "class_token_maps",
    "common_base_model",
    "corrupt",
    "corrupt_split",
    "describe_images",
    "detect",
    "detect_changed",
    "detect_split",
    "divide",
    "draw_detections",
    "draw_objects",
    "draw_report",
    "evaluate",
    "few_shot",
    "find_adapter",
    "find_errors",
    "find_splits",
    "has_split",
    "load_base_config",
    "load_base_model",
    "load_detector",
    "load_processor",
    "load_split",
    "load_splits",
    "load_trainable",
    "lowest_rows",
    "make_views",
    "match_classes",
    "mean_boxes_per_process",
    "mean_precision_under_corruption",
    "measure_threshold",
    "only_split",
    "pad_small_images",
    "parse_purifier",
    "perturb",
    "phrase_lengths",
    "read_class_names",
    "read_image",
    "read_threshold",
    "result_of",
    "rows_of",
    "save_adapter",
    "set_image_size",
    "side_by_side",
    "split_caption",
    "split_classes",
    "suggest_thresholds",
    "write_adapter",
    "write_threshold",
]
