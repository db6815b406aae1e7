"""Tables, images and errors of stores, by fsspec's memory store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pandas
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers import inside, run
from hub import Hub
from scenes import make_pairs

from data.batch import BadSample, UserError
from data.sources.remote import find_files
from data.sources.source import load_splits
from data.web import storage
from data.web.limits import FetchPolicy
from data.web.remote_files import fetch_files
from data.web.remote_tables import copy_file
from engine.config.fields import Config, as_dict


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    monkeypatch.setattr(storage, "BACKOFF", 0.0)
    yield fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def names(dataset: str) -> dict[str, list[str]]:
    return {split: [entry.address for entry in entries] for split, entries in find_files(dataset).items()}


def test_folders_of_a_store_are_laid_out_as_local_ones(store: MemoryFileSystem) -> None:
    for path in ("a/train-000.tar", "a/train-001.tar", "a/val-000.tar", "a/other.tar", "a/train.csv", "b/x.tar",
                 "b/y.tar", "c/train/0.tar", "c/test/t.parquet", "d/pairs.csv", "e/1.csv", "e/2.csv", "f/x.jpg"):
        store.pipe_file(f"/{path}", b"x")
    assert names("memory://a/") == names("memory://a") == {
        "train": ["memory://a/train-000.tar", "memory://a/train-001.tar"], "valid": ["memory://a/val-000.tar"]}
    assert names("memory://a/train-*.tar") == {"train": names("memory://a")["train"]}
    assert names("memory://a/{train-{000..001},val-000}.tar") == names("memory://a")
    assert names("memory://b") == {"all": ["memory://b/x.tar", "memory://b/y.tar"]} == names("memory://b/*.tar")
    assert names("memory://c") == {"train": ["memory://c/train/0.tar"], "test": ["memory://c/test/t.parquet"]}
    assert names("memory://d") == {"all": ["memory://d/pairs.csv"]} == names("memory://d/pairs.csv")
    for dataset, message in {"memory://e": "which of 1.csv, 2.csv", "memory://f": "holds x.jpg; of a store, tables",
                             "memory://f/x.jpg": "of a store, tables", "memory://g": "no such file, folder or bucket",
                             "memory://a/q*.tar": "no such file; the pattern asks for it"}.items():
        with pytest.raises(UserError, match=message):
            find_files(dataset)


def test_what_an_address_cannot_mean_is_refused_by_the_address(store: MemoryFileSystem, tmp_path: Path) -> None:
    """Words about a copy in the cache, or "holds a, a", name neither the mistake nor where it was made."""
    page = b"\n<!DOCTYPE html><html>Sign in</html>"
    for path, content in {"a?b/train.csv": b"", "p/train.csv": page, "q/train.parquet": page, "r/train.parquet": b"PAR",
                          "c/train.csv": b"image,title\na.jpg,one\n"}.items():
        store.pipe_file(f"/{path}", content)
    for dataset, message in {"memory://": "no bucket",
                             "memory://a?b": "memory://a: what follows its [?] would be a query",
                             "memory://p": "memory://p/train.csv: a page or other markup, not a table",
                             "memory://q": "memory://q/train.parquet: a page or other markup, not a table",
                             "memory://r": "memory://r/train.parquet: not a Parquet file"}.items():
        with pytest.raises(UserError, match=message) as caught:
            load_splits(dataset, download=bring(tmp_path))
        assert str(tmp_path) not in str(caught.value)
    assert load_splits("MEMORY://c", download=bring(tmp_path))["train"].title.to_pylist() == ["one"]


def bring(cache: Path, log: Any = lambda text: None) -> Any:
    return lambda dataset: {name: [copy_file(entry.address, cache, log) for entry in entries]
                            for name, entries in find_files(dataset).items()}


def test_a_table_of_a_store_names_images_of_stores_and_none_of_this_machine(store: MemoryFileSystem,
                                                                            tmp_path: Path) -> None:
    """A table from the network could otherwise show files of the machine that trains on it."""
    images = ["images/1.jpg", "s3://other/2.jpg", "https://host/3.jpg", "a/../4.jpg", "../up.jpg", "/etc/passwd",
              "file:///etc/passwd", "ssh://host/x.jpg"]
    table = pandas.DataFrame({"image": images, "title": [f"title {number}" for number in range(len(images))]})
    store.pipe_file("/bucket/data/pairs.csv", table.to_csv(index=False).encode())
    entries: list[dict[str, Any]] = []
    rows = load_splits("memory://bucket/data/pairs.csv", ledger=entries.append, download=bring(tmp_path))["train"]
    kept = rows.image.to_pylist()
    assert kept == ["memory://bucket/data/images/1.jpg", "s3://other/2.jpg", "https://host/3.jpg"]
    assert [entry["row"] for entry in entries] == [3, 4, 5, 6, 7]
    assert {entry["reason"] for entry in entries} == {"outside-folder"}


def test_a_table_is_copied_once_and_again_when_it_has_changed(store: MemoryFileSystem, tmp_path: Path) -> None:
    store.pipe_file("/bucket/pairs.csv", b"image,title\na.jpg,one\n")
    said: list[str] = []
    titles = []
    for content in (None, None, b"image,title\na.jpg,two\n"):
        if content:
            store.pipe_file("/bucket/pairs.csv", content)
        rows = load_splits("memory://bucket/pairs.csv", download=bring(tmp_path, said.append))["train"]
        titles.append(rows.title.to_pylist())
    assert titles == [["one"], ["one"], ["two"]]
    assert said == ["memory://bucket/pairs.csv has changed since it was copied: it is copied again"]


def test_training_from_a_table_of_a_store_reads_its_images_there_once(store: MemoryFileSystem, tiny_model: Path,
                                                                      tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", 9, 4, 4)
    for path in pairs.rglob("*.*"):
        store.pipe_file(f"/bucket/{path.relative_to(pairs)}", path.read_bytes())
    arguments = ["--dataset", "memory://bucket", "--model", tiny_model, "--batch-size", 4,
                 "--cache-dir", tmp_path / "cache"]
    done = inside([*arguments, "--out", tmp_path / "run"])
    assert done.returncode == 0 and "train 9, valid 4, test 4; 0 rows dropped" in done.stderr, done.stderr
    local = inside(["--dataset", pairs, "--model", tiny_model, "--batch-size", 4, "--cache-dir", tmp_path / "local",
                    "--out", tmp_path / "local-run"])
    assert local.returncode == 0
    assert (tmp_path / "run/metrics.json").read_text() == (tmp_path / "local-run/metrics.json").read_text()
    store.rm("/bucket/images", recursive=True)
    again = inside([*arguments, "--out", tmp_path / "again"])
    assert again.returncode == 0 and "0 images and 0 titles encoded" in again.stderr, again.stderr
    assert not list((tmp_path / "cache").rglob("*.jpg"))


def test_a_folder_of_a_hub_repository_is_read_through_its_own_driver(hub: Hub, tmp_path: Path) -> None:
    done = run(["check", "--dataset", "hf://datasets/shawhin/yt-title-thumbnail-pairs/data", "--cache-dir", tmp_path,
                "--allow-host", "127.0.0.1"], env=hub.env)
    assert "train 53, valid 11, test 12" in done.stdout, done.stderr


class Broken(MemoryFileSystem):
    """A store whose driver raises whatever it likes."""

    cachable = False
    error: Exception = Exception()

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        raise Broken.error

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        raise Broken.error


class NoCredentialsError(Exception):
    """As botocore has it."""


def test_errors_are_one_line_that_names_the_address_and_no_secret() -> None:
    usual = fsspec.get_filesystem_class("memory")
    fsspec.register_implementation("memory", Broken, clobber=True)
    try:
        for error, message in {
                PermissionError("Forbidden"): "access is refused (Forbidden); check the credentials",
                NoCredentialsError("Unable to locate credentials"): "access is refused (Unable to locate credentials)",
                TimeoutError("read timed out"): "cannot be read (TimeoutError: read timed out); check the network",
                RuntimeError("GET https://h/x?sig=SECRET\nfailed"): "cannot be read (RuntimeError: GET https://h/x",
        }.items():
            Broken.error = error
            with pytest.raises(UserError) as caught:
                storage.stat("memory://bucket/x.csv?sig=SECRET")
            text = str(caught.value)
            assert text.startswith("memory://bucket/x.csv: ") and message in text
            assert "\n" not in text and "SECRET" not in text
        with pytest.raises(BadSample, match="unreadable-file"):
            storage.read("memory://bucket/x.jpg", 10)
    finally:
        fsspec.register_implementation("memory", usual, clobber=True)
    with pytest.raises(UserError, match="neither credentials nor") as caught:
        storage.stat("s3://key:SECRET@bucket/x.csv")
    assert "SECRET" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda address: (_ for _ in ()).throw(ImportError("Install s3fs")))
    with pytest.raises(UserError, match=r"s3:// addresses are read by the package s3fs: pip install s3fs"):
        storage.stat("s3://bucket/x.csv")


def test_a_picture_is_bounded(store: MemoryFileSystem) -> None:
    store.pipe_file("/bucket/x.jpg", bytes(100))
    assert storage.read("memory://bucket/x.jpg", 100) == bytes(100)
    with pytest.raises(BadSample, match="too-large"):
        storage.read("memory://bucket/x.jpg", 99)
    with pytest.raises(BadSample, match="truncated"):
        storage.read_range("memory://bucket/x.jpg", 90, 20)
    with pytest.raises(BadSample, match="missing-file"):
        storage.read("memory://bucket/y.jpg", 99)


def test_what_is_secret_in_an_address_is_left_out_of_files_and_messages() -> None:
    """Else a signed address opens the bucket to whoever reads config.json, a log or a report."""
    for address, kept in {"https://u:PW@h/{a,b}.tar?X-Amz-Signature=1&x=2": "https://h/{a,b}.tar",
                          "az://c/x.tar?se=1&sig=2": "az://c/x.tar", "https://h/x.csv?id=3": "https://h/x.csv?id=3",
                          "https://h/x.csv?mail=a:b@c": "https://h/x.csv?mail=a:b@c", "/data/a?key=1": "/data/a?key=1",
                          "shawhin/yt": "shawhin/yt"}.items():
        assert storage.without_secrets(address) == kept
    cfg = Config(dataset="https://h/x.tar?token=T", probe="s3://k:S@b/x")
    assert as_dict(cfg, "train")["dataset"] == "https://h/x.tar" and as_dict(cfg, "train")["probe"] == "s3://b/x"
    for name in ("x.zip", "*.tar"):
        with pytest.raises(UserError) as caught:
            fetch_files(f"https://u:PW@h/{name}?sig=SECRET", Path("nowhere"), FetchPolicy(), print)
        assert "PW" not in str(caught.value) and "SECRET" not in str(caught.value)
