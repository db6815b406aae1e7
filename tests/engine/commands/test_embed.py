"""`run.py embed`: vectors equal those of other libraries, tables that account for every row, folders that go on."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from helpers import inside, last_flags, make_pairs

from engine.publish import embeddings


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 + 4 + 4 rows with negatives: a copied image, a title in capitals, one row without title, one dead image."""
    pairs = make_pairs(tmp_path_factory.mktemp("odd") / "pairs", 12, 4, 4)
    with (pairs / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shutil.copy(pairs / rows[0]["image"], pairs / "images" / "copy.jpg")
    rows[3]["image"], rows[5]["title"], rows[6]["title"] = "images/copy.jpg", f" {rows[1]['title'].upper()}", ""
    rows[4]["title_neg"] = ""
    (pairs / rows[7]["image"]).write_bytes(b"gone")
    pd.DataFrame(rows).to_csv(pairs / "train.csv", index=False)
    return pairs


@pytest.fixture(scope="module")
def flags(odd: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    cache = tmp_path_factory.mktemp("embed") / "cache"
    return ["embed", "--model", tiny_model, "--dataset", odd, "--cache-dir", cache, "--precision", "fp32",
            "--max-bad", "20%"]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 8 rows and chunks of 3, so that the tables have several parts."""
    monkeypatch.setattr(embeddings, "PART", 8)
    monkeypatch.setattr(embeddings, "CHUNK", 3)


def read(folder: Path) -> pd.DataFrame:
    """All parts of a folder of Parquet files, as pandas reads them, in the order of their names."""
    return pd.concat([pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))], ignore_index=True)


def vectors(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])


def theirs(model: Path, titles: Sequence[str], pictures: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings by transformers' `get_image_features` and `get_text_features`."""
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    clip, processor = CLIPModel.from_pretrained(model), CLIPProcessor.from_pretrained(model)
    pixels = processor(images=[Image.open(path) for path in pictures], return_tensors="pt")
    tokens = processor(text=[*titles], return_tensors="pt", padding=True, truncation=True, max_length=77)
    with torch.no_grad():
        features = [clip.get_image_features(**pixels), clip.get_text_features(**tokens)]
    image, text = (getattr(each, "pooler_output", each).numpy() for each in features)
    return image / np.linalg.norm(image, axis=1, keepdims=True), text / np.linalg.norm(text, axis=1, keepdims=True)


@pytest.mark.usefixtures("small_parts")
def test_every_row_leads_to_its_vectors_and_these_are_those_of_transformers_and_sentence_transformers(
        odd: Path, flags: list[object], tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = inside([*flags, "--out", out])
    assert done.returncode == 0, done.stderr
    images, titles, rows = (read(out / name) for name in ("images/metadata", "titles/metadata", "rows"))
    image_NE, title_NE = vectors(out / "images" / "img_emb"), vectors(out / "titles" / "text_emb")
    assert len(image_NE) == len(images) == 20 - 3 and len({*images["digest"]}) == 17  # a copy, a dead one, an untitled
    assert len(title_NE) == len(titles) and len({*titles["digest"]}) == len(titles)
    assert np.array_equal(np.stack(images["embedding"]), image_NE)
    assert np.array_equal(np.stack(titles["embedding"]), title_NE)
    assert images["image"].tolist() == [*range(17)] and titles["title"].tolist() == [*range(len(titles))]

    dropped = [json.loads(line) for line in (out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(each["row"], each["reason"]) for each in dropped} == {(6, "no-title"), (7, "not-image")}
    source = {name: pd.read_csv(odd / f"{name}.csv", keep_default_na=False) for name in ("train", "valid", "test")}
    assert len(rows) + len(dropped) == sum(map(len, source.values()))
    for row in rows.itertuples():
        given = source[row.split].iloc[row.row]
        image = Path(images["image_path"][row.image]).read_bytes()
        assert image == (odd / given["image"]).read_bytes()
        assert titles["caption"][row.title].lower() == given["title"].strip().lower()
        negatives = [titles["caption"][number] for number in row.negatives]
        assert negatives == [given["title_neg"]] * bool(given["title_neg"])
    own = titles[~titles["negative_only"]]
    assert {*own["title"]} == {*rows["title"]} and own["title"].max() == len(own) - 1

    pictures, captions = [Path(name) for name in images["image_path"]], titles["caption"].tolist()
    image_theirs, title_theirs = theirs(tiny_model, captions, pictures)
    np.testing.assert_allclose(title_NE, title_theirs, atol=1e-5)
    np.testing.assert_allclose(image_NE, image_theirs, atol=2e-3)  # pixels may differ by 2/255
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(tiny_model), device="cpu")
    np.testing.assert_allclose(title_NE, peer.encode(captions, normalize_embeddings=True), atol=1e-5)


@pytest.mark.usefixtures("small_parts")
def test_a_killed_run_goes_on_with_what_is_missing_and_ends_as_a_whole_one(
        flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert inside([*flags, "--out", whole]).returncode == 0
    write, written = embeddings._write_parquet, []

    def until_killed(path: Path, *content: object) -> None:
        written.append(path)
        write(path, *content)  # type: ignore[arg-type]
        if len(written) == 2:
            path.with_name(".img_emb_0001.npy.left.npy").touch()  # what SIGKILL leaves
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "_write_parquet", until_killed)
        with pytest.raises(KeyboardInterrupt):
            inside([*flags, "--out", cut])
    assert not json.loads((cut / "embeddings.json").read_text(encoding="utf-8"))["finished"]
    first = cut / "images" / "img_emb" / "img_emb_0000.npy"
    before = first.stat().st_mtime_ns
    done = inside([*flags, "--out", cut])
    assert done.returncode == 0 and "1 files were there already" in done.stderr + done.stdout
    assert first.stat().st_mtime_ns == before
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(cut)) for path in cut.rglob("*") if path.is_file()) == names
    for name in names:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.usefixtures("small_parts")
def test_parts_that_were_damaged_are_said_and_written_again(flags: list[object], tmp_path: Path) -> None:
    """Else vectors of a cut or altered file would be searched in silence."""
    out = tmp_path / "out"
    assert inside([*flags, "--out", out]).returncode == 0
    vectors, tables = sorted(out.rglob("*.npy")), sorted(out.rglob("*.parquet"))
    before = {path: path.read_bytes() for path in (*vectors, *tables)}
    for path in vectors[1::2]:
        path.write_bytes(before[path][:-1] + b"?")
    group = pq.ParquetFile(tables[0]).metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    (embedding,) = [column for column in columns if column.path_in_schema.startswith("embedding")]
    data = bytearray(before[tables[0]])
    data[embedding.data_page_offset + embedding.total_compressed_size - 1] ^= 1
    tables[0].write_bytes(data)
    tables[1].write_bytes(before[tables[1]][:-9])
    tables[-1].unlink()
    tables[-1].mkdir()
    refused = inside([*flags, "--out", out])
    assert refused.returncode == 1 and str(tables[-1]) in refused.stderr  # what is in a folder is somebody's
    tables[-1].rmdir()
    again = inside([*flags, "--out", out])
    assert again.returncode == 0 and "damaged" in refused.stderr, again.stderr
    assert {path: path.read_bytes() for path in (*vectors, *tables)} == before


def test_a_warm_store_runs_no_tower_and_fp16_parquet_holds_no_second_copy(
        flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.clip.towers import Tower

    full, half = tmp_path / "full", tmp_path / "half"
    assert inside([*flags, "--out", full]).returncode == 0

    def refuse(self: Tower, device: torch.device) -> torch.nn.Module:
        raise AssertionError("a tower ran")

    monkeypatch.setattr(Tower, "for_pass", refuse)
    done = inside([*flags, "--out", half, "--dtype", "fp16", "--vectors", "npy"])
    assert done.returncode == 0, done.stderr
    rounded = vectors(half / "images" / "img_emb")
    assert rounded.dtype == np.float16 and "embedding" not in read(half / "images" / "metadata")
    np.testing.assert_array_equal(rounded, vectors(full / "images" / "img_emb").astype(np.float16))


def test_what_is_there_is_not_replaced_and_other_embeddings_are_not_mixed_in(
        flags: list[object], pairs: Path, tiny_st_model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    (foreign / "img_emb").mkdir(parents=True)
    (foreign / "img_emb" / "img_emb_0.npy").write_bytes(b"theirs")
    refused = inside([*flags, "--out", foreign])
    assert refused.returncode == 2 and "holds no embeddings of thumbtune's" in refused.stderr
    assert [path.name for path in foreign.rglob("*")] == ["img_emb", "img_emb_0.npy"]
    out = tmp_path / "out"
    assert inside([*flags, "--out", out, "--split", "test"]).returncode == 0
    for other, said in ((["--split", "valid"], "--split test, not valid"), (["--dtype", "fp16"], "--dtype fp32"),
                        (["--dtype", "bf16"], "use fp32 or fp16"), (["--model", tiny_st_model], "model or the data")):
        refused = inside(last_flags([*map(str, flags), "--split", "test", "--out", out, *map(str, other)]))
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
    assert inside([*flags[:1], "--dataset", pairs]).returncode == 2  # no --out
    (tmp_path / "busy").mkdir()
    held = os.open(tmp_path / "busy", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # as another process that writes there
    refused = inside([*flags, "--split", "test", "--out", tmp_path / "busy"])
    os.close(held)
    assert refused.returncode == 2 and "another process is writing there" in refused.stderr
    (out / "embeddings.json").unlink()  # "move it away to start afresh", says the error where it is damaged
    done = inside(last_flags([*map(str, flags), "--split", "test", "--out", out, "--model", tiny_st_model]))
    assert done.returncode == 0 and "there already" not in done.stderr, done.stderr
