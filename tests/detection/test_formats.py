# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""All formats give the same small data set, and each reader raises errors for files that it cannot read."""

import json
import os
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import datasets
import pytest
from accelerate import Accelerator
from PIL import ExifTags, Image

from peft_sdpt.detection import (
    DetectionSplit,
    check_images,
    evaluate,
    find_splits,
    has_split,
    load_base_model,
    load_processor,
    load_split,
    load_splits,
    match_classes,
    only_split,
    set_image_size,
)
from peft_sdpt.errors import InputError
from tests.helpers.detectors import ROOT
from tests.helpers.formats import write_coco, write_labelme, write_voc, write_yolo

SHARED = ROOT.parent / "shared"
HOST = ROOT / "examples" / "host"
NAMES = ["cat", "dog", "owl"]
# File name, size, and objects as (class, box).
IMAGES = {
    "a.png": ((64, 48), [(1, (4, 6, 20, 12)), (0, (0, 0, 64, 48))]),
    "b c.png": ((40, 80), [(2, (10, 30, 8, 16))]),
    "d.jpg": ((32, 32), []),
}


def colour_of(name: str) -> tuple[int, int, int]:
    return tuple(random.Random(name).choices(range(256), k=3))


def picture_files(folder: Path, names=IMAGES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", IMAGES[name][0], colour_of(name)).save(folder / name, quality=100)


def put(file: Path, content) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def coco(names=IMAGES, prefix: str = "") -> dict:
    return write_coco({prefix + name: IMAGES[name] for name in names}, NAMES)


def yolo_lines(name: str) -> str:
    return write_yolo(*IMAGES[name])


def check(data: DetectionSplit, names=IMAGES) -> None:
    """Check that a data set is the one above, in any order."""
    assert data.class_names == NAMES
    found = {}
    for index in range(len(data)):
        image = data.open_image(index)
        assert image.size == data.sizes[index]
        boxes = [tuple(round(value, 4) for value in box) for box in data.boxes[index]]
        pixel = image.getpixel((3, 3))
        (name,) = [n for n in names if max(abs(a - b) for a, b in zip(colour_of(n), pixel, strict=True)) < 4]
        found[name] = (image.size, list(zip(data.labels[index], boxes, strict=True)))
    assert found == {name: IMAGES[name] for name in names}
    assert not any(map(any, data.crowds))
    assert len(set(map(str, data.image_ids))) == len(data)


# ---- one data set, many layouts


def yolo_of_ultralytics(folder: Path) -> None:
    for split in ("train", "val"):
        picture_files(folder / "images" / split)
        for name in ("a.png", "b c.png"):  # an image without objects has no file
            put((folder / "labels" / split / name).with_suffix(".txt"), yolo_lines(name))
    put(
        folder / "data.yaml",
        "path: /datasets/elsewhere\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n  2: owl\n",
    )


def yolo_of_roboflow(folder: Path) -> None:
    for split in ("train", "valid"):
        picture_files(folder / split / "images")
        for name in IMAGES:
            put((folder / split / "labels" / name).with_suffix(".txt"), yolo_lines(name))
    put(folder / "data.yaml", "train: ../train/images\nval: ../valid/images\n\nnc: 3\nnames: ['cat', 'dog', 'owl']\n")


def yolo_with_lists(folder: Path) -> None:
    """The data set has the lists of Darknet, and outlines instead of boxes."""
    picture_files(folder / "all" / "images")
    for name, (size, objects) in IMAGES.items():
        put((folder / "all" / "labels" / name).with_suffix(".txt"), write_yolo(size, objects, outlines=True))
    for split in ("train", "val"):
        put(folder / f"{split}.txt", "".join(f"./all/images/{name}\n" for name in IMAGES))
    put(folder / "my.yml", "train: train.txt\nval: val.txt\nnames: [cat, dog, owl]\n")


def yolo_of_keypoints(folder: Path) -> None:
    yolo_of_ultralytics(folder)
    for file in folder.rglob("labels/*/*.txt"):
        file.write_text("".join(f"{line} 0.5 0.5 2 0.1 0.2 1\n" for line in file.read_text().splitlines()))
    with (folder / "data.yaml").open("a") as stream:
        stream.write("kpt_shape: [2, 3]\n")


def yolo_of_cvat(folder: Path) -> None:
    for split in ("train", "val"):
        picture_files(folder / f"obj_{split}_data")
        for name in IMAGES:
            put((folder / f"obj_{split}_data" / name).with_suffix(".txt"), yolo_lines(name))
        put(folder / f"{split}.txt", "".join(f"data/obj_{split}_data/{name}\n" for name in IMAGES))
    put(folder / "obj.names", "cat\ndog\nowl\n")
    put(folder / "obj.data", "classes = 3\nnames = data/obj.names\n")


def yolo_of_label_studio(folder: Path) -> None:
    picture_files(folder / "images")
    for name in IMAGES:
        put((folder / "labels" / name).with_suffix(".txt"), yolo_lines(name))
    put(folder / "classes.txt", "cat\ndog\nowl\n")
    put(folder / "notes.json", {"categories": [{"id": 0, "name": "cat"}], "info": {}})


def yolo_of_supervision(folder: Path) -> None:
    """It writes a `data.yaml` without splits."""
    picture_files(folder / "images")
    for name in IMAGES:
        put((folder / "labels" / name).with_suffix(".txt"), yolo_lines(name))
    put(folder / "data.yaml", "nc: 3\nnames: [cat, dog, owl]\n")


def yolo_of_labelimg(folder: Path) -> None:
    picture_files(folder)
    for name in IMAGES:
        put((folder / name).with_suffix(".txt"), yolo_lines(name))
    put(folder / "classes.txt", "cat\ndog\nowl\n")


def voc(folder: Path) -> None:
    picture_files(folder / "JPEGImages")
    for name, (size, objects) in IMAGES.items():
        put((folder / "Annotations" / name).with_suffix(".xml"), write_voc(name, size, objects, NAMES))
    for split in ("train", "val"):
        put(folder / "ImageSets" / "Main" / f"{split}.txt", "a\nd\n")
        put(folder / "ImageSets" / "Main" / f"cat_{split}.txt", "a 1\nd -1\n")


def voc_of_roboflow(folder: Path) -> None:
    for split in ("train", "valid", "test"):
        picture_files(folder / split)
        for name, (size, objects) in IMAGES.items():
            put((folder / split / name).with_suffix(".xml"), write_voc(name, size, objects, NAMES, first=0))


def voc_of_labelimg(folder: Path) -> None:
    """The files have the path of another machine, a name without a suffix, and no size."""
    picture_files(folder / "images")
    for name, (_, objects) in IMAGES.items():
        xml = write_voc(Path(name).stem, (0, 0), objects, NAMES)
        put((folder / "annotations" / name).with_suffix(".xml"), xml)


def labelme(folder: Path) -> None:
    picture_files(folder)
    for name, (size, objects) in IMAGES.items():
        put((folder / name).with_suffix(".json"), write_labelme(name, size, objects, NAMES))


def labelme_with_splits(folder: Path) -> None:
    for split in ("train", "val"):
        picture_files(folder / split / "images")
        for name, (size, objects) in IMAGES.items():
            content = write_labelme(f"..\\images\\{name}", size, objects, NAMES, outlines=True)
            put((folder / split / "annotations" / name).with_suffix(".json"), content)
    put(folder / "class_names.json", {"cat": "kitten"})


def cvat(folder: Path) -> None:
    for split in ("train", "val"):
        picture_files(folder / "images" / split)
        put(folder / "annotations" / f"instances_{split}.json", coco())


def cvat_without_splits(folder: Path) -> None:
    picture_files(folder / "images" / "default")
    put(folder / "annotations" / "instances_default.json", coco())


def label_studio(folder: Path) -> None:
    picture_files(folder / "images")
    put(folder / "result.json", coco(prefix="images\\"))


def label_studio_of_a_server(folder: Path) -> None:
    picture_files(folder / "images")
    put(folder / "result.json", coco(prefix="../../label-studio/data/media/upload/1/"))


def fiftyone(folder: Path) -> None:
    picture_files(folder / "data")
    put(folder / "labels.json", coco())


def beside_the_images(folder: Path) -> None:
    picture_files(folder)
    put(folder / "annotations.json", coco())


def any_name(folder: Path) -> None:
    picture_files(folder / "pictures")
    put(folder / "birds-2026.json", coco(prefix="pictures/"))
    put(folder / "class_names.json", {"cat": "kitten"})


def one_train_file(folder: Path) -> None:
    picture_files(folder / "images")
    put(folder / "train.json", coco())


def rows(names=IMAGES, **other) -> datasets.Dataset:
    columns = {
        "image": [{"bytes": None, "path": None}] * len(names),
        "objects": [
            {"bbox": [list(box) for _, box in objects], "category": [label for label, _ in objects]}
            for _, objects in (IMAGES[name] for name in names)
        ],
    }
    return columns


FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "objects": {
            "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
            "category": datasets.List(datasets.ClassLabel(names=NAMES)),
        },
    }
)


def as_rows(folder: Path) -> datasets.Dataset:
    picture_files(folder / "raw")
    columns = rows()
    columns["image"] = [(folder / "raw" / name).read_bytes() for name in IMAGES]
    columns["image"] = [{"bytes": content, "path": None} for content in columns["image"]]
    shutil.rmtree(folder / "raw")
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def parquet(folder: Path) -> None:
    data = as_rows(folder)
    for split in ("train", "validation"):
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def saved_to_disk(folder: Path) -> None:
    data = as_rows(folder)
    datasets.DatasetDict({"train": data, "val": data}).save_to_disk(folder)


def one_saved_to_disk(folder: Path) -> None:
    as_rows(folder).save_to_disk(folder)


def imagefolder(folder: Path) -> None:
    """The form is that of the documentation of `datasets`, with `categories`, and names instead of numbers."""
    for split in ("train", "val"):
        picture_files(folder / split)
        lines = [
            json.dumps(
                {
                    "file_name": name,
                    "objects": {
                        "bbox": [list(box) for _, box in objects],
                        "categories": [NAMES[c] for c, _ in objects],
                    },
                }
            )
            for name, (_, objects) in IMAGES.items()
        ]
        put(folder / split / "metadata.jsonl", "\n".join(lines) + "\n")


WITH_SPLITS = {
    "YOLO": (yolo_of_ultralytics, yolo_of_roboflow, yolo_with_lists, yolo_of_keypoints, yolo_of_cvat),
    "Pascal VOC": (voc_of_roboflow,),
    "LabelMe": (labelme_with_splits,),
    "COCO": (cvat,),
    "rows": (parquet, saved_to_disk, imagefolder),
}
WITHOUT_SPLITS = {
    "YOLO": (yolo_of_label_studio, yolo_of_supervision, yolo_of_labelimg),
    "Pascal VOC": (voc_of_labelimg,),
    "LabelMe": (labelme,),
    "COCO": (
        cvat_without_splits,
        label_studio,
        label_studio_of_a_server,
        fiftyone,
        beside_the_images,
        any_name,
        one_train_file,
    ),
    "rows": (one_saved_to_disk,),
}


def each(writers: dict) -> list:
    return [pytest.param(writer, id=writer.__name__) for group in writers.values() for writer in group]


@pytest.mark.parametrize("write", each(WITH_SPLITS))
def test_a_format_with_splits(write, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data set"
    write(folder)
    for split in ("train", "val", "validation"):
        check(load_split(str(folder), split))
        assert has_split(str(folder), split)
    assert not has_split(str(folder), "minival") and only_split(find_splits(str(folder))) is None
    with pytest.raises(InputError, match=r"no split 'minival'.*The data set \(.*\) has .*train, val"):
        load_split(str(folder), "minival")


@pytest.mark.parametrize("write", each(WITHOUT_SPLITS))
def test_a_format_without_splits(write, tmp_path):
    folder = tmp_path / "data set"
    write(folder)
    (name,) = find_splits(str(folder))
    assert only_split([name]) == name
    check(load_split(str(folder), name))


def test_voc_itself(tmp_path):
    """Its splits are lists of names. Its other lists tell which images have a class."""
    voc(tmp_path)
    assert find_splits(str(tmp_path)) == ["train", "val"]
    data = load_split(str(tmp_path), "val")
    assert data.image_ids == ["Annotations/a", "Annotations/d"]
    # The classes are those of the listed images.
    assert data.class_names == ["cat", "dog"] and data.boxes[0] == [(4, 6, 20, 12), (0, 0, 64, 48)]
    put(tmp_path / "ImageSets" / "Main" / "trainval.txt", "a\nd\n")
    assert len(load_split(str(tmp_path), "trainval")) == 2
    put(tmp_path / "ImageSets" / "Main" / "train.txt", "a\nz\n")
    with pytest.raises(InputError, match=r"train\.txt: lists 'z', but there is no z\.xml in"):
        load_split(str(tmp_path), "train")


def test_the_file_in_place_of_the_folder(tmp_path):
    yolo_of_ultralytics(tmp_path / "yolo")
    check(load_split(str(tmp_path / "yolo" / "data.yaml"), "val"))
    beside_the_images(tmp_path / "coco")
    check(load_split(str(tmp_path / "coco" / "annotations.json"), "default"))


def test_images_that_are_named_as_splits(tmp_path):
    """Their files belong to images. They are not lists of images or annotations of a split."""
    names = {"train_1.png": "a.png", "test.png": "b c.png", "val.png": "d.jpg"}
    for folder in ("yolo", "labelme"):
        picture_files(tmp_path / folder)
        for new, old in names.items():
            size, objects = IMAGES[old]
            with Image.open(tmp_path / folder / old) as image:
                image.save(tmp_path / folder / new)
            (tmp_path / folder / old).unlink()
            put((tmp_path / "yolo" / new).with_suffix(".txt"), write_yolo(size, objects))
            put((tmp_path / "labelme" / new).with_suffix(".json"), write_labelme(new, size, objects, NAMES))
    put(tmp_path / "yolo" / "classes.txt", "\n".join(NAMES))
    for folder in ("yolo", "labelme"):
        assert find_splits(str(tmp_path / folder)) == ["default"]
        check(load_split(str(tmp_path / folder), "default"))


def test_splits_in_other_letter_case(tmp_path):
    cvat(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").rename(tmp_path / "annotations" / "instances_Train.json")
    (tmp_path / "images" / "train").rename(tmp_path / "images" / "Train")
    assert has_split(str(tmp_path), "train")
    check(load_split(str(tmp_path), "train"))


def test_only_an_evaluation_split_is_not_divided(tmp_path):
    picture_files(tmp_path / "images")
    put(tmp_path / "test.json", coco())
    assert find_splits(str(tmp_path)) == ["test"] and only_split(["test"]) is None


# ---- names of files


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_accents_in_any_form(tmp_path, written, stored):
    name = "Café Münster.png"
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / unicodedata.normalize(stored, name))
    content = write_coco({unicodedata.normalize(written, name): ((9, 9), [(0, (1, 1, 5, 5))])}, NAMES)
    put(tmp_path / "train.json", content)
    assert check_images(load_split(str(tmp_path), "train"), disable_progress=True) == {}


def test_two_names_of_one_file(tmp_path):
    """Two images may differ only in the folders that a tool leaves out."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "1.png")
    entry = ((9, 9), [(0, (1, 1, 5, 5))])
    put(tmp_path / "train.json", write_coco({"north/1.png": entry, "south/1.png": entry}, NAMES))
    with pytest.raises(InputError, match=r"'north/1\.png' and 'south/1\.png' are both found at .*1\.png"):
        load_split(str(tmp_path), "train")
    content = write_coco({"1.png": entry}, NAMES)
    content["images"].append({**content["images"][0], "id": 7})
    put(tmp_path / "train.json", content)
    with pytest.raises(InputError, match=r"'1\.png' and '1\.png' are both found at .*; each image needs one entry"):
        load_split(str(tmp_path), "train")


@pytest.mark.parametrize("write", [voc_of_labelimg, labelme, yolo_of_labelimg])
def test_the_same_names_in_several_folders(write, tmp_path):
    """Cameras number their photos from 1 on every day."""
    write(tmp_path / "day1")
    write(tmp_path / "day2")
    for file in (tmp_path / "day2").rglob("*.[pj][np]g"):
        Image.new("RGB", IMAGES[file.name][0], "white").save(file)
    for file in (tmp_path / "day2").glob("classes.txt"):
        file.rename(tmp_path / "classes.txt")
        (tmp_path / "day1" / "classes.txt").unlink()
    data = load_split(str(tmp_path), "default")
    assert len(data) == 6
    for index, name in enumerate(data.image_ids):
        is_white = min(data.open_image(index).getpixel((3, 3))) > 250
        assert is_white == ("day2" in name)


def test_a_usual_name_comes_before_others(tmp_path):
    """Backups, results of detection, and the files of other tools lie in the same folder."""
    beside_the_images(tmp_path)
    old = {**coco(), "annotations": []}
    for name in ("annotations_old.json", "detections.json"):
        put(tmp_path / name, old)
    check(load_split(str(tmp_path), "default"))
    (tmp_path / "annotations.json").unlink()
    put(tmp_path / "b.json", old)
    with pytest.raises(InputError, match=r"no split 'train'.* \(COCO\) has annotations_old, b\."):
        load_split(str(tmp_path), "train")


@pytest.mark.parametrize("write", [yolo_of_label_studio, voc_of_labelimg, labelme])
def test_a_coco_file_of_another_name_does_not_replace_another_format(write, tmp_path):
    write(tmp_path)
    put(tmp_path / "part.json", {**coco(), "annotations": []})
    check(load_split(str(tmp_path), "default"))


def test_what_is_not_used_is_told(tmp_path):
    voc_of_labelimg(tmp_path / "voc")
    Image.new("RGB", (9, 9)).save(tmp_path / "voc" / "images" / "z.png")
    assert load_split(str(tmp_path / "voc"), "default").left_out == ["1 image without an annotation file: z.png"]
    yolo_of_label_studio(tmp_path / "yolo")
    put(tmp_path / "yolo" / "labels" / "Z.txt", "0 0.5 0.5 0.1 0.1\n")
    assert load_split(str(tmp_path / "yolo"), "default").left_out == ["1 label file without an image: Z.txt"]


def test_coco_without_sizes(tmp_path):
    content = coco()
    for image in content["images"]:
        image.pop("width"), image.update(height=0)
    picture_files(tmp_path / "images")
    put(tmp_path / "train.json", content)
    check(load_split(str(tmp_path), "train"))
    content["images"][0].update(width="many", height=3)
    put(tmp_path / "train.json", content)
    with pytest.raises(InputError, match=r"images\[0\]: `width` and `height` must be numbers, got \('many', 3\)"):
        load_split(str(tmp_path), "train")


def test_a_folder_too_deep_is_named(tmp_path):
    cvat(tmp_path / "export" / "my data")
    with pytest.raises(InputError, match=r"my data is a data set in COCO format; pass this folder"):
        load_split(str(tmp_path / "export"), "train")


def test_paths_of_another_machine_in_data_yaml(tmp_path):
    yolo_of_ultralytics(tmp_path)
    put(
        tmp_path / "data.yaml",
        "path: C:\\Users\\me\\pets\ntrain: images\\train\nval: /content/pets/images/val\nnames: [cat, dog, owl]\n",
    )
    for split in ("train", "val"):
        check(load_split(str(tmp_path), split))


def lead_out(folder: Path, name: str) -> dict[str, Path]:
    """Write the data set of `IMAGES` in several formats. Its first image is only at `name`, outside of each folder.

    `name` is relative to the folder of the data set, or absolute.
    """
    first, *others = IMAGES
    (size, objects), written = IMAGES[first], {}
    for format in ("coco", "voc", "labelme", "list", "yaml"):
        place = written[format] = folder / format
        picture_files(place / "images", {image: IMAGES[image] for image in others})
    content = coco(prefix="images/")
    content["images"][0]["file_name"] = name
    put(written["coco"] / "train.json", content)
    put(written["voc"] / "train" / "a.xml", write_voc(os.path.join("..", name), size, objects, NAMES))
    put(written["labelme"] / "train" / "a.json", write_labelme(os.path.join("..", name), size, objects, NAMES))
    for format in ("list", "yaml"):
        put(written[format] / "classes.txt", "\n".join(NAMES))
    put(written["list"] / "train.txt", name)
    put(written["yaml"] / "data.yaml", f"names: {NAMES}\ntrain: {Path(name).parent}\n")
    return written


@pytest.mark.parametrize("is_absolute", [False, True], ids=["relative", "absolute"])
def test_names_that_lead_out_of_the_folder(tmp_path, is_absolute):
    """Data from somebody else must not read any image on this computer."""
    first = next(iter(IMAGES))
    outside = tmp_path / "elsewhere" / "secret.png"
    picture_files(outside.parent, {first: IMAGES[first]})
    os.rename(outside.parent / first, outside)
    put(outside.with_suffix(".txt"), yolo_lines(first))
    name = str(outside) if is_absolute else "../elsewhere/secret.png"
    for format, folder in lead_out(tmp_path / "data", name if is_absolute else f"../{name}").items():
        with pytest.raises(InputError, match=r"leads out of the folder of the data set; allow_outside_images=True"):
            data = load_split(str(folder), "train")
            raise InputError(*check_images(data, disable_progress=True).values())
        data = load_split(str(folder), "train", allow_outside_images=True)
        assert check_images(data, disable_progress=True) == {}, format
        assert data.open_image(0).getpixel((0, 0)) == colour_of(first), format


def test_links_in_the_folder_may_lead_anywhere(tmp_path):
    """The user who made a link intended where it points."""
    picture_files(tmp_path / "elsewhere")
    folder = tmp_path / "data"
    folder.mkdir()
    try:
        (folder / "images").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("no links here")
    put(folder / "train.json", coco())
    check(load_split(str(folder), "train"))
    (tmp_path / "link").symlink_to(folder)
    check(load_split(str(tmp_path / "link"), "train"))


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "\x00.png", "/" * 5000, "a/" * 50_000, "~/x.png", "C:\\x.png"])
def test_names_that_no_file_can_have(tmp_path, name):
    for format, folder in lead_out(tmp_path, name if "\x00" not in name else "x.png").items():
        if format == "coco":
            content = coco(prefix="images/")
            content["images"][0]["file_name"] = name
            put(folder / "train.json", content)
        with pytest.raises(InputError) as error:
            raise InputError(*check_images(load_split(str(folder), "train"), disable_progress=True).values())
        assert str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 2000, format


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text here")
@pytest.mark.parametrize("write", [yolo_of_labelimg, voc_of_labelimg])
def test_names_of_files_that_are_not_utf_8(tmp_path, write):
    write(tmp_path)
    for file in list(tmp_path.rglob("*")):
        if file.stem == Path(next(iter(IMAGES))).stem:
            os.rename(file, os.fsencode(file.parent) + b"/caf\xe9" + os.fsencode(file.suffix))
    data = load_split(str(tmp_path), "default")
    assert "caf�" in " ".join(data.image_ids)
    for split in load_splits(str(tmp_path), ["default"], Accelerator(cpu=True)).values():
        json.dumps(split.image_ids, ensure_ascii=False).encode()
        split.fingerprint()


def test_aliases_of_yaml_that_would_never_end(tmp_path):
    yolo_of_label_studio(tmp_path)
    (tmp_path / "classes.txt").unlink()
    lists = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30))
    for last in ("nc: *l29\nnames: [cat, dog, owl]", "names: *l29", "train: *l29\nnames: [cat, dog, owl]"):
        put(tmp_path / "data.yaml", f"l0: &l0 [x]\n{lists}\n{last}\n")
        with pytest.raises(InputError, match=r"data\.yaml: `(nc|names|train)` .*list"):
            load_split(str(tmp_path), "train")


def test_photos_of_another_split_decide(tmp_path):
    """The tool drew on photos as they are stored, which only the training split tells."""
    for split, orientation in (("train", 6), ("val", 3)):
        stored = (48, 64) if split == "train" else (64, 48)
        photo(tmp_path / "images" / f"{split}.png", stored, orientation)
        box = (0, 24, 32, 24) if split == "train" else (32, 24, 32, 24)
        put(tmp_path / f"{split}.json", write_coco({f"{split}.png": ((64, 48), [(0, box)])}, NAMES))
    splits = load_splits(str(tmp_path), ["train", "val"], Accelerator())
    assert redness(splits["train"]) > 0.95 and redness(splits["val"]) > 0.95


def test_a_missing_image_says_where_it_was_looked_for(tmp_path):
    cvat(tmp_path)
    (tmp_path / "images" / "train" / "a.png").unlink()
    with pytest.raises(InputError) as error:
        data = load_split(str(tmp_path), "train")
        data.open_image(0)
    assert "a.png: no such image, but instances_train.json lists it; looked in" in str(error.value)
    assert f"{tmp_path / 'images' / 'train'}, " in str(error.value) and "with b c.png, d.jpg" in str(error.value)


# ---- EXIF


def photo(file: Path, size: tuple[int, int], orientation: int) -> None:
    """A photo whose top left quarter is red, as a viewer shows it in `size`."""
    shown = Image.new("RGB", size, (0, 0, 255))
    shown.paste((255, 0, 0), (0, 0, size[0] // 2, size[1] // 2))
    inverse = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]
    for method in inverse:
        shown = shown.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file.parent.mkdir(parents=True, exist_ok=True)
    shown.save(file, exif=exif, quality=95)


def redness(data: DetectionSplit, index: int = 0) -> float:
    """The share of red pixels in the first box."""
    image = data.open_image(index)
    x, y, width, height = data.boxes[index][0]
    pixels = list(image.crop((x, y, x + width, y + height)).getdata())
    return sum(r > 180 and b < 90 for r, _, b in pixels) / len(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(64, 48), (64, 64)], ids=["oblong", "square"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_boxes_drawn_on_the_photo_as_it_is_shown(tmp_path, orientation, size, suffix):
    name = f"p.{suffix}"
    photo(tmp_path / "images" / name, size, orientation)
    box = (0, 0, size[0] // 2, size[1] // 2)
    put(tmp_path / "train.json", write_coco({name: (size, [(0, box)])}, NAMES))
    assert redness(load_split(str(tmp_path), "train")) > 0.95
    # YOLO gives no sizes. They are those of the photo as it is shown.
    folder = tmp_path / "yolo"
    photo(folder / name, size, orientation)
    put(folder / "p.txt", write_yolo(size, [(0, box)]))
    put(folder / "classes.txt", "\n".join(NAMES))
    assert redness(load_split(str(folder), "default")) > 0.95


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_undecided_photos_follow_the_others_of_the_split(tmp_path, orientation):
    """Photos that are turned by 90 degrees show that this tool draws on the photo as it is stored."""
    photo(tmp_path / "images" / "p.png", (64, 48), orientation)
    entries = {"p.png": ((64, 48), [(0, (0, 0, 32, 24))])}
    for index in range(3):
        photo(tmp_path / "images" / f"{index}.png", (48, 64), 6)
        entries[f"{index}.png"] = ((64, 48), [(0, (0, 24, 32, 24))])
    put(tmp_path / "train.json", write_coco(entries, NAMES))
    data = load_split(str(tmp_path), "train")
    assert redness(data, 1) > 0.95 and not data.open_image.undecided
    data.open_image(0)
    assert data.open_image.undecided == {0} and not data.open_image.turns_undecided()
    with Image.open(tmp_path / "images" / "p.png") as stored:
        assert data.open_image(0).tobytes() == stored.convert("RGB").tobytes()


# ---- boxes


@pytest.mark.parametrize(
    ("bbox_format", "convert"),
    [
        ("cxcywh", lambda x, y, w, h, W, H: (x + w / 2, y + h / 2, w, h)),
        ("relative_xywh", lambda x, y, w, h, W, H: (x / W, y / H, w / W, h / H)),
        ("relative_xyxy", lambda x, y, w, h, W, H: (x / W, y / H, (x + w) / W, (y + h) / H)),
        ("relative_cxcywh", lambda x, y, w, h, W, H: ((x + w / 2) / W, (y + h / 2) / H, w / W, h / H)),
    ],
)
def test_other_box_formats(tmp_path, bbox_format, convert):
    one_train_file(tmp_path)
    content = coco()
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for annotation in content["annotations"]:
        annotation["bbox"] = convert(*annotation["bbox"], *sizes[annotation["image_id"]])
    put(tmp_path / "train.json", content)
    check(load_split(str(tmp_path), "train", bbox_format))
    if bbox_format.startswith("relative"):
        with pytest.raises(InputError, match=f"lies within the first pixel.*bbox_format='{bbox_format}'"):
            load_split(str(tmp_path), "train")


def test_one_box_of_fractions_among_others(tmp_path):
    content = coco()
    content["annotations"][0]["bbox"] = [0.1, 0.2, 0.5, 0.5]
    picture_files(tmp_path / "images")
    put(tmp_path / "train.json", content)
    with pytest.raises(InputError, match=r"lies within the first pixel.*; skip_bad_boxes=True leaves such boxes out"):
        load_split(str(tmp_path), "train")
    assert sum(map(len, load_split(str(tmp_path), "train", skip_bad_boxes=True).boxes)) == 2


def test_formats_that_say_how_boxes_are_written(tmp_path):
    yolo_of_labelimg(tmp_path)
    with pytest.raises(InputError, match=r"bbox_format='xyxy': .* is in YOLO format, which says how boxes are written"):
        load_split(str(tmp_path), "default", "xyxy")
    with pytest.raises(
        InputError, match=r"class_names_column='synonyms': .* is in YOLO format, which has no such field"
    ):
        load_split(str(tmp_path), "default", class_names_column="synonyms")


# ---- YOLO


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", "must be a class and 4 numbers .*, got 4 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "must be a class and 4 numbers .*, got 6 numbers"),
        ("3 0.5 0.5 0.1 0.1", "the class must be a number from 0 to 2, got 3"),
        ("-1 0.5 0.5 0.1 0.1", "the class must be a number from 0 to 2, got -1"),
        ("cat 0.5 0.5 0.1 0.1", "must be numbers, got 'cat"),
        ("0 12 20 30 40", "must be fractions of the image from 0 to 1"),
        ("0 nan 0.5 0.1 0.1", "must be fractions of the image"),
        ("0 0.5 0.5 0.1 0", "is empty"),
        ("0 0.1 0.5 0.6 0.1", "lies outside its image"),
    ],
)
def test_bad_line_of_yolo(tmp_path, line, message):
    yolo_of_labelimg(tmp_path)
    put(tmp_path / "a.txt", f"1 0.5 0.5 0.5 0.5\n\n{line}\n")
    with pytest.raises(InputError, match=message) as error:
        load_split(str(tmp_path), "default")
    assert "a.txt, line 3" in str(error.value) or "image 'a.png'" in str(error.value)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [cat, dog]\nnc: 3\ntrain: images", "`nc` says 3 classes, but `names` has 2"),
        ("names: {0: cat, 2: dog}\ntrain: images", "the numbers in `names` must be 0, 1, 2 and so on"),
        ("names: cat\ntrain: images", "`names` must be a list of class names, got str"),
        (
            "names: [cat, dog, owl]\ntrain: nowhere",
            r"the folder of `train` does not exist; looked for .*nowhere.* has .*data.yaml",
        ),
        ("names: [cat, dog, owl]\ntrain: labels", r"`train` is 'labels', where no image was found"),
        ("names: [cat, dog, owl]\ntrain: 3", r"`train` must be a folder or a text file with a list of images, got 3"),
        ("names: [cat\ntrain: images", "not YAML"),
    ],
)
def test_bad_data_yaml(tmp_path, yaml, message):
    yolo_of_label_studio(tmp_path)
    (tmp_path / "classes.txt").unlink()
    put(tmp_path / "data.yaml", yaml)
    with pytest.raises(InputError, match=message):
        load_split(str(tmp_path), "train")


def test_a_data_yaml_with_a_split_that_was_not_exported(tmp_path):
    """Roboflow writes the line whether there is a test split or not."""
    yolo_of_roboflow(tmp_path)
    with (tmp_path / "data.yaml").open("a") as stream:
        stream.write("test: ../test/images\n")
    assert find_splits(str(tmp_path)) == ["train", "val"]
    with pytest.raises(InputError, match=r"no split 'test'; looked for the key `test` in data\.yaml, and its"):
        load_split(str(tmp_path), "test")


def test_a_folder_within_a_folder_of_the_same_name(tmp_path, monkeypatch):
    """An archive that was unpacked twice. A relative path must not be joined to the folder again."""
    monkeypatch.chdir(tmp_path)
    yolo_of_ultralytics(Path("d"))
    shutil.copytree("d", "d/d")
    for file in Path("d/d").rglob("*.png"):
        Image.new("RGB", Image.open(file).size, "white").save(file)
    check(load_split("d", "train"))


def test_images_that_do_not_open_without_annotated_sizes(tmp_path):
    """Their errors come when they are opened, so that they can be left out."""
    yolo_of_ultralytics(tmp_path)
    (tmp_path / "images" / "train" / "a.png").write_bytes(b"")
    data = load_split(str(tmp_path), "train")
    assert list(check_images(data, disable_progress=True)) == [0] and data.boxes[0] == []
    accelerator = Accelerator()
    with pytest.raises(InputError, match=r"a\.png: cannot be opened as an image .* skip_bad_images=True leaves"):
        load_splits(str(tmp_path), ["train"], accelerator)
    assert len(load_splits(str(tmp_path), ["train"], accelerator, skip_bad_images=True)["train"]) == 2


@pytest.mark.parametrize("write", [voc_of_labelimg, labelme])
def test_a_list_of_classes_beside_another_format(write, tmp_path):
    write(tmp_path)
    put(tmp_path / "classes.txt", "owl\ncat\n")
    check(load_split(str(tmp_path), "default"))


@pytest.mark.parametrize("write", [voc_of_labelimg, labelme, yolo_of_labelimg])
def test_hidden_folders_are_skipped(write, tmp_path):
    write(tmp_path)
    shutil.copytree(tmp_path, tmp_path / ".ipynb_checkpoints")
    check(load_split(str(tmp_path), "default"))


def test_a_byte_order_mark(tmp_path):
    beside_the_images(tmp_path)
    file = tmp_path / "annotations.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    check(load_split(str(tmp_path), "default"))


def test_no_label_file_at_all(tmp_path):
    yolo_of_label_studio(tmp_path)
    shutil.rmtree(tmp_path / "labels")
    with pytest.raises(InputError, match=r"has 3 images, but no label file; looked for .*labels/a\.txt"):
        load_split(str(tmp_path), "default")


# ---- Pascal VOC and LabelMe


def test_voc_counts_from_one_unless_a_box_says_otherwise(tmp_path):
    voc_of_roboflow(tmp_path / "zero")
    voc_of_labelimg(tmp_path / "one")
    assert "<xmin>0</xmin>" in (tmp_path / "zero" / "train" / "a.xml").read_text()
    assert "<xmin>1</xmin>" in (tmp_path / "one" / "annotations" / "a.xml").read_text()


def test_other_xml_files_are_skipped(tmp_path):
    voc_of_labelimg(tmp_path)
    put(tmp_path / "annotations" / "a0.xml", "")
    put(tmp_path / "pom.xml", "<project><name>x</name></project>")
    check(load_split(str(tmp_path), "default"))


def test_difficult_objects_are_ignored(tmp_path):
    voc_of_labelimg(tmp_path)
    file = tmp_path / "annotations" / "a.xml"
    file.write_text(file.read_text().replace("<difficult>0", "<difficult>1", 1))
    assert load_split(str(tmp_path), "default").crowds == [[True, False], [False], []]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<xmin>5</xmin>", "<xmin>wide</xmin>", "needs <bndbox> with xmin, ymin, xmax and ymax, got"),
        ("<bndbox>", "<box>", "not XML"),
        ("<name>dog</name>", "<name> </name>", "an object has no <name>"),
        ("<width>64</width>", "<width>many</width>", "the size must be two numbers, got 'many' and '48'"),
        ("<xmax>24</xmax>", "<xmax>240</xmax>", "lies outside its image"),
    ],
)
def test_bad_xml(tmp_path, old, new, message):
    voc_of_roboflow(tmp_path)
    file = tmp_path / "train" / "a.xml"
    text = file.read_text().replace("<xmin>4</xmin>", "<xmin>5</xmin>")
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=rf"a(\.xml)?'?: .*{message}"):
        load_split(str(tmp_path), "train")


def test_shapes_of_labelme(tmp_path):
    labelme(tmp_path)
    file = tmp_path / "d.json"
    content = json.loads(file.read_text())
    content["shapes"] = [
        {"label": "owl", "shape_type": "circle", "points": [[16, 16], [16, 20]]},
        {"label": "owl", "shape_type": "point", "points": [[3, 3]]},
    ]
    put(file, content)
    data = load_split(str(tmp_path), "default")
    assert data.boxes[2] == [(12, 12, 8, 8)]
    content["shapes"][0]["points"] = [[1]]
    put(file, content)
    with pytest.raises(InputError, match=r"d\.json: a shape 'owl': `points` must be pairs of numbers"):
        load_split(str(tmp_path), "default")


# ---- rows


def test_numbers_as_categories_with_names_in_a_file(tmp_path):
    data = as_rows(tmp_path / "raw")
    columns = {
        "image": datasets.Image(),
        "objects": {**FEATURES["objects"], "category": datasets.List(datasets.Value("int64"))},
    }
    data.cast(datasets.Features(columns)).save_to_disk(tmp_path / "rows")
    with pytest.raises(InputError, match=r"has no class names; .*class_names_file=\.\.\. with a JSON file such as"):
        load_split(str(tmp_path / "rows"), "train")
    names = put(tmp_path / "names.json", {str(index): name for index, name in enumerate(NAMES)})
    check(load_split(str(tmp_path / "rows"), "train", class_names_file=names))


def test_sizes_of_rows_decide_as_in_coco(tmp_path):
    """Many data sets have columns with the sizes. If they are the sizes of the stored photos, no photo is turned."""
    photo(tmp_path / "p.jpg", (48, 64), 6)
    columns = {
        "image": [{"bytes": (tmp_path / "p.jpg").read_bytes(), "path": None}],
        "objects": [{"bbox": [[0, 24, 32, 24]], "category": [0]}],
        "width": [64],
        "height": [48],
    }
    features = datasets.Features({**FEATURES, "width": datasets.Value("int64"), "height": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "rows")
    data = load_split(str(tmp_path / "rows"), "train")
    assert data.sizes == [(64, 48)] and redness(data) > 0.95


# ---- what is recognised, but not read


def an_archive(folder: Path) -> None:
    put(folder / "export.zip", "PK")


def xml_of_cvat(folder: Path) -> None:
    picture_files(folder / "images")
    put(folder / "annotations.xml", "<?xml version='1.0'?>\n<annotations>\n  <version>1.1</version>\n</annotations>")


def json_of_label_studio(folder: Path) -> None:
    put(folder / "project.json", [{"id": 1, "data": {"image": "a.png"}, "annotations": []}])


def json_of_via(folder: Path) -> None:
    put(folder / "via.json", {"a.png123": {"filename": "a.png", "regions": []}})


def table(folder: Path) -> None:
    put(folder / "train" / "_annotations.csv", "filename,width,height,class,xmin,ymin,xmax,ymax\n")


def only_images(folder: Path) -> None:
    picture_files(folder)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (an_archive, r"is an archive; unpack it first \(`unzip .*export\.zip`\)"),
        (xml_of_cvat, r"It looks like CVAT's XML, which is not read; .*datum convert -i .* -if cvat -f coco"),
        (json_of_label_studio, r"It looks like the JSON of Label Studio; export the project as COCO there"),
        (json_of_via, r"VGG Image Annotator; choose `Export Annotations \(COCO format\)`"),
        (table, r"a table in CSV; export the data as COCO"),
        (only_images, r"Looked for COCO, YOLO.*The folder has a\.png, b c\.png, d\.jpg\."),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(InputError, match=message):
        load_split(str(tmp_path), "train")


def test_other_json_named_train(tmp_path):
    put(tmp_path / "train.json", [{"id": 1, "data": {"image": "a.png"}, "annotations": []}])
    with pytest.raises(InputError, match=r"train\.json: not a COCO file; .* It looks like the JSON of Label Studio"):
        load_split(str(tmp_path), "train")


# ---- real data

# Enough for a few objects of each class. The forms differ in none, or in all of them.
NUM_PHOTOS = 16


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}: the photographs are not part of the repository")
@pytest.mark.parametrize(
    ("data_set", "split"),
    [("datasets/bccd", "test"), ("datasets/boards", "test"), ("cases/underscored_names/words", "val")],
)
def test_real_data_has_the_same_ap_in_each_form(data_set, split, tmp_path):
    """The data is written as YOLO and as Pascal VOC, which has another order of classes."""
    whole = load_split(str(SHARED / data_set), split)
    source = whole.subset(range(min(NUM_PHOTOS, len(whole))))
    paths = whole.open_image.source.paths[: len(source)]
    objects = [list(zip(labels, boxes, strict=True)) for labels, boxes in zip(source.labels, source.boxes, strict=True)]
    for form in ("yolo", "voc"):
        for path, size, group in zip(paths, source.sizes, objects, strict=True):
            (tmp_path / form / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / form / split / path.name).symlink_to(path)
            if form == "yolo":
                put((tmp_path / form / split / path.name).with_suffix(".txt"), write_yolo(size, group))
            else:
                xml = write_voc(path.name, size, group, source.class_names)
                put((tmp_path / form / split / path.name).with_suffix(".xml"), xml)
    put(tmp_path / "yolo" / "classes.txt", "\n".join(source.class_names))
    forms = {"coco": source} | {form: load_split(str(tmp_path / form), split) for form in ("yolo", "voc")}
    processor, model = load_processor(None, HOST), load_base_model(HOST).eval()
    set_image_size(processor, 128)
    forms = match_classes(forms)
    results = {form: evaluate(model, processor, data, 8, Accelerator()) for form, data in forms.items()}
    assert results["yolo"] == results["voc"] == results["coco"]
    assert results["coco"]["AP50"] > 0.005
