"""Files and folders are written whole or not at all."""
import os
from pathlib import Path

import pytest

import tokenlabel.files as module
from tokenlabel.files import check_replaceable, check_writable, new_folder, write_file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_text_and_bytes_are_written_as_they_are(tmp_path):
    assert write_file(tmp_path / "a" / "text", "名\r\n") == tmp_path / "a" / "text"
    write_file(str(tmp_path / "bytes"), b"\xff")
    assert contents(tmp_path) == {"a/text": "名\r\n".encode(), "bytes": b"\xff"}


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    file = write_file(tmp_path / "file", "old")
    monkeypatch.setattr(module.os, "replace", lambda old, new: 1 / 0)
    with pytest.raises(ZeroDivisionError): write_file(file, "new")
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("there", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("where", ["block", "move"])
def test_a_folder_that_cannot_be_completed_stays_as_it_was(tmp_path, monkeypatch, there, where):
    folder = tmp_path / "result"
    if there: write_file(folder / "file", "old")
    before, replace = contents(tmp_path), os.replace

    def move(old, new):
        if Path(old).name == "new": raise OSError("no space left")
        replace(old, new)

    with pytest.raises(OSError, match="no space left"), new_folder(folder) as new:
        (new / "file").write_text("new")
        if where == "block": raise OSError("no space left")
        monkeypatch.setattr(module.os, "replace", move)
    assert contents(tmp_path) == before and folder.exists() == there


def test_a_new_folder_replaces_all_of_the_old_one_whatever_its_name(tmp_path):
    folder = tmp_path / ("名" * 70)
    write_file(folder / "old", "1")
    with new_folder(folder) as new: write_file(new / "new", "2")
    assert contents(folder) == {"new": b"2"} and list(tmp_path.iterdir()) == [folder]


def test_a_folder_below_a_file_or_a_protected_one_is_refused(tmp_path, monkeypatch):
    check_writable(tmp_path / "one" / "two")
    file = write_file(tmp_path / "file", "precious")
    for folder in file, file / "below":
        with pytest.raises(ValueError, match=f"{file} is a file; give a folder"): check_writable(folder)
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be written to"): check_writable(tmp_path / "new")


def test_a_folder_that_cannot_be_moved_is_refused(tmp_path, monkeypatch):
    check_replaceable(tmp_path / "new")
    with pytest.raises(ValueError, match="/proc"): check_replaceable(Path("/proc"))  # a mount point
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be replaced"): check_replaceable(Path("."))
    protected = tmp_path / "protected"
    (protected / "result").mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(module.os, "access", lambda path, mode: path != protected and access(path, mode))
    with pytest.raises(ValueError, match=f"{protected} cannot be written to"): check_replaceable(protected / "result")
