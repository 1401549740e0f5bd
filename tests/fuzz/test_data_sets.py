# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Damaged data sets are read correctly, or raise an error of one line."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from peft_sdpt.detection import BOX_FORMATS, DetectionSplit, check_images, load_split
from peft_sdpt.detection.grounding import clean_name
from peft_sdpt.errors import InputError
from tests.helpers.formats import write_coco, write_labelme, write_voc, write_yolo
from tests.helpers.fuzz import BAD_NUMBERS, json_values, scalars, time_bound

pytestmark = pytest.mark.fuzz

NAMES = ["cat", "dog", "owl"]
IMAGES = {
    "a.png": ((40, 30), [(0, (2.0, 3.0, 10.0, 12.0)), (1, (20.0, 5.0, 15.0, 20.0))]),
    "b.png": ((30, 40), [(2, (1.0, 1.0, 28.0, 30.0))]),
    "c.png": ((32, 32), []),
}
MAX_LETTERS = 2000
# Bytes that can make a reader of text fail.
PIECES = (
    *(
        b"",
        b"\x00",
        b"\xff",
        b"\n",
        b"\r\n",
        b" ",
        b"\xef\xbb\xbf",
        b"\\ud800",
        b"-",
        b"1e400",
        b"nan",
        b"inf",
        b"null",
    ),
    *(b"9" * 400, b"9" * 5000, b"[" * 20_000, b"{" * 3000, b"<a>" * 3000, b"../" * 400, b"/etc/passwd", b"a" * 300),
    *(
        b"'",
        b'"',
        b"]",
        b"}",
        b",",
        b":",
        b"&",
        b"&amp;",
        b"*a",
        b"!!python/object:os.system",
        b"2001-13-45",
        b"%",
        b"#",
    ),
    b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nnames: [*c, *c, *c]\n",
)


# ---- damage


def places_in(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Yield the path of each value in a value of JSON."""
    if place:
        yield place
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places_in(child, (*place, key))


def parent_of(value: Any, place: tuple) -> Any:
    for key in place[:-1]:
        value = value[key]
    return value


@st.composite
def damaged(draw: st.DrawFn, good: Any) -> Any:
    """A value of JSON of which one to three values were replaced, removed, doubled, or swapped with another one."""
    value = copy.deepcopy(good)
    numbers = st.lists(st.sampled_from(BAD_NUMBERS) | st.floats(-5, 50), min_size=4, max_size=4)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        places = list(places_in(value))
        if not places:
            break
        place, other = draw(st.sampled_from(places)), draw(st.sampled_from(places))
        parent, key = parent_of(value, place), place[-1]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "double", "swap"]))
        if kind == "replace":
            parent[key] = draw(scalars | numbers | json_values)
        elif kind == "remove":
            del parent[key]
        elif kind == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            first, second = copy.deepcopy(parent[key]), copy.deepcopy(parent_of(value, other)[other[-1]])
            parent[key] = second
            if place != other[: len(place)]:
                parent_of(value, other)[other[-1]] = first
    return value


@st.composite
def damaged_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """A file of which one to three parts were replaced by something else, or by another part of it."""
    content = good
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 30)) | st.just(len(content)))
        other = draw(st.integers(0, len(content)))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=8) | st.just(content[other : other + 200]))
        content = content[:start] + piece + content[end:]
    return content


# ---- the expected result


def check_line(text: str) -> None:
    assert text.isprintable(), repr(text)
    assert 0 < len(text) <= MAX_LETTERS


def read(dataset: Path, split: str, **options: Any) -> DetectionSplit | None:
    """Read a split with all its images. Return None if this raised an error of one line."""
    with time_bound():
        try:
            data = load_split(str(dataset), split, **options)
        except InputError as error:
            check_line(str(error))
            return None
        problems = check_images(data, disable_progress=True)
    for line in (*data.left_out, *problems.values()):
        check_line(line)
    columns = (data.sizes, data.boxes, data.labels, data.crowds)
    assert len(data) > 0 and all(len(column) == len(data) for column in columns)
    assert data.class_names and len(set(data.class_names)) == len(data.class_names)
    assert all(name == clean_name(name) != "" for name in data.class_names)
    for index, ((width, height), boxes, labels, crowds) in enumerate(zip(*columns, strict=True)):
        assert len(boxes) == len(labels) == len(crowds)
        for box, label, crowd in zip(boxes, labels, crowds, strict=True):
            x, y, box_width, box_height = box
            assert all(map(math.isfinite, box)) and box_width > 0 and box_height > 0
            assert x >= -1 and y >= -1 and x + box_width <= width + 1 and y + box_height <= height + 1
            assert label in range(len(data.class_names)) and isinstance(crowd, bool)
        if index not in problems:
            image = data.open_image(index)
            assert (image.size, image.mode) == ((width, height), "RGB")
    assert data.has_objects() and len(data.fingerprint()) == 16
    json.dumps({"ids": data.image_ids, **data.as_coco()}, ensure_ascii=False).encode()
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with images. Beside it is an image that no data set may read."""
    outside = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (40, 30), "red").save(outside / "secret.png")
    folder = outside / "data"
    (folder / "images").mkdir(parents=True)
    for number, (name, (size, _)) in enumerate(IMAGES.items()):
        Image.new("RGB", size, (9, 9, number)).save(folder / "images" / name)
    return folder


def subfolder(folder: Path, name: str) -> Path:
    """Return a folder of its own for a format, with the same images."""
    new = folder.parent / name
    if not new.exists():
        new.mkdir()
        for image in (folder / "images").iterdir():
            (new / image.name).write_bytes(image.read_bytes())
    return new


COCO = write_coco(IMAGES, NAMES)
for image in COCO["images"]:
    image["file_name"] = f"images/{image['file_name']}"
OPTIONS = st.fixed_dictionaries(
    {"skip_bad_boxes": st.booleans()},
    optional={"bbox_format": st.sampled_from(list(BOX_FORMATS)), "class_names_column": st.sampled_from(["name", "id"])},
)


@given(content=damaged(COCO), options=OPTIONS)
def test_a_coco_file(folder, content, options):
    (folder / "train.json").write_text(json.dumps(content))
    data = read(folder, "train", **options)
    if data is None or options.get("bbox_format", "xywh") != "xywh":
        return
    # If the file was accepted, the result has its values.
    content = json.loads(json.dumps(content))
    column = options.get("class_names_column", "name")
    names = [category[column] for category in content["categories"]]
    assert data.class_names == [clean_name(name[0] if isinstance(name, list) else name) for name in names]
    position = {category["id"]: index for index, category in enumerate(content["categories"])}
    boxes: dict[Any, list] = {image["id"]: [] for image in content["images"]}
    for each in content["annotations"]:
        boxes[each["image_id"]].append((position[each["category_id"]], each["bbox"]))
    assert data.image_ids == list(boxes)
    for index, expected in enumerate(boxes.values()):
        got = list(zip(data.labels[index], data.boxes[index], strict=True))
        if options["skip_bad_boxes"]:
            expected = [(label, box) for label, box in expected if (label, numbers(box)) in got]
            assert len(expected) >= len(got)
        else:
            assert got == [(label, numbers(box)) for label, box in expected]


def numbers(box: Any) -> tuple | None:
    try:
        return tuple(map(float, box))
    except (TypeError, ValueError, OverflowError):
        return None


@given(content=damaged_bytes(json.dumps(COCO).encode()))
def test_the_bytes_of_a_coco_file(folder, content):
    (folder / "train.json").write_bytes(content)
    read(folder, "train")


LABELME = write_labelme("a.png", *IMAGES["a.png"], NAMES)


@given(content=damaged(LABELME))
def test_a_file_of_labelme(folder, content):
    files = subfolder(folder, "labelme")
    for name in ("b", "c"):
        (files / f"{name}.json").write_text(json.dumps(write_labelme(f"{name}.png", *IMAGES[f"{name}.png"], NAMES)))
    (files / "a.json").write_text(json.dumps(content))
    data = read(files, "default")
    if data is not None and content == LABELME:
        assert data.boxes[0] == [box for _, box in IMAGES["a.png"][1]]


VOC = write_voc("a.png", *IMAGES["a.png"], NAMES).encode()


@given(content=damaged_bytes(VOC), texts=st.lists(scalars, max_size=2))
def test_a_file_of_voc(folder, content, texts):
    files = subfolder(folder, "voc")
    (files / "b.xml").write_text(write_voc("b.png", *IMAGES["b.png"], NAMES))
    for text in texts:  # replace values of the file by these
        said = escape(str(text)).encode("utf-8", "replace")
        content = content.replace(b"<name>cat", b"<name>" + said).replace(b"<ymin>4.0", b"<ymin>" + said)
    (files / "a.xml").write_bytes(content)
    read(files, "default")


DATA_YAML = {
    "path": ".",
    "train": "images/train",
    "val": "images/val",
    "nc": 3,
    "names": {0: "cat", 1: "dog", 2: "owl"},
}


def yolo(folder: Path) -> Path:
    files = folder.parent / "yolo"
    if not files.exists():
        for part in ("images/train", "labels/train", "images/val", "labels/val"):
            (files / part).mkdir(parents=True)
            for name, (size, objects) in IMAGES.items():
                if part.startswith("images"):
                    (files / part / name).write_bytes((folder / "images" / name).read_bytes())
                else:
                    (files / part / name).with_suffix(".txt").write_text(write_yolo(size, objects))
    return files


@given(labels=damaged_bytes(write_yolo(*IMAGES["a.png"]).encode()))
def test_a_label_file_of_yolo(folder, labels):
    files = yolo(folder)
    (files / "data.yaml").write_text(yaml.safe_dump(DATA_YAML))
    (files / "labels" / "train" / "a.txt").write_bytes(labels)
    read(files, "train")


@given(content=damaged(DATA_YAML), split=st.sampled_from(["train", "val"]))
def test_a_data_yaml(folder, content, split):
    files = yolo(folder)
    (files / "labels" / "train" / "a.txt").write_text(write_yolo(*IMAGES["a.png"]))
    # Like JSON, but it also has numbers as keys.
    (files / "data.yaml").write_text(json.dumps(content) if needs_json(content) else yaml.safe_dump(content))
    read(files, split)


def needs_json(content: Any) -> bool:
    """Return whether a value has halves of surrogate pairs, which YAML cannot write."""
    try:
        yaml.safe_dump(content).encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        return True
    return False


@given(content=damaged_bytes(yaml.safe_dump(DATA_YAML).encode()))
def test_the_bytes_of_a_data_yaml(folder, content):
    files = yolo(folder)
    (files / "labels" / "train" / "a.txt").write_text(write_yolo(*IMAGES["a.png"]))
    (files / "data.yaml").write_bytes(content)
    read(files, "train")
    read(files / "data.yaml", "val")


@given(names=damaged_bytes(b"cat\ndog\nowl\n"), listed=damaged_bytes(b"images/train/a.png\nimages/train/b.png\n"))
def test_lists_of_yolo(folder, names, listed):
    files = yolo(folder)
    (files / "data.yaml").unlink(missing_ok=True)
    (files / "labels" / "train" / "a.txt").write_text(write_yolo(*IMAGES["a.png"]))
    (files / "classes.txt").write_bytes(names)
    (files / "test.txt").write_bytes(listed)
    read(files, "test")
    (files / "classes.txt").unlink()


def test_good_data_sets_are_read(folder):
    """The data sets are valid before they are damaged."""
    (folder / "train.json").write_text(json.dumps(COCO))
    test_a_file_of_labelme.hypothesis.inner_test(folder, LABELME)
    test_a_file_of_voc.hypothesis.inner_test(folder, VOC, [])
    yolo(folder)
    (folder.parent / "yolo" / "data.yaml").write_text(yaml.safe_dump(DATA_YAML))
    parts = (folder, "train"), (folder.parent / "labelme", "default"), (folder.parent / "voc", "default")
    for place, split in (*parts, (folder.parent / "yolo", "train")):
        data = read(place, split)
        for (_, objects), boxes in zip(IMAGES.values(), data.boxes, strict=False):
            assert boxes == [pytest.approx(box, abs=1e-4) for _, box in objects]
