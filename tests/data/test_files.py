"""Folders are replaced whole, and nothing is deleted that this program did not make."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from data import files as durable
from data.batch import BadSample, UserError
from data.files import (
    MARK,
    delete_folder,
    first_foreign,
    is_output,
    keep_lines,
    kind_of,
    recover_folders,
    replaced_folder,
    sha256,
    write_mark,
)
from data.gallery import read_queries
from data.images.decode import ImageSpec
from data.images.reader import Reader
from data.reading import NotAFile, TooLarge, read_text
from data.sources.source import load_splits
from data.web.limits import FetchPolicy
from engine.config.settings import read_toml
from engine.run_folder.ownership import is_run, refuse_foreign_shards


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*")
            if path.is_file() and path.name != MARK}


def write(folder: Path, text: str) -> None:
    with replaced_folder(folder, "model") as new:
        (new / "deep").mkdir()
        for name in ("a", "b", "deep/c"):
            (new / name).write_text(text)


def killed_at(call: int, folder: Path, text: str) -> bool:
    """Write in a process that is killed before its `call`-th rename or deletion; False when it made fewer."""
    child = os.fork()
    if not child:
        calls = count(1)

        def deadly(event: str, _: tuple) -> None:
            if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(deadly)
        write(folder, text)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_rename_or_deletion_leaves_a_whole_model(tmp_path: Path) -> None:
    """A run killed while it exports keeps the old model or has the new one, and the next start cleans up."""
    folder = tmp_path / "model"
    old, new = ({name: text for name in ("a", "b", "deep/c")} for text in ("old", "new"))
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    exchanges = durable._exchange(tmp_path / "one", tmp_path / "other")
    for name in ("one", "other"):
        (tmp_path / name).rmdir()
    for call in count(1):
        write(folder, "old")
        if not killed_at(call, folder, "new"):
            break
        whole = [path for path in tmp_path.iterdir() if contents(path) in (old, new)]
        assert whole, call
        if exchanges:  # at no moment is there nothing under the name
            assert contents(folder) in (old, new), call
        recover_folders(tmp_path, locked=True)
        assert [path.name for path in tmp_path.iterdir()] == ["model"], call
        assert contents(folder) in (old, new) and first_foreign(folder) is None, call
    assert call > 8 and contents(folder) == new


def test_what_is_not_listed_is_never_replaced_or_deleted(tmp_path: Path) -> None:
    """Notes that somebody has put into a model folder, or a folder of another program, outlive an export."""
    write(tmp_path / "model", "old")
    (tmp_path / "model" / "deep" / "notes").write_text("years of work")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_text("years of work")
    (tmp_path / "link").symlink_to("theirs")
    before = contents(tmp_path)
    for name, obstacle in (("model", "model/deep/notes"), ("theirs", "theirs"), ("link", "link")):
        assert first_foreign(tmp_path / name) == tmp_path / obstacle
        with pytest.raises(FileExistsError, match="not made by thumbtune"):
            write(tmp_path / name, "new")
        delete_folder(tmp_path / name)
    assert contents(tmp_path) == before and (tmp_path / "link").is_symlink()


def test_an_error_while_writing_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    write(tmp_path / "model", "old")
    with pytest.raises(ZeroDivisionError), replaced_folder(tmp_path / "model", "model") as new:
        (new / "a").write_text("new")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and contents(tmp_path / "model")["a"] == "old"


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    """Two exports beside each other do not delete what the other is writing; a hidden folder of others is not touched.
    """
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    names = [f".model-{ended.pid}", f".model-{os.getppid()}", f".gone-{ended.pid}.old"]
    for name in names:
        (tmp_path / name).mkdir()
        write_mark(tmp_path / name, "model")
    (tmp_path / f".backup-{ended.pid}.old").mkdir()
    recover_folders(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names[1], "gone", f".backup-{ended.pid}.old"}


def test_only_a_mark_of_ours_makes_an_output(tmp_path: Path) -> None:
    for kind in ("run", "cache", "shards"):
        (tmp_path / kind).mkdir()
        write_mark(tmp_path / kind, kind)
    assert [kind for kind in ("run", "cache", "shards") if is_output(tmp_path / kind)] == ["run", "cache"]
    for text in ("", "[]", "{}", '{"kind": "run", "files": []}', "\0", "[" * 100_000):
        (tmp_path / "run" / MARK).write_text(text)
        assert kind_of(tmp_path / "run") == "", text


def test_a_named_pipe_is_never_waited_for(tmp_path: Path) -> None:
    """A pipe where a mark, a setting or a file to be hashed should be would hang a run and every later command."""
    os.mkfifo(tmp_path / MARK)
    os.mkfifo(tmp_path / "config.json")
    assert kind_of(tmp_path) == "" and not is_run(tmp_path)
    for read in (read_text, sha256):
        with pytest.raises(NotAFile, match="a named pipe"):
            read(tmp_path / "config.json")
    with pytest.raises(ValueError, match="a named pipe"):
        read_toml(tmp_path / "config.json")
    with pytest.raises(UserError, match="a named pipe"):
        read_queries([], str(tmp_path / "config.json"), "")


def test_a_file_with_a_large_hole_is_refused_and_not_read(tmp_path: Path) -> None:
    """An unfinished copy of a table or shard: terabytes of zeros would be read, or held as one line."""
    path = tmp_path / "train.csv"
    path.write_text("image,title\n")
    os.truncate(path, 1 << 40)
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("this file system has no holes")
    with pytest.raises(TooLarge, match="1,09.* never written"):
        read_text(path)
    with pytest.raises(UserError, match="1,09.* never written"):
        load_splits(str(tmp_path))
    with open(path, "r+b") as file:  # one that was written at its end is not finished either
        file.seek(-1, os.SEEK_END)
        file.write(b"\n")
    with pytest.raises(UserError, match="1,09.* never written"):
        load_splits(str(tmp_path))


def test_files_of_titles_and_settings_are_read_bounded_and_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 27)
    for name, reason in (("pipe", "a named pipe"), ("zero", "a device"), ("large", "134,217,728 bytes")):
        with pytest.raises(UserError, match=f"--queries .*{name}: {reason}"):
            read_queries([], str(tmp_path / name), "")
        with pytest.raises(ValueError, match=f"--config .*{name}: {reason}"):
            read_toml(tmp_path / name)


def test_a_folder_whose_name_is_not_utf8_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "pairs\udce9"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    (folder / "train.csv").write_text("image,title\na.jpg,a\n")
    with pytest.raises(UserError, match="not UTF-8; rename it"):
        load_splits(str(folder))


def test_the_index_of_somebody_elses_shard_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar.index.json").write_text("theirs")
    with pytest.raises(UserError, match="train-000000.tar.index.json, which is not thumbtune's"):
        refuse_foreign_shards(str(tmp_path), "pairs.csv")


def test_lines_are_removed_in_one_step_and_an_unchanged_file_is_not_written(tmp_path: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while a resume shortens steps.jsonl must not leave it empty."""
    file = tmp_path / "steps.jsonl"
    file.write_text("1\n2\n3\n4")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", None)  # a full disk or a kill before the new file is in place
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(OSError, match="no room"):
            keep_lines(file, lambda line: line < "3")
    assert file.read_text() == "1\n2\n3\n4" and list(tmp_path.iterdir()) == [file]
    keep_lines(file, lambda line: line < "3")
    assert file.read_text() == "1\n2\n"
    before = file.stat()
    keep_lines(file, lambda line: True)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    keep_lines(tmp_path / "new", lambda line: True)
    assert (tmp_path / "new").read_text() == ""


def test_a_sparse_gigabyte_is_no_picture(tmp_path: Path) -> None:
    """A file of holes takes no room on the disk and all memory when it is read."""
    path = tmp_path / "holes.jpg"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadSample, match="too-large: .*holes.jpg: 1,099,511,627,776 bytes"):
        Reader(tmp_path, ImageSpec.clip(), FetchPolicy(), 25_000_000, 1).read(str(path))
