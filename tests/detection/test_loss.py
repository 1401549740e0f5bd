# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The loss against one written by hand, and where transformers' own differs from it."""

import copy
import itertools
import math
import multiprocessing
import os
import socket
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import generalized_box_iou
from transformers.loss.loss_grounding_dino import (
    GroundingDinoForObjectDetectionLoss,
    GroundingDinoHungarianMatcher,
    GroundingDinoImageLoss,
)

from peft_sdpt import SDPTConfig
from peft_sdpt.detection import class_token_maps
from peft_sdpt.detection import loss as loss_module
from peft_sdpt.detection.loss import GroundedDetectionLoss
from peft_sdpt.errors import InputError
from tests.helpers.detectors import HOST_NAMES, make_host, moved
from tests.helpers.patience import PATIENCE

# Tokens of each class of each image's prompt: equal counts in different layouts, two sizes of prompt.
LAYOUTS = [[1, 3], [2, 2], [3, 1]]


def make_inputs(layouts: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Pictures and prompts; `layouts` has the number of tokens of each class of each prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for layout in layouts:
        row = [101]
        for tokens in layout:
            row += [*torch.randint(200, 1000, (tokens,), generator=generator).tolist(), 1012]
        rows.append([*row, 102])
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return {
        "pixel_values": torch.randn(len(rows), 3, 64, 64, generator=generator),
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "token_type_ids": torch.zeros_like(ids),
    }


def make_labels(classes: list[list[int]], seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for image in classes:
        centre = 0.3 + 0.4 * torch.rand(len(image), 2, generator=generator)
        size = 0.1 + 0.4 * torch.rand(len(image), 2, generator=generator)
        labels.append(
            {"class_labels": torch.tensor(image, dtype=torch.long), "boxes": torch.cat([centre, size], dim=1)}
        )
    return labels


def one(outputs, labels, image: int):
    """Outputs and labels of one image of a batch."""
    single = copy.copy(outputs)
    for name in ("logits", "pred_boxes", "enc_outputs_class", "enc_outputs_coord_logits", "input_ids"):
        single[name] = outputs[name][image : image + 1]
    return single, labels[image : image + 1]


@pytest.fixture(scope="module", params=HOST_NAMES)
def host(request):
    return make_host(request.param)


@pytest.fixture(scope="module")
def case(host):
    with torch.no_grad():
        outputs = host(**make_inputs(LAYOUTS))
    return host.config, outputs, make_labels([[1, 0], [0], [1, 1, 0]])


# ---- by hand


def giou_by_hand(a: list[float], b: list[float]) -> float:
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = ((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b))
    inside = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - inside
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return inside / union - (hull - union) / hull


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def stage_by_hand(config, logits, boxes, labels, layouts, num_boxes: int) -> float:
    """One stage's loss in scalar arithmetic, the matching by trying every one of them."""
    total = 0.0
    for image, layout in enumerate(layouts):
        tokens, position = [], 1
        for count in layout:
            tokens.append(range(position, position + count))
            position += count + 1
        readable = range(position + 1)  # the separators and [SEP] too, but no padding
        queries = boxes[image].tolist()
        scores = logits[image].tolist()
        classes, targets = labels[image]["class_labels"].tolist(), labels[image]["boxes"].tolist()

        def cost(query, box, scores=scores, queries=queries, tokens=tokens, classes=classes, targets=targets):
            focal = 0.0
            for token in tokens[classes[box]]:
                p = sigmoid(scores[query][token])
                positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
                negative = 0.75 * p**2 * -math.log(1 - p + 1e-8)
                focal += (positive - negative) / len(tokens[classes[box]])
            l1 = sum(abs(x - y) for x, y in zip(queries[query], targets[box], strict=True))
            giou = giou_by_hand(queries[query], targets[box])
            return config.class_cost * focal + config.bbox_cost * l1 - config.giou_cost * giou

        table = [[cost(query, box) for box in range(len(classes))] for query in range(len(queries))]
        match = min(
            itertools.permutations(range(len(queries)), len(classes)),
            key=lambda chosen, table=table: sum(table[query][box] for box, query in enumerate(chosen)),
        )
        positive = {(query, token) for box, query in enumerate(match) for token in tokens[classes[box]]}
        for query, token in itertools.product(range(len(queries)), readable):
            p = sigmoid(scores[query][token])
            if (query, token) in positive:
                total += 2.0 * config.focal_alpha * (1 - p) ** 2 * -math.log(p)
            else:
                total += 2.0 * (1 - config.focal_alpha) * p**2 * -math.log(1 - p)
        for box, query in enumerate(match):
            l1 = sum(abs(x - y) for x, y in zip(queries[query], targets[box], strict=True))
            total += config.bbox_loss_coefficient * l1
            total += config.giou_loss_coefficient * (1 - giou_by_hand(queries[query], targets[box]))
    return total / num_boxes


def loss_by_hand(config, outputs, labels, layouts, encoder_coefficient: float = 1.0) -> float:
    num_boxes = max(1, sum(len(label["class_labels"]) for label in labels))
    total = stage_by_hand(config, outputs.logits, outputs.pred_boxes, labels, layouts, num_boxes)
    logits, boxes = [], []
    for image in range(len(layouts)):
        best = outputs.enc_outputs_class[image].amax(-1).argsort(descending=True)[: config.num_queries]
        logits.append(outputs.enc_outputs_class[image][best])
        boxes.append(outputs.enc_outputs_coord_logits[image][best].sigmoid())
    return total + encoder_coefficient * stage_by_hand(config, logits, boxes, labels, layouts, num_boxes)


@pytest.mark.parametrize("encoder_coefficient", [1.0, 0.5, 0.0])
def test_equals_the_loss_by_hand(case, encoder_coefficient, device):
    config, outputs, labels = case
    loss = GroundedDetectionLoss(config, encoder_coefficient=encoder_coefficient)
    result = loss(moved(outputs, device), moved(labels, device))
    expected = loss_by_hand(config, outputs, labels, LAYOUTS, encoder_coefficient)
    assert result.shape == () and result.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("change", ["class_cost", "bbox_cost", "giou_cost", "focal_alpha", "bbox_loss_coefficient"])
def test_reads_the_config(case, change):
    config, outputs, labels = case
    other = copy.deepcopy(config)
    setattr(other, change, 0.6 if change == "focal_alpha" else 40.0)
    result = GroundedDetectionLoss(other)(outputs, labels).item()
    assert result == pytest.approx(loss_by_hand(other, outputs, labels, LAYOUTS), rel=1e-4)


def test_class_coefficient(case):
    config, outputs, labels = case
    one_, three, five = (GroundedDetectionLoss(config, class_coefficient=c)(outputs, labels) for c in (1.0, 3.0, 5.0))
    torch.testing.assert_close(three - one_, five - three)
    assert three > one_ + 1e-3


# ---- labels of different prompts


def one_hots(config, outputs, labels):
    """Our one-hot labels, transformers' own as a call yet to be made, and those by hand."""
    stage = {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
    stage["label_maps"] = class_token_maps(outputs.input_ids, outputs.logits.shape[-1])
    matcher = GroundingDinoHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    matches = matcher(stage, labels)
    expected = torch.zeros_like(outputs.logits)
    for image, (queries, boxes) in enumerate(matches):
        for query, box in zip(queries.tolist(), boxes.tolist(), strict=True):
            wanted = labels[image]["class_labels"][box].item()
            phrase = 0
            for token, index in enumerate(outputs.input_ids[image].tolist()):
                if index in (101, 1012, 102, 0):
                    phrase += index == 1012
                elif phrase == wanted:
                    expected[image, query, token] = 1
    with mock.patch.object(loss_module, "sigmoid_focal_loss", wraps=loss_module.sigmoid_focal_loss) as focal_loss:
        GroundedDetectionLoss(config, encoder_coefficient=0)(outputs, labels)
    (_, ours, _), _ = focal_loss.call_args
    theirs = GroundingDinoImageLoss(matcher, config.focal_alpha, ["labels"])
    return (
        ours.view_as(outputs.logits),
        lambda: theirs._get_target_classes_one_hot(stage, labels, matches),
        expected,
    )


def test_labels_of_equal_counts_in_different_layouts(case):
    ours, theirs, expected = one_hots(*case)
    assert torch.equal(ours, expected)
    theirs = theirs()
    # One image has nothing before it and the second one's offset is right by chance; the third one is wrong.
    assert torch.equal(theirs[:2].float(), expected[:2])
    assert not torch.equal(theirs[2].float(), expected[2])


def test_labels_of_different_counts(host):
    with torch.no_grad():
        outputs = host(**make_inputs([[2], [1, 1, 2, 1]]))
    ours, theirs, expected = one_hots(host.config, outputs, make_labels([[0], [3, 1]]))
    assert torch.equal(ours, expected)
    with pytest.raises(IndexError):
        theirs()


def decoder_loss_of_transformers(config, outputs, labels):
    config = copy.deepcopy(config)
    config.two_stage = False
    logits, ids = outputs.logits, outputs.input_ids
    maps = tuple(m.long() for m in class_token_maps(ids, logits.shape[-1]))
    mask = nn.functional.pad(ids != 0, (0, logits.shape[-1] - ids.shape[1]))[:, None].expand_as(logits)
    return GroundingDinoForObjectDetectionLoss(logits, labels, logits.device, outputs.pred_boxes, config, maps, mask)[0]


def test_decoder_term_is_that_of_transformers_image_by_image_but_not_in_a_batch(case, monkeypatch):
    config, outputs, labels = case
    # transformers would divide by the number of processes, which a test before this one may have set up.
    monkeypatch.setattr(PartialState, "_shared_state", {})
    loss = GroundedDetectionLoss(config, encoder_coefficient=0)
    total = 0.0
    for image in range(3):
        single = one(outputs, labels, image)
        predicted = [single[0][name].requires_grad_() for name in ("logits", "pred_boxes")]
        mine, theirs = loss(*single), decoder_loss_of_transformers(config, *single)
        torch.testing.assert_close(mine, theirs)
        gradients = [torch.autograd.grad(each, predicted) for each in (mine, theirs)]
        torch.testing.assert_close(*gradients)
        total += loss(*single) * len(labels[image]["boxes"])
    batch = loss(outputs, labels)
    torch.testing.assert_close(batch, total / 6)
    assert (batch - decoder_loss_of_transformers(config, outputs, labels)).abs() > 1e-3


def test_matches_those_that_transformers_matches(host):
    """Many objects, images without any, and more objects than queries."""
    for seed, classes in enumerate([[[0, 1] * 4, [], [1, 0, 1]], [[], [], []], [[1], [0] * 5, [1] * 6]]):
        with torch.no_grad():
            outputs = host(**make_inputs(LAYOUTS, seed))
        ours, _, expected = one_hots(host.config, outputs, make_labels(classes, seed))
        assert torch.equal(ours, expected)


def test_generalised_iou_is_that_of_transformers():
    first, second = (torch.cat([label["boxes"] for label in make_labels([[0] * 9], seed)]) for seed in (3, 4))
    expected = generalized_box_iou(center_to_corners_format(first), center_to_corners_format(second))
    assert torch.equal(loss_module.generalised_iou(first[:, None], second), expected)
    assert torch.equal(loss_module.generalised_iou(first, second), expected.diag())


# ---- the encoder's term


def test_encoder_term_reaches_prompts_and_that_of_transformers_does_not(host):
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(host), SDPTConfig(num_virtual_tokens=4, init_weights=False))
    prompts = [p for p in model.parameters() if p.requires_grad]
    assert len(prompts) == 4  # with the gates
    labels = make_labels([[1, 0], [0], [1]])
    outputs = model(**make_inputs(LAYOUTS))

    # Decoder off: its tensors keep their values and lose their graph.
    logits, boxes = outputs.logits.detach(), outputs.pred_boxes.detach()
    theirs, _, _ = GroundingDinoForObjectDetectionLoss(
        logits,
        labels,
        logits.device,
        boxes,
        host.config,
        tuple(m.long() for m in class_token_maps(outputs.input_ids, logits.shape[-1])),
        logits != float("-inf"),
        encoder_logits=outputs.encoder_logits,
        encoder_pred_boxes=outputs.encoder_pred_boxes,
    )
    assert theirs.isfinite()
    if theirs.requires_grad:
        assert torch.autograd.grad(theirs, prompts, retain_graph=True, allow_unused=True) == (None,) * 4

    detached = type(outputs)(**{**outputs, "logits": logits, "pred_boxes": boxes})
    assert not GroundedDetectionLoss(host.config, encoder_coefficient=0)(detached, labels).requires_grad
    gradients = torch.autograd.grad(GroundedDetectionLoss(host.config)(detached, labels), prompts)
    for gradient in gradients:
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-4


def test_encoder_term_trains_the_proposals(host):
    model = copy.deepcopy(host)
    outputs = model(**make_inputs(LAYOUTS))
    outputs.logits, outputs.pred_boxes = outputs.logits.detach(), outputs.pred_boxes.detach()
    GroundedDetectionLoss(host.config)(outputs, make_labels([[1, 0], [0], [1]])).backward()
    inner = model.model
    # Classes and boxes both: the projection feeds the two of them, the box head only its own.
    assert inner.enc_output.weight.grad.abs().max() > 1e-4
    assert max(p.grad.abs().max() for p in inner.encoder_output_bbox_embed.parameters() if p.grad is not None) > 1e-4
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_outputs_without_proposals(case):
    # A host of transformers 5.24 with two_stage=False cannot run, so its outputs are made from the other kind's.
    config, outputs, labels = case
    one_stage = copy.copy(outputs)
    one_stage.enc_outputs_class = one_stage.enc_outputs_coord_logits = None
    result = GroundedDetectionLoss(config)(one_stage, labels)
    torch.testing.assert_close(result, GroundedDetectionLoss(config, encoder_coefficient=0)(outputs, labels))


# ---- what batches may hold


@pytest.mark.parametrize("classes", [[[1, 0], [], [1]], [[], [], [0]], [[], [], []]], ids=["some", "most", "all"])
def test_images_without_boxes(host, classes):
    labels = make_labels(classes)
    inputs = make_inputs(LAYOUTS)
    inputs["pixel_values"].requires_grad_()
    outputs = host(**inputs)
    result = GroundedDetectionLoss(host.config)(outputs, labels)
    assert result.item() == pytest.approx(loss_by_hand(host.config, outputs, labels, LAYOUTS), rel=1e-4)
    (gradient,) = torch.autograd.grad(result, inputs["pixel_values"])
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("label", [-1, 2, 100])
def test_class_labels_out_of_range(case, label, device):
    """Without the check, -1 is the last class, and the number of classes is an IndexError within transformers."""
    config, outputs, labels = case[0], case[1], copy.deepcopy(case[2])
    image = next(i for i, each in enumerate(labels) if len(each["boxes"]))
    labels[image]["class_labels"][-1] = label
    with pytest.raises(InputError, match=rf"labels\[{image}\]: class label {label} must be from 0 to 1, .* 2 phrases"):
        GroundedDetectionLoss(config)(moved(outputs, device), moved(labels, device))


def test_labels_of_other_precision(case):
    """NumPy's numbers are in double precision."""
    config, outputs, labels = case
    loss = GroundedDetectionLoss(config)
    other = [{"class_labels": each["class_labels"].int(), "boxes": each["boxes"].double()} for each in labels]
    assert torch.equal(loss(outputs, other), loss(outputs, labels))


def test_labels_of_too_few_images(case):
    config, outputs, labels = case
    with pytest.raises(InputError, match="must be a list with one entry per image, got 2 for 3 images"):
        GroundedDetectionLoss(config)(outputs, labels[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda label: label.update(boxes=100 * label["boxes"]),
            "must be centre x, centre y, width and height as frac",
        ),
        (lambda label: label["boxes"].fill_(math.nan), r"box \[nan, nan, nan, nan\] must be centre x"),
        (lambda label: label.update(boxes=label["boxes"][:, :3]), r"`boxes` have the shape \(n, 4\), got the shapes"),
        (lambda label: label.update(boxes=label["boxes"][1:]), "got the shapes"),
        (lambda label: label.update(class_labels=label["class_labels"].float()), r"n integers .*torch\.float32"),
        (lambda label: label.update(class_labels=label["class_labels"].bool()), r"n integers .*torch\.bool"),
        (lambda label: label.update(class_labels=label["class_labels"].tolist()), "must be a dict with the tensors"),
        (lambda label: label.pop("boxes"), "must be a dict with the tensors `class_labels` and `boxes`"),
        (lambda label: label.update(boxes=label["boxes"].to("meta")), "must be on the device of the outputs, cpu, got"),
        (lambda label: label["boxes"][:, 2].zero_(), "must be centre x, centre y, width and height"),
        (lambda label: label["boxes"].copy_(torch.tensor([0.95, 0.95, 0.4, 0.4])), "and lie in the image"),
    ],
)
def test_other_labels_that_cannot_be_used(case, change, message):
    config, outputs, labels = case[0], case[1], copy.deepcopy(case[2])
    image = next(i for i, each in enumerate(labels) if len(each["boxes"]))
    change(labels[image])
    with pytest.raises(InputError, match=rf"labels\[{image}\].*{message}"):
        GroundedDetectionLoss(config)(outputs, labels)


def test_more_boxes_than_queries(host):
    classes = [[0, 1] * 5]
    with torch.no_grad():
        outputs = host(**make_inputs([[2, 1]]))
    assert outputs.logits.shape[1] < 10
    assert GroundedDetectionLoss(host.config)(outputs, make_labels(classes)).isfinite()


@pytest.mark.parametrize("stage", ["logits", "enc_outputs_class"])
@pytest.mark.parametrize("token", [0, 2], ids=["separator", "word"])
def test_nan_stays_visible(case, stage, token, device):
    config, outputs, labels = case
    broken = copy.copy(outputs)
    broken[stage] = outputs[stage].clone()
    broken[stage][1, 3, token] = float("nan")
    loss = GroundedDetectionLoss(config)
    assert loss(moved(outputs, device), moved(labels, device)).isfinite()
    assert loss(moved(broken, device), moved(labels, device)).isnan()


def test_autocast(host):
    inputs, labels = make_inputs(LAYOUTS), make_labels([[1, 0], [0], [1]])
    model = copy.deepcopy(host)
    exact = GroundedDetectionLoss(host.config)(host(**inputs), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**inputs)
        inside = GroundedDetectionLoss(host.config)(outputs, labels)
    outside = GroundedDetectionLoss(host.config)(outputs, labels)
    for result in (inside, outside):
        assert result.dtype == torch.float32
        assert result.item() == pytest.approx(exact.item(), rel=0.2)
    outside.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_half_precision_outputs_are_computed_in_single(case):
    config, outputs, labels = case
    names = ("logits", "pred_boxes", "enc_outputs_class", "enc_outputs_coord_logits")
    half, rounded = copy.copy(outputs), copy.copy(outputs)
    for name in names:
        half[name] = outputs[name].bfloat16()
        rounded[name] = half[name].float()
    loss = GroundedDetectionLoss(config)
    result = loss(half, labels)
    # The proposals' ranking and sigmoid are taken in the host's dtype, so equal but for their rounding.
    assert result.item() == pytest.approx(loss(rounded, labels).item(), rel=0.02)
    assert result.dtype == torch.float32


# ---- normalisation


def test_repeating_a_batch_changes_nothing(case):
    config, outputs, labels = case
    doubled = copy.copy(outputs)
    for name in ("logits", "pred_boxes", "enc_outputs_class", "enc_outputs_coord_logits", "input_ids"):
        doubled[name] = torch.cat([outputs[name]] * 2)
    loss = GroundedDetectionLoss(config)
    torch.testing.assert_close(loss(doubled, labels * 2), loss(outputs, labels))


def test_an_image_without_boxes_adds_its_background_to_the_same_divisor(case):
    config, outputs, _ = case
    loss = GroundedDetectionLoss(config)
    labels = make_labels([[1, 0, 0], [], [1]])
    parts = [loss(*one(outputs, labels, image)) * max(1, len(labels[image]["boxes"])) for image in range(3)]
    torch.testing.assert_close(loss(outputs, labels), sum(parts) / 4)


def _loss_of_a_process(rank, port, config, outputs, labels, queue):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
        GLOO_SOCKET_IFNAME="lo",
    )
    PartialState._reset_state()
    try:
        state = PartialState(cpu=True)
        assert state.num_processes == 2
        queue.put((rank, [GroundedDetectionLoss(config)(outputs, batch).item() for batch in labels]))
        state.wait_for_everyone()
        state.destroy_process_group()
    except BaseException as error:
        queue.put((rank, repr(error)))


def test_mean_over_processes_is_the_loss_of_the_whole_batch(case, monkeypatch):
    config, outputs, _ = case
    halves = [copy.copy(outputs), copy.copy(outputs)]
    for name in ("logits", "pred_boxes", "enc_outputs_class", "enc_outputs_coord_logits", "input_ids"):
        halves[0][name], halves[1][name] = outputs[name][:1].detach(), outputs[name][1:].detach()
    # Uneven processes, one without a box, fewer boxes than processes, and none at all.
    batches = [make_labels(c) for c in ([[1, 0, 0], [0], [1]], [[], [0], [1]], [[1], [], []], [[], [], []])]
    # Processes of the forked kind share the outputs and need no import of their own.
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(
            target=_loss_of_a_process,
            args=(rank, port, config, halves[rank], [b[:1] if rank == 0 else b[1:] for b in batches], queue),
            daemon=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    results = dict(queue.get() for _ in processes)
    assert all(isinstance(losses, list) for losses in results.values()), results

    monkeypatch.setattr(PartialState, "_shared_state", {})
    for index, labels in enumerate(batches):
        whole = GroundedDetectionLoss(config)(outputs, labels).item()
        assert (results[0][index] + results[1][index]) / 2 == pytest.approx(whole, rel=1e-5)


def test_asks_for_no_distributed_run_outside_of_accelerate(case, monkeypatch):
    config, outputs, labels = case
    state = {}
    monkeypatch.setattr(PartialState, "_shared_state", state)
    GroundedDetectionLoss(config)(outputs, labels)
    assert not state


# ---- the Trainer


def make_trainer(host, folder, inputs, labels, **arguments) -> Trainer:
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(host), SDPTConfig(num_virtual_tokens=4))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=1,
            per_device_train_batch_size=3,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=1,
            **arguments,
        ),
        train_dataset=[{"index": index} for index in range(6)],
        # The same batch whatever the sampler draws.
        data_collator=lambda rows: {**inputs, "labels": labels},
        compute_loss_func=GroundedDetectionLoss(host.config),
    )


def test_trainer_takes_it_as_its_loss_function(host, tmp_path):
    inputs, labels = make_inputs(LAYOUTS), make_labels([[1, 0], [0], [1]])
    trainer = make_trainer(host, tmp_path, inputs, labels)
    loss = GroundedDetectionLoss(host.config)(trainer.model(**inputs), labels)
    prompts = [p for p in trainer.model.parameters() if p.requires_grad]
    wanted = [p.detach() - 0.1 * g for p, g in zip(prompts, torch.autograd.grad(loss, prompts), strict=True)]
    assert trainer.train().training_loss == pytest.approx(loss.item(), rel=1e-4)
    for prompt, expected in zip(prompts, wanted, strict=True):
        torch.testing.assert_close(prompt.detach(), expected)


def test_trainer_with_gradient_accumulation_as_documented(host, tmp_path):
    inputs, labels = make_inputs(LAYOUTS), make_labels([[1, 0], [0], [1]])
    once = make_trainer(host, tmp_path, inputs, labels)
    twice = make_trainer(host, tmp_path, inputs, labels, gradient_accumulation_steps=2)
    twice.loss_is_scaled_for_ga = False
    assert "loss_is_scaled_for_ga = False" in GroundedDetectionLoss.__doc__
    for trainer in (once, twice):
        trainer.train()
    for a, b in zip(once.model.parameters(), twice.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
