"""Shards in a store are streamed once into the feature store; a run on them is the run on local shards."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import webdataset
from fsspec.implementations.memory import MemoryFileSystem
from helpers import as_ranks, inside, tiny_clip
from safetensors.torch import load_file
from scenes import make_pairs
from torch import equal

from data.batch import Team
from data.cold import Encoders, Pipeline, Reader
from data.images.decode import ImageSpec
from data.ingest import ingest_shards
from data.shards.manifests import read_manifest
from data.sources.remote import find_files
from data.web import storage
from data.web.limits import FetchPolicy
from engine.clip.loading import load_clip

FLAGS = ("--batch-size", 16, "--precision", "fp32", "--workers", 2)


class Store(MemoryFileSystem):
    """fsspec's memory store that counts what is read, and fails as its class says."""

    cachable = False
    read: Counter[str] = Counter()  # name -> bytes
    calls = 0
    fail_every = 0  # calls after which one fails, alternately with an error and with half of its bytes
    refused = ""  # a name that access is refused to

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        Store.calls += 1
        name = path.rpartition("/")[2]
        if name == Store.refused:
            raise PermissionError("Forbidden")
        data = super().cat_file(path, start, end)
        if Store.fail_every and Store.calls % Store.fail_every == 0:
            if Store.calls // Store.fail_every % 2:
                raise ConnectionResetError("reset by peer")
            data = data[: len(data) // 2]
        Store.read[name] += len(data)
        return data


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    usual = fsspec.get_filesystem_class("memory")
    fsspec.register_implementation("memory", Store, clobber=True)
    monkeypatch.setattr(storage, "BLOCK", 5_000)
    monkeypatch.setattr(storage, "BACKOFF", 0.0)
    Store.fail_every, Store.refused = 0, ""
    Store.read.clear()
    yield Store()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    fsspec.register_implementation("memory", usual, clobber=True)


def write_shards(pairs: Path, out: Path) -> Path:
    """The pairs of a folder as shards of ten samples, by the webdataset package; one picture is none."""
    out.mkdir()
    for split in ("train", "valid", "test"):
        with (webdataset.ShardWriter(f"{out}/{split}-%06d.tar", maxcount=10, verbose=0) as writer,
              (pairs / f"{split}.csv").open(newline="", encoding="utf-8") as file):
            for number, row in enumerate(csv.DictReader(file)):
                image = (pairs / row["image"]).read_bytes() if (split, number) != ("train", 3) else b"no picture"
                writer.write({"__key__": f"{number:06}", "jpg": image, "txt": row["title"],
                              "json": {"title_neg": row["title_neg"]}})
    return out


def upload(folder: Path, place: str) -> None:
    for path in [*folder.glob("*.tar"), *folder.glob("*.txt")]:
        Store().pipe_file(f"/{place}/{path.name}", path.read_bytes())


def train(dataset: object, model: Path, out: Path, cache: Path) -> str:
    done = inside(["--dataset", dataset, "--model", model, "--out", out, "--cache-dir", cache, *FLAGS])
    assert done.returncode == 0, done.stderr
    return done.stderr


def result(run: Path) -> tuple[list[dict[str, Any]], Any, Any]:
    """Steps without times, metrics, and the ledger without the places of shards."""
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    for entry in ledger:
        entry["image"] = entry["image"].rpartition("/")[2]
        entry["detail"] = entry["detail"].rpartition("/")[2]
    return steps, json.loads((run / "metrics.json").read_text()), ledger


def assert_equal_runs(first: Path, second: Path) -> None:
    assert result(first) == result(second)
    weights, others = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    assert weights.keys() == others.keys() and all(equal(weights[name], others[name]) for name in weights)


def test_a_run_from_a_store_is_the_local_run_and_reads_every_byte_once(tiny_model: Path, pairs: Path,
                                                                       tmp_path: Path) -> None:
    shards = write_shards(pairs, tmp_path / "shards")
    upload(shards, "bucket/shards")
    train(shards, tiny_model, tmp_path / "local", tmp_path / "cache-local")
    said = train("memory://bucket/shards/", tiny_model, tmp_path / "run", tmp_path / "cache")
    assert "0 rows dropped" not in said and "1 rows dropped" in said
    assert_equal_runs(tmp_path / "local", tmp_path / "run")
    sizes = {path.name: path.stat().st_size for path in shards.glob("*.tar")}
    shown = Store.read.total() - sum(sizes.values())  # pictures of the report, and the one that does not decode
    assert all(Store.read[name] >= size for name, size in sizes.items()) and shown < sum(sizes.values())
    assert not list((tmp_path / "cache").rglob("*.tar*"))

    # Again, and by a pattern: nothing is streamed, and the towers are not asked for a picture.
    Store.read.clear()
    dataset = "memory://bucket/shards/{train,valid,test}-*.tar"
    said = train(dataset, tiny_model, tmp_path / "again", tmp_path / "cache")
    assert "0 images and 0 titles encoded" in said and Store.read.total() <= shown
    assert_equal_runs(tmp_path / "local", tmp_path / "again")
    found = inside(["search", "a red car", "--dataset", dataset, "--model", tiny_model, "--split", "test",
                    "--cache-dir", tmp_path / "cache", "--precision", "fp32", "--json"])
    assert found.returncode == 0 and '"answers"' in found.stdout, found.stderr
    assert Store.read.total() <= shown + 10


def test_cut_connections_are_gone_on_with_and_finished_shards_stay(tiny_model: Path, pairs: Path,
                                                                   tmp_path: Path) -> None:
    """A run that stops half-way would stream everything again, or a cut connection would spoil the features."""
    shards = write_shards(pairs, tmp_path / "shards")
    upload(shards, "bucket")
    train(shards, tiny_model, tmp_path / "local", tmp_path / "cache-local")
    Store.fail_every, Store.refused = 3, "train-000002.tar"
    arguments = ["--dataset", "memory://bucket", "--model", tiny_model, "--out", tmp_path / "run", "--cache-dir",
                 tmp_path / "cache", *FLAGS]
    stopped = inside(arguments)
    assert stopped.returncode == 2 and "train-000002.tar: access is refused (Forbidden)" in stopped.stderr
    before, Store.refused = Store.read.copy(), ""
    Store.read.clear()
    done = inside(arguments)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path / "local", tmp_path / "run")
    assert before["train-000000.tar"] and Store.read["train-000000.tar"] < before["train-000000.tar"]


def test_a_changed_shard_and_another_model_are_streamed_again(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    shards = write_shards(pairs, tmp_path / "shards")
    upload(shards, "bucket")
    arguments = ["eval", "--split", "test", "--dataset", "memory://bucket", "--cache-dir", tmp_path / "cache"]
    first = inside([*arguments, "--model", tiny_model])
    assert first.returncode == 0 and set(Store.read) == {"test-000000.tar", "test-000001.tar"}, first.stderr
    other = write_shards(make_pairs(tmp_path / "other", 4, 4, 12, seed=5), tmp_path / "other-shards")
    Store().pipe_file("/bucket/test-000001.tar", (other / "test-000001.tar").read_bytes())
    Store.read.clear()
    again = inside([*arguments, "--model", tiny_model])
    assert "bucket/test-000001.tar has changed since it was streamed: it is streamed again" in again.stderr
    assert set(Store.read) == {"test-000001.tar"} and again.stdout != first.stdout
    Store.read.clear()
    assert inside([*arguments, "--model", tiny_clip(tmp_path / "model", seed=1)]).returncode == 0
    assert set(Store.read) == {"test-000000.tar", "test-000001.tar"}


def test_a_shard_that_is_replaced_while_it_is_streamed_is_refused(tmp_path: Path) -> None:
    Store().pipe_file("/bucket/x.tar", bytes(60_000))
    with storage.open_stream("memory://bucket/x.tar") as stream:
        assert len(stream.read(10_000)) == 10_000
        Store().pipe_file("/bucket/x.tar", bytes(range(256)) * 300)
        with pytest.raises(storage.Changed, match="has changed while it was read; run again"):
            stream.read()


def test_check_and_a_lone_split_read_shards_of_a_store(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """`check` copies the shards; a lone split is divided by content that the stream has told, as the local one is."""
    shards = write_shards(pairs, tmp_path / "shards")
    for path in shards.glob("train-*.tar"):
        Store().pipe_file(f"/bucket/part{path.name[5:]}", path.read_bytes())
        path.rename(shards / f"part{path.name[5:]}")
    for path in (*shards.glob("valid*"), *shards.glob("test*")):
        path.unlink()
    checked = inside(["check", "--dataset", "memory://bucket", "--cache-dir", tmp_path / "cache", "--json"])
    local = inside(["check", "--dataset", shards, "--cache-dir", tmp_path / "cache-local", "--json"])
    assert json.loads(checked.stdout)["rows"] == json.loads(local.stdout)["rows"], checked.stderr
    train("memory://bucket/part*", tiny_model, tmp_path / "run", tmp_path / "cache-run")
    train(shards, tiny_model, tmp_path / "local", tmp_path / "cache-local")
    assert_equal_runs(tmp_path / "local", tmp_path / "run")


def test_several_captions_class_names_and_templates_of_a_store_are_those_of_the_folder(tiny_model: Path, pairs: Path,
                                                                                       tmp_path: Path) -> None:
    """A run from a store would lose captions, negatives or classes, or keep class names that have been mended."""
    shards, images = tmp_path / "shards", sorted((pairs / "images").iterdir())
    shards.mkdir()
    with webdataset.ShardWriter(f"{shards}/test-%06d.tar", maxcount=9, verbose=0) as writer:
        for number, image in enumerate(images[:24]):
            fields: dict[str, Any] = {"cls": number % 3}
            if number % 2:
                fields = {"json": {"caption": [f"a {number}", f"one {number}"], "negatives": [f"no {number}", "none"]}}
            writer.write({"__key__": f"{number:06}", "jpg": image.read_bytes(), **fields})
    (shards / "classnames.txt").write_text("cat\nred_fox\n")
    flags = ["eval", "--split", "test", "--model", tiny_model, "--precision", "fp32",
             "--template", "a photo of a {},a drawn {}", "--max-bad", "50%"]
    upload(shards, "bucket")
    for names in ("cat\nred_fox\n", "cat\nred_fox\nowl\n"):
        (shards / "classnames.txt").write_text(names)
        Store().pipe_file("/bucket/classnames.txt", names.encode())
        there = inside([*flags, "--dataset", "memory://bucket", "--cache-dir", tmp_path / "cache"])
        here = inside([*flags, "--dataset", shards, "--cache-dir", tmp_path / "local"])
        assert there.returncode == here.returncode == 0, there.stderr + here.stderr
        assert there.stdout == here.stdout
    assert "the file of class names beside memory://bucket/test-000000.tar has changed" in there.stderr


def test_splits_names_the_splits_of_shards_in_a_store(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """The error would name a flag that leads to the same error."""
    shards = write_shards(pairs, tmp_path / "shards")
    for path in [*shards.glob("train*"), *shards.glob("valid*")]:
        path.unlink()
    upload(shards, "bucket")
    arguments = ["--model", tiny_model, "--cache-dir", tmp_path / "cache", *FLAGS[2:], "--batch-size", 4]
    refused = inside(["--dataset", "memory://bucket", "--out", tmp_path / "refused", *arguments])
    assert refused.returncode == 2 and "--splits train=test trains on it" in refused.stderr, refused.stderr
    for dataset, out in (("memory://bucket", "run"), (shards, "local")):
        done = inside(["--dataset", dataset, "--splits", "train=test", "--out", tmp_path / out, *arguments])
        assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path / "local", tmp_path / "run")
    missing = inside(["--dataset", "memory://bucket", "--splits", "train=dev", "--out", tmp_path / "x", *arguments])
    assert missing.returncode == 2 and "there is no split 'dev'; there is test" in missing.stderr, missing.stderr


def test_nodes_with_caches_of_their_own_read_every_byte_once(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """And each has then all manifests and features: another run there reads nothing."""
    upload(write_shards(pairs, tmp_path / "shards"), "bucket/shards")
    tokenizer = load_clip(str(tiny_model)).tokenizer

    def ingest(team: Team) -> list[int]:
        cache = tmp_path / f"cache-{team.rank}"
        encoders = Encoders(lambda pixels: pixels.float().mean((2, 3)), lambda tokens: tokens.ids_BL[:, :1].float(), 3,
                            1, "images-00000000", "titles-00000000", True, tokenizer, 77)
        reader = Reader(cache / "fetched", ImageSpec.clip(32), FetchPolicy(), 25_000_000, 2)
        team = Team(team.rank, team.size, team.exchange, (0, 1))
        pipeline = Pipeline(reader, encoders, team, cache, torch.device("cpu"), print)
        files = ingest_shards(find_files("memory://bucket/shards/"), pipeline)
        paths = [file.path for split in files.values() for file in split]
        assert all(read_manifest(path) for path in paths)
        return [len(paths), len(encoders.image_store(cache))]

    first = as_ranks(2, ingest)
    read = Store.read.total()
    assert first[0] == first[1] and isinstance(first[0], list) and first[0][1] > 50
    assert as_ranks(2, ingest) == first and Store.read.total() == read
    assert read == sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar"))
