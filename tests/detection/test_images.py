# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Finding images in folders."""

import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from peft_sdpt.detection import images
from peft_sdpt.detection.images import absolute_folders, find_images, images_in, passed_over, relative_name, watch
from peft_sdpt.errors import InputError
from tests.helpers.detectors import run_python


def picture(file: Path, colour: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), colour).save(file)
    return file


@pytest.fixture
def tree(tmp_path):
    """A folder with images of several kinds in subfolders, and with other files."""
    root = tmp_path / "tree"
    for name in ("b.png", "a/1.jpg", "b/1.JPG", "b/c/2.HEIC", "b/c/3.webp", "b/c/4.AVIF", ".hidden/5.png", ".6.png"):
        picture(root / name)
    picture(root / "out" / "b.png")
    for name in ("notes.txt", "a/clip.mp4", "b/a.psd", ".DS_Store"):
        (root / name).write_text("no image")
    return root


FOUND = ["a/1.jpg", "b/1.JPG", "b/c/2.HEIC", "b/c/3.webp", "b/c/4.AVIF", "b.png"]


def below(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_subfolders(tree):
    found, others = images_in(tree, without=tree / "out")
    assert below(found, tree) == FOUND
    assert below(others, tree) == ["a/clip.mp4", "b/a.psd", "notes.txt"]
    assert below(images_in(tree)[0], tree) == [*FOUND, "out/b.png"]
    # The folder itself is searched, even if its name starts with a dot.
    assert below(images_in(tree / ".hidden", without=tree / ".hidden")[0], tree) == [".hidden/5.png"]


def test_links_to_folders(tree, tmp_path):
    """Links are followed, and a circle of links does not repeat forever."""
    picture(tmp_path / "elsewhere" / "7.png")
    try:
        (tree / "link").symlink_to(tmp_path / "elsewhere")
        (tree / "b" / "circle").symlink_to(tree)
        (tree / "b" / "again").symlink_to(tree / "a")
    except OSError:
        pytest.skip("no links here")
    names = below(images_in(tree, without=tree / "out")[0], tree)
    assert names == ["a/1.jpg", *FOUND[1:-1], FOUND[-1], "link/7.png"]


def test_a_folder_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="gone: cannot be read"):
        images_in(tmp_path / "gone")


def test_a_subfolder_that_goes_away_during_the_search(tree, monkeypatch):
    real = os.scandir

    def scandir(path):
        if Path(path).name == "c":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert below(images_in(tree, without=tree / "out")[0], tree) == ["a/1.jpg", "b/1.JPG", "b.png"]


def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "a").mkdir(parents=True)
    inputs = [Path("in/a"), Path("in"), Path("in/b.png")]
    folders = absolute_folders(inputs)
    assert folders == {tmp_path / "in", tmp_path / "in" / "a"}
    # The outermost folder counts, so that a/1.jpg and 1.jpg are different results.
    assert relative_name(Path("in/a/1.jpg"), folders) == Path("a/1.jpg")
    assert relative_name(tmp_path / "in" / "1.jpg", folders) == Path("1.jpg")
    # A result never leaves its folder.
    assert relative_name(Path("../x/1.jpg"), absolute_folders([Path(".")])) == Path("1.jpg")


def test_what_is_passed_over_is_named(tree, capsys):
    assert below(find_images([tree], False, tree / "out"), tree) == FOUND
    line = "passed over 2 files that are not images: b/a.psd, notes.txt; "
    line += "1 video, whose frames must be extracted first, for instance with ffmpeg: a/clip.mp4\n"
    assert capsys.readouterr().err == line.replace("/", os.sep)
    # No note is printed for a folder with images only, and none is printed twice.
    find_images([tree / "out"], False)
    assert capsys.readouterr().err == ""
    find_images([tree, tree / "b"], False, tree / "out")
    assert capsys.readouterr().err.count("a.psd") == 1


def test_many_files_are_passed_over(tmp_path):
    files = [tmp_path / f"{number}.txt" for number in range(10, 30)]
    text = passed_over(files, {tmp_path})
    assert text.startswith("passed over 20 files that are not images: 10.txt, 11.txt, ") and text.endswith(
        " and 10 more"
    )
    assert "19.txt" in text and "20.txt" not in text
    assert passed_over(files[:1], {tmp_path}) == "passed over 1 file that is not an image: 10.txt"


def test_a_folder_without_images_names_what_it_has(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "clip.MOV").write_text("")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(
        InputError, match=r"no image in this folder \(passed over 1 file that .*b.txt; 1 video, .*MOV\)"
    ):
        find_images([tmp_path], False)


def test_heic_without_its_package(tree):
    code = """
import sys
from pathlib import Path
sys.modules["pillow_heif"] = None  # as if it was not installed
from peft_sdpt.detection.images import find_images
from peft_sdpt.errors import InputError
tree = Path(sys.argv[1])
print([path.name for path in find_images([tree / "b"], False)])
for inputs in ([tree / "b" / "c" / "2.HEIC"], [tree / "heic"]):
    try:
        find_images(inputs, False)
    except InputError as error:
        print(error)
"""
    picture(tree / "heic" / "8.heif")
    finished = run_python(code, str(tree))
    lines = finished.stdout.splitlines()
    assert lines[0] == "['1.JPG', '3.webp', '4.AVIF']"
    assert "2.HEIC: cannot be opened as an image" in lines[1]
    assert lines[1].endswith("HEIC photos need pip install pillow-heif.")
    assert "(passed over 1 HEIC photo, which needs pip install pillow-heif: 8.heif)" in lines[2]
    name = Path("c", "2.HEIC")
    assert f"1 HEIC photo, which needs pip install pillow-heif: {name}" in finished.stderr


def test_only_the_first_frame(tmp_path, capsys):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "b.tif", "c.webp", "d.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        picture(tmp_path / f"still-{name}")
    # Phones store a preview as the second picture.
    frames[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:])
    found = find_images([tmp_path], False)
    line = "only the first frame or page of 4 files is read: a.gif, b.tif, c.webp, d.png\n"
    assert len(found) == 9 and capsys.readouterr().err == line
    for path, image in images.read_images(found, False):
        red, _, blue = image.getpixel((20, 15))
        assert red > 200 and blue < 50, path


def test_watching(tree, tmp_path, monkeypatch, capsys):
    """New subfolders are searched too. Files that are not read are named after the first look and at the end."""
    looks = []

    def user(_) -> None:
        if len(looks) == 1:
            picture(tree / "new" / "d" / "9.png")
            picture(tree / "out" / "c.png")
            frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
            for name in ("1.gif", "2.gif"):
                frames[0].save(tree / "new" / name, save_all=True, append_images=frames[1:])
            (tree / "new" / "e.txt").write_text("")
        else:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(images.time, "sleep", user)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for look in watch([tree, tree / "b"], tree / "out"):
            looks.append(below([path for path, _ in look], tree))
    finally:
        signal.signal(signal.SIGINT, before)
    assert looks == [FOUND, ["new/1.gif", "new/2.gif", "new/d/9.png"]]
    error = capsys.readouterr().err
    assert error.count("passed over") == 2 and error.count("notes.txt") == 1
    assert "passed over 1 file that is not an image: " + str(Path("new", "e.txt")) in error
    assert error.count("only the first frame or page of files such as") == 1
