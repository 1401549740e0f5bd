# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Files and folders are written completely or not at all."""

import errno
import multiprocessing
import os
import signal

import pytest
import torch

from peft_sdpt.errors import InputError
from peft_sdpt.files import (
    DIGESTS,
    LOCK,
    UNFINISHED,
    check_digests,
    check_writable,
    only_writer,
    publish_folder,
    read_json,
    whole_file,
    whole_files,
    write_digests,
)
from tests.helpers.disk import file_size_limit
from tests.helpers.patience import PATIENCE


class Killed(BaseException):
    """Stands for Ctrl-C."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_replaces_the_old_one(tmp_path, durable):
    for text in ("one", "two"):
        with whole_file(tmp_path / "new" / "file.txt", durable=durable) as unfinished:
            assert unfinished.parent == tmp_path / "new" and unfinished.name.endswith(UNFINISHED)
            unfinished.write_text(text)
        assert (tmp_path / "new" / "file.txt").read_text() == text
    assert names(tmp_path / "new") == ["file.txt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError("No space left on device"),
        RuntimeError("from torch"),
        Exception("No space left on device (os error 28)"),  # raised by tokenizers
        Killed(),
    ],
)
def test_a_file_that_fails_leaves_the_old_one(tmp_path, error):
    file = tmp_path / "file.txt"
    file.write_text("old")
    expected = Killed if isinstance(error, Killed) else InputError
    with pytest.raises(expected) as raised, whole_file(file) as unfinished:
        unfinished.write_text("half")
        raise error
    assert names(tmp_path) == ["file.txt"] and file.read_text() == "old"
    if expected is InputError:
        assert str(raised.value) == f"{file}: cannot be written ({error})." and raised.value.__cause__ is error


def test_a_file_that_was_not_written_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot be written"), whole_file(tmp_path / "file.txt"):
        pass
    assert names(tmp_path) == []


def test_an_error_that_is_not_about_writing_stays(tmp_path):
    with pytest.raises(KeyError), whole_file(tmp_path / "file.txt") as unfinished:
        unfinished.write_text("half")
        raise KeyError("a bug")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyError("a bug"), Exception("a bug"), Killed()])
def test_files_that_fail_leave_nothing(tmp_path, error):
    with pytest.raises(type(error)), whole_files(tmp_path) as unfinished:
        (unfinished / "half.txt").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_file_that_cannot_be_written_is_named_once(tmp_path):
    with (
        pytest.raises(InputError, match=r"inner: cannot be written \([^()]*full[^()]*\)\.$"),
        whole_files(tmp_path),
        whole_file(tmp_path / "inner"),
    ):
        raise OSError(errno.ENOSPC, "full")
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [0, 10])
def test_a_disk_that_is_really_full(tmp_path, size):
    (tmp_path / "file.txt").write_text("earlier")
    for write in (whole_file(tmp_path / "file.txt"), whole_files(tmp_path)):
        with pytest.raises(InputError, match="cannot be written"), file_size_limit(size), write as unfinished:
            file = unfinished / "file.txt" if unfinished.is_dir() else unfinished
            file.write_bytes(b"x" * 100)
        assert names(tmp_path) == ["file.txt"] and (tmp_path / "file.txt").read_text() == "earlier"


def test_what_torch_says_of_a_full_disk_is_put_in_words(tmp_path):
    with (
        file_size_limit(1000),
        pytest.raises(InputError, match=r"cannot be written \(torch could not write all bytes; the disk is full or"),
        whole_file(tmp_path / "file.pt") as unfinished,
    ):
        torch.save({"a": torch.zeros(1000)}, unfinished)
    assert names(tmp_path) == []


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    with whole_file(tmp_path / "file.txt") as one, whole_file(tmp_path / "file.txt") as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "file.txt").read_text() == "one"  # written later
    assert names(tmp_path) == ["file.txt"]


def test_files_are_replaced_and_others_stay(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("old")
    with whole_files(tmp_path) as unfinished:
        (unfinished / "b.txt").write_text("new")
        (unfinished / "c.txt").write_text("new")
        assert (tmp_path / "b.txt").read_text() == "old"
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {
        "a.txt": "old",
        "b.txt": "new",
        "c.txt": "new",
    }


def test_files_of_a_killed_process_are_removed(tmp_path):
    left = tmp_path / f"files{UNFINISHED}"
    left.mkdir()
    (left / "half.txt").write_text("half")
    with whole_files(tmp_path) as unfinished:
        (unfinished / "whole.txt").write_text("whole")
    assert names(tmp_path) == ["whole.txt"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (whole_file(tmp_path / "file" / "name"), whole_files(tmp_path / "file")):
        with pytest.raises(InputError, match="cannot be written"), write:
            pytest.fail("must not be entered")


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path):
    for number, exists in enumerate((False, True)):
        unfinished, folder = tmp_path / f"unfinished{number}", tmp_path / f"folder{number}"
        unfinished.mkdir()
        (unfinished / "file.txt").write_text("text")
        if exists:
            folder.mkdir()
        publish_folder(unfinished, folder)
        assert (folder / "file.txt").read_text() == "text" and not unfinished.exists()


def test_a_folder_with_files_is_not_replaced(tmp_path):
    for name in ("unfinished", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.txt").write_text(name)
    with pytest.raises(OSError):
        publish_folder(tmp_path / "unfinished", tmp_path / "folder")
    assert (tmp_path / "folder" / "file.txt").read_text() == "folder"


def test_all_is_flushed_before_the_name_is_given(tmp_path, monkeypatch):
    flushed = []

    def fsync(descriptor):
        assert not (tmp_path / "folder").exists()
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "file.txt").write_text("text")
    publish_folder(tmp_path / "unfinished", tmp_path / "folder")
    assert flushed == [str(tmp_path / "unfinished" / "file.txt"), str(tmp_path / "unfinished")]


@pytest.mark.skipif(os.name != "posix", reason="files have no such permissions")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with whole_file(tmp_path / "one") as unfinished:
            unfinished.touch(0o600)  # as safetensors does
        with whole_files(tmp_path / "several") as unfinished:
            (unfinished / "two").touch(0o600)
            (unfinished / "plain").touch()
        (tmp_path / "unfinished").mkdir()
        (tmp_path / "unfinished" / "three").touch(0o600)
        publish_folder(tmp_path / "unfinished", tmp_path / "folder")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in sorted(files)] == ["three", "one", "plain", "two"]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_a_folder_that_can_be_written_is_made_and_stays_empty(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "folder")
    assert names(tmp_path / "new" / "folder") == []
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(InputError, match=rf"^folder='{folder}': cannot be written \(.*\)\.$"):
            check_writable(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe{",
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b"9" * 5000,
        b"\x00" * 100,
    ],
    ids=lambda content: repr(content[:16]),
)
def test_json_that_cannot_be_read_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(InputError, match=r"file\.json: not JSON") as raised:
        read_json(tmp_path / "file.json")
    assert len(str(raised.value)) < len(str(tmp_path)) + 300 and str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["missing.json", "", "a" * 300, "null\x00"])
def test_a_json_file_that_is_not_there_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(InputError, match="cannot be read") as raised:
        read_json(tmp_path / name)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("content", [rb'{"name": "\ud800"}', rb'{"\udfff": 1}'])
def test_half_of_a_surrogate_pair_is_refused(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(InputError, match=r"file\.json: has \\ud.*, half of a surrogate pair, which is not text"):
        read_json(tmp_path / "file.json")


def test_json_is_read_as_it_is(tmp_path):
    (tmp_path / "file.json").write_bytes(b'\xef\xbb\xbf{"a": [1, "\\ud83d\\ude00"]}')
    assert read_json(tmp_path / "file.json") == {"a": [1, "\U0001f600"]}


def with_digests(folder):
    for name in ("a.bin", "b/c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 3)
    write_digests(folder)
    return [folder / name for name in ("a.bin", "b/c.txt", DIGESTS)]


def test_digests_are_those_of_sha256sum(tmp_path):
    with_digests(tmp_path)
    assert (tmp_path / DIGESTS).read_text() == (
        "# 2 files\n"
        "bbbfe120b21682bd87639a5c9b66438bdd7bcf62599b0815b4dc82ab6c2de5a1  a.bin\n"
        "c94a35615ef9149f5f0f5b0d6ab29f241b26697b606e6e191dc9512ea8707290  b/c.txt\n"
    )
    assert check_digests(tmp_path)
    # Files that are added later are not damage. A folder without digests cannot be checked.
    (tmp_path / "later.txt").write_text("later")
    assert check_digests(tmp_path)
    (tmp_path / DIGESTS).unlink()
    assert not check_digests(tmp_path) and not check_digests(tmp_path / "missing")


def test_a_flipped_bit_is_seen_and_its_file_is_named(tmp_path):
    for file in with_digests(tmp_path):
        whole = file.read_bytes()
        for place in range(len(whole)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            with pytest.raises(InputError, match=r"is damaged|is missing") as raised:
                check_digests(tmp_path)
            assert file.name in str(raised.value) or file.name == DIGESTS
        for end in range(len(whole)):
            file.write_bytes(whole[:end])
            with pytest.raises(InputError, match="is damaged"):
                check_digests(tmp_path)
        file.unlink()
        if file.name != DIGESTS:
            with pytest.raises(InputError, match=f"{file.name}: is missing"):
                check_digests(tmp_path)
        file.write_bytes(whole)
    assert check_digests(tmp_path)


def test_digests_open_no_other_files(tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "folder"
    with_digests(folder)
    for name in ("../secret", str(tmp_path / "secret"), "b/../a.bin", "/dev/zero"):
        (folder / DIGESTS).write_text(f"# 1 files\n{'0' * 64}  {name}\n")
        with pytest.raises(InputError, match="is missing"):
            check_digests(folder)


def process(work, *args):
    """Start `work(connection, *args)` in a fork. Returns the process and the other end of the connection."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    started = context.Process(target=work, args=(there, *args))
    started.start()
    return started, here


def hold(connection, folder):
    with only_writer(folder):
        connection.send("held")
        connection.recv()
    connection.send("left")


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    other, connection = process(hold, tmp_path)
    assert connection.poll(PATIENCE) and connection.recv() == "held"
    with (
        pytest.raises(InputError, match=rf"^output_dir='{tmp_path}': another command is writing to this folder; wait"),
        only_writer(tmp_path, "output_dir"),
    ):
        pytest.fail("must not be entered")
    connection.send("leave")
    assert connection.poll(PATIENCE) and connection.recv() == "left"
    other.join(PATIENCE)
    assert names(tmp_path) == []
    with only_writer(tmp_path):
        with pytest.raises(InputError, match="another command"), only_writer(tmp_path):
            pytest.fail("must not be entered")
        assert names(tmp_path) == [LOCK]
    assert names(tmp_path) == []


def outlive(connection, folder):
    with only_writer(folder):
        worker, _ = process(lambda _: signal.pause())
        connection.send(worker.pid)
        connection.recv()


def test_a_killed_writer_leaves_no_lock(tmp_path):
    """The lock is free even if DataLoader workers of the killed process still run."""
    other, connection = process(outlive, tmp_path)
    assert connection.poll(PATIENCE)
    worker = connection.recv()
    try:
        other.kill()
        os.waitpid(other.pid, 0)  # `join` would wait for the worker too
        assert names(tmp_path) == [LOCK]
        with only_writer(tmp_path):
            os.kill(worker, 0)  # raises an error if the worker does not run
    finally:
        os.kill(worker, signal.SIGKILL)
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path):
        (tmp_path / "file.txt").write_text("written")
    said = capsys.readouterr().err
    reason = f"[Errno {number}] {os.strerror(number)}"
    assert said == f"{tmp_path}: cannot be locked ({reason}). Let no other command write to it.\n"
