# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Reading COCO folders and rows of the Hub, and every input that is refused."""

import json
import math
from pathlib import Path

import datasets
import pytest
from PIL import Image

from coco_data import load_split
from errors import InputError

DATASETS = Path(__file__).resolve().parents[2] / "shared" / "datasets"


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


def load(folder: Path, coco, split: str = "train"):
    (folder / f"{split}.json").write_text(coco if isinstance(coco, str) else json.dumps(coco))
    return load_split(str(folder), split)


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


def test_missing_file(folder, coco):
    load(folder, coco)
    with pytest.raises(InputError, match=r"no split 'val'; looked for val\.json, .*There is train\.json\."):
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
        ("images", "width"),
        ("images", "height"),
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
    with pytest.raises(InputError, match="annotation 9 is of image 8"):
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
    with pytest.raises(InputError, match=r"--dataset_name 'no/such', split 'train': no such folder.*nothing here"):
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
