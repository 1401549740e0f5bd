# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detecting with saved adapters, run as a user runs it."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageOps
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

import detect
from peft_sdpt.commands import detect as command
from peft_sdpt.commands import print_any_name
from peft_sdpt.detection import images, prediction
from peft_sdpt.detection.grounding import split_classes
from peft_sdpt.detection.saved_adapter import common_base_model, find_adapter, load_processor
from peft_sdpt.files import only_writer
from tests.helpers.detectors import ROOT, acting
from tests.helpers.disk import file_size_limit
from tests.helpers.main_job import HOST, Killed, launched
from tests.helpers.patience import PATIENCE, wait_until

NAMES = ["grinning face", "dog", "red apple"]
# Low, because noise is what the tests' pictures show.
THRESHOLD = 0.02


def noise(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def load_host():
    return AutoModelForZeroShotObjectDetection.from_pretrained(HOST, dtype=torch.float32).eval()


def save_adapter(folder: Path, seed: int, class_names=NAMES, **config) -> Path:
    torch.manual_seed(seed)
    get_peft_model(load_host(), acting(**config)).save_pretrained(folder)
    if class_names is not None:
        (folder / "class_names.json").write_text(json.dumps(class_names))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of different size and classes."""
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(folder / "one", 1), save_adapter(folder / "two", 2, NAMES[::-1][:2], num_virtual_tokens=3)]


@pytest.fixture
def photos(tmp_path):
    """A folder of three pictures, two of them of one size, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, (name, size) in enumerate({"c.png": (80, 120), "a.png": (120, 90), "b.png": (120, 90)}.items()):
        noise(seed, *size).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the script in this process; returns its exit code, 0 when it just returns."""

    def run(*flags, output: Path = tmp_path / "out", threshold: float | None = THRESHOLD) -> int:
        # Flags that are given again replace these.
        arguments = ["detect.py", "--output_dir", output, *flags]
        if threshold is not None:
            arguments[1:1] = ["--threshold", threshold]
        monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
        try:
            detect.main()
        except SystemExit as exit:
            return exit.code
        return 0

    return run


def read(folder: Path) -> dict:
    return json.loads((folder / "detections.json").read_text())


def names_of(folder: Path) -> list[str]:
    """Names of the files, except the plan of a finished run, which is hidden."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".detections.plan")


# ---- what is written


def test_pictures_and_a_coco_file_that_agree_with_detect(run, photos, adapters, tmp_path, capsys):
    assert run(photos, "--adapter", adapters[0]) == 0
    out = tmp_path / "out"
    assert names_of(out) == ["a.png", "b.png", "c.png", "detections.json"]
    written = read(out)
    assert [image["file_name"] for image in written["images"]] == ["a.png", "b.png", "c.png"]
    assert [image["source"] for image in written["images"]] == [str(photos / n) for n in ("a.png", "b.png", "c.png")]
    assert written["categories"] == [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]

    with contextlib.redirect_stdout(None):
        coco = COCO(str(out / "detections.json"))
    model = PeftModel.from_pretrained(load_host(), adapters[0]).eval()
    processor = AutoProcessor.from_pretrained(HOST)
    chunks = split_classes(NAMES, processor.tokenizer, model.config.max_text_len)
    for batch in (["a.png", "b.png"], ["c.png"]):
        pictures = [Image.open(photos / name) for name in batch]
        for name, picture, found in zip(
            batch, pictures, prediction.detect(model, processor, pictures, NAMES, chunks), strict=True
        ):
            image = next(image for image in coco.dataset["images"] if image["file_name"] == name)
            assert (image["width"], image["height"]) == picture.size == Image.open(out / name).size
            assert Image.open(out / name).tobytes() != picture.tobytes()
            kept = found["scores"] >= THRESHOLD
            assert 0 < kept.sum() < len(kept)
            annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
            assert [a["score"] for a in annotations] == found["scores"][kept].tolist()
            assert [a["bbox"] for a in annotations] == found["boxes"][kept].tolist()
            assert [a["category_id"] - 1 for a in annotations] == found["labels"][kept].tolist()
            assert all(a["area"] == a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0 for a in annotations)
    assert [a["id"] for a in written["annotations"]] == [*range(1, len(written["annotations"]) + 1)]
    # The file can also be loaded as results of the same images.
    with contextlib.redirect_stdout(None):
        assert len(coco.loadRes(written["annotations"]).getAnnIds()) == len(written["annotations"])
    per_class = [sum(a["category_id"] == i for a in written["annotations"]) for i in (1, 2, 3)]
    text = capsys.readouterr().out
    assert "looking for 3 classes: grinning face, dog, red apple (threshold 0.02)\n" in text
    summary = f"3 images, {sum(per_class)} objects ("
    assert summary in text and f"Results: {out}\n" in text
    assert all(f"{name}: {number}" in text for name, number in zip(NAMES, per_class, strict=True))
    assert "Nothing was found" not in text


def test_sources_are_found_from_anywhere(run, photos, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("photos", "--adapter", adapters[0], "--threshold", "0.9") == 0
    assert [image["source"] for image in read(tmp_path / "out")["images"]] == [
        str(photos / name) for name in ("a.png", "b.png", "c.png")
    ]


# ---- the threshold


QUERIES = 50  # of the small base model


def test_no_limit_above_the_threshold(run, photos, adapters, tmp_path, capsys):
    """The results have each pair of query and class, more than the hundred that COCO counts."""
    assert run(photos, "--adapter", adapters[0], "--threshold", "0") == 0
    written = read(tmp_path / "out")
    assert len(written["annotations"]) == 3 * QUERIES * len(NAMES) > 3 * prediction.MAX_DETECTIONS
    scores = [a["score"] for a in written["annotations"] if a["image_id"] == 1]
    assert scores == sorted(scores, reverse=True) and len(scores) == QUERIES * len(NAMES)
    text = capsys.readouterr().out
    assert "The detector found as many objects as it can, 50, in 3 images: a.png, b.png, c.png." in text


def test_uses_all_queries():
    boxes = torch.arange(12.0).reshape(3, 4)

    def full(boxes, labels, chunks, num_queries):
        found = {"boxes": boxes, "scores": torch.ones(len(boxes)), "labels": torch.tensor(labels)}
        return command.uses_all_queries(found, chunks, num_queries)

    assert full(boxes, [0, 0, 0], [[0]], 3) and full(boxes, [0, 1, 0], [[0, 1]], 3)
    assert not full(boxes, [0, 0, 0], [[0]], 4)
    # A query with two classes counts as one object. Each prompt uses all queries.
    assert not full(boxes[[0, 0, 1]], [0, 1, 0], [[0, 1]], 3)
    assert not full(boxes, [0, 1, 1], [[0], [1]], 3)


def test_nothing_found(run, photos, adapters, tmp_path, capsys):
    """The message has the best scores, rounded down."""
    assert run(photos, "--adapter", adapters[0], "--threshold", "0.9") == 0
    written = read(tmp_path / "out")
    assert written["annotations"] == []
    text = capsys.readouterr().out
    assert "3 images, 0 objects. Nothing was found in 3 images (threshold 0.9), where the best scores are: " in text
    assert run(photos, "--adapter", adapters[0], "--threshold", "0", output=tmp_path / "all") == 0
    everything = read(tmp_path / "all")["annotations"]
    best = {i["file_name"]: max(a["score"] for a in everything if a["image_id"] == i["id"]) for i in written["images"]}
    assert {i["file_name"]: i["best_score"] for i in written["images"]} == pytest.approx(best, abs=1e-6)
    in_order = sorted(best, key=best.__getitem__, reverse=True)
    assert text.index(in_order[0]) < text.index(in_order[1]) < text.index(in_order[2])
    for name, score in best.items():
        shown = float(text.split(f"{name} ")[1].split()[0].rstrip(",."))
        assert score - 0.001 <= shown <= score

    # A threshold between the images.
    capsys.readouterr()
    assert run(photos, "--adapter", adapters[0], "--threshold", best[in_order[1]] - 1e-4) == 0
    text = capsys.readouterr().out
    assert "Nothing was found in 1 image (" in text and f"where the best score is: {in_order[2]} 0." in text


def test_the_threshold_that_an_adapter_suggests(run, photos, adapters, tmp_path, capsys):
    suggesting = tmp_path / "suggesting"
    shutil.copytree(adapters[0], suggesting)
    assert run(photos, "--adapter", adapters[0], "--threshold", "0") == 0
    scores = sorted((a["score"] for a in read(tmp_path / "out")["annotations"]), reverse=True)
    suggested = round((scores[9] + scores[10]) / 2, 7)
    (suggesting / "detection.json").write_text(json.dumps({"threshold": suggested}))
    default = ("--output_dir", tmp_path / "out")

    def detected(*flags) -> list[str]:
        capsys.readouterr()
        code = run(photos, "--adapter", suggesting, f"silent={adapters[0]}", *default, *flags, threshold=None)
        assert code == 0
        return capsys.readouterr().out.splitlines()

    lines = detected()
    assert lines[0].startswith("suggesting: looking for 3 classes: ")
    assert lines[0].endswith(f"(threshold {suggested}, as the adapter suggests)")
    assert lines[1].startswith("silent: looking for") and lines[1].endswith("(threshold 0.3)")
    assert len(read(tmp_path / "out" / "suggesting")["annotations"]) == 10
    assert lines[2].startswith("suggesting: 3 images, 10 objects (")
    assert lines[3].startswith("silent: 3 images, 0 objects. Nothing was found in 3 images (threshold 0.3), where")
    lines = detected("--threshold", "0.9")
    expected = f"Nothing was found in 3 images (threshold 0.9; the adapter suggests {suggested}), where"
    assert lines[2].startswith(f"suggesting: 3 images, 0 objects. {expected}")


def test_scores_that_are_not_finite(run, photos, adapters, monkeypatch, capsys):
    real = command.load_detector

    def damaged(*args):
        model = real(*args)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "class_embed" in name or "prompts" in name).fill_(
                torch.nan
            )
        return model

    monkeypatch.setattr(command, "load_detector", damaged)
    assert run(photos, "--adapter", adapters[0]) == 2
    error = capsys.readouterr().err
    assert "images[0]: the scores or boxes are not finite. The weights may be damaged" in error
    assert error.rstrip().endswith(f"images[0] is {photos / 'a.png'}.")


# ---- names


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text here")
def test_names_that_are_no_text(run, photos, adapters, tmp_path, monkeypatch, capsys):
    """On Linux, the name of a file can have any bytes. The names of results are valid UTF-8, also in a second run."""
    folder = os.fsencode(photos)
    os.rename(photos / "a.png", folder + b"/caf\xe9\n.png")
    os.mkdir(folder + b"/\xff")
    os.rename(photos / "b.png", folder + b"/\xff/" + b"\xe9" * 251 + b".png")
    for _ in range(2):
        assert run(photos, "--adapter", adapters[0], "--threshold", "0.99") == 0
        said = capsys.readouterr().out
        assert "3 images, 0 objects" in said and "caf� .png 0." in said
    names = [image["file_name"] for image in read(tmp_path / "out")["images"]]
    assert "caf�\n.png" in names and "c.png" in names
    long = next(name for name in names if name.startswith("�/"))
    assert len(Path(long).name.encode()) <= 255 and long.endswith("�.png")
    assert all((tmp_path / "out" / name).is_file() for name in names)
    json.dumps(read(tmp_path / "out"), ensure_ascii=False).encode()


def test_names_are_cut_to_what_a_file_system_allows():
    taken: set[str] = set()
    name = command.free_name(Path("a") / ("x" * 250 + ".heic"), taken)
    assert name == "a/" + "x" * 250 + "." + ".jpg"
    again = command.free_name(Path("a") / ("x" * 250 + ".heic"), taken)
    assert again.endswith("-2.jpg") and len(Path(again).name) == 255
    for name in ("é" * 127 + ".psd", "😀" * 62 + ".png"):
        free = Path(command.free_name(Path(name), taken)).name
        assert free.endswith(".png") and 250 < len(free.encode()) <= 255


def test_class_names_with_line_breaks(run, photos, tmp_path, capsys):
    adapter = save_adapter(tmp_path / "strange", 1, ["grinning\n face\x1b[31m", "dog"])
    assert run(photos, "--adapter", adapter) == 0
    assert [each["name"] for each in read(tmp_path / "out")["categories"]] == ["grinning face[31m", "dog"]
    assert "looking for 2 classes: grinning face[31m, dog (threshold" in capsys.readouterr().out


def test_names_that_the_terminal_lacks(monkeypatch, capsys):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    print_any_name()
    print("a café \udce9 😀", flush=True)
    assert stdout.buffer.getvalue() == rb"a caf\xe9 \udce9 \U0001f600" + b"\n"


# ---- files


def test_batches_change_nothing(run, photos, adapters, tmp_path):
    noise(7, 80, 120).save(photos / "b2.png")
    for size in (1, 8):
        assert run(photos, "--adapter", adapters[0], "--batch_size", size, output=tmp_path / str(size)) == 0
    one, many = (read(tmp_path / size)["annotations"] for size in "18")
    assert len(one) == len(many)
    for a, b in zip(one, many, strict=True):
        # Sums in another order. Padding, were there any, would move scores by a tenth.
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_pictures_of_one_name_keep_apart(run, photos, adapters, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    noise(9).save(photos / "a-2.png")
    noise(10).save(other / "A.PNG")
    # A picture that is named twice is taken once.
    assert run(photos, other, photos / "a.png", "--adapter", adapters[0]) == 0
    written = read(tmp_path / "out")["images"]
    by_source = {image["source"]: image["file_name"] for image in written}
    assert len(by_source) == len(written) == 8
    assert len({name.casefold() for name in by_source.values()}) == 8
    assert by_source[str(photos / "a.png")] == "a.png" and by_source[str(photos / "a-2.png")] == "a-2.png"
    assert by_source[str(other / "A.PNG")] == "A-3.PNG" and by_source[str(other / "a.png")] == "a-4.png"
    assert names_of(tmp_path / "out") == sorted([*by_source.values(), "detections.json"])


def test_subfolders(run, adapters, tmp_path, monkeypatch, capsys):
    """The results have the same subfolders. The results of an earlier run are not read as images."""
    folder = tmp_path / "camera"
    for seed, name in enumerate(("a/1.jpg", "b/1.jpg", "b/c/2.HEIC", "3.WEBP", "b/4.avif")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    monkeypatch.chdir(folder)
    for _ in range(2):
        assert run(".", "--adapter", adapters[0], output=folder / "out") == 0
        written = read(folder / "out")["images"]
        names = ["3.WEBP", "a/1.jpg", "b/1.jpg", "b/4.avif", "b/c/2.HEIC.jpg"]
        assert sorted(image["file_name"] for image in written) == names
        for image in written:
            with Image.open(folder / "out" / image["file_name"]) as drawn:
                assert drawn.size == (image["width"], image["height"]) == (120, 90)
            assert Path(image["source"]) == folder / image["file_name"].replace(".HEIC.jpg", ".HEIC")
        assert capsys.readouterr().err.count("passed over 1 file that is not an image: notes.txt\n") == 1
    # The boxes belong to the image of the same name.
    assert run(folder / "b" / "1.jpg", "--adapter", adapters[0], output=tmp_path / "alone") == 0
    (number,) = (image["id"] for image in written if image["file_name"] == "b/1.jpg")
    ours = [a["score"] for a in read(folder / "out")["annotations"] if a["image_id"] == number]
    assert ours and ours == pytest.approx([a["score"] for a in read(tmp_path / "alone")["annotations"]], abs=1e-5)


def test_a_result_never_replaces_an_image(refused, run, photos, adapters, tmp_path):
    flags = ("--adapter", adapters[0])
    # The result of in/photos/a.png would be photos/a.png, which is an input itself.
    (tmp_path / "in" / "photos").mkdir(parents=True)
    noise(1).save(tmp_path / "in" / "photos" / "a.png")
    refused("photos has the input images", tmp_path / "in", photos, *flags, output=tmp_path)
    # A result in a watched folder would be the next input.
    refused("has the input images", photos, "--watch", *flags, output=tmp_path)


def test_a_file_of_the_user_is_never_replaced(refused, run, photos, adapters, tmp_path):
    """It is no input of this run, and not listed in the results of an earlier one."""
    flags = (photos, "--adapter", adapters[0])
    assert run(*flags) == 0 and run(*flags) == 0
    for name in ("detections.json", ".detections.plan"):
        (tmp_path / "out" / name).unlink()
    refused("exists, and this command did not write it", *flags)


def test_results_beside_the_folder_of_the_images(run, photos, adapters, tmp_path):
    before = (photos / "a.png").read_bytes()
    assert run(photos, "--adapter", adapters[0], output=tmp_path) == 0
    assert (tmp_path / "a.png").exists() and (photos / "a.png").read_bytes() == before


def test_photographs_are_turned_upright(run, adapters, tmp_path):
    upright = noise(3, 90, 120)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned a quarter to the left
    (tmp_path / "in").mkdir()
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in" / "turned.png", exif=exif)
    upright.save(tmp_path / "in" / "upright.png")
    assert run(tmp_path / "in", "--adapter", adapters[0], "--batch_size", 1) == 0
    written = read(tmp_path / "out")
    assert [(image["width"], image["height"]) for image in written["images"]] == [(90, 120)] * 2
    one, two = ([a["bbox"] for a in written["annotations"] if a["image_id"] == i] for i in (1, 2))
    assert one == two and one
    drawn = [Image.open(tmp_path / "out" / name) for name in ("turned.png", "upright.png")]
    assert ImageOps.exif_transpose(drawn[0]).tobytes() == drawn[1].tobytes()


@pytest.mark.parametrize(
    "suffix", [".jpg", ".JPEG", ".png", ".webp", ".avif", ".heic", ".HEIF", ".bmp", ".gif", ".tif", ".ppm", ".jp2"]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK"])
def test_kinds_of_pictures(suffix, mode, tmp_path):
    """Whatever is read is written again, though not as it was stored."""
    file = tmp_path / f"in{suffix}"
    try:
        noise(0).convert(mode).save(file, **({"compression": "group4"} if suffix == ".tif" and mode == "1" else {}))
    except (OSError, ValueError):
        pytest.skip("no such pictures")
    results = command.Results("", tmp_path, None, ["dog"], [[0]], 0.5)
    found = {"boxes": torch.tensor([[5.0, 5.0, 60.0, 40.0]]), "scores": torch.ones(1), "labels": torch.tensor([0])}
    name = command.free_name(Path(f"out{suffix}"), set())
    results.write_image(name, images.read_image(file, str(file)), {**found, "best_score": 1.0})
    assert name == f"out{suffix}" + (".jpg" if suffix.lower() in images.HEIF_SUFFIXES else "")
    with Image.open(tmp_path / name) as written:
        assert written.size == (120, 90)


def test_names_of_results():
    taken = {"a/b.psd.png"}
    assert command.free_name(Path("a/b.psd"), taken) == "a/b.psd-2.png"
    assert command.free_name(Path("b.psd"), taken) == "b.psd.png"
    assert command.free_name(Path("detections.json"), taken) == "detections.json.png"
    assert command.free_name(Path("IMG_1.HEIC"), taken) == "IMG_1.HEIC.jpg"
    assert command.free_name(Path("A/B.psd.PNG"), taken) == "A/B.psd-3.PNG"


# ---- adapters


def test_two_adapters_give_what_each_alone_gives(run, photos, adapters, tmp_path):
    both = tmp_path / "both"
    assert run(photos, "--adapter", *adapters, output=both) == 0
    assert names_of(both) == ["one", "two"]
    for adapter in adapters:
        alone = tmp_path / f"{adapter.name} alone"
        assert run(photos, "--adapter", adapter, output=alone) == 0
        assert names_of(alone) == names_of(both / adapter.name)
        for name in names_of(alone):
            assert (alone / name).read_bytes() == (both / adapter.name / name).read_bytes()
    assert read(both / "one")["annotations"] != read(both / "two")["annotations"]
    assert [c["name"] for c in read(both / "two")["categories"]] == NAMES[::-1][:2]


def test_an_adapter_with_lora(run, photos, adapters, tmp_path):
    """It loads like any other, alone and beside one without LoRA."""
    model = get_peft_model(load_host(), acting(lora_rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sdpt_lora_B" in name:
                parameter.normal_(0, 0.02)
    model.save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "class_names.json").write_text(json.dumps(NAMES))
    folders = [tmp_path / "lora", adapters[1]]
    assert run(photos, "--adapter", *folders, output=tmp_path / "both") == 0
    for folder in folders:
        alone = tmp_path / f"{folder.name} alone"
        assert run(photos, "--adapter", folder, output=alone) == 0
        assert read(alone) == read(tmp_path / "both" / folder.name)
    pictures = [Image.open(photos / "a.png")]
    processor = AutoProcessor.from_pretrained(HOST)
    chunks = split_classes(NAMES, processor.tokenizer, model.config.max_text_len)
    (found,) = prediction.detect(model.eval(), processor, pictures, NAMES, chunks)
    scores = found["scores"][found["scores"] >= THRESHOLD].tolist()
    written = read(tmp_path / "lora alone")
    (image,) = [image["id"] for image in written["images"] if image["file_name"] == "a.png"]
    ours = [entry["score"] for entry in written["annotations"] if entry["image_id"] == image]
    assert len(ours) == len(scores) > 0 and ours == pytest.approx(scores, abs=1e-5)


def test_without_an_adapter_the_bare_host_detects(run, photos, adapters, tmp_path):
    assert run(photos, "--class_names", *NAMES) == 0
    assert run(photos, "--adapter", adapters[0], "--class_names", *NAMES, output=tmp_path / "tuned") == 0
    bare, tuned = read(tmp_path / "out"), read(tmp_path / "tuned")
    assert bare["categories"] == tuned["categories"] and bare["annotations"] != tuned["annotations"]


def test_names(run, photos, adapters, tmp_path, monkeypatch):
    same = tmp_path / "v=1.5" / "one"
    shutil.copytree(adapters[0], same)
    monkeypatch.chdir(same)
    # A name may have a full stop, a path an equals sign, and "." is called as the folder is.
    assert run(photos, "--adapter", f"run.1={adapters[0]}", same.parent.parent / "v=1.5" / "one") == 0
    assert names_of(tmp_path / "out") == ["one", "run.1"]
    assert run(photos, "--adapter", f"first={adapters[0]}", ".", output=tmp_path / "here") == 0
    assert names_of(tmp_path / "here") == ["first", "one"]
    assert read(tmp_path / "here" / "one") == read(tmp_path / "out" / "run.1")


def test_class_names_given_override(run, photos, adapters, tmp_path):
    assert run(photos, "--adapter", *adapters, "--class_names", "red blood cell", "platelet") == 0
    for name in ("one", "two"):
        assert [c["name"] for c in read(tmp_path / "out" / name)["categories"]] == ["red blood cell", "platelet"]


def test_a_caption_is_split_into_classes(run, photos, adapters, tmp_path, capsys):
    assert run(photos / "a.png", "--class_names", "cat . dog . person .", "st. bernard") == 0
    assert [c["name"] for c in read(tmp_path / "out")["categories"]] == ["cat", "dog", "person", "st. bernard"]
    assert "looking for 4 classes: cat, dog, person, st. bernard (threshold 0.02)\n" in capsys.readouterr().out


def test_many_classes_are_not_all_listed(run, photos, capsys):
    names = [f"{colour} {kind}" for colour in ("red", "green", "blue", "white") for kind in ("car", "dog", "hat")]
    assert run(photos / "a.png", "--class_names", *names) == 0
    assert "looking for 12 classes: red car, red dog, " in (text := capsys.readouterr().out)
    assert "white car and 2 more (threshold 0.02)\n" in text


def test_the_adapters_own_processor(run, photos, adapters, tmp_path):
    """Training saves one beside the adapter, with the size of pictures it was told."""
    own = tmp_path / "own"
    shutil.copytree(adapters[0], own)
    processor = AutoProcessor.from_pretrained(HOST)
    processor.image_processor.size = {"shortest_edge": 48, "longest_edge": 80}
    processor.save_pretrained(own)
    assert load_processor(find_adapter(str(own)), str(HOST)).image_processor.size["shortest_edge"] == 48
    assert run(photos, "--adapter", own, f"hosts={adapters[0]}") == 0
    assert read(tmp_path / "out" / "own")["annotations"] != read(tmp_path / "out" / "hosts")["annotations"]


def test_host_of_the_adapters(adapters, tmp_path, monkeypatch):
    found = [find_adapter(str(adapters[0])), find_adapter(str(adapters[1]), "second")]
    assert [adapter.name for adapter in found] == ["one", "second"]
    assert common_base_model(found) == str(HOST)
    # One folder, two ways of writing it.
    monkeypatch.chdir(ROOT)
    found[0] = dataclasses.replace(found[0], base_model="examples/host")
    assert common_base_model(found) == str(HOST)


# ---- the Hub


def test_an_adapter_of_the_hub(run, photos, adapters, hub, tmp_path):
    folder = tmp_path / "pushed"
    shutil.copytree(adapters[0], folder)
    AutoProcessor.from_pretrained(HOST).save_pretrained(folder)
    (folder / "detections.png").write_bytes(b"large")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "state.json").write_text("{}")
    hub.add("user/adapter", folder)
    assert run(photos, "--adapter", "user/adapter", adapters[1]) == 0
    assert names_of(tmp_path / "out") == ["adapter", "two"]
    fetched = {*hub.fetched()}
    assert {"adapter_config.json", "adapter_model.safetensors", "class_names.json", "tokenizer.json"} <= fetched
    assert not {"detections.png", "checkpoint/state.json"} & fetched
    assert run(photos, "--adapter", adapters[0], output=tmp_path / "local") == 0
    assert read(tmp_path / "local") == read(tmp_path / "out" / "adapter")


def test_an_adapter_that_the_hub_has_not(run, photos, hub, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("no adapter")
    hub.add("user/adapter", tmp_path / "notes")
    assert run(photos, "--adapter", "user/nosuch") == 2
    assert "--adapter user/nosuch: no such folder, and no such repository on the Hub" in capsys.readouterr().err
    assert run(photos, "--adapter", "user/adapter") == 2
    assert "--adapter user/adapter: is not a saved adapter" in capsys.readouterr().err


# ---- watching


def test_watch(run, photos, adapters, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "SECONDS_BETWEEN_LOOKS", 0.05)
    noise(5).save(tmp_path / "late.png")
    late = (tmp_path / "late.png").read_bytes()
    out, seen, failures = tmp_path / "out", {}, []

    def written() -> list[str]:
        return [image["file_name"] for image in read(out)["images"]] if (out / "detections.json").exists() else []

    def user() -> None:
        try:
            wait_until(lambda: len(written()) == 3)
            seen["at first"] = written()
            (photos / "late.png").write_bytes(late[: len(late) // 2])
            (photos / "never.jpg").write_bytes(b"no picture")
            time.sleep(0.3)
            seen["half there"] = written()
            (photos / "late.png").write_bytes(late)
            wait_until(lambda: len(written()) == 4)
            time.sleep(0.2)
            seen["there"] = written()
        except BaseException as failure:
            failures.append(failure)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=user)
    thread.start()
    before = signal.getsignal(signal.SIGINT)
    code = run(photos, "--adapter", adapters[0], "--watch")
    thread.join()
    assert not failures and code == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert seen["at first"] == seen["half there"] == ["a.png", "b.png", "c.png"]
    assert seen["there"] == written() == ["a.png", "b.png", "c.png", "late.png"]
    output = capsys.readouterr()
    assert f"\n4 images, {len(read(out)['annotations'])} objects (" in output.out
    assert output.err.count("passed over 1 file that is not an image: notes.txt") == 1
    assert f"skipped: {photos / 'never.jpg'} cannot be opened" in output.err and "late" not in output.err
    assert names_of(out) == ["a.png", "b.png", "c.png", "detections.json", "late.png"]

    # The same as without watching.
    (photos / "never.jpg").unlink()
    assert run(photos, "--adapter", adapters[0], output=tmp_path / "all") == 0
    scores, all_scores = ([a["score"] for a in read(f)["annotations"]] for f in (out, tmp_path / "all"))
    assert scores == pytest.approx(all_scores, abs=1e-5)


def test_watching_ends_with_everything_written(run, photos, adapters, tmp_path, monkeypatch):
    """Ctrl-C while the first of many pictures is at work: it ends in the file, those after it are not begun."""
    for seed in range(20):
        noise(seed).save(photos / f"d{seed}.png")
    real = command.detect

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(command, "detect", real)
        return real(*args, **kwargs)

    monkeypatch.setattr(command, "detect", interrupted)
    assert run(photos, "--adapter", adapters[0], "--watch", "--batch_size", 1) == 0
    names = [image["file_name"] for image in read(tmp_path / "out")["images"]]
    # The next one had been read already.
    assert names == ["a.png", "b.png"]
    assert names_of(tmp_path / "out") == [*names, "detections.json"]


def test_a_long_watch_seldom_writes_its_file(tmp_path, monkeypatch):
    """The file is written completely each time, which takes longer and longer."""
    clock, looks, done, written = [0.0], 400, [], []
    journal = SimpleNamespace(add=lambda number, entries: done.append(number))

    def watch(*_):
        for number in range(looks):
            clock[0] += 1.0
            yield iter([(tmp_path / f"{number}.png", SimpleNamespace(size=(8, 8)))] if number < looks - 100 else [])

    def write(results, journal):
        written.append((len(done), clock[0]))
        clock[0] += 0.01 * len(done)

    monkeypatch.setattr(command, "watch", watch)
    monkeypatch.setattr(command, "detect_batch", lambda *_: [])
    monkeypatch.setattr(command, "write_results", write)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    command.detect_new(
        argparse.Namespace(inputs=[tmp_path], output_dir=tmp_path / "out", batch_size=4), None, [], journal
    )
    # In the beginning, after each look.
    assert [number for number, _ in written[:8]] == [1, 2, 3, 4, 5, 6, 7, 8]
    seconds = sum(0.01 * number for number, _ in written)
    assert seconds < 0.1 * clock[0] and len(written) > 20
    # After looks without new images, it has all of them.
    assert written[-1][0] == len(done) == 300


def test_watching_an_empty_folder(run, adapters, tmp_path, monkeypatch):
    (tmp_path / "camera").mkdir()
    monkeypatch.setattr(images.time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
    assert run(tmp_path / "camera", "--adapter", adapters[0], "--watch") == 0
    written = read(tmp_path / "out")
    assert written["images"] == written["annotations"] == [] and len(written["categories"]) == 3


def test_a_watched_folder_that_goes_away(run, photos, adapters, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images.time, "sleep", lambda _: shutil.rmtree(photos))
    assert run(photos, "--adapter", adapters[0], "--watch") == 2
    assert f"{photos}: cannot be read" in capsys.readouterr().err
    assert len(read(tmp_path / "out")["images"]) == 3


# ---- what is refused


@pytest.fixture
def refused(run, offline, tmp_path, monkeypatch, capsys):
    """Checks that a run ends in one line and exit code 2, and before weights are loaded unless told."""

    def refused(message: str, *flags, loads: bool = False, **kwargs) -> None:
        if not loads:
            monkeypatch.setattr(command, "load_detector", lambda *_: pytest.fail("loaded"))
        capsys.readouterr()
        assert run(*flags, **kwargs) == 2
        error = capsys.readouterr().err
        assert message in error.strip().splitlines()[-1]
        assert "Traceback" not in error
        assert loads or not list(tmp_path.rglob("detections.json"))

    return refused


@pytest.mark.parametrize(
    ("message", "flags"),
    [
        ("--threshold -0.1: must be", ("--threshold", -0.1)),
        ("--threshold 1.0: must be", ("--threshold", 1)),
        ("--threshold nan: must be", ("--threshold", "nan")),
        ("--batch_size 0: must be", ("--batch_size", 0)),
        ("--class_names: is needed without an --adapter", ()),
        ("no-such-folder: cannot be loaded as a detector", ("--model_name_or_path", "no-such-folder")),
        ("--adapter no-such-folder: no such folder", ("--adapter", "no-such-folder")),
        ("--adapter no/such folder: no such folder", ("--adapter", "no/such folder")),
        ("--output_dir /proc/nowhere: cannot be written", ("--output_dir", "/proc/nowhere", "--class_names", "dog")),
        ("has no word for a prompt", ("--class_names", "dog", "...")),
        ("class names: dog is given 2 times", ("--class_names", "dog", "cat", "Dog ")),
        ("class names: dog is given 2 times", ("--class_names", "cat . dog .", "dog")),
        ("the tokenizer knows no word of '☃'", ("--class_names", "☃")),
    ],
)
def test_bad_flags(refused, photos, message, flags):
    refused(message, photos, *flags)


def test_bad_inputs(refused, photos, adapters, tmp_path, monkeypatch, capsys, run):
    flags = ("--adapter", adapters[0])
    (tmp_path / "empty").mkdir()
    refused("nosuch.jpg: no such image or folder", photos / "nosuch.jpg", *flags)
    refused("xxx…: no such image or folder", photos / ("x" * 290), *flags)
    refused("empty: no image in this folder", photos, tmp_path / "empty", *flags)
    refused("notes.txt: cannot be opened as an image", photos / "notes.txt", *flags)
    refused("a.png: is not a folder, which --watch needs", photos / "a.png", "--watch", *flags)
    refused("has the input images", photos, *flags, output=photos)
    refused("has the input images", photos, "--watch", *flags, output=photos / ".." / photos.name)
    (tmp_path / "file").write_text("")
    refused("file: is not a folder", photos, *flags, output=tmp_path / "file")
    (photos / "bad.jpg").write_text("no picture")
    refused("bad.jpg: cannot be opened as an image", photos, *flags)
    refused("none of them can be opened", photos / "bad.jpg", "--skip_bad_images", *flags)
    noise(0, 2000, 2).save(photos / "bad.jpg")
    refused("bad.jpg: cannot be opened as an image (2000 x 2 pixels are too oblong", photos, *flags)


def test_pictures_that_end_in_the_middle(refused, run, photos, adapters, tmp_path, capsys):
    """Their headers are in order."""
    half = (photos / "b.png").read_bytes()[:3000]
    (photos / "b.png").write_bytes(half)
    (photos / "bad.jpg").write_text("no picture")
    refused("bad.jpg: cannot be opened as an image", photos, "--adapter", adapters[0], loads=True)
    (photos / "bad.jpg").unlink()
    refused("b.png: cannot be opened as an image", photos, "--adapter", adapters[0], loads=True)
    (photos / "bad.jpg").write_text("no picture")
    assert run(photos, "--adapter", adapters[0], "--skip_bad_images") == 0
    assert [image["file_name"] for image in read(tmp_path / "out")["images"]] == ["a.png", "c.png"]
    error = capsys.readouterr().err
    assert f"skipped: {photos / 'bad.jpg'}" in error and f"skipped: {photos / 'b.png'}" in error


def test_bad_adapters(refused, photos, adapters, tmp_path):
    refused(
        f"--adapter {adapters[0]} {adapters[0]}: both are called one", photos, "--adapter", adapters[0], adapters[0]
    )
    refused("both are called ONE", photos, "--adapter", adapters[0], f"ONE={adapters[1]}")
    refused("'a/b' cannot be the name of a folder", photos, "--adapter", f"a/b={adapters[0]}")
    refused("'..' cannot be the name of a folder", photos, "--adapter", f"..={adapters[0]}")
    for name in ("n" * 300, "é" * 200, "a\nb"):
        refused("cannot be the name of a folder; write NAME=ADAPTER.", photos, "--adapter", f"{name}={adapters[0]}")
    refused(f"is not a saved adapter, because {photos}", photos, "--adapter", photos)

    def changed(name: str, **changes) -> Path:
        folder = tmp_path / name
        shutil.copytree(adapters[0], folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder

    nowhere = changed("nowhere", base_model_name_or_path="no/such host")
    refused("no/such host: cannot be loaded as a detector", photos, "--adapter", nowhere)
    refused("The adapter names this base model; pass --model_name_or_path.", photos, "--adapter", nowhere)
    different = ("--adapter", adapters[0], nowhere)
    refused("--adapter: the adapters were trained on different base models (one:", photos, *different)
    refused("no/such host). Choose one by --model_name_or_path.", photos, *different)
    refused("does not name its base model", photos, "--adapter", changed("hostless", base_model_name_or_path=None))
    refused("is not an adapter that can be loaded", photos, "--adapter", changed("strange", peft_type="NOSUCH"))
    get_peft_model(load_host().model.text_backbone, LoraConfig(target_modules=["query"])).save_pretrained(
        tmp_path / "lora"
    )
    refused("is not an SDPT adapter, because its config is a LoraConfig", photos, "--adapter", tmp_path / "lora")

    for text, message in (
        ("{", "class_names.json: not JSON"),
        ('{"a": 1}', "class_names.json: must be a JSON list of names"),
        ("[1]", "class_names.json: must be a JSON list of names"),
        ("[]", "named: has no class name."),
    ):
        shutil.rmtree(tmp_path / "named", ignore_errors=True)
        (changed("named") / "class_names.json").write_text(text)
        refused(message, photos, "--adapter", tmp_path / "named")
    (tmp_path / "named" / "class_names.json").unlink()
    message = "saved without class names (class_names.json). Pass --class_names."
    refused(message, photos, "--adapter", tmp_path / "named")
    (tmp_path / "named" / "class_names.json").write_text('["dog"]')
    (tmp_path / "named" / "processor_config.json").write_text("{")
    refused(f"{tmp_path / 'named'}: has no processor that can be loaded", photos, "--adapter", tmp_path / "named")


def test_adapters_that_do_not_load_on_the_host(refused, photos, adapters, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(adapters[1], other)
    shutil.copy(adapters[0] / "adapter_model.safetensors", other)
    # Before the base model is loaded.
    refused(f"--adapter {other}: is not an adapter that can be loaded", photos, "--adapter", other)
    refused(f"--adapter {other}: is not an adapter that can be loaded", photos, "--adapter", adapters[0], other)
    (other / "adapter_model.safetensors").write_bytes(b"damaged")
    refused(f"--adapter {other}: is not an adapter that can be loaded", photos, "--adapter", other)


def test_a_host_of_another_kind(refused, photos, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "owlvit"}')
    message = f"--model_name_or_path {tmp_path}: must be a Grounding DINO, MM Grounding DINO or LLMDet"
    refused(message, photos, "--model_name_or_path", tmp_path, "--class_names", "dog")


# ---- several processes, and runs that go on


@pytest.fixture
def many(tmp_path):
    """A folder with six pictures, which make batches of two, one, two and one."""
    folder = tmp_path / "many"
    (folder / "b").mkdir(parents=True)
    for seed, (name, size) in enumerate({"a1.png": (120, 90), "a2.png": (120, 90), "a3.png": (90, 120)}.items()):
        noise(seed, *size).save(folder / name)
        noise(10 + seed, *size).save(folder / "b" / name)
    return folder


BATCHES = ("--batch_size", 2)


@pytest.fixture
def killed_after(monkeypatch):
    """Kill runs after a number of calls of the model. Returns the number of calls so far."""

    def killed_after(number: int) -> list[int]:
        calls: list[int] = []

        def counted(model, processor, pictures, *args, **kwargs):
            if len(calls) == number:
                raise Killed
            calls.append(len(pictures))
            return prediction.detect(model, processor, pictures, *args, **kwargs)

        monkeypatch.setattr(command, "detect", counted)
        return calls

    return killed_after


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_run_goes_on_where_it_stopped(run, many, adapters, tmp_path, killed_after, capsys):
    """It ends with the same files, bit for bit, as a run that was not killed."""
    flags = (many, "--adapter", *adapters, *BATCHES)
    assert run(*flags, output=tmp_path / "whole") == 0
    out = tmp_path / "out"
    killed_after(3)  # in the second batch, between the two adapters
    with pytest.raises(Killed):
        run(*flags)
    # As SIGKILL leaves it: a line that is cut off, a file that was not renamed, and no COCO file.
    (lines,) = (out / "detections.unfinished").glob("*.jsonl")
    lines.write_bytes(lines.read_bytes() + b'{"batch": 1, "images": [{"file_na')
    (out / "one" / f"{'0f' * 8}.unfinished").write_text("half")
    for name in ("one", "two"):
        (out / name / "detections.json").unlink()
    calls = killed_after(4)
    with pytest.raises(Killed):
        run(*flags, "--resume")
    assert calls == [1, 1, 2, 2]
    capsys.readouterr()
    calls = killed_after(-1)
    assert run(*flags, "--resume") == 0
    assert calls == [1, 1]
    assert "resuming: 5 of 6 images are done\n" in capsys.readouterr().out
    assert contents(out) == contents(tmp_path / "whole")
    assert len(read(out / "one")["images"]) == 6


def test_a_stopped_run_has_a_file_with_what_is_done(run, many, adapters, tmp_path, killed_after):
    """Without --resume, the next run starts from the beginning, and may replace the images. So does one with nothing to
    resume."""
    flags = (many, "--adapter", adapters[0], *BATCHES)
    killed_after(2)
    with pytest.raises(Killed):
        run(*flags)
    names = [image["file_name"] for image in read(tmp_path / "out")["images"]]
    assert names == ["a1.png", "a2.png", "a3.png"]
    (tmp_path / "out" / "detections.json").unlink()
    for more in ((), ("--resume",)):
        calls = killed_after(-1)
        assert run(*flags, *more) == 0
        assert calls == [2, 1, 2, 1] and len(read(tmp_path / "out")["images"]) == 6
        assert not (tmp_path / "out" / "detections.unfinished").exists()
        shutil.rmtree(tmp_path / "out")


def test_a_finished_run_is_not_done_again(run, many, adapters, tmp_path, killed_after, monkeypatch, capsys):
    """The command with --resume ends at once, and refuses other settings and images."""
    flags = (many, "--adapter", *adapters, *BATCHES)
    assert run(*flags, "--resume") == 0
    out = tmp_path / "out"
    before = contents(out)
    calls = killed_after(-1)
    with monkeypatch.context() as patch:
        patch.setattr(command, "load_detector", lambda *_: pytest.fail("loaded"))
        capsys.readouterr()
        assert run(*flags, "--resume") == 0
        assert capsys.readouterr().out == f"the results of 6 images in {out} are complete; nothing is left to do.\n"
        other = save_adapter(tmp_path / "other" / "one", 5)
        for message, more in {
            f"--threshold is [0.5, 0.5], but was [0.02, 0.02] in the finished run in {out}.": ("--threshold", 0.5),
            f"adapter one has other weights than in the finished run in {out}.": ("--adapter", other, adapters[1]),
        }.items():
            assert run(*flags, "--resume", *more) == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert error == f"detect.py: --resume: {message} Without --resume, the command starts from the beginning."
        noise(0).save(many / "a2-new.png")
        assert run(*flags, "--resume") == 2
        assert f"a2-new.png was added; the finished run in {out} did not have" in capsys.readouterr().err
        (many / "a2-new.png").unlink()
        # Its results would be in the folder itself.
        assert run(many, "--adapter", adapters[0], *BATCHES, "--resume") == 2
        assert "--adapter is ['one'], but was ['one', 'two'] in the finished run" in capsys.readouterr().err
    assert contents(out) == before and not calls
    # Without a COCO file, or without --resume, everything is computed.
    (out / "two" / "detections.json").unlink()
    assert run(*flags, "--resume") == 0
    assert len(calls) == 8 and contents(out) == before
    # A run that was killed is not finished, although there are results of another one.
    killed_after(1)
    with pytest.raises(Killed):
        run(*flags)
    calls = killed_after(-1)
    assert run(*flags, "--resume") == 0
    assert len(calls) == 8 and contents(out) == before


def test_an_output_that_is_a_file(refused, photos, adapters, tmp_path):
    (tmp_path / "afile").touch()
    refused(
        f"--output_dir {tmp_path / 'afile'}: is not a folder.",
        photos,
        "--adapter",
        adapters[0],
        output=tmp_path / "afile",
    )


def test_ctrl_c_says_how_to_go_on(run, many, adapters, monkeypatch, capsys):
    monkeypatch.setattr(command, "detect", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert run(many, "--adapter", adapters[0]) == 130
    assert capsys.readouterr().err.endswith("detect.py: stopped; the same command with --resume goes on.\n")


def test_only_the_same_run_is_resumed(refused, run, many, adapters, tmp_path, killed_after):
    killed_after(1)
    flags = (many, "--adapter", adapters[0], *BATCHES)
    with pytest.raises(Killed):
        run(*flags)
    out = tmp_path / "out"
    (out / "detections.json").unlink()
    other = shutil.copytree(adapters[0], tmp_path / "other" / "one")
    before = contents(out)

    def differs(what: str, *more) -> None:
        refused(f"--resume: {what}", *flags, "--resume", *more)
        assert contents(out) == before

    differs("--threshold is [0.5], but was [0.02] in the unfinished run in ", "--threshold", 0.5)
    differs("--class_names is [['dog']], but was [['grinning face', 'dog', 'red apple']]", "--class_names", "dog")
    differs("--batch_size is 1, but was 2", "--batch_size", 1)
    differs("--adapter is ['new'], but was ['one'] in the", "--adapter", f"new={adapters[0]}")
    differs("--adapter is ['one', 'two'], but was ['one'] in", "--adapter", adapters[0], adapters[1])
    save_adapter(other, 5)
    differs(f"adapter one has other weights than in the unfinished run in {out}.", "--adapter", other)
    differs("cannot be used with --watch.", "--watch")
    noise(0).save(many / "a2-new.png")
    differs(f"{many / 'a2-new.png'} was added; the unfinished run in {out} did not have this image.")
    (many / "a2-new.png").rename(tmp_path / "a2-new.png")
    (many / "b" / "a1.png").rename(tmp_path / "a1.png")
    differs(f"{many / 'b' / 'a1.png'}, an image of the unfinished run in {out}, is missing.")
    (tmp_path / "a1.png").rename(many / "b" / "a1.png")
    content = (many / "a3.png").read_bytes()
    noise(0, 100, 100).save(many / "a3.png")
    differs(f"{many / 'a3.png'} has changed: it has 100 x 100 pixels, but had 90 x 120 in the unfinished run in {out}.")
    (many / "a3.png").write_bytes(content)
    refused(f"--resume: {many / 'a2.png'} has another place in the order", many / "a2.png", *flags, "--resume")
    for text, message in (
        ("{", "not JSON"),
        ("[]", "is damaged"),
        ('{"settings": 1, "images": []}', "is damaged"),
        ('{"settings": {}}', "is damaged"),
        ('{"settings": {}, "images": [["a.png", "a.png"]]}', "is damaged"),
    ):
        (out / "detections.unfinished" / "plan.json").write_text(text)
        refused(f"plan.json: {message}", *flags, "--resume")


def test_pictures_that_cannot_be_read_are_named_once(run, many, adapters, tmp_path, killed_after, capsys):
    """The flag may be added when a run goes on."""
    (many / "a3.png").write_bytes((many / "a3.png").read_bytes()[:3000])
    flags = (many, "--adapter", adapters[0], *BATCHES)
    assert run(*flags) == 2
    assert f"{many / 'a3.png'}: cannot be opened as an image" in capsys.readouterr().err
    calls = killed_after(-1)
    assert run(*flags, "--resume", "--skip_bad_images") == 0
    assert calls == [2, 1]
    assert capsys.readouterr().err.count(f"skipped: {many / 'a3.png'}: cannot be opened") == 1
    names = [image["file_name"] for image in read(tmp_path / "out")["images"]]
    assert names == ["a1.png", "a2.png", "b/a1.png", "b/a2.png", "b/a3.png"]


def test_results_that_are_missing_at_the_end_are_noticed(refused, many, adapters, monkeypatch):
    """As on a network file system that does not yet show the file of another machine."""
    monkeypatch.setattr(command.Journal, "add", lambda *_: None)
    flags = (many, "--adapter", adapters[0], *BATCHES)
    refused("the results of 4 batches are not there; the same command with --resume goes on.", *flags, loads=True)


def test_results_are_not_held_in_memory(tmp_path):
    """Writing the COCO file of a large run takes the memory of one batch."""
    box = [0.123456789, 1.123456789, 20.123456789, 30.123456789]
    found = {"best_score": 0.9, "full": False, "boxes": [box] * 200, "scores": [0.9] * 200, "labels": [0] * 200}
    image = {"file_name": "a.png", "width": 100, "height": 100, "source": "/a.png", "found": [found]}
    journal = command.Journal(tmp_path)
    journal.start({}, [])
    results = command.Results("", tmp_path, None, ["dog"], [[0]], 0.5)
    tracemalloc.start()
    try:
        for batch in range(50):
            journal.add(batch, [image])
        results.write(journal, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = (tmp_path / "detections.json").stat().st_size
    assert size > 1_000_000 and peak < size / 4
    written = read(tmp_path)
    assert [image["id"] for image in written["images"]] == [*range(1, 51)]
    assert [a["id"] for a in written["annotations"]] == [*range(1, 10_001)]
    assert results.summary().startswith("50 images, 10,000 objects (dog: 10000).")


@pytest.mark.slow
def test_two_processes_finish_what_one_began(run, many, adapters, tmp_path, killed_after):
    """The images are divided. The files are those of one process, bit for bit."""
    flags = (many, "--adapter", adapters[0], *BATCHES)
    assert run(*flags, output=tmp_path / "whole") == 0
    killed_after(1)
    with pytest.raises(Killed):
        run(*flags)
    script = ROOT / "examples" / "detect.py"
    options = ("--output_dir", tmp_path / "out", "--threshold", THRESHOLD, "--resume")
    command = ("-m", "torch.distributed.run", "--nproc_per_node", 2, script, *flags, *options)
    process = launched(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # One process reports.
    assert out.count("resuming: 2 of 6 images are done") == out.count("6 images, ") == out.count("looking for") == 1
    assert err.count("detecting:   0%") == 1


# ---- trust


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_a_really_full_disk_leaves_no_part_of_a_picture(run, tmp_path, adapters, capsys, suffix):
    """Pillow 12 raises no error if it writes only a part of a JPEG."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.new("RGB", (16, 16)).save(photos / "a.png")
    noise(0, 200, 200).save(photos / f"b{suffix}")
    with file_size_limit(9000):
        assert run(photos, "--adapter", adapters[0], "--batch_size", 1, threshold=0.99) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last == f"detect.py: {out / f'b{suffix}'}: cannot be written ([Errno 27] File too large)."
    assert "Traceback" not in error
    assert names_of(out) == ["a.png", "detections.json", "detections.unfinished"]
    assert [image["file_name"] for image in read(out)["images"]] == ["a.png"]
    # The disk has free space again.
    assert run(photos, "--adapter", adapters[0]) == 0
    assert names_of(out) == ["a.png", f"b{suffix}", "detections.json"]


def test_a_folder_that_another_command_writes_to_is_refused(run, photos, adapters, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with only_writer(out):
        assert run(photos, "--adapter", adapters[0]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"detect.py: --output_dir {out}: another command is writing to this folder; wait until")
    assert list(out.iterdir()) == []


def test_a_picture_is_written_in_the_format_of_its_name(run, tmp_path, adapters):
    names = [f"photo{suffix}" for suffix in (".apng", ".gif", ".j2k", ".jp2", ".jpeg", ".ppm", ".webp")]
    (tmp_path / "photos").mkdir()
    for name in names:
        noise(0).save(tmp_path / "photos" / name)
    assert run(tmp_path / "photos", "--adapter", adapters[0]) == 0
    assert names_of(tmp_path / "out") == ["detections.json", *names]
    for name in names:
        with Image.open(tmp_path / "out" / name) as image, Image.open(tmp_path / "photos" / name) as source:
            assert image.format == source.format and image.size == source.size
        start = [(folder / name).read_bytes()[:4] for folder in (tmp_path / "photos", tmp_path / "out")]
        assert start[0] == start[1]
