# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Reading COCO folders and rows of the Hub, and every input that is refused. Other formats are in `test_formats.py`."""

import dataclasses
import io
import json
import math
import pickle
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from accelerate import Accelerator
from PIL import ExifTags, Image

from peft_sdpt.detection import (
    DetectionSplit,
    check_images,
    divide,
    few_shot,
    has_split,
    load_split,
    load_splits,
    loading,
    match_classes,
)
from peft_sdpt.detection.formats import coco as coco_format
from peft_sdpt.errors import InputError

DATASETS = Path(__file__).resolve().parents[3] / "shared" / "datasets"


def picture(width: int, height: int, colour=(200, 30, 30)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


@pytest.fixture
def coco() -> dict:
    """Two pictures with annotations and one without; ids in no order and with gaps, one crowd."""
    return {
        "images": [
            {"id": 42, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 7, "file_name": "a.png", "width": 20, "height": 60},
            {"id": 1000, "file_name": "deep/c.png", "width": 10, "height": 10},
        ],
        "annotations": [
            {"id": 5, "image_id": 7, "category_id": 90, "bbox": [1, 2, 3.5, 4], "iscrowd": 0},
            {"id": 9, "image_id": 42, "category_id": 3, "bbox": [0, 0, 40, 30], "iscrowd": 1},
            {"id": 6, "image_id": 7, "category_id": 3, "bbox": [10, 50, 10, 10]},
        ],
        "categories": [{"id": 90, "name": "White Cell"}, {"id": 3, "name": "dog"}, {"id": 11, "name": "cat"}],
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    picture(40, 30, (0, 255, 0)).save(tmp_path / "images" / "b.png")
    picture(20, 60).convert("L").save(tmp_path / "images" / "a.png")
    picture(10, 10).save(tmp_path / "images" / "deep" / "c.png")
    return tmp_path


def load(folder: Path, coco, split: str = "train", **options) -> DetectionSplit:
    (folder / f"{split}.json").write_text(coco if isinstance(coco, str) else json.dumps(coco))
    return load_split(str(folder), split, **options)


def put(file: Path, content) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def test_reads_a_folder(folder, coco):
    data = load(folder, coco)
    assert len(data) == 3
    assert data.class_names == ["White Cell", "dog", "cat"]
    assert data.image_ids == [42, 7, 1000]
    assert data.sizes == [(40, 30), (20, 60), (10, 10)]
    assert data.boxes == [[(0, 0, 40, 30)], [(1, 2, 3.5, 4), (10, 50, 10, 10)], []]
    assert data.labels == [[1], [0, 1], []]
    assert data.crowds == [[True], [False, False], []]
    assert [data.open_image(i).size for i in range(3)] == data.sizes
    assert data.open_image(0).getpixel((0, 0)) == (0, 255, 0)
    assert data.open_image(1).mode == "RGB"


def test_as_coco_round_trip(folder, coco):
    data = load(folder, coco)
    written = data.as_coco()
    for image, name in zip(written["images"], ("b.png", "a.png", "deep/c.png"), strict=True):
        image["file_name"] = name
    again = load(folder, written, "val")
    assert again.image_ids == [0, 1, 2]
    for name in ("class_names", "sizes", "boxes", "labels", "crowds"):
        assert getattr(again, name) == getattr(data, name)
    assert again.as_coco()["annotations"] == written["annotations"]
    # COCO evaluation takes id 0 for "no match".
    assert [a["id"] for a in written["annotations"]] == [1, 2, 3]
    assert [a["area"] for a in written["annotations"]] == [1200, 14, 100]


# ---- layouts


@pytest.mark.parametrize(
    ("annotations", "images", "split"),
    [
        ("train.json", "images", "train"),
        ("train/_annotations.coco.json", "train", "train"),
        ("train/annotations_without_background.json", "train", "train"),
        ("annotations/instances_train2017.json", "train2017", "train2017"),
        ("annotations/instances_train.json", "images/train", "train"),
        ("annotations/train.json", "images", "train"),
        ("instances_train.json", "images/train", "train"),
        ("train/labels.json", "train/data", "train"),
        ("train/result.json", "train/images", "train"),
    ],
    ids=["ours", "Roboflow", "ODinW", "COCO", "CVAT", "annotations", "instances", "FiftyOne", "Label Studio"],
)
def test_layouts(folder, coco, annotations, images, split):
    shutil.move(folder / "images", folder / "moved")
    (folder / images).parent.mkdir(exist_ok=True)
    shutil.move(folder / "moved", folder / images)
    put(folder / annotations, coco)
    data = load_split(str(folder), split)
    assert data.class_names == ["White Cell", "dog", "cat"]
    assert check_images(data, disable_progress=True) == {}
    assert has_split(str(folder), split)
    assert not has_split(str(folder), "test")


def test_odinw_comes_before_roboflow(folder, coco):
    """ODinW has both, and Roboflow's file has the root category."""
    put(folder / "train" / "_annotations.coco.json", coco)
    coco["categories"][0]["name"] = "platelet"
    put(folder / "train" / "annotations_without_background.json", coco)
    assert load_split(str(folder), "train").class_names[0] == "platelet"


@pytest.mark.parametrize("there", ["val", "valid", "validation"])
@pytest.mark.parametrize("asked", ["val", "valid", "validation"])
def test_names_of_the_validation_split(folder, coco, there, asked):
    put(folder / f"{there}.json", coco)
    assert has_split(str(folder), asked)
    assert len(load_split(str(folder), asked)) == 3
    assert not has_split(str(folder), "train")


def test_the_exact_name_comes_first(folder, coco):
    put(folder / "val.json", coco)
    coco["categories"][0]["name"] = "platelet"
    put(folder / "valid" / "_annotations.coco.json", coco)
    assert load_split(str(folder), "val").class_names[0] == "White Cell"
    assert load_split(str(folder), "valid").class_names[0] == "platelet"


def roboflow(folder: Path, split: str, labels: list[int], root: str = "cells") -> None:
    """A Roboflow export: a root category 0, and boxes of `labels`."""
    coco = {
        "images": [{"id": 0, "file_name": "a.jpg", "width": 9, "height": 9}],
        "annotations": [
            {"id": i, "image_id": 0, "category_id": label, "bbox": [0, 0, 5, 5]} for i, label in enumerate(labels)
        ],
        "categories": [
            {"id": 0, "name": root, "supercategory": "none"},
            {"id": 1, "name": "RBC", "supercategory": root},
            {"id": 2, "name": "WBC", "supercategory": root},
        ],
    }
    put(folder / split / "_annotations.coco.json", coco)


def test_roboflow_root_is_no_class(tmp_path):
    roboflow(tmp_path, "train", [2, 1])
    roboflow(tmp_path, "valid", [1])
    train, val = load_split(str(tmp_path), "train"), load_split(str(tmp_path), "val")
    assert train.class_names == val.class_names == ["RBC", "WBC"]
    assert train.labels == [[1, 0]] and val.labels == [[0]]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", ["cells"], None),
        ("name", {}, "must be a name"),
        ("name", 1, "must be a name"),
        ("supercategory", [], None),
    ],
)
def test_roboflow_categories_with_other_types(tmp_path, field, value, message):
    roboflow(tmp_path, "train", [2, 1])
    file = tmp_path / "train" / "_annotations.coco.json"
    coco = json.loads(file.read_text())
    coco["categories"][0][field] = value
    put(file, coco)
    if message:
        with pytest.raises(InputError, match=message):
            load_split(str(tmp_path), "train")
    else:
        assert load_split(str(tmp_path), "train").class_names == ["cells", "RBC", "WBC"]


def test_roboflow_root_may_have_the_name_of_a_class(tmp_path):
    roboflow(tmp_path, "train", [2, 1], root="RBC")
    assert load_split(str(tmp_path), "train").class_names == ["RBC", "WBC"]


def test_roboflow_root_with_boxes_in_any_split_stays_in_all(tmp_path):
    roboflow(tmp_path, "train", [2, 1])
    roboflow(tmp_path, "valid", [0])
    for split, labels in (("train", [[2, 1]]), ("valid", [[0]])):
        data = load_split(str(tmp_path), split)
        assert data.class_names == ["cells", "RBC", "WBC"]
        assert data.labels == labels


def test_roboflow_classes_without_a_root_stay(tmp_path):
    roboflow(tmp_path, "train", [1], root="none")
    assert load_split(str(tmp_path), "train").class_names == ["none", "RBC", "WBC"]


def test_missing_split_says_what_is_there(folder, coco):
    for file in ("train.json", "annotations/instances_val2017.json", "extra/_annotations.coco.json"):
        put(folder / file, coco)
    with pytest.raises(InputError) as error:
        load_split(str(folder), "test")
    message = str(error.value)
    assert str(folder) in message and "'test'" in message
    for file in ("test.json", "test/_annotations.coco.json", "annotations/instances_test.json"):
        assert file in message
    assert message.endswith("The data set (COCO) has train, extra, val2017.")


def test_an_empty_folder_is_no_data_set(tmp_path):
    with pytest.raises(InputError, match=r"no data set in a known format. Looked for COCO, .*The folder is empty\."):
        load_split(str(tmp_path), "train")


def test_a_file_name_may_leave_the_folder_of_images(folder, coco):
    """It may not leave the folder of the data set. See `test_names_that_lead_out_of_the_folder`."""
    shutil.move(folder / "images" / "a.png", folder / "a.png")
    coco["images"][1]["file_name"] = "../a.png"
    coco["images"][0]["file_name"] = str(folder / "images" / "b.png")
    assert check_images(load(folder, coco), disable_progress=True) == {}


# ---- what is refused


@pytest.mark.parametrize(
    "field", [("images", 0, "id"), ("annotations", 0, "category_id"), ("annotations", 0, "bbox", 2)]
)
def test_a_number_of_400_digits(folder, coco, field):
    *place, last = field
    value = coco
    for key in place:
        value = value[key]
    value[last] = 10**400
    with pytest.raises(InputError, match=r"finite numbers|has the unknown") as error:
        load(folder, coco)
    assert len(str(error.value)) < 500 and "bbox_format" not in str(error.value)


@pytest.mark.parametrize("field", ["width", "height"])
@pytest.mark.parametrize("size", [10**400, 2**40, "Infinity", "wide", [4]])
def test_a_size_that_no_image_has(folder, coco, field, size):
    coco["images"][1][field] = size
    with pytest.raises(InputError, match=r"train\.json: images\[1\]: `width` and `height` must be numbers, got \("):
        load(folder, coco)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400"])
@pytest.mark.parametrize("part", ["images", "categories"])
def test_an_id_that_is_not_finite(folder, coco, part, value):
    """NaN differs from itself, so it cannot be an id."""
    coco[part].append({**coco[part][0], "id": 12345})
    text = json.dumps(coco).replace("12345", value)
    with pytest.raises(InputError, match=rf"{part}\[\d\]: `id` must be finite, got (nan|inf)"):
        load(folder, text)


def test_what_a_message_quotes_is_one_short_line(folder, coco):
    coco["images"][0]["file_name"] = ["x\n\x1b[31m" * 1000]
    with pytest.raises(InputError, match="`file_name` must be str, got ") as error:
        load(folder, coco)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_class_names_of_a_file_are_cleaned(folder, coco, tmp_path):
    """A line break in a name cannot be drawn, so the report at the end of a run would fail."""
    new = put(tmp_path / "names.json", {"dog": "big\n dog\x1b[31m", "White Cell": "a\u200cnt \u2028", "cat": "\x00cat"})
    names = load(folder, coco, class_names_file=new).class_names
    assert sorted(names) == sorted(["big dog[31m", "a\u200cnt", "cat"])
    twice = put(tmp_path / "names.json", {"dog": "cat\x00"})
    with pytest.raises(InputError, match=r"several categories named cat \('cat', 'cat'\)"):
        load(folder, coco, class_names_file=twice)


def test_missing_file(folder, coco):
    load(folder, coco)
    with pytest.raises(
        InputError,
        match=r"no split 'val'; looked for .*val\.json, .*The data set \(COCO\) has train\.",
    ):
        load_split(str(folder), "val")


@pytest.mark.parametrize("text", ["{", "", "not json"])
def test_not_json(folder, text):
    with pytest.raises(InputError, match=r"train\.json: not JSON"):
        load(folder, text)


def test_not_text(folder):
    (folder / "train.json").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(InputError, match=r"train\.json: not JSON"):
        load_split(str(folder), "train")


@pytest.mark.parametrize("missing", ["images", "annotations", "categories"])
def test_not_coco(folder, coco, missing):
    del coco[missing]
    with pytest.raises(InputError, match=r"train\.json: not a COCO file"):
        load(folder, coco)


def test_a_list_is_not_coco(folder, coco):
    with pytest.raises(InputError, match="not a COCO file"):
        load(folder, coco["annotations"])


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("images", "id"),
        ("images", "file_name"),
        ("annotations", "image_id"),
        ("annotations", "category_id"),
        ("annotations", "bbox"),
        ("categories", "id"),
        ("categories", "name"),
    ],
)
def test_entry_without_a_field(folder, coco, part, key):
    del coco[part][1][key]
    with pytest.raises(InputError, match=rf"train\.json: {part}\[1\] .*`{key}`"):
        load(folder, coco)


def test_unknown_image_id(folder, coco):
    coco["annotations"][1]["image_id"] = 8
    with pytest.raises(InputError, match="annotation 9 has the unknown image_id 8"):
        load(folder, coco)


def test_unknown_category_id(folder, coco):
    coco["annotations"][2]["category_id"] = 0
    with pytest.raises(InputError, match="annotation 6 has the unknown category_id 0"):
        load(folder, coco)


@pytest.mark.parametrize(("part", "word"), [("images", "image"), ("categories", "category")])
def test_duplicate_ids(folder, coco, part, word):
    coco[part][1]["id"] = coco[part][0]["id"]
    with pytest.raises(InputError, match=f"{word} ids are not unique"):
        load(folder, coco)


def test_missing_image_file(folder, coco):
    data = load(folder, coco)
    (folder / "images" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png: no such image, but train\.json lists it"):
        data.open_image(1)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([5, 5, 0, 4], "is empty"),
        ([5, 5, 4, -1], "is empty"),
        ([-1.5, 5, 4, 4], "lies outside its image of 20 x 60"),
        ([5, -2, 4, 4], "lies outside"),
        ([5, 5, 16.5, 4], "lies outside"),
        ([5, 5, 4, 56.5], "lies outside"),
        ([math.nan, 5, 4, 4], "four finite numbers"),
        ([5, 5, math.inf, 4], "four finite numbers"),
        ([5, 5, 4], "four finite numbers"),
        ([5, 5, 4, 4, 4], "four finite numbers"),
        ([], "four finite numbers"),
        ([5, 5, None, 4], "four finite numbers"),
        ([5, 5, "wide", 4], "four finite numbers"),
        (None, "four finite numbers"),
        ("1234", "four finite numbers"),
    ],
)
def test_bad_box(folder, coco, box, problem):
    coco["annotations"][2]["bbox"] = box
    with pytest.raises(InputError, match=rf"train\.json.*{problem}"):
        load(folder, coco)


def test_a_pixel_outside_is_rounding(folder, coco):
    coco["annotations"][2]["bbox"] = [-1, -1, 22, 62]
    assert load(folder, coco).boxes[1][1] == (-1, -1, 22, 62)


def test_split_without_images(folder, coco):
    with pytest.raises(InputError, match="split 'train' has no images"):
        load(folder, {**coco, "images": [], "annotations": []})


@pytest.mark.parametrize(
    ("part", "value"),
    [("images", None), ("annotations", [1]), ("categories", [{"id": [1], "name": "a"}]), ("images", [{"id": 1}, 3])],
)
def test_wrong_types_are_one_error(folder, coco, part, value):
    with pytest.raises(InputError, match="train"):
        load(folder, {**coco, part: value})


def test_split_without_boxes(folder, coco):
    for annotation in coco["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(InputError, match="split 'train' has no boxes"):
        load(folder, coco)
    coco["annotations"] = []
    with pytest.raises(InputError, match="split 'train' has no boxes"):
        load(folder, coco)


def test_categories_of_one_name(folder, coco):
    for category in coco["categories"]:
        category["name"] = "cell"
    with pytest.raises(InputError, match="split 'train' has several categories named cell"):
        load(folder, coco)


def test_split_without_categories(folder, coco):
    with pytest.raises(InputError, match="split 'train' has no categories"):
        load(folder, {**coco, "annotations": [], "categories": []})


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("images", {"id": 1}, "`images` must be a list"),
        ("categories", "cat", "`categories` must be a list"),
        ("annotations", [1], r"annotations\[0\] must be an object, got 1"),
        ("categories", [{"id": [1], "name": "a"}], r"categories\[0\]: `id` must be .*, got \[1\]"),
        (
            "images",
            [{"id": 1, "file_name": "a", "width": [9], "height": 9}],
            r"images\[0\]: `width` and `height` must be numbers, got \(\[9\], 9\)",
        ),
        ("images", [{"id": 1, "file_name": 3, "width": 9, "height": 9}], r"images\[0\]: `file_name` must be .*, got 3"),
        ("categories", [{"id": 90, "name": None}], "`name` of category 90 must be .*, got None"),
    ],
)
def test_wrong_types_name_the_entry(folder, coco, part, value, message):
    coco = {**coco, "annotations": [], part: value}
    with pytest.raises(InputError, match=rf"train\.json: {message}"):
        load(folder, coco)


@pytest.mark.parametrize(
    ("flag", "crowd"), [(0, False), ("0", False), (False, False), (None, False), ("1", True), (1.0, True), (True, True)]
)
def test_crowd_flags(folder, coco, flag, crowd):
    coco["annotations"][2]["iscrowd"] = flag
    assert load(folder, coco).crowds[1] == [False, crowd]


@pytest.mark.parametrize("flag", ["yes", 2, [1], ""])
def test_bad_crowd_flag(folder, coco, flag):
    coco["annotations"][2]["iscrowd"] = flag
    with pytest.raises(InputError, match=r"train\.json: annotation 6: `iscrowd`"):
        load(folder, coco)


def test_categories_of_one_phrase_are_listed(folder, coco):
    coco["categories"][2]["name"] = "white  cell."
    with pytest.raises(InputError, match=r"named white cell \('White Cell', 'white cell\.'\)"):
        load(folder, coco)


@pytest.mark.parametrize("name", ["", " ", "?."])
def test_category_without_a_word(folder, coco, name):
    coco["categories"][2]["name"] = name
    with pytest.raises(InputError, match=r"split 'train': .* has no word for a prompt"):
        load(folder, coco)


def test_ids_of_other_types(folder, coco):
    """Tables write whole numbers as floats; some tools name images by strings."""
    coco["images"][0]["id"] = coco["annotations"][1]["image_id"] = "b"
    coco["annotations"][0]["category_id"] = 90.0
    data = load(folder, coco)
    assert data.image_ids == ["b", 7, 1000]
    assert data.labels == [[1], [0, 1], []]


# ---- box formats


def as_xyxy(coco: dict) -> dict:
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]
    return coco


def test_xyxy_boxes_are_kept_as_xywh(folder, coco):
    boxes = load(folder, coco).boxes
    assert load(folder, as_xyxy(coco), bbox_format="xyxy").boxes == boxes


def test_boxes_of_the_other_format(folder, coco):
    """Some boxes fit as both; what counts is that all fit as the other."""
    with pytest.raises(InputError, match=r"image 7: box \[10, 50, 10, 10\] is empty; .*bbox_format='xywh'"):
        load(folder, coco, bbox_format="xyxy")
    with pytest.raises(InputError, match=r"image 7: box \[10, 50, 20, 60\] lies outside .*bbox_format='xyxy'"):
        load(folder, as_xyxy(coco))


def test_a_bad_box_is_not_taken_for_another_format(folder, coco):
    coco["annotations"][0]["bbox"] = [1, 2, 30, 4]
    with pytest.raises(InputError, match="lies outside") as error:
        load(folder, coco)
    assert "bbox_format" not in str(error.value)


def test_bad_boxes_are_left_out_only_when_asked(folder, coco):
    """COCO's own train2017 has boxes without width or height."""
    kept = load(folder, coco)
    bad = [[1, 2, 0, 4], [1, 2, 30, 4], [float("nan"), 2, 3, 4]]
    coco["annotations"][:0] = [
        {"id": 50 + i, "image_id": 7, "category_id": 3, "bbox": box} for i, box in enumerate(bad)
    ]
    with pytest.raises(InputError, match=r"box \[1, 2, 0, 4\] is empty; .*; skip_bad_boxes=True leaves such boxes out"):
        load(folder, coco)
    data = load(folder, coco, skip_bad_boxes=True)
    assert [data.boxes, data.labels, data.crowds] == [kept.boxes, kept.labels, kept.crowds]
    assert [text.partition("box ")[2].split("]")[0] for text in data.left_out] == [
        "[1, 2, 0, 4",
        "[1, 2, 30, 4",
        "[nan, 2, 3, 4",
    ]


def test_unknown_box_format(folder, coco):
    with pytest.raises(InputError, match=r"bbox_format='yxyx': must be one of xywh, xyxy"):
        load(folder, coco, bbox_format="yxyx")


# ---- names for prompts


def test_class_names_file(folder, coco):
    names = put(folder / "names.txt", {"White Cell": "white blood cell", "cat": "tabby"})
    assert load(folder, coco, class_names_file=str(names)).class_names == ["white blood cell", "dog", "tabby"]


def test_class_names_file_may_swap_names(folder, coco):
    names = put(folder / "names.txt", {"dog": "cat", "cat": "dog"})
    assert load(folder, coco, class_names_file=names).class_names == ["White Cell", "cat", "dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"Dog": "hound"}, r"there is no class 'Dog'; the classes are 'White Cell', 'dog', 'cat'"),
        ({"dog": 3}, "the new name of 'dog' must be a string, got 3"),
        ({"dog": None}, "the new name of 'dog' must be a string, got None"),
        (["dog"], "must be a JSON object"),
    ],
)
def test_bad_class_names_file(folder, coco, content, message):
    with pytest.raises(InputError, match=rf"names\.txt: {message}"):
        load(folder, coco, class_names_file=put(folder / "names.txt", content))


def test_unreadable_class_names_file(folder, coco):
    with pytest.raises(InputError, match=r"names\.txt: cannot be read"):
        load(folder, coco, class_names_file=folder / "names.txt")
    (folder / "names.txt").write_text("dog: hound")
    with pytest.raises(InputError, match=r"names\.txt: not JSON"):
        load(folder, coco, class_names_file=folder / "names.txt")


def test_renamed_to_one_phrase(folder, coco):
    names = put(folder / "names.txt", {"dog": "animal", "cat": "Animal."})
    with pytest.raises(InputError, match=r"several categories named animal \('animal', 'Animal\.'\)"):
        load(folder, coco, class_names_file=names)


def test_class_names_column(folder, coco):
    for category, synonyms in zip(coco["categories"], (["leukocyte", "WBC"], "hot_dog", ["tabby"]), strict=True):
        category["synonyms"] = synonyms
    data = load(folder, coco, class_names_column="synonyms")
    assert data.class_names == ["leukocyte", "hot_dog", "tabby"]
    # The file names what the column gave.
    names = put(folder / "names.txt", {"hot_dog": "hot dog"})
    data = load(folder, coco, class_names_column="synonyms", class_names_file=names)
    assert data.class_names == ["leukocyte", "hot dog", "tabby"]


@pytest.mark.parametrize("value", [[], 3, [3], None])
def test_bad_class_names_column(folder, coco, value):
    for category in coco["categories"]:
        category["synonyms"] = value
    with pytest.raises(InputError, match=r"train\.json: `synonyms` of category 90"):
        load(folder, coco, class_names_column="synonyms")
    del coco["categories"][0]["synonyms"]
    with pytest.raises(InputError, match=r"train\.json: category 90 \('White Cell'\) has no `synonyms`"):
        load(folder, coco, class_names_column="synonyms")


# ---- pictures


def test_loading_opens_no_picture(folder, coco):
    shutil.rmtree(folder / "images")
    assert len(load(folder, coco)) == 3


def cut_short(width: int, height: int, kind: str) -> bytes:
    """The first half of a picture's file: its header and some of its pixels."""
    noise = Image.frombytes("L", (width, height), random.Random(0).randbytes(width * height))
    file = io.BytesIO()
    noise.save(file, kind)
    return file.getvalue()[: file.tell() // 2]


def damage(folder: Path) -> None:
    """A picture of another size, one that is cut short and one that is none."""
    picture(41, 30).save(folder / "images" / "b.png")
    (folder / "images" / "a.png").write_bytes(cut_short(20, 60, "PNG"))
    (folder / "images" / "deep" / "c.png").write_text("no picture")


DAMAGES = (
    r"b\.png: \(41, 30\) pixels, but train\.json says \(40, 30\)",
    r"a\.png: cannot be opened as an image",
    r"c\.png: cannot be opened as an image",
)


@pytest.mark.parametrize("index", range(3))
def test_damaged_pictures(folder, coco, index):
    data = load(folder, coco)
    damage(folder)
    with pytest.raises(InputError, match=DAMAGES[index]):
        data.open_image(index)


def test_check_images(folder, coco):
    data = load(folder, coco)
    assert check_images(data, disable_progress=True) == {}
    (folder / "images" / "a.png").unlink()
    problems = check_images(data, disable_progress=True)
    assert list(problems) == [1] and "a.png: no such image" in problems[1]
    damage(folder)
    problems = check_images(data, disable_progress=True)
    assert list(problems) == [0, 1, 2]
    assert all(str(folder) in text for text in problems.values())


def test_check_images_shows_its_progress(folder, coco, capsys):
    check_images(load(folder, coco), disable_progress=False)
    assert "checking images" in capsys.readouterr().err


def test_an_interrupted_check_ends(folder, coco):
    opened = []

    def interrupt(index: int) -> None:
        opened.append(index)
        time.sleep(0.01)
        if len(opened) == 5:
            raise KeyboardInterrupt

    data = load(folder, coco).subset([0] * 2000)
    data.open_image = interrupt
    with pytest.raises(KeyboardInterrupt):
        check_images(data, disable_progress=True)
    assert len(opened) < 2000


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("annotated", ["as stored", "as shown"])
def test_pictures_turned_by_exif(folder, coco, orientation, annotated):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture(40, 30).save(folder / "images" / "b.jpg", exif=exif)
    size = (30, 40) if annotated == "as shown" and orientation >= 5 else (40, 30)
    image = {"id": 42, "file_name": "b.jpg", "width": size[0], "height": size[1]}
    boxes = [{"image_id": 42, "category_id": 3, "bbox": [0, 0, 5, 5]}]
    data = load(folder, {**coco, "images": [image], "annotations": boxes})
    assert data.open_image(0).size == size


def test_open_image_can_be_pickled(folder, coco):
    data = load(folder, coco)
    again = pickle.loads(pickle.dumps(data))
    assert again.open_image(0).tobytes() == data.open_image(0).tobytes()
    some = pickle.loads(pickle.dumps(data.subset([2, 0])))
    assert [some.open_image(i).size for i in range(2)] == [(10, 10), (40, 30)]


# ---- parts of a split


def test_subset(folder, coco):
    data = load(folder, coco)
    some = data.subset([2, 1]).subset([1])
    assert (some.image_ids, some.sizes, some.boxes) == ([7], [(20, 60)], [data.boxes[1]])
    assert (some.labels, some.crowds) == ([[0, 1]], [[False, False]])
    assert some.class_names == data.class_names
    assert some.open_image(0).size == (20, 60)
    assert len(data.subset([])) == 0 and len(data) == 3


def split_of(labels: list[list[int]], num_classes: int) -> DetectionSplit:
    return DetectionSplit(
        class_names=[f"class {i}" for i in range(num_classes)],
        image_ids=list(range(len(labels))),
        sizes=[(9, 9)] * len(labels),
        boxes=[[(0.0, 0.0, 5.0, 5.0)] * len(image) for image in labels],
        labels=labels,
        crowds=[[False] * len(image) for image in labels],
        open_image=lambda index: picture(9, 9),
    )


def random_split(seed: int) -> DetectionSplit:
    rng = random.Random(seed)
    labels = [[min(int(rng.expovariate(0.6)), 7) for _ in range(rng.randrange(4))] for _ in range(60)]
    return split_of(labels, num_classes=9)


def images_of(data: DetectionSplit, images, label: int) -> int:
    return sum(label in data.labels[image] for image in images)


@pytest.mark.parametrize("seed", [0, 3, 30, 300])
@pytest.mark.parametrize("shots", [1, 3, 5, 10])
def test_few_shot(seed, shots):
    data = random_split(seed)
    taken = few_shot(data, shots, seed)
    assert taken == sorted(set(taken))
    for label in range(9):
        assert images_of(data, taken, label) >= min(shots, images_of(data, range(60), label))
    assert all(data.labels[image] for image in taken)
    assert set(few_shot(data, shots - 1, seed)) <= set(taken)


def test_few_shot_is_glips_protocol():
    """Image by image in a shuffled order, counting down what each class still needs."""
    data = random_split(1)
    order = [image for image in range(60) if data.labels[image]]
    random.Random(30).shuffle(order)
    needed, taken = [3] * 9, []
    for image in order:
        if any(needed[label] > 0 for label in set(data.labels[image])):
            taken.append(image)
            for label in set(data.labels[image]):
                needed[label] -= 1
    assert few_shot(data, 3, 30) == sorted(taken)


def test_few_shot_depends_on_seed_and_data_alone():
    data = random_split(2)
    random.seed(1)
    first = few_shot(data, 2, seed=0)
    random.seed(2)
    assert few_shot(data, 2, seed=0) == first
    assert len({tuple(few_shot(data, 2, seed)) for seed in range(5)}) > 1
    # Images by their ids, not by their place in the file.
    turned = data.subset(range(59, -1, -1))
    assert {turned.image_ids[i] for i in few_shot(turned, 2, seed=0)} == {data.image_ids[i] for i in first}


def test_few_shot_counts_no_crowds():
    data = split_of([[0], [0], [0, 1], [1]], num_classes=2)
    data.crowds = [[True], [False], [True, False], [True]]
    for seed in range(5):
        assert few_shot(data, 5, seed) == [1, 2]


def test_few_shot_of_ids_of_two_types():
    data = split_of([[0], [0]], num_classes=1)
    data.image_ids = ["a", 1]
    assert len(few_shot(data, 1, seed=0)) == 1


def test_classes_are_matched_by_name(folder, coco):
    """Each split has its own order, and lacks classes that it does not use."""
    train = load(folder, coco)
    val = load(folder, {**coco, "categories": [coco["categories"][i] for i in (1, 0)]}, "val")
    assert val.class_names == ["dog", "White Cell"]
    matched = match_classes({"train": train, "val": val})
    for data in matched.values():
        assert data.class_names == ["White Cell", "dog", "cat"]
        assert data.labels == train.labels
    assert matched["val"].image_ids == val.image_ids and val.labels == [[0], [1, 0], []]
    # The first split determines the order. Classes that only another split has follow.
    assert match_classes({"val": val, "train": train})["train"].class_names == ["dog", "White Cell", "cat"]


@pytest.mark.parametrize("size", [3, 4, 20, 101])
def test_divide(size):
    data = split_of([[0]] * size + [[]] * 10, num_classes=1)
    parts = divide(data, seed=0)
    assert list(parts) == ["train", "val", "test"]
    assert sorted(index for part in parts.values() for index in part) == list(range(size + 10))
    for part in ("val", "test"):
        # Images without objects are in each part too, and none of the parts has only those.
        assert len([index for index in parts[part] if index < size]) == max(1, round(0.15 * size))
        assert len([index for index in parts[part] if index >= size]) == 2
    # By ids, not by places in the file.
    turned = data.subset(range(size + 9, -1, -1))
    again = {name: [turned.image_ids[index] for index in part] for name, part in divide(turned, seed=0).items()}
    assert {name: sorted(part) for name, part in again.items()} == parts
    assert size < 20 or divide(data, seed=1)["test"] != parts["test"]


def test_too_few_images_to_divide():
    with pytest.raises(InputError, match="needs at least 3 images with objects to be divided, got 2"):
        divide(split_of([[0], [0], [], []], num_classes=1), seed=0)


def test_names_are_given_after_the_classes_are_matched(folder, coco):
    """A split without a class takes a file that renames it."""
    put(folder / "train.json", coco)
    put(folder / "val.json", {**coco, "categories": [coco["categories"][i] for i in (1, 0)]})
    names = put(folder / "names.json", {"cat": "kitten", "dog": "hound"})
    splits = load_splits(str(folder), ["train", "val"], Accelerator(), class_names_file=names)
    assert splits["val"].class_names == splits["train"].class_names == ["White Cell", "hound", "kitten"]
    # Letter case does not matter to a detector.
    put(folder / "val.json", {**coco, "categories": [{"id": 90, "name": "white  CELL"}, {"id": 3, "name": "Dog"}]})
    splits = load_splits(str(folder), ["train", "val"], Accelerator())
    assert splits["val"].class_names == ["White Cell", "dog", "cat"] and splits["val"].labels == [[1], [0, 1], []]


def test_machines_with_different_copies_of_a_data_set(folder, coco, monkeypatch):
    """As two processes see it, of which the second has fewer images in its copy."""
    put(folder / "train.json", coco)
    mine = load_split(str(folder), "train")
    fingerprints = [{"train": data.fingerprint()} for data in (mine, mine.subset([0]))]
    process = SimpleNamespace(num_processes=2, process_index=0, is_local_main_process=False, print=lambda _: None)
    monkeypatch.setattr(loading, "gather_object", lambda own: own + fingerprints[1:])
    with pytest.raises(
        InputError, match="process 1 has read another split 'train' than the main process; all machines"
    ):
        load_splits(str(folder), ["train"], process)
    # Equal copies. The objects that this process gathers later are images that it cannot open, of which it has none.
    monkeypatch.setattr(loading, "gather_object", lambda own: 2 * own)
    assert load_splits(str(folder), ["train"], process)["train"].fingerprint() == mine.fingerprint()


def test_line_breaks_in_names(folder, coco):
    coco["categories"][0]["name"] = "White\n  Cell\t"
    assert load(folder, coco).class_names[0] == "White Cell"


def test_fingerprint(folder, coco):
    data = load(folder, coco)
    assert len(data.fingerprint()) == 16 and int(data.fingerprint(), 16)
    assert load(folder, coco).fingerprint() == data.fingerprint()
    changes = {
        "class_names": ["White Cell", "dog", "cow"],
        "image_ids": [42, 7, 1001],
        "sizes": [(40, 30), (20, 60), (10, 11)],
        "boxes": [[(0, 0, 40, 30)], [(1, 2, 3.5, 4), (10, 50, 10, 9)], []],
        "labels": [[1], [0, 2], []],
        "crowds": [[True], [False, True], []],
    }
    changed = [dataclasses.replace(data, **{name: value}) for name, value in changes.items()]
    assert len({split.fingerprint() for split in [data, data.subset([1, 0, 2]), *changed]}) == 8


# ---- rows of the Hub

OBJECT = {
    "bbox": datasets.Sequence(datasets.Value("float32"), length=4),
    "category": datasets.ClassLabel(names=["cat", "dog"]),
}
# `Sequence` of a dict becomes a dict of lists; a list of a dict stays one.
LAYOUTS = {
    "dict of lists": (
        datasets.Sequence(OBJECT),
        [
            {"bbox": [[1, 2, 3, 4], [0, 0, 30, 20]], "category": [1, 0]},
            {"bbox": [], "category": []},
        ],
    ),
    "list of dicts": (
        [OBJECT],
        [
            [{"bbox": [1, 2, 3, 4], "category": 1}, {"bbox": [0, 0, 30, 20], "category": 0}],
            [],
        ],
    ),
}


def hub(monkeypatch, columns: dict, features: dict, splits=("train", "validation", "test")) -> None:
    """Serve the same rows for each split in place of the Hub."""
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(dict.fromkeys(splits, rows)))


def hub_rows(layout: str, **changes) -> tuple[dict, dict]:
    feature, objects = LAYOUTS[layout]
    return {"image": [picture(30, 20, (0, 0, 255)), picture(8, 9)], "objects": objects, **changes}, {
        "image": datasets.Image(),
        "objects": feature,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_rows_of_the_hub(monkeypatch, layout):
    columns, features = hub_rows(layout)
    assert isinstance(datasets.Features(features)["objects"], dict) == (layout == "dict of lists")
    hub(monkeypatch, columns, features)
    data = load_split("someone/some-data", "val")
    assert data.class_names == ["cat", "dog"]
    assert data.image_ids == [0, 1]
    assert data.sizes == [(30, 20), (8, 9)]
    assert data.boxes == [[(1, 2, 3, 4), (0, 0, 30, 20)], []]
    assert data.labels == [[1, 0], []]
    assert data.crowds == [[False, False], []]
    opened = data.open_image(0)
    assert opened.mode == "RGB" and opened.getpixel((3, 3)) == (0, 0, 255)
    assert len(data.as_coco()["annotations"]) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_box_of_the_hub(monkeypatch, layout):
    columns, features = hub_rows(layout)
    columns["image"] = [picture(5, 5), picture(8, 9)]
    hub(monkeypatch, columns, features)
    with pytest.raises(InputError, match=r"someone/some-data \(train\): image 0: box .* lies outside"):
        load_split("someone/some-data", "train")


def test_hub_without_such_data(monkeypatch):
    def refuse(name):
        raise FileNotFoundError("nothing here")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"dataset_name='no/such': no such folder.*nothing here"):
        load_split("no/such", "train")


@pytest.mark.parametrize("column", ["image", "objects"])
def test_column_missing(monkeypatch, column):
    columns, features = hub_rows("dict of lists")
    columns[f"my_{column}"], features[f"my_{column}"] = columns.pop(column), features.pop(column)
    hub(monkeypatch, columns, features)
    with pytest.raises(InputError, match=rf"no column {column}; it has .*my_{column}"):
        load_split("someone/some-data", "train")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("field", ["bbox", "category"])
def test_field_of_objects_missing(monkeypatch, layout, field):
    columns, features = hub_rows(layout)
    left = {key: value for key, value in OBJECT.items() if key != field}
    lists = {key: datasets.Sequence(value) for key, value in left.items()}
    features["objects"] = lists if layout == "dict of lists" else [left]
    empty = {key: [] for key in left}
    columns["objects"] = [empty, empty] if layout == "dict of lists" else [[], []]
    hub(monkeypatch, columns, features)
    with pytest.raises(InputError, match=f"`objects` has no `{field}`"):
        load_split("someone/some-data", "train")


def test_categories_without_names(monkeypatch):
    columns, features = hub_rows("dict of lists")
    features["objects"] = datasets.Sequence({**OBJECT, "category": datasets.Value("int64")})
    hub(monkeypatch, columns, features)
    with pytest.raises(InputError, match="has no class names"):
        load_split("someone/some-data", "train")


@pytest.fixture
def parquet(tmp_path, monkeypatch) -> str:
    """A data set as the Hub keeps it, with strings for categories; the train split lacks one class."""
    objects = {
        "train": [{"bbox": [[1, 2, 3, 4], [0, 0, 9, 9]], "category": ["dog", "ant"], "is_crowd": [0, 1]}],
        "validation": [{"bbox": [[1, 2, 3, 4]], "category": ["cat"], "is_crowd": [0]}, None],
    }
    feature = {
        "bbox": datasets.Sequence(datasets.Value("float32"), length=4),
        "category": datasets.Value("string"),
        "is_crowd": datasets.Value("int8"),
    }
    features = datasets.Features({"image": datasets.Image(), "objects": datasets.Sequence(feature)})
    for split, rows in objects.items():
        images = [picture(30, 20 + index) for index in range(len(rows))]
        rows = datasets.Dataset.from_dict({"image": images, "objects": rows}, features=features)
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    folder, load_dataset, names = str(tmp_path / "hub"), datasets.load_dataset, datasets.get_dataset_split_names
    monkeypatch.setattr(datasets, "load_dataset", lambda name: load_dataset(folder, cache_dir=str(tmp_path / "cache")))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: names(folder))
    return "someone/some-data"


def test_parquet_of_the_hub(parquet):
    train = load_split(parquet, "train")
    assert train.boxes == [[(1, 2, 3, 4), (0, 0, 9, 9)]]
    assert train.crowds == [[False, True]]
    val = load_split(parquet, "val")
    # Names are those of all splits, sorted, so that the splits agree.
    assert train.class_names == val.class_names == ["ant", "cat", "dog"]
    assert train.labels == [[2, 0]] and val.labels == [[1], []]
    assert val.sizes == [(30, 20), (30, 21)]
    again = pickle.loads(pickle.dumps(val.subset([1])))
    assert again.open_image(0).size == (30, 21)
    assert check_images(val, disable_progress=True) == {}


def test_splits_of_the_hub(parquet):
    assert [has_split(parquet, split) for split in ("train", "val", "valid", "validation", "test")] == [1, 1, 1, 1, 0]
    with pytest.raises(InputError, match=r"no split 'test'\. The data set \(the Hub\) has train, validation\."):
        load_split(parquet, "test")


def test_has_split_of_nothing(monkeypatch):
    def refuse(name):
        raise datasets.exceptions.DatasetNotFoundError

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    assert not has_split("no/such", "train")


def test_a_hub_that_does_not_answer_changes_no_choice_of_splits(monkeypatch):
    def refuse(name):
        raise ConnectionError("timed out")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(InputError, match=r"dataset_name='some/data': no such folder, .*\(timed out\)"):
        has_split("some/data", "test")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_sizes_come_from_headers(monkeypatch, kind):
    """A picture that ends after its header has a size; whoever opens it hears of it."""
    columns, features = hub_rows("list of dicts")
    columns["image"] = [picture(30, 20), {"bytes": cut_short(80, 90, kind), "path": None}]
    hub(monkeypatch, columns, features)
    data = load_split("someone/some-data", "train")
    assert data.sizes == [(30, 20), (80, 90)]
    with pytest.raises(InputError, match=r"someone/some-data \(train\): image 1: cannot be opened as an image"):
        data.open_image(1)
    assert list(check_images(data, disable_progress=True)) == [1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_of_the_hub_turned_by_exif(monkeypatch, kind, orientation):
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    picture(20, 30).save(file, kind, exif=exif)
    columns, features = hub_rows("list of dicts")
    columns["image"] = [{"bytes": file.getvalue(), "path": None}, picture(8, 9)]
    columns["objects"] = [[{"bbox": [1, 2, 3, 4], "category": 1}], []]
    hub(monkeypatch, columns, features)
    data = load_split("someone/some-data", "train")
    assert data.sizes[0] == data.open_image(0).size == ((30, 20) if orientation >= 5 else (20, 30))


@pytest.mark.parametrize("image", [{"bytes": b"no picture", "path": None}, None])
def test_no_picture_on_the_hub(monkeypatch, image):
    columns, features = hub_rows("list of dicts")
    columns["image"] = [picture(30, 20), image]
    hub(monkeypatch, columns, features)
    data = load_split("someone/some-data", "train")
    with pytest.raises(InputError, match=r"someone/some-data \(train\): image 1"):
        data.open_image(1)


def test_pictures_on_the_disk(monkeypatch, tmp_path):
    picture(30, 20).save(tmp_path / "a.png")
    columns, features = hub_rows("list of dicts")
    columns["image"] = [str(tmp_path / "a.png"), picture(8, 9)]
    hub(monkeypatch, columns, features)
    with pytest.raises(InputError, match=r"image 0: its file .* of the data set; allow_outside_images=True follows"):
        load_split("someone/some-data", "train")
    data = load_split("someone/some-data", "train", allow_outside_images=True)
    assert data.sizes[0] == data.open_image(0).size == (30, 20)
    picture(31, 20).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"image 0: \(31, 20\) pixels, but its header says \(30, 20\)"):
        data.open_image(0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"image 0: cannot be opened as an image .*a\.png"):
        data.open_image(0)


def test_column_of_other_things(monkeypatch):
    columns, features = hub_rows("list of dicts")
    columns["image"], features["image"] = ["a.png", "b.png"], datasets.Value("string")
    hub(monkeypatch, columns, features)
    with pytest.raises(InputError, match="the column image has no images"):
        load_split("someone/some-data", "train")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_xyxy_of_the_hub(monkeypatch, layout):
    columns, features = hub_rows(layout)
    hub(monkeypatch, columns, features)
    assert load_split("someone/some-data", "train", "xyxy").boxes == [[(1, 2, 2, 2), (0, 0, 30, 20)], []]


def named_rows(categories: list, names: list, category_type, name_type=None) -> tuple[dict, dict]:
    """One picture with a box a category, which a second field names."""
    feature = {
        "bbox": OBJECT["bbox"],
        "category": category_type,
        "label_text": name_type or datasets.Value("string"),
    }
    objects = {"bbox": [[0, 0, 5, 5]] * len(categories), "category": categories, "label_text": names}
    return {"image": [picture(9, 9)], "objects": [objects]}, {
        "image": datasets.Image(),
        "objects": datasets.Sequence(feature),
    }


@pytest.mark.parametrize(
    ("category_type", "categories", "class_names", "labels"),
    [
        # Numbers in their order, strings in theirs, a ClassLabel in its own; a class that is nowhere keeps its name.
        (datasets.Value("int64"), [70, 3, 70], ["red cell", "white cell"], [1, 0, 1]),
        (datasets.Value("string"), ["a", "b", "a"], ["white cell", "red cell"], [0, 1, 0]),
        (datasets.ClassLabel(names=["r", "x", "w"]), [2, 0, 2], ["red cell", "x", "white cell"], [2, 0, 2]),
    ],
)
def test_class_names_column_of_the_hub(monkeypatch, category_type, categories, class_names, labels):
    hub(monkeypatch, *named_rows(categories, ["white cell", "red cell", "white cell"], category_type))
    data = load_split("someone/some-data", "train", class_names_column="label_text")
    assert data.class_names == class_names
    assert data.labels == [labels]


def test_first_of_a_list_of_names_of_the_hub(monkeypatch):
    names = [["leukocyte", "WBC"], ["erythrocyte"]]
    columns, features = named_rows([1, 0], names, datasets.Value("int64"), [datasets.Value("string")])
    hub(monkeypatch, columns, features)
    data = load_split("someone/some-data", "train", class_names_column="label_text")
    assert data.class_names == ["erythrocyte", "leukocyte"]


def test_bad_class_names_column_of_the_hub(monkeypatch):
    hub(monkeypatch, *named_rows([1, 1], ["a", "b"], datasets.Value("int64")))
    with pytest.raises(InputError, match=r"image 0: category 1 is named 'b' here and 'a' before"):
        load_split("someone/some-data", "train", class_names_column="label_text")
    with pytest.raises(InputError, match=r"`objects` has no `text`; it has .*'label_text'"):
        load_split("someone/some-data", "train", class_names_column="text")
    with pytest.raises(InputError, match=r"has no class names; .*class_names_column=..."):
        load_split("someone/some-data", "train")


def test_class_names_file_of_the_hub(monkeypatch, tmp_path):
    hub(monkeypatch, *hub_rows("list of dicts"))
    names = put(tmp_path / "names.json", {"dog": "hound"})
    assert load_split("someone/some-data", "train", class_names_file=names).class_names == ["cat", "hound"]


def test_unknown_class_of_the_hub(monkeypatch):
    columns, features = hub_rows("list of dicts")
    columns["objects"][0][0] = {"bbox": [1, 2, 3, 4], "category": -1}
    hub(monkeypatch, columns, features)
    with pytest.raises(InputError, match=r"\(train\): image 0: unknown category -1"):
        load_split("someone/some-data", "train")


@pytest.mark.parametrize("category", [OBJECT["category"], datasets.Value("string")], ids=["ClassLabel", "string"])
def test_objects_of_several_lengths(monkeypatch, category):
    columns, features = hub_rows("dict of lists")
    features["objects"] = {"bbox": datasets.Sequence(OBJECT["bbox"]), "category": datasets.Sequence(category)}
    columns["objects"] = [{"bbox": [[1, 2, 3, 4]], "category": ["cat", "dog"]}, {"bbox": [], "category": []}]
    hub(monkeypatch, columns, features)
    with pytest.raises(InputError, match=r"\(train\): image 0: the fields of `objects` have different lengths"):
        load_split("someone/some-data", "train")


def test_missing_values_of_the_hub(monkeypatch):
    box, numbers = OBJECT["bbox"], datasets.Value("int64")
    columns, features = hub_rows("list of dicts")
    columns["objects"][0] = [None]
    hub(monkeypatch, columns, features)
    with pytest.raises(InputError, match=r"\(train\): image 0: a value in `objects` is missing"):
        load_split("someone/some-data", "train")

    columns, features = hub_rows("dict of lists")
    features["objects"] = {"bbox": datasets.Sequence(box), "category": datasets.Sequence(OBJECT["category"])}
    columns["objects"] = [{"bbox": None, "category": None}, {"bbox": [], "category": []}]
    hub(monkeypatch, columns, features)
    with pytest.raises(InputError, match=r"\(train\): image 0: a value in `objects` is missing"):
        load_split("someone/some-data", "train")

    hub(monkeypatch, *named_rows([1, None], ["a", "b"], numbers))
    with pytest.raises(InputError, match=r"\(train\): image 0: unknown category None"):
        load_split("someone/some-data", "train", class_names_column="label_text")
    hub(monkeypatch, *named_rows([None], ["a"], datasets.Value("string")))
    with pytest.raises(InputError, match=r"\(train\): image 0: unknown category None"):
        load_split("someone/some-data", "train")
    hub(monkeypatch, *named_rows([0, None], ["a", "b"], OBJECT["category"]))
    with pytest.raises(InputError, match=r"\(train\): image 0: unknown category None"):
        load_split("someone/some-data", "train")
    hub(monkeypatch, *named_rows([1], [None], numbers))
    with pytest.raises(InputError, match="image 0: `label_text` must be a name or a list of names, got None"):
        load_split("someone/some-data", "train", class_names_column="label_text")


def test_columns_of_the_hub_with_other_types(monkeypatch):
    columns, features = hub_rows("dict of lists")
    columns["objects"], features["objects"] = ["a", "b"], datasets.Value("string")
    hub(monkeypatch, columns, features)
    with pytest.raises(InputError, match="the column objects must have fields, got Value"):
        load_split("someone/some-data", "train")
    hub(monkeypatch, *named_rows([["a"]], ["a"], datasets.Sequence(datasets.Value("string"))))
    with pytest.raises(InputError, match=r"`objects.category` must be a number, a string or a ClassLabel, got"):
        load_split("someone/some-data", "train")


def test_a_bug_of_a_reader_is_not_called_bad_data(tmp_path, monkeypatch):
    def broken(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(coco_format, "find", broken)
    with pytest.raises(TypeError, match="a bug"):
        load_split(str(tmp_path), "train")


# ---- the photographs


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("bccd", {"train": 205, "val": 87, "test": 72}), ("boards", {"train": 87, "val": 35, "test": 27})],
)
@pytest.mark.skipif(not DATASETS.is_dir(), reason=f"no {DATASETS}: the photographs are not part of the repository")
def test_reads_the_photographs(name, sizes):
    for split, size in sizes.items():
        data = load_split(str(DATASETS / name), split)
        assert len(data) == size
        assert sum(map(len, data.boxes)) > size
        assert {label for labels in data.labels for label in labels} <= set(range(len(data.class_names)))
        assert data.open_image(size - 1).size == data.sizes[size - 1]
