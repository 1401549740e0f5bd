# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Generated scenes, the tasks made of them, and pictures of detections."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import pictograms
from peft_sdpt.detection.drawing import SIDE, draw_detections
from peft_sdpt.detection.loading import load_split
from pictograms import STYLES, SceneStyle, make_scene, read_categories, tasks, tiles
from pretrain_host import held_out_scenes

ALL = list(range(len(read_categories())))
SPLITS = {"train": 7, "val": 4, "test": 5}


# ---- categories


def test_at_least_three_hundred_seen_categories():
    categories = read_categories()
    assert sum(category.seen for category in categories) >= 300
    assert sum(not category.seen for category in categories) >= 10
    # Labels of pre-training are the first indices.
    seen = [category.seen for category in categories]
    assert seen == sorted(seen, reverse=True)


def test_names_and_keys_are_unique_and_fit_a_prompt():
    categories = read_categories()
    for values in ([c.name for c in categories], [c.key for c in categories]):
        assert len(set(values)) == len(values)
    for category in categories:
        assert category.name == " ".join(category.name.lower().split())
        assert category.name and not set(category.name) & set(".?,=[]_")


@pytest.mark.parametrize("style", STYLES)
def test_every_category_is_drawn_in_every_style_and_no_two_alike(style):
    drawn = tiles(style)
    assert len(drawn) == len(ALL)
    for tile in drawn:
        alpha = np.asarray(tile.getchannel("A"))
        assert min(tile.size) >= 8 and (alpha > 200).sum() > 100
    assert len({tile.tobytes() for tile in drawn}) == len(drawn)


# ---- scenes


def pixels(picture: Image.Image) -> bytes:
    return picture.tobytes()


def test_scene_depends_on_its_seed_alone():
    picture, labels, boxes = make_scene((3, 1), ALL)
    np.random.seed(5)
    again = make_scene((3, 1), ALL)
    assert pixels(again[0]) == pixels(picture) and again[1:] == (labels, boxes)
    assert pixels(make_scene((3, 1, 0), ALL)[0]) == pixels(picture)  # as documented
    for other in ((3, 2), (4, 1), (3, 1, 1)):
        assert pixels(make_scene(other, ALL)[0]) != pixels(picture)


def test_scenes_draw_from_the_classes_they_are_given():
    drawn = [label for seed in range(40) for label in make_scene((seed,), [5, 17, 200])[1]]
    assert set(drawn) == {5, 17, 200}


def drawn_alpha(monkeypatch, seed, look: SceneStyle, size: int = 96):
    """What a scene draws, as its opacity: the difference between it on black and on white is what shows through."""
    background = pictograms._background
    scenes = []
    for colour in ("black", "white"):

        def plain(rng, size, colour=colour):
            background(rng, size)  # the scene's later draws of random numbers stay the same
            return Image.new("RGB", (size, size), colour)

        monkeypatch.setattr(pictograms, "_background", plain)
        scenes.append(make_scene(seed, ALL, size, look))
    monkeypatch.setattr(pictograms, "_background", background)
    (black, *truth), (white, *same) = scenes
    assert truth == same and truth == list(make_scene(seed, ALL, size, look)[1:])
    through = np.asarray(ImageChops.subtract(white, black)).max(-1)
    return 255 - through, truth[0], truth[1]


LOOKS = {
    "noto": SceneStyle(),
    "twemoji": SceneStyle("twemoji"),
    "small grey": SceneStyle("twemoji", smallest=0.1, largest=0.3, grey=True),
}


@pytest.mark.parametrize("look", LOOKS)
def test_boxes_are_tight_around_what_is_drawn(look, monkeypatch):
    alone = dataclasses.replace(LOOKS[look], most=1)
    seen = 0
    for seed in range(25):
        alpha, labels, boxes = drawn_alpha(monkeypatch, (seed,), alone)
        assert len(labels) == len(boxes) <= 1
        for x, y, width, height in boxes:
            rows, columns = np.nonzero(alpha > 32)
            edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            # Rounding of the two blends may hide or show a pixel of alpha 32 or 33.
            assert np.abs(np.subtract(edges, (x, y, x + width, y + height))).max() <= 1
            seen += 1
    assert seen >= 20


@pytest.mark.parametrize("look", LOOKS)
def test_everything_drawn_is_in_a_box_and_no_box_is_hidden(look, monkeypatch):
    count = 0
    for seed in range(15):
        alpha, labels, boxes = drawn_alpha(monkeypatch, (seed, 1), LOOKS[look])
        assert len(labels) == len(boxes)
        covered = np.zeros_like(alpha, dtype=bool)
        for x, y, width, height in boxes:
            assert min(x, y) >= 0 and max(x + width, y + height) <= 96 and min(width, height) >= 4
            assert (alpha[y : y + height, x : x + width] > 128).mean() > 0.1
            covered[y : y + height, x : x + width] = True
        assert not (alpha[~covered] > 1).any()
        for i, first in enumerate(boxes):
            for second in boxes[:i]:
                width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
                height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
                inside = max(0, width) * max(0, height)
                assert inside < 0.25 * min(first[2] * first[3], second[2] * second[3])
        count += len(boxes)
    assert count > 20


def test_held_out_scenes_are_not_those_of_pretraining():
    classes = [index for index, category in enumerate(read_categories()) if category.seen]
    held_out = held_out_scenes(True, 6)
    # The default --seed, by step and image: a seed of two numbers is one of three with a zero.
    trained = {pixels(make_scene((0, step, image), classes)[0]) for step in range(6) for image in range(6)}
    assert not trained & {pixels(held_out.open_image(index)) for index in range(6)}


def test_pictograms_have_the_sizes_of_the_look():
    longest = {
        name: [max(box[2:]) / 96 for seed in range(40) for box in make_scene((seed,), ALL, 96, look)[2]]
        for name, look in LOOKS.items()
    }
    assert max(longest["noto"]) > 0.4 > max(longest["small grey"])
    assert min(longest["noto"]) > 0.12 > min(longest["small grey"])


def test_grey_is_grey_and_the_others_are_not():
    for seed in range(10):
        grey = np.asarray(make_scene((seed,), ALL, 96, LOOKS["small grey"])[0]).astype(int)
        assert grey.shape == (96, 96, 3) and np.ptp(grey, axis=-1).max() == 0
        colour = np.asarray(make_scene((seed,), ALL, 96, LOOKS["twemoji"])[0]).astype(int)
        assert np.ptp(colour, axis=-1).max() > 20


def test_styles_differ():
    first, second = (make_scene((1,), ALL, 96, SceneStyle(style)) for style in ("noto", "twemoji"))
    assert first[1][0] == second[1][0]  # the same name drawn by another hand
    assert pixels(first[0]) != pixels(second[0])


# ---- tasks


@pytest.fixture(autouse=True)
def short_tasks(monkeypatch):
    """The built-in tasks with fewer pictures, the rest as they are."""
    for name, task in tasks.TASKS.items():
        monkeypatch.setitem(tasks.TASKS, name, dataclasses.replace(task, **SPLITS))


def write(name, folder):
    tasks.write_task(name, folder, disable_progress=True)
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("name", tasks.TASKS)
def test_task_written_twice_is_the_same_bytes(name, tmp_path):
    first, second = write(name, tmp_path / "a"), write(name, tmp_path / "b")
    assert first == second
    assert len(first) == 3 + sum(SPLITS.values())


@pytest.mark.parametrize("name", tasks.TASKS)
def test_task_is_a_coco_folder(name, tmp_path):
    write(name, tmp_path)
    classes = set()
    for split, count in SPLITS.items():
        data = load_split(str(tmp_path), split)
        assert len(data) == count
        classes.add(tuple(data.class_names))
        for index in range(count):
            assert data.open_image(index).size == data.sizes[index] == (96, 96)
    assert len(classes) == 1


def test_annotations_are_those_of_the_scenes(tmp_path):
    write("twemoji", tmp_path)
    coco = json.loads((tmp_path / "val.json").read_text())
    every = [category.name for category in read_categories()]
    classes = [every.index(category["name"]) for category in coco["categories"]]
    seed = (tasks.zlib.crc32(b"twemoji"), 1, 2)
    picture, labels, boxes = make_scene(seed, classes, 96, tasks.TASKS["twemoji"].look)
    assert pixels(Image.open(tmp_path / "images" / "val_0002.png")) == pixels(picture)
    found = [a for a in coco["annotations"] if a["image_id"] == 2]
    assert [classes[a["category_id"]] for a in found] == labels
    assert [tuple(a["bbox"]) for a in found] == [tuple(map(float, box)) for box in boxes]


def test_names_kept_out_of_pretraining_are_in_the_task_of_new_names_alone(tmp_path):
    unseen = {category.name for category in read_categories() if not category.seen}
    for name in tasks.TASKS:
        write(name, tmp_path / name)
        for split in SPLITS:
            names = set(load_split(str(tmp_path / name), split).class_names)
            assert len(names) > 20
            assert names == unseen if name == "noto-new" else not unseen & names


def test_splits_and_tasks_share_no_picture(tmp_path):
    digests = [
        hashlib.sha256(content).hexdigest()
        for name in tasks.TASKS
        for file, content in write(name, tmp_path / name).items()
        if file.startswith("images")
    ]
    assert len(set(digests)) == len(digests) == len(tasks.TASKS) * sum(SPLITS.values())


def test_tasks_are_big_enough_and_colourless_where_they_say_so(tmp_path):
    fields = {field.name: field.default for field in dataclasses.fields(tasks.Task)}
    assert fields["train"] >= 500 and fields["val"] >= 100 and fields["test"] >= 200
    write("twemoji-small-grey", tmp_path)
    for file in sorted((tmp_path / "images").iterdir()):
        assert np.ptp(np.asarray(Image.open(file).convert("RGB")).astype(int), axis=-1).max() == 0


@pytest.mark.parametrize("kept", [[], ["train"], ["train", "val"]])
def test_killed_writing_is_completed(kept, tmp_path):
    whole = write("twemoji", tmp_path / "whole")
    killed = tmp_path / "killed"
    write("twemoji", killed)
    for split in SPLITS:
        if split not in kept:
            (killed / f"{split}.json").unlink()
            (killed / "images" / f"{split}_0003.png").unlink()
            (killed / "images" / f"{split}_0001.png").write_bytes(b"half a pict")
    (killed / "test.json.unfinished").write_text('{"images": [')
    assert write("twemoji", killed) == whole


def test_a_kill_in_the_middle_leaves_no_split_that_looks_finished(tmp_path, monkeypatch):
    calls = []

    def scene(*args):
        calls.append(args)
        if len(calls) == SPLITS["train"] + 3:
            raise KeyboardInterrupt
        return make_scene(*args)

    monkeypatch.setattr(pictograms, "make_scene", scene)
    with pytest.raises(KeyboardInterrupt):
        write("twemoji", tmp_path / "killed")
    assert [file.name for file in (tmp_path / "killed").glob("*.json*")] == ["train.json"]
    monkeypatch.setattr(pictograms, "make_scene", make_scene)
    assert write("twemoji", tmp_path / "killed") == write("twemoji", tmp_path / "whole")


def test_complete_folder_is_left_as_it_is(tmp_path, monkeypatch):
    before = write("twemoji", tmp_path)
    monkeypatch.setattr(pictograms, "make_scene", lambda *args: pytest.fail("drawn again"))
    assert write("twemoji", tmp_path) == before


# ---- pictures of detections


@pytest.fixture
def found() -> dict:
    return {
        "boxes": torch.tensor([[20.0, 40.0, 60.0, 30.0], [100.0, 10.0, 20.0, 20.0]]),
        "scores": torch.tensor([0.9, 0.29]),
        "labels": torch.tensor([1, 0]),
    }


def test_draws_boxes_that_score_enough(found):
    picture = Image.new("RGB", (160, 80), "white")
    drawn = draw_detections(picture, found, ["dog", "cat"], 0.3, SIDE)
    assert drawn.size == (SIDE, 160)  # twice as large
    assert picture.getcolors() == [(160 * 80, (255, 255, 255))]
    white = (255, 255, 255)
    colour = drawn.getpixel((40, 110))
    assert colour != white
    for edge in ((160, 110), (100, 80), (100, 140)):
        assert drawn.getpixel(edge) == colour
    assert drawn.getpixel((100, 110)) == white
    # The second one scores less; with a lower threshold it is there, in its own colour.
    assert drawn.crop((195, 0, 320, 160)).getcolors() == [(125 * 160, white)]
    both = draw_detections(picture, found, ["dog", "cat"], 0.2, SIDE)
    assert both.getpixel((200, 40)) not in (white, colour)


def test_draws_nothing_where_nothing_is_found(found):
    picture = Image.new("RGB", (160, 80), "white")
    none = {"boxes": torch.empty(0, 4), "scores": torch.empty(0), "labels": torch.empty(0, dtype=torch.long)}
    assert draw_detections(picture, none, ["dog"], 0.3).getcolors() == [(160 * 80, (255, 255, 255))]
    assert len(draw_detections(picture, found, ["dog", "cat"], 0.3).getcolors()) > 2


@pytest.mark.parametrize("size", [(40, 30), (160, 80), (1600, 800), (4000, 3000)], ids=str)
def test_draws_at_the_size_of_the_picture(size):
    width, height = size
    box = torch.tensor([[0.25 * width, 0.25 * height, 0.5 * width, 0.5 * height]])
    found = {"boxes": box, "scores": torch.tensor([0.9]), "labels": torch.tensor([0])}
    drawn = draw_detections(Image.new("RGB", size, "white"), found, [""], 0.3)
    assert drawn.size == size
    row = [drawn.getpixel((x, height * 2 // 3)) != (255, 255, 255) for x in range(width)]
    edges = [x for x in range(width) if row[x]]
    assert edges[0] == 0.25 * width and edges[-1] == 0.75 * width
    # Lines that are seen in a large picture and do not fill a small one.
    assert max(2, width // 500) <= len(edges) // 2 <= max(3, width // 200)


def test_names_stay_inside_the_picture():
    found = {"boxes": torch.tensor([[390.0, 150.0, 10.0, 20.0]]), "scores": torch.ones(1), "labels": torch.tensor([0])}
    picture = Image.new("RGB", (400, 300), "white")
    plain, named = (draw_detections(picture, found, [name], 0.3) for name in ("", "a long name of a class"))
    inked = [(x, y) for x in range(400) for y in range(300) if named.getpixel((x, y)) != (255, 255, 255)]
    assert min(x for x, _ in inked) < 250 and max(x for x, _ in inked) == 399
    # The margin behind the name is as wide as that before it.
    assert plain.getpixel((399, 160)) == named.getpixel((399, 160))
    assert all(named.getpixel((398, y)) != (0, 0, 0) for y in range(300))


def test_line_art_is_dark_on_white_within_the_outlines():
    for plain, drawn in list(zip(tiles("twemoji"), tiles("twemoji", line_art=True), strict=True))[::20]:
        red, green, blue, alpha = (np.asarray(band, dtype=float) for band in drawn.split())
        assert (red == green).all() and (red == blue).all()
        covered = red[alpha > 128]
        assert (covered < 128).mean() > 0.02 and (covered > 200).mean() > 0.2
        assert abs(np.asarray(plain.getchannel("A")).mean() - alpha.mean()) < 60
