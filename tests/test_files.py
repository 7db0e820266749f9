"""Outputs are whole or absent, and what stood there before survives every failure."""

import errno
import os
import threading

import pytest
from safetensors import SafetensorError

from clvp_fast.io import files
from clvp_fast.io.files import UnwritableError, build_folder_once, make_private, replacing, staged_folder
from tests.kit.waiting import BOUND


def contents(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_files_arrive_together_and_replace_old_ones(tmp_path):
    target = tmp_path / "deep" / "out"
    before = {}
    for text in ("first", "second"):
        with staged_folder(target) as folder:
            (folder / "a.txt").write_text(text)
            (folder / "b.txt").write_text(text)
            assert contents(target) == before
        before = {"a.txt": text, "b.txt": text}
        assert contents(target) == before
        assert len(list(target.iterdir())) == 2  # no scratch folder is left


def test_folders_inside_join_those_that_stand_there(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/old.txt").write_text("old")
    for text in ("first", "second"):
        with staged_folder(tmp_path) as folder:
            for name in ("a/b", "a/c/d"):
                (folder / name).mkdir(parents=True)
                (folder / name / "new.txt").write_text(text)
        found = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
        assert {name: path.read_text() for name, path in found.items()} == {
            "a/b/old.txt": "old",
            "a/b/new.txt": text,
            "a/c/d/new.txt": text,
        }
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_in_the_place_of_a_folder_inside(tmp_path):
    (tmp_path / "b").write_text("mine")
    with pytest.raises(UnwritableError, match="a file stands where"), staged_folder(tmp_path) as folder:
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / "new.txt").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["b"] and contents(tmp_path) == {"b": "mine"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad"), OSError(errno.EIO, "broken", "elsewhere")])
def test_nothing_is_left_after_an_error(tmp_path, error):
    target = tmp_path / "deep" / "out"
    with pytest.raises(type(error)) as caught, staged_folder(target) as folder:
        (folder / "a.txt").write_text("half")
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_old_files_survive_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "b.txt").write_text("old")
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(UnwritableError, match="the disk is full") as caught, staged_folder(tmp_path) as folder:
        (folder / "a.txt").write_text("new")
        (folder / "b.txt").write_text("new")
    assert str(tmp_path) in str(caught.value)
    assert contents(tmp_path) == {"a.txt": "old", "b.txt": "old"}


def test_a_full_disk_in_the_words_of_safetensors(tmp_path):
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def build(folder):
        raise error

    with pytest.raises(UnwritableError, match="the disk is full"), staged_folder(tmp_path / "out"):
        raise error
    with pytest.raises(UnwritableError, match="the disk is full"):
        build_folder_once(tmp_path / "cache" / "demo-1", build)
    with pytest.raises(SafetensorError, match="header"), staged_folder(tmp_path / "out"):
        raise SafetensorError("header too large")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    for target in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(UnwritableError, match="a file stands where the folder should be"), staged_folder(target):
            pytest.fail("the block must not run")
    assert contents(tmp_path) == {"out": "mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UnwritableError, match="no permission"), staged_folder(tmp_path):
        pytest.fail("the block must not run")


def test_permission_errors_are_explained(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    with pytest.raises(UnwritableError, match="no permission to write there"), staged_folder(tmp_path):
        pytest.fail("the block must not run")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with replacing(target) as path:
        path.write_text("new")
        assert contents(tmp_path)["a.txt"] == "old"
    assert contents(tmp_path) == {"a.txt": "new"}
    with pytest.raises(ValueError, match="wrong"), replacing(target) as path:
        path.write_text("half")
        raise ValueError("wrong")
    with pytest.raises(UnwritableError, match="the disk is full"), replacing(target) as path:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert contents(tmp_path) == {"a.txt": "new"}
    with pytest.raises(UnwritableError, match="cannot write into"), replacing(tmp_path / "none/a.txt") as path:
        path.write_text("new")
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), replacing(target):
        (tmp_path / "other.txt").read_text()


def test_folder_is_built_once_by_racing_builders(tmp_path):
    target, barrier, built = tmp_path / "cache" / "demo-1", threading.Barrier(4), []

    def build(folder):
        barrier.wait(BOUND)  # all four are in the middle of building
        (folder / "a.txt").write_text("whole")
        built.append(folder)

    threads = [threading.Thread(target=build_folder_once, args=(target, build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 4
    assert contents(target) == {"a.txt": "whole"}
    assert [path.name for path in target.parent.iterdir()] == ["demo-1"]
    build_folder_once(target, lambda folder: pytest.fail("it is there already"))


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "a.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_folder_once(tmp_path / "demo-1", build)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_made_are_the_user_s_alone(tmp_path):
    before = os.umask(0o002)
    try:
        make_private(tmp_path / "a" / "b")
        build_folder_once(tmp_path / "c" / "demo-1", lambda folder: None)
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b", "c")} == {0o700}
    make_private(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        make_private(tmp_path / "file" / "a")


def test_a_folder_in_the_way_of_a_file_is_found_before_anything_is_moved(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_text("old")
    match = rf"cannot write into {tmp_path}: a folder stands where the file {tmp_path}/b should be; move it away"
    with pytest.raises(UnwritableError, match=match), staged_folder(tmp_path) as folder:
        for name in ("a", "b", "c"):
            (folder / name).write_text("new")
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
