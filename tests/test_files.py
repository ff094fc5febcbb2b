"""Files and folders are written whole or not at all."""
import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import huggingface_hub
import pytest

import tokenlabel.files as module
from tokenlabel.files import (check_hub, check_replaceable, check_saved, check_seal, check_writable, new_folder, read_json,
                              sealed_folder, work_folder, write_file, write_json)


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


def test_a_folder_below_a_file_or_a_protected_one_is_refused(tmp_path):
    check_writable(tmp_path / "one" / "two")
    file = write_file(tmp_path / "file", "precious")
    for folder in file, file / "below":
        with pytest.raises(ValueError, match=f"{file} is a file; give a folder"): check_writable(folder)
    with pytest.raises(ValueError, match="/proc cannot be written to"): check_writable(Path("/proc/new"))  # not even by root


def test_a_folder_that_cannot_be_moved_is_refused(tmp_path, monkeypatch):
    check_replaceable(tmp_path / "new")
    with pytest.raises(ValueError, match="/proc"): check_replaceable(Path("/proc"))  # a mount point
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be replaced"): check_replaceable(Path("."))
    protected = tmp_path / "protected"
    (protected / "result").mkdir(parents=True)
    make = module.tempfile.TemporaryFile
    def denied(dir, **how):
        if dir == protected: raise PermissionError(13, "Permission denied")
        return make(dir=dir, **how)
    monkeypatch.setattr(module.tempfile, "TemporaryFile", denied)
    with pytest.raises(ValueError, match=f"{protected} cannot be written to"): check_replaceable(protected / "result")


@pytest.mark.parametrize("place", ["circle", "circle/below"])
def test_links_in_a_circle_are_refused(tmp_path, place):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match="symbolic links lead in a circle"): check_saved(tmp_path / place, "result")
    assert (tmp_path / "circle").is_symlink()


def test_a_name_that_is_no_text_is_refused_and_a_long_one_is_not(tmp_path):
    with pytest.raises(ValueError, match=r"udcff' is not in UTF-8"): check_saved(tmp_path / "\udcff", "result")
    with sealed_folder(tmp_path / ("動" * 80), "result") as new: write_file(new / "a", "1")
    assert check_seal(tmp_path / ("動" * 80), "result") == set()


def test_a_manifest_lists_what_is_needed(tmp_path):
    with sealed_folder(tmp_path / "one", "result") as new: write_file(new / "a", "1")
    with pytest.raises(ValueError, match="manifest.json is damaged: it does not list b"): check_seal(tmp_path / "one", "result", "a", "b")


def test_what_a_killed_process_leaves_is_removed_and_what_is_in_use_is_not(tmp_path):
    code = ("import os, pathlib, tokenlabel.files as f\nwith f.work_folder(pathlib.Path(%r), 'run') as work:\n"
            "    (work / 'half').write_text('x'); os.kill(os.getpid(), 9)" % str(tmp_path))
    subprocess.run([sys.executable, "-c", code])
    [left] = tmp_path.iterdir()
    assert (left / "half").exists()
    with work_folder(tmp_path, "run") as work: assert left.exists() and work.exists()  # it may be of this very moment
    os.utime(left, (0, 0))
    with work_folder(tmp_path, "run") as used:
        os.utime(used, (0, 0))
        with work_folder(tmp_path, "run"): assert used.exists() and not left.exists()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("path", ["new/../mine", "mine/missing/..", "mine/../mine", "link"])
def test_a_folder_that_the_package_did_not_write_is_never_replaced(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_file(Path("mine/a"), "precious")
    Path("link").symlink_to("mine")
    for kind in "result", "oracle":
        with pytest.raises(ValueError, match="give a new or empty folder"), sealed_folder(path, kind): pass
    with sealed_folder("other", "oracle") as new: write_file(new / "a", "1")
    with pytest.raises(ValueError, match="'oracle'.*not 'result'"), sealed_folder("other", "result"): pass
    assert contents(tmp_path / "mine") == {"a": b"precious"}


def test_a_file_that_is_put_there_during_the_work_is_not_lost(tmp_path):
    with sealed_folder(tmp_path / "one", "result") as new: write_file(new / "a", "1")
    with pytest.raises(ValueError, match="notes"), sealed_folder(tmp_path / "one", "result") as new:
        write_file(tmp_path / "one" / "notes", "precious")
    assert contents(tmp_path / "one").keys() == {"a", "notes", "manifest.json"}


def test_notes_beside_sealed_files_do_not_matter_to_a_reader(tmp_path):
    with sealed_folder(tmp_path / "one", "result") as new: write_file(new / "a", "1")
    write_file(tmp_path / "one" / "notes", "mine")
    (tmp_path / "one" / "folder").mkdir()
    check_seal(tmp_path / "one", "result")
    with pytest.raises(ValueError, match="folder, notes"): check_saved(tmp_path / "one", "result")


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"kind": "result"}', '{"kind": "result", "format": 1, "files": 3}', "[" * 100000,
                                      '{"kind": "result", "format": 1, "files": {"%s": "0"}}' % ("a" * 5000),
                                      '{"kind": "result", "format": 1, "files": {"a\\u0000": "0"}}',
                                      '{"kind": "result", "format": 2, "files": {}}', '{"kind": ["x"], "format": {}, "files": {}}'])
def test_a_broken_list_of_files_is_one_clear_error(tmp_path, manifest):
    write_file(tmp_path / "one" / "manifest.json", manifest)
    with pytest.raises(ValueError, match="damaged|format|lacks"): check_seal(tmp_path / "one", "result")


def test_a_json_file_altered_anywhere_is_refused_or_unchanged(tmp_path):
    value = {"label": " 動物", "loss": [.1, 1e-300, float("inf")], "n": 3, "none": None}
    content = write_json(tmp_path / "v.json", "verdict", value).read_bytes()
    assert read_json(tmp_path / "v.json", "verdict") == value
    with pytest.raises(ValueError, match="not 'maps'"): read_json(tmp_path / "v.json", "maps")
    for place in range(len(content)):
        for changed in (content[:place], content[:place] + b"7" + content[place + 1:], content[:place] + b" " + content[place:]):
            (tmp_path / "v.json").write_bytes(changed)
            try: assert read_json(tmp_path / "v.json", "verdict") == value
            except ValueError as error: assert "v.json" in str(error)


# --- the model hub ----------------------------------------------------------------------------------------------------


def answers(monkeypatch, answer):
    def model_info(name, timeout):
        if isinstance(answer, Exception): raise answer
        if answer: answer.wait()
    monkeypatch.setattr("huggingface_hub.model_info", model_info)


def failure(kind):
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    return kind("401 Client Error", response=response)


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    ended = threading.Event()
    answers(monkeypatch, ended)
    with pytest.raises(ConnectionError, match="cannot load some/body from the model hub .* no answer within 0.01 s"):
        check_hub("some/body", seconds=0.01)
    ended.set()


@pytest.mark.parametrize("answer, message", [
    (failure(huggingface_hub.errors.RepositoryNotFoundError), "the hub has no such model, or the model is private"),
    (httpx.ConnectError("[Errno -2] Name or service\nnot known"), r"the hub cannot be reached \(Name or service not known\)")])
def test_what_is_wrong_with_a_hub_is_one_line(answer, message, monkeypatch):
    answers(monkeypatch, answer)
    with pytest.raises(OSError, match=message) as error: check_hub("some/body")
    assert "\n" not in str(error.value)


def test_a_hub_that_answers_with_another_error_is_left_to_the_loader(monkeypatch):
    answers(monkeypatch, failure(huggingface_hub.errors.HfHubHTTPError))
    assert check_hub("some/body") is None


def test_a_cached_model_needs_no_hub(monkeypatch, tmp_path):
    answers(monkeypatch, AssertionError("the hub was asked"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    write_file(tmp_path / "models--some--body" / "refs" / "main", "0" * 40)
    write_file(tmp_path / "models--some--body" / "snapshots" / ("0" * 40) / "config.json", "{}")
    check_hub("some/body")
