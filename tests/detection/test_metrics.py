# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Average precision by hand, and detections in the pixels and classes of the picture."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from transformers import GroundingDinoProcessor
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

from peft_sdpt.detection import prediction
from peft_sdpt.detection.data import DetectionSplit
from peft_sdpt.detection.metrics import average_precision, evaluate
from peft_sdpt.detection.prediction import MAX_DETECTIONS, detect, detect_split, result_of, rows_of
from peft_sdpt.errors import InputError
from tests.helpers.detectors import HOST_NAMES, make_host
from tests.helpers.words import make_tokenizer


def make_split(boxes, labels=None, crowds=None, classes: int = 1, size=(100, 100)) -> DetectionSplit:
    return DetectionSplit(
        class_names=["dog", "cat", "horse", "platelet", "cell"][:classes],
        image_ids=list(range(len(boxes))),
        sizes=[size] * len(boxes),
        boxes=boxes,
        labels=labels or [[0] * len(image) for image in boxes],
        crowds=crowds or [[False] * len(image) for image in boxes],
        open_image=lambda index: Image.new("RGB", size),
    )


# ---- average precision

BOX, OTHER, FAR = (10, 10, 20, 20), (60, 10, 30, 20), (10, 60, 20, 30)


def test_perfect_detections():
    data = make_split([[BOX, OTHER], [], [FAR]], [[0, 2], [], [1]], classes=3)
    rows = [(0, *BOX, 0.9, 0), (0, *OTHER, 0.3, 2), (2, *FAR, 0.5, 1)]
    assert average_precision(data, rows) == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}


def test_a_false_positive_above_the_true_one():
    rows = [(0, *FAR, 0.9, 0), (0, *BOX, 0.8, 0)]
    assert average_precision(make_split([[BOX]]), rows) == {"AP": 0.5, "AP50": 0.5, "AP75": 0.5}
    # Below it, it does no harm.
    rows = [(0, *FAR, 0.7, 0), (0, *BOX, 0.8, 0)]
    assert average_precision(make_split([[BOX]]), rows)["AP50"] == 1.0


def test_true_false_true():
    # Precision 1 at the 51 recalls up to 0.5, 2 / 3 at the 50 above.
    rows = [(0, *BOX, 0.9, 0), (0, *FAR, 0.8, 0), (0, *OTHER, 0.7, 0)]
    expected = round((51 + 50 * 2 / 3) / 101, 4)
    assert average_precision(make_split([[BOX, OTHER]]), rows)["AP50"] == expected


def test_a_box_found_twice_counts_once():
    rows = [(0, *BOX, 0.9, 0), (0, *BOX, 0.8, 0), (0, *OTHER, 0.7, 0)]
    expected = round((51 + 50 * 2 / 3) / 101, 4)
    assert average_precision(make_split([[BOX, OTHER]]), rows)["AP50"] == expected


def test_thresholds_of_overlap():
    # Width 20 of 32 in common: IoU 0.625 passes 0.50, 0.55 and 0.60 of the ten.
    rows = [(0, 10, 10, 32, 20, 0.9, 0)]
    assert average_precision(make_split([[BOX]]), rows) == {"AP": 0.3, "AP50": 1.0, "AP75": 0.0}


@pytest.mark.parametrize("row", [(0, *BOX, 0.9, 1), (1, *BOX, 0.9, 0)], ids=["class", "picture"])
def test_wrong_class_or_picture(row):
    assert average_precision(make_split([[BOX], []], classes=2), [row])["AP50"] == 0.0


def test_mean_over_the_classes_that_occur():
    data = make_split([[BOX, OTHER]], [[0, 1]], classes=3)
    # Class 1 is missed; class 2 occurs nowhere and its detections count for nothing.
    assert average_precision(data, [(0, *BOX, 0.9, 0), (0, *FAR, 0.95, 2)])["AP50"] == 0.5


def test_crowds_are_neither_wanted_nor_wrong():
    rows = [(0, *FAR, 0.9, 0), (0, 62, 12, 8, 8, 0.85, 0), (0, *BOX, 0.8, 0)]
    crowd = make_split([[BOX, OTHER, FAR]], crowds=[[False, True, True]])
    assert average_precision(crowd, rows)["AP50"] == 1.0
    assert average_precision(crowd, rows[:2])["AP50"] == 0.0
    plain = make_split([[BOX, OTHER, FAR]])
    assert average_precision(plain, rows)["AP50"] < 0.7


def test_no_detections():
    assert average_precision(make_split([[BOX]]), []) == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}


def test_prints_nothing(capsys):
    average_precision(make_split([[BOX]]), [(0, *BOX, 0.9, 0)])
    assert capsys.readouterr().out == ""


def ap50_by_hand(data: DetectionSplit, rows: list[tuple]) -> float:
    """COCO's AP at IoU 0.5: greedy matching by score, precision made monotonic, mean over 101 recalls and classes."""

    def iou(a, b):
        width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        inside = max(0, width) * max(0, height)
        return inside / (a[2] * a[3] + b[2] * b[3] - inside)

    means = []
    for label in sorted({label for image in data.labels for label in image}):
        truth = [
            [box for box, own in zip(boxes, labels, strict=True) if own == label]
            for boxes, labels in zip(data.boxes, data.labels, strict=True)
        ]
        taken, hits = set(), []
        for image, *box, _, _ in sorted((r for r in rows if r[6] == label), key=lambda r: -r[5]):
            free = [(iou(box, t), i) for i, t in enumerate(truth[image]) if (image, i) not in taken]
            best = max(free, default=(0, None))
            hits.append(best[0] >= 0.5)
            if hits[-1]:
                taken.add((image, best[1]))
        found = np.cumsum(hits)
        precision = found / np.arange(1, len(hits) + 1)
        recall = found / sum(map(len, truth))
        # A grain of slack: 0.1 + 0.2 is not 0.3.
        reached = [precision[recall >= r - 1e-9].max(initial=0.0) for r in np.arange(101) / 100]
        means.append(np.mean(reached))
    return float(np.mean(means))


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_average_precision_by_hand(seed):
    rng = np.random.default_rng(seed)
    boxes, labels, rows = [], [], []
    for image in range(12):
        count = int(rng.integers(0, 6))
        corner, size = rng.uniform(0, 60, (count, 2)), rng.uniform(5, 40, (count, 2))
        boxes.append([tuple(map(float, box)) for box in np.concatenate([corner, size], axis=1)])
        labels.append(rng.integers(0, 3, count).tolist())
        for box, label in zip(boxes[-1], labels[-1], strict=True):
            for _ in range(int(rng.integers(0, 3))):
                moved = np.array(box) + rng.normal(0, 3, 4)
                rows.append((image, *moved[:2], *moved[2:].clip(1), rng.random(), label))
            if rng.random() < 0.4:
                rows.append((image, *rng.uniform(1, 50, 4), rng.random(), int(rng.integers(0, 4))))
    data = make_split(boxes, labels, classes=4)
    expected = ap50_by_hand(data, rows)
    assert 0.2 < expected < 0.9
    assert average_precision(data, rows)["AP50"] == pytest.approx(expected, abs=1e-4)


# ---- detections


@pytest.fixture
def processor(tmp_path):
    return GroundingDinoProcessor(
        GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}), make_tokenizer(tmp_path)
    )


class WordDetector(nn.Module):
    """Returns boxes that are given and scores that depend on the query and the word piece alone."""

    def __init__(self, boxes: torch.Tensor, max_text_len: int = 32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.boxes = boxes
        self.config = SimpleNamespace(max_text_len=max_text_len)
        self.prompts: list[int] = []

    def forward(self, pixel_values, pixel_mask, input_ids, attention_mask, token_type_ids):
        assert pixel_mask.shape == pixel_values.shape[:1] + pixel_values.shape[2:]
        self.prompts.append(input_ids.shape[1])
        batch, queries = len(input_ids), self.boxes.shape[-2]
        logits = torch.full((batch, queries, self.config.max_text_len), float("-inf"))
        query = torch.arange(queries)[:, None]
        values = torch.sin(input_ids[:, None, :] * 1.7 + query * 2.3) * 4
        # What is no class's must not count, however sure.
        values = values.masked_fill(torch.isin(input_ids, torch.tensor([101, 102, 1012]))[:, None, :], 9.0)
        logits[..., : input_ids.shape[1]] = values.masked_fill(attention_mask[:, None, :] == 0, float("-inf"))
        return SimpleNamespace(logits=logits, pred_boxes=self.boxes.expand(batch, -1, -1))


def random_boxes(queries: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.cat(
        [torch.rand(queries, 2, generator=generator), 0.05 + 0.3 * torch.rand(queries, 2, generator=generator)], dim=1
    )


def test_boxes_are_pixels_of_each_picture(processor):
    model = WordDetector(torch.tensor([[0.5, 0.5, 0.5, 0.2], [0.9, 0.1, 0.4, 0.4]]))
    wide, tall = Image.new("RGB", (400, 100)), Image.new("RGB", (30, 120))
    first, second = detect(model, processor, [wide, tall], ["dog"], [[0]])
    for result, (width, height) in ((first, wide.size), (second, tall.size)):
        found = sorted(result["boxes"].tolist())
        inside = [0.25 * width, 0.4 * height, 0.5 * width, 0.2 * height]
        cut = [0.7 * width, 0.0, 0.3 * width, 0.3 * height]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(sorted([inside, cut])))
        assert result["labels"].tolist() == [0, 0]


@pytest.mark.parametrize("name", HOST_NAMES)
def test_boxes_of_a_host_span_each_picture_of_a_padded_batch(name, processor):
    """The host's boxes are shares of the picture without its padding: `detect` counts on it."""
    host = make_host(name, num_queries=40)
    for module in (host.bbox_embed, host.model.encoder_output_bbox_embed):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    # Without box heads a host returns its proposals, a grid over the picture.
    wide, tall = Image.new("RGB", (200, 100)), Image.new("RGB", (100, 200))
    results = detect(host, processor, [wide, tall], ["dog"], [[0]])
    for picture, result in zip((wide, tall), results, strict=True):
        x, y, w, h = result["boxes"].unbind(-1)
        proposal = (w < 0.2 * picture.width) & (h < 0.2 * picture.height)
        assert proposal.sum() >= 10
        centres = torch.stack([(x + w / 2) / picture.width, (y + h / 2) / picture.height])[:, proposal]
        assert (centres.amax(1) > 0.75).all() and (centres.amin(1) < 0.25).all()


NAMES = ["red blood cell", "dog", "Hotdogs", "st. bernard", "cat"]


def as_set(result) -> dict:
    columns = zip(result["boxes"].tolist(), result["labels"].tolist(), result["scores"].tolist(), strict=True)
    return {(label, *(round(v, 3) for v in box)): score for box, label, score in columns}


@pytest.mark.parametrize("chunks", [[[0], [1], [2], [3], [4]], [[0, 1], [2, 3], [4]], [[4, 2], [3, 0, 1]]])
def test_chunks_find_what_one_prompt_finds(processor, chunks):
    model = WordDetector(random_boxes(7))
    pictures = [Image.new("RGB", (60, 40)), Image.new("RGB", (40, 90))]
    whole = detect(model, processor, pictures, NAMES, [[0, 1, 2, 3, 4]])
    parts = detect(model, processor, pictures, NAMES, chunks)
    assert len(model.prompts) == 1 + len(chunks)
    for one, many in zip(whole, parts, strict=True):
        assert len(one["scores"]) == 35
        assert as_set(many) == pytest.approx(as_set(one), abs=1e-6)
        assert many["scores"].tolist() == sorted(many["scores"].tolist(), reverse=True)


def test_scores_belong_to_the_class_of_the_list(processor):
    model = WordDetector(random_boxes(1))
    ids = processor.tokenizer(["red blood cell", "dog"], add_special_tokens=False)["input_ids"]
    expected = [torch.sin(torch.tensor(words) * 1.7).mul(4).sigmoid().mean().item() for words in ids]
    result = detect(model, processor, [Image.new("RGB", (9, 9))], NAMES, [[2, 3], [1, 0]])[0]
    scores = dict(zip(result["labels"].tolist(), result["scores"].tolist(), strict=True))
    assert [scores[0], scores[1]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_class_of_a_chunk_of_its_own_scores_as_if_it_were_alone(name, processor):
    host = make_host(name)
    pictures = [Image.linear_gradient("L").resize((64, 64)).convert("RGB")]
    both = detect(host, processor, pictures, NAMES, [[2], [1]])[0]
    for index in (1, 2):
        alone = detect(host, processor, pictures, [NAMES[index]], [[0]])[0]
        own = both["labels"] == index
        torch.testing.assert_close(both["scores"][own], alone["scores"])
        torch.testing.assert_close(both["boxes"][own], alone["boxes"])


@pytest.mark.parametrize("chunks", [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]]])
def test_keeps_the_hundred_best(processor, chunks):
    model = WordDetector(random_boxes(31))
    result = detect(model, processor, [Image.new("RGB", (50, 50))], NAMES, chunks)[0]
    assert MAX_DETECTIONS == 100 and len(result["scores"]) == 100
    everything = [
        score
        for index in range(5)
        for score in detect(model, processor, [Image.new("RGB", (50, 50))], [NAMES[index]], [[0]])[0]["scores"].tolist()
    ]
    assert len(everything) == 155
    assert result["scores"].tolist() == pytest.approx(sorted(everything, reverse=True)[:100])


@pytest.mark.parametrize("chunks", [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]]])
def test_no_limit_and_a_threshold(processor, chunks):
    model = WordDetector(random_boxes(31))
    arguments = (model, processor, [Image.new("RGB", (50, 50))], NAMES, chunks)
    (everything,) = detect(*arguments, max_detections=None)
    scores = everything["scores"].tolist()
    assert len(scores) == 155 and scores == sorted(scores, reverse=True)
    threshold = (scores[119] + scores[120]) / 2
    (best,) = detect(*arguments, threshold=threshold, max_detections=None)
    assert all(torch.equal(best[key], everything[key][:120]) for key in ("boxes", "scores", "labels"))
    for lowest, limit, number in ((0.0, 7, 7), (threshold, 130, 120), (threshold, 20, 20)):
        (some,) = detect(*arguments, lowest, limit)
        assert some["scores"].tolist() == pytest.approx(scores[:number])
    (none,) = detect(*arguments, threshold=1.0)
    assert none["boxes"].shape == (0, 4) and len(none["scores"]) == len(none["labels"]) == 0
    # The best score is known, though it is below the threshold.
    assert none["best_score"] == everything["best_score"] == scores[0]


def test_a_limit_below_one(processor):
    with pytest.raises(ValueError, match="max_detections=0: must be at least 1, or None"):
        detect(WordDetector(random_boxes(2)), processor, [Image.new("RGB", (9, 9))], NAMES, [[0]], max_detections=0)


def test_more_than_a_hundred_objects_of_a_split(processor):
    """With a high enough limit, all 144 queries are in the rows."""
    model = WordDetector(random_boxes(144))
    pictures = [Image.new("RGB", (120, 120))]
    data = DetectionSplit(["cell"], [1], [(120, 120)], [[(0.0, 0.0, 8.0, 8.0)]], [[0]], [[False]], pictures.__getitem__)
    arguments = (model, processor, data, 1, Accelerator(cpu=True))
    assert len(detect_split(*arguments)) == MAX_DETECTIONS
    assert len(detect_split(*arguments, max_detections=None)) == 144
    assert len(detect_split(*arguments, max_detections=120)) == 120


def test_rows_and_back():
    result = {
        "boxes": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
        "scores": torch.tensor([0.5, 0.25]),
        "labels": torch.tensor([3, 0]),
    }
    rows = [*rows_of(6, {key: value[:1] for key, value in result.items()}), *rows_of(7, result)]
    assert all(torch.equal(result_of(7, rows)[key], result[key]) for key in result)
    assert len(result_of(8, rows)["scores"]) == 0


def test_rows_of():
    result = {
        "boxes": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
        "scores": torch.tensor([0.5, 0.25]),
        "labels": torch.tensor([3, 0]),
    }
    assert rows_of(7, result) == [(7, 1, 2, 3, 4, 0.5, 3), (7, 5, 6, 7, 8, 0.25, 0)]


# ---- evaluation


GREY = 50


@pytest.fixture
def counted_split():
    """Five pictures of a grey that tells which they are, and how often each was opened."""
    boxes = [[(10.0 + i, 10, 20, 20)] for i in range(5)]
    data = make_split(boxes, [[i % 2] for i in range(5)], classes=2)
    opened = []

    def open_image(index):
        opened.append(index)
        return Image.new("RGB", (100, 100), (GREY * index,) * 3)

    data.open_image = open_image
    return data, opened


class PerfectDetector(nn.Module):
    """Finds what is annotated in the pictures of `counted_split`."""

    def __init__(self, data, processor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(max_text_len=32)
        self.data, self.image_processor = data, processor.image_processor
        self.batches: list[int] = []

    def forward(self, pixel_values, pixel_mask, input_ids, attention_mask, token_type_ids):
        assert not self.training
        self.batches.append(len(input_ids))
        grey = pixel_values[:, 0].mean((1, 2)) * self.image_processor.image_std[0] + self.image_processor.image_mean[0]
        images = (grey * 255 / GREY).round().int().tolist()
        boxes = torch.tensor([self.data.boxes[image] for image in images])
        boxes = torch.cat([boxes[..., :2] + boxes[..., 2:] / 2, boxes[..., 2:]], dim=-1) / 100
        phrase = (input_ids == 1012).cumsum(1)
        wanted = torch.tensor([self.data.labels[image] for image in images])
        logits = torch.full((len(images), 1, self.config.max_text_len), float("-inf"))
        logits[..., : input_ids.shape[1]] = torch.where(phrase == wanted, 6.0, -6.0)[:, None]
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


def test_evaluate_counts_each_image_once(counted_split, processor):
    data, opened = counted_split
    model = PerfectDetector(data, processor).train()
    metrics = evaluate(model, processor, data, 2, Accelerator(cpu=True))
    assert metrics == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}
    assert opened == [0, 1, 2, 3, 4] and model.batches == [2, 2, 1]
    assert model.training


@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_evaluate_shares_images_among_processes(counted_split, processor, monkeypatch, num_processes):
    data, opened = counted_split
    gathered = []

    def run():
        for rank in range(num_processes):
            accelerator = SimpleNamespace(
                process_index=rank,
                num_processes=num_processes,
                is_local_main_process=False,
                autocast=contextlib.nullcontext,
                unwrap_model=lambda model: model,
            )
            last = evaluate(PerfectDetector(data, processor).eval(), processor, data, 2, accelerator)
        return last

    monkeypatch.setattr(prediction, "gather_object", lambda rows: gathered.extend(rows) or list(gathered))
    # The last process to arrive has the rows of all of them.
    assert run() == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}
    assert sorted(opened) == [0, 1, 2, 3, 4]
    assert sorted(row[0] for row in gathered if row[5] > 0.5) == [0, 1, 2, 3, 4]


def test_a_batch_has_pictures_of_one_size(processor):
    """Padding changes scores: other batch sizes would change what is found."""
    data = make_split([[BOX]] * 6, [[0]] * 6, classes=2)
    data.sizes = [(100, 100), (64, 100)] * 3
    pictures = [Image.effect_noise(size, 50 + i).convert("RGB") for i, size in enumerate(data.sizes)]
    data.open_image = pictures.__getitem__
    host = make_host("mm_grounding_dino")
    one, many = (sorted(detect_split(host, processor, data, size, Accelerator(cpu=True))) for size in (1, 4))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(many), rtol=1e-4, atol=1e-3)
    workers = sorted(detect_split(host, processor, data, 4, Accelerator(cpu=True), num_workers=2))
    assert workers == many


def test_evaluate_over_more_classes_than_a_prompt_holds(processor):
    model = WordDetector(random_boxes(4), max_text_len=8).eval()
    data = make_split([[BOX], [OTHER], []], [[0], [4], []], classes=5)
    metrics = evaluate(model, processor, data, 2, Accelerator(cpu=True))
    assert len(model.prompts) > 2 and max(model.prompts) <= 8
    assert all(0 <= value <= 1 for value in metrics.values())
    assert not model.training


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_a_model_stays_even_after_an_error(processor, training):
    model = make_host("mm_grounding_dino").train(training)
    data = make_split([[BOX]], [[0]], classes=2)

    def broken(index):
        raise InputError("no such image")

    data.open_image = broken
    with pytest.raises(InputError, match="no such image"):
        detect_split(model, processor, data, 1, Accelerator(cpu=True))
    assert model.training == training
    with pytest.raises(InputError, match="image_size=1: does not suit this base model"):
        prediction.check_image_size(failing(model), processor, 1)
    assert model.training == training


def failing(model):
    def forward(*args, **kwargs):
        assert not model.training
        raise RuntimeError("selected index k out of range")

    model.forward = forward
    return model


def test_evaluate_with_workers(processor):
    host = make_host("mm_grounding_dino")
    data = make_split([[BOX], [OTHER], []], [[0], [1], []], classes=2)
    host.train()
    one, two = (evaluate(host, processor, data, 2, Accelerator(cpu=True), num_workers=n) for n in (0, 1))
    assert one == two and host.training


def test_evaluate_a_host(processor):
    host = make_host("mm_grounding_dino")
    data = make_split([[BOX], [OTHER], []], [[0], [1], []], classes=2)
    metrics = evaluate(host, processor, data, 2, Accelerator(cpu=True))
    assert metrics.keys() == {"AP", "AP50", "AP75"} and all(0 <= value <= 1 for value in metrics.values())


def test_images_of_another_mode_are_refused():
    with pytest.raises(InputError, match=r"images\[1\]: must be RGB, got I;16; peft_sdpt\.detection\.read_image"):
        detect(None, None, [Image.new("RGB", (9, 9)), Image.new("I;16", (9, 9))], ["dog"], [[0]])


class Spoiled(WordDetector):
    """A detector with one value that is not finite, in the logits or boxes of the last image of a batch."""

    def __init__(self, output: str, value: float):
        super().__init__(random_boxes(5))
        self.output, self.value = output, value

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        halves = {"logits": outputs.logits.half(), "pred_boxes": outputs.pred_boxes.half().clone()}
        halves[self.output][-1, 2, 1] = self.value
        return SimpleNamespace(**halves)


BAD_OUTPUTS = [
    ("logits", "nan"),
    ("logits", "inf"),
    ("pred_boxes", "nan"),
    ("pred_boxes", "inf"),
    ("pred_boxes", "-inf"),
]


@pytest.mark.parametrize(("output", "value"), BAD_OUTPUTS)
@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_scores_or_boxes_that_are_not_finite_are_named(processor, output, value, threshold):
    model = Spoiled(output, float(value))
    images = [Image.new("RGB", (100, 100))] * 3
    with pytest.raises(InputError, match=r"images\[2\]: the scores or boxes are not finite\. .* too large for float16"):
        detect(model, processor, images, ["dog"], [[0]], threshold)
    data = make_split([[BOX], [BOX]], [[0], [0]], classes=1)
    message = r"validating: image 1: the scores or boxes are not finite\. .* lower the learning rate\."
    with pytest.raises(InputError, match=message):
        detect_split(model, processor, data, 2, Accelerator(cpu=True), "validating")


def test_the_logits_of_padding_may_be_infinite(processor):
    """They are -inf in any precision. The logits of a token of the prompt may be -inf too."""
    detect(Spoiled("logits", float("-inf")), processor, [Image.new("RGB", (100, 100))], ["dog"], [[0]])
