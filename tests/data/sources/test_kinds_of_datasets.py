"""The datasets that people have, each written by the library that makes it: image content and titles of every split."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data.batch import UserError
from data.cold import Reader
from data.images.decode import ImageSpec
from data.shards.writer import ShardWriter
from data.sources.source import Columns, ReadOptions, load_splits
from data.stream.stages import read_shard
from data.stream.titles import TitleRules
from data.web.fetch import FetchPolicy
from data.web.storage import Entry

datasets = pytest.importorskip("datasets")
pd = pytest.importorskip("pandas")
webdataset = pytest.importorskip("webdataset")

Expected = dict[str, list[tuple[int | str, str]]]  # split -> number of the picture, or its address, and title
Writer = Callable[[Path], Expected]
CASES: dict[str, Writer] = {}
STEP = 24  # between the colours of pictures, which JPEG keeps apart


def case(write: Writer) -> Writer:
    """A writer fills an empty folder and returns what must be read from it."""
    CASES[write.__name__.strip("_")] = write
    return write


def jpeg(number: int, kind: str = "JPEG") -> bytes:
    """A picture that shows its number as its colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * STEP, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def shown(content: bytes) -> int:
    with Image.open(io.BytesIO(content)) as image:
        return round(int(np.asarray(image.convert("RGB"))[4, 4, 0]) / STEP)


def pictures(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))


def frame(folder: Path, rows: int = 3) -> Any:
    """A pandas table of pictures that lie in `folder`."""
    pictures(folder, [f"{row}.jpg" for row in range(rows)])
    numbers = range(rows)
    return pd.DataFrame({"image": [f"{row}.jpg" for row in numbers], "title": [f"title {row}" for row in numbers]})


def split(*numbers: int, captions: int = 0) -> list[tuple[int | str, str]]:
    """The rows of pictures with one title, or with `captions` each."""
    if captions:
        return [(number, f"title {number}.{which}") for number in numbers for which in range(captions)]
    return [(number, f"title {number}") for number in numbers]


def several(*numbers: int) -> list[list[str]]:
    return [[title for _, title in split(number, captions=2)] for number in numbers]


def embedded(*numbers: int, **more: Any) -> Any:
    """A `datasets.Dataset` with pictures in it."""
    features = datasets.Features({"image": datasets.Image(), "title": datasets.Value("string")})
    columns = {"image": [{"bytes": jpeg(number), "path": None} for number in numbers],
               "title": [f"title {number}" for number in numbers]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    for name, values in more.items():
        dataset = dataset.remove_columns("title").add_column(name, values)
    return dataset


@case
def csv_by_pandas(folder: Path) -> Expected:
    rows = frame(folder)
    rows.to_csv(folder / "train.csv", index=False)
    rows[:1].to_csv(folder / "val.csv", index=False)
    rows[1:].to_csv(folder / "test.csv", index=False)
    return {"train": split(0, 1, 2), "valid": split(0), "test": split(1, 2)}


@case
def csv_with_pandas_index(folder: Path) -> Expected:
    frame(folder).to_csv(folder / "pairs.csv")
    return {"train": split(0, 1, 2)}


@case
def tsv_by_pandas(folder: Path) -> Expected:
    frame(folder).to_csv(folder / "pairs.tsv", sep="\t", index=False)
    return {"train": split(0, 1, 2)}


@case
def csv_gz(folder: Path) -> Expected:
    frame(folder).to_csv(folder / "train.csv.gz", index=False)
    frame(folder)[:1].to_csv(folder / "test.csv.gz", index=False)
    return {"train": split(0, 1, 2), "test": split(0)}


@case
def tsv_gz(folder: Path) -> Expected:
    frame(folder).to_csv(folder / "pairs.tsv.gz", sep="\t", index=False)
    return {"train": split(0, 1, 2)}


@case
def jsonl_by_pandas(folder: Path) -> Expected:
    frame(folder).to_json(folder / "pairs.jsonl", orient="records", lines=True)
    return {"train": split(0, 1, 2)}


@case
def jsonl_gz(folder: Path) -> Expected:
    frame(folder).to_json(folder / "pairs.jsonl.gz", orient="records", lines=True)
    return {"train": split(0, 1, 2)}


@case
def ndjson(folder: Path) -> Expected:
    frame(folder).to_json(folder / "train.ndjson", orient="records", lines=True)
    frame(folder).to_json(folder / "test.ndjson", orient="records", lines=True)
    return {"train": split(0, 1, 2), "test": split(0, 1, 2)}


@case
def json_array(folder: Path) -> Expected:
    frame(folder / "images").assign(image=[f"images/{row}.jpg" for row in range(3)]).to_json(
        folder / "pairs.json", orient="records", indent=1)
    return {"train": split(0, 1, 2)}


@case
def json_array_gz(folder: Path) -> Expected:
    frame(folder).to_json(folder / "train.json.gz", orient="records")
    return {"train": split(0, 1, 2)}


@case
def json_columns_by_pandas(folder: Path) -> Expected:
    frame(folder).to_json(folder / "pairs.json")
    return {"train": split(0, 1, 2)}


@case
def json_data_field(folder: Path) -> Expected:
    value = {"version": "1.0", "data": frame(folder).to_dict("records")}
    (folder / "pairs.json").write_text(json.dumps(value))
    return {"train": split(0, 1, 2)}


@case
def json_lines_called_json_by_datasets(folder: Path) -> Expected:
    datasets.Dataset.from_pandas(frame(folder)).to_json(folder / "train.json")
    return {"train": split(0, 1, 2)}


@case
def json_image_to_captions(folder: Path) -> Expected:
    frame(folder, 2)
    captions = dict(zip(["0.jpg", "1.jpg"], several(0, 1), strict=True))
    (folder / "captions.json").write_text(json.dumps(captions, indent=2))
    return {"train": split(0, 1, captions=2)}


@case
def feather_by_pandas(folder: Path) -> Expected:
    frame(folder).to_feather(folder / "pairs.feather")
    return {"train": split(0, 1, 2)}


@case
def arrow_stream_of_datasets(folder: Path) -> Expected:
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=str(folder / "train.arrow"), features=embedded().features) as writer:
        for number in range(3):
            writer.write({"image": {"bytes": jpeg(number), "path": None}, "title": f"title {number}"})
        writer.finalize()
    return {"train": split(0, 1, 2)}


@case
def parquet_by_pandas(folder: Path) -> Expected:
    frame(folder).to_parquet(folder / "train.parquet")
    return {"train": split(0, 1, 2)}


@case
def parquet_with_images_by_datasets(folder: Path) -> Expected:
    embedded(0, 1).to_parquet(folder / "train-00000-of-00002.parquet")
    embedded(2).to_parquet(folder / "train-00001-of-00002.parquet")
    embedded(3).to_parquet(folder / "test-00000-of-00001.parquet")
    return {"train": split(0, 1, 2), "test": split(3)}


@case
def parquet_with_a_list_of_captions(folder: Path) -> Expected:
    embedded(0, 1, caption=several(0, 1)).to_parquet(folder / "all.parquet")
    return {"train": split(0, 1, captions=2)}


@case
def parquet_with_lists_of_one_image(folder: Path) -> Expected:
    rows = {"image": [[{"bytes": jpeg(number), "path": None}] for number in range(2)], "title": ["title 0", "title 1"]}
    features = datasets.Features({"image": datasets.List(datasets.Image()), "title": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "all.parquet")
    return {"train": split(0, 1)}


def labelled(*numbers: int) -> Any:
    kind = datasets.ClassLabel(names=["cat", "dog"])
    dataset = embedded(*numbers, label=[number % 2 for number in numbers])
    return dataset.cast_column("label", kind)


def classes(*numbers: int) -> list[tuple[int | str, str]]:
    return [(number, ("cat", "dog")[number % 2]) for number in numbers]


@case
def parquet_with_class_labels(folder: Path) -> Expected:
    labelled(0, 1, 2).to_parquet(folder / "train.parquet")
    labelled(3).to_parquet(folder / "test.parquet")
    return {"train": classes(0, 1, 2), "test": classes(3)}


@case
def saved_dataset(folder: Path) -> Expected:
    embedded(0, 1, 2).save_to_disk(folder)
    return {"train": split(0, 1, 2)}


@case
def saved_dataset_of_a_selection(folder: Path) -> Expected:
    embedded(0, 1, 2, 3).select([3, 1]).save_to_disk(folder, num_shards=2)
    return {"train": split(3, 1)}


@case
def saved_dataset_dict(folder: Path) -> Expected:
    parts = {"train": embedded(0, 1, caption=several(0, 1)), "validation": embedded(2, caption=several(2)),
             "test": embedded(3, caption=several(3))}
    datasets.DatasetDict(parts).save_to_disk(folder)
    return {"train": split(0, 1, captions=2), "valid": split(2, captions=2), "test": split(3, captions=2)}


@case
def saved_class_labels(folder: Path) -> Expected:
    datasets.DatasetDict({"train": labelled(0, 1), "test": labelled(2)}).save_to_disk(folder)
    return {"train": classes(0, 1), "test": classes(2)}


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: parts/a-*.parquet
  - split: validation
    path: parts/b.parquet
---
# A dataset
"""


@case
def clone_of_a_hub_dataset_with_a_card(folder: Path) -> Expected:
    (folder / "parts").mkdir()
    (folder / "README.md").write_text(CARD)
    embedded(0).to_parquet(folder / "parts/a-0.parquet")
    embedded(1).to_parquet(folder / "parts/a-1.parquet")
    embedded(2).to_parquet(folder / "parts/b.parquet")
    return {"train": split(0, 1), "valid": split(2)}


@case
def clone_of_a_hub_dataset(folder: Path) -> Expected:
    (folder / "data").mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    embedded(0, 1).to_parquet(folder / "data/train-00000-of-00001.parquet")
    embedded(2).to_parquet(folder / "data/validation-00000-of-00001.parquet")
    return {"train": split(0, 1), "valid": split(2)}


@case
def hive_by_split(folder: Path) -> Expected:
    for name, numbers in (("train", (0, 1)), ("test", (2,))):
        (folder / f"split={name}").mkdir()
        embedded(*numbers).to_parquet(folder / f"split={name}/part-0.parquet")
    return {"train": split(0, 1), "test": split(2)}


@case
def hive_by_year(folder: Path) -> Expected:
    import pyarrow.dataset as ds

    rows = pa.table({"image": [jpeg(number) for number in range(3)], "year": [2019, 2020, 2020],
                     "title": [f"title {number}" for number in range(3)]})
    ds.write_dataset(rows, folder, format="parquet", partitioning=ds.partitioning(
        pa.schema([("year", pa.int64())]), flavor="hive"))
    return {"train": split(0, 1, 2)}


@case
def parts_of_spark(folder: Path) -> Expected:
    for part in range(3):
        name = f"part-{part:05}-0d1c3a5e-7a1b-4c4b-9d53-3c5c1f5a8f6e-c000.snappy.parquet"
        embedded(part).to_parquet(folder / name)
        (folder / f".{name}.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()
    return {"train": split(0, 1, 2)}


@case
def numbered_csv_files(folder: Path) -> Expected:
    rows = frame(folder)
    for row in range(3):
        rows[row: row + 1].to_csv(folder / f"{row:04}.csv", index=False)
    return {"train": split(0, 1, 2)}


@case
def splits_as_words_of_names(folder: Path) -> Expected:
    rows = frame(folder)
    rows[:2].to_csv(folder / "pairs_train_2017.csv", index=False)
    rows[2:].to_csv(folder / "pairs_val_2017.csv", index=False)
    return {"train": split(0, 1), "valid": split(2)}


@case
def tables_in_split_folders(folder: Path) -> Expected:
    for name in ("train", "test"):
        frame(folder / name).to_csv(folder / name / "pairs.csv", index=False)
    return {"train": split(0, 1, 2), "test": split(0, 1, 2)}


@case
def one_folder_in_another(folder: Path) -> Expected:
    frame(folder / "archive").to_csv(folder / "archive/pairs.csv", index=False)
    return {"train": split(0, 1, 2)}


@case
def tables_in_several_folders(folder: Path) -> Expected:
    for number, name in enumerate(("english", "more")):
        (folder / name).mkdir()
        embedded(number).to_parquet(folder / name / "rows.parquet")
    return {"train": split(0, 1)}


@case
def imagefolder_with_metadata_csv(folder: Path) -> Expected:
    frame(folder).rename(columns={"image": "file_name", "title": "text"}).to_csv(folder / "metadata.csv", index=False)
    return {"train": split(0, 1, 2)}


@case
def imagefolder_with_metadata_in_each_split(folder: Path) -> Expected:
    for name in ("train", "test"):
        rows = frame(folder / name).rename(columns={"image": "file_name", "title": "text"})
        rows.to_json(folder / name / "metadata.jsonl", orient="records", lines=True)
    return {"train": split(0, 1, 2), "test": split(0, 1, 2)}


@case
def imagefolder_with_one_metadata_for_all_splits(folder: Path) -> Expected:
    names = ["train/0.jpg", "train/1.jpg", "test/2.jpg"]
    pictures(folder, names)
    rows = pd.DataFrame({"file_name": names, "caption": [f"title {number}" for number in range(3)]})
    rows.to_parquet(folder / "metadata.parquet")
    return {"train": split(0, 1), "test": split(2)}


@case
def class_folders(folder: Path) -> Expected:
    pictures(folder, ["cat/0.jpg", "dog/1.jpg", "cat/2.jpg"])
    return {"train": [(0, "cat"), (2, "cat"), (1, "dog")]}


@case
def class_folders_in_split_folders(folder: Path) -> Expected:
    pictures(folder, ["train/cat/0.jpg", "train/dog/1.jpg", "val/cat/2.jpg", "val/dog/3.jpg"])
    return {"train": classes(0, 1), "valid": classes(2, 3)}


@case
def images_with_texts_and_a_json_file(folder: Path) -> Expected:
    for row in range(3):
        pictures(folder / "deep", [f"{each}.jpg" for each in range(3)])
        (folder / f"deep/{row}.txt").write_text(f"title {row}\n")
    (folder / "about.json").write_text(json.dumps({"images": 3}))
    return {"train": split(0, 1, 2)}


@case
def images_with_texts(folder: Path) -> Expected:
    for row in range(3):
        pictures(folder, [f"{each}.jpg" for each in range(3)])
        (folder / f"{row}.txt").write_text(f"title {row}\n")
    return {"train": split(0, 1, 2)}


def karpathy(splits: list[str], **more: Any) -> dict[str, Any]:
    """The published schema: https://cs.stanford.edu/people/karpathy/deepimagesent/."""
    images = []
    for number, name in enumerate(splits):
        sentences = [{"tokens": title.split(), "raw": title, "imgid": number, "sentid": 2 * number + which}
                     for which, title in enumerate(several(number)[0])]
        images.append({"sentids": [2 * number, 2 * number + 1], "imgid": number, "sentences": sentences, "split": name,
                       "filename": f"{number}.jpg", **{key: values[number] for key, values in more.items()}})
    return {"images": images, "dataset": "coco"}


@case
def karpathy_coco(folder: Path) -> Expected:
    folders = ["train2014", "val2014", "val2014", "val2014"]
    pictures(folder, [f"{place}/{number}.jpg" for number, place in enumerate(folders)])
    value = karpathy(["train", "restval", "val", "test"], filepath=folders, cocoid=[1, 2, 3, 4])
    (folder / "dataset_coco.json").write_text(json.dumps(value))
    return {"train": split(0, 1, captions=2), "valid": split(2, captions=2), "test": split(3, captions=2)}


@case
def coco_called_after_splits(folder: Path) -> Expected:
    pictures(folder / "images", ["0.jpg", "1.jpg"])
    (folder / "train.json").write_text(coco(0))
    (folder / "val.json").write_text(coco(1))
    return {"train": split(0, captions=2), "valid": split(1, captions=2)}


@case
def coco_under_another_name(folder: Path) -> Expected:
    pictures(folder / "images", ["0.jpg", "1.jpg"])
    (folder / "annotations.json").write_text(coco(0, 1))
    return {"train": split(0, 1, captions=2)}


def zipped_images(folder: Path) -> None:
    frame(folder / "in").rename(columns={"image": "file_name", "title": "text"}).to_csv(
        folder / "in/metadata.csv", index=False)
    shutil.make_archive(str(folder / "train"), "zip", folder / "in")
    shutil.rmtree(folder / "in")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.zip\n---\n")


@case
def karpathy_flickr8k(folder: Path) -> Expected:
    pictures(folder / "Images", ["0.jpg", "1.jpg", "2.jpg"])
    (folder / "dataset_flickr8k.json").write_text(json.dumps(karpathy(["train", "val", "test"])))
    return {"train": split(0, captions=2), "valid": split(1, captions=2), "test": split(2, captions=2)}


@case
def karpathy_flickr30k(folder: Path) -> Expected:
    pictures(folder / "flickr30k-images", ["0.jpg", "1.jpg"])
    (folder / "dataset_flickr30k.json").write_text(json.dumps(karpathy(["train", "test"])))
    return {"train": split(0, captions=2), "test": split(1, captions=2)}


def coco(*numbers: int) -> str:
    """The published schema: https://cocodataset.org/#format-data."""
    images = [{"id": 100 + number, "file_name": f"{number}.jpg", "width": 8, "height": 8, "license": 1,
               "coco_url": f"http://127.0.0.1:9/{number}.jpg"} for number in numbers]
    annotations = [{"id": 10 * number + which, "image_id": 100 + number, "caption": title}
                   for which in range(2) for number in numbers for title in several(number)[0][which: which + 1]]
    return json.dumps({"info": {"year": 2017}, "images": images, "licenses": [], "annotations": annotations})


@case
def coco_annotations(folder: Path) -> Expected:
    pictures(folder, ["train2017/0.jpg", "train2017/1.jpg", "val2017/2.jpg"])
    (folder / "annotations").mkdir()
    (folder / "annotations/captions_train2017.json").write_text(coco(0, 1))
    (folder / "annotations/captions_val2017.json").write_text(coco(2))
    (folder / "annotations/instances_val2017.json").write_text('{"images": [], "annotations": [], "categories": []}')
    return {"train": split(0, 1, captions=2), "valid": split(2, captions=2)}


@case
def coco_beside_its_images(folder: Path) -> Expected:
    pictures(folder / "images", ["0.jpg", "1.jpg"])
    (folder / "captions_train2014.json").write_text(coco(0, 1))
    return {"train": split(0, 1, captions=2)}


@case
def kaggle_flickr8k(folder: Path) -> Expected:
    pictures(folder / "Images", ["0.jpg", "1.jpg"])
    rows = [{"image": f"{number}.jpg", "caption": title} for number in (0, 1) for title in several(number)[0]]
    pd.DataFrame(rows).to_csv(folder / "captions.txt", index=False)
    return {"train": split(0, 1, captions=2)}


@case
def kaggle_flickr30k(folder: Path) -> Expected:
    pictures(folder / "flickr30k_images/flickr30k_images", ["0.jpg", "1.jpg"])
    lines = [f"{number}.jpg| {which}| {title}" for number in (0, 1) for which, title in enumerate(several(number)[0])]
    lines.insert(0, "image_name| comment_number| comment")
    (folder / "flickr30k_images/results.csv").write_text("\n".join(lines) + "\n")
    return {"train": split(0, 1, captions=2)}


@case
def flickr8k_tokens(folder: Path) -> Expected:
    pictures(folder / "Flicker8k_Dataset", ["0.jpg", "1.jpg", "2.jpg"])
    (folder / "Flickr8k_text").mkdir()
    lines = [f"{number}.jpg#{which}\t{title}" for number in range(3) for which, title in enumerate(several(number)[0])]
    (folder / "Flickr8k_text/Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    (folder / "Flickr8k_text/Flickr_8k.trainImages.txt").write_text("0.jpg\n1.jpg\n")
    (folder / "Flickr8k_text/Flickr_8k.testImages.txt").write_text("2.jpg\n")
    return {"train": split(0, 1, captions=2), "test": split(2, captions=2)}


@case
def conceptual_captions(folder: Path) -> Expected:
    for name in ("Train_GCC-training.tsv", "Validation_GCC-1.1.0-Validation.tsv"):
        (folder / name).write_text('a "quoted start\thttp://h/0.jpg\nb\thttp://h/1.jpg\n')
    rows: list[tuple[int | str, str]] = [("http://h/0.jpg", 'a "quoted start'), ("http://h/1.jpg", "b")]
    return {"train": rows, "valid": rows}


@case
def laion(folder: Path) -> Expected:
    rows = pd.DataFrame({"SAMPLE_ID": [1.0, 2.0], "URL": ["http://h/0.jpg", "http://h/1.jpg"], "TEXT": ["a", None],
                         "HEIGHT": [8, 8], "WIDTH": [8, 8], "similarity": [.3, .3], "NSFW": ["UNLIKELY", "UNSURE"]})
    for part in range(2):
        rows.to_parquet(folder / f"part-{part:05}-c0-c000.snappy.parquet")
    return {"train": [("http://h/0.jpg", "a"), ("http://h/1.jpg", "")] * 2}


@case
def webdataset_shards(folder: Path) -> Expected:
    for name, numbers in (("train", (0, 1, 2)), ("test", (3,))):
        with webdataset.ShardWriter(str(folder / f"{name}-%06d.tar"), maxcount=2, verbose=0) as writer:
            for number in numbers:
                writer.write({"__key__": f"{number:04}", "jpg": jpeg(number), "txt": f"title {number}"})
    return {"train": split(0, 1, 2), "test": split(3)}


@case
def webdataset_classes_of_clip_benchmark(folder: Path) -> Expected:
    (folder / "classnames.txt").write_text("cat\ndog\n")
    for name, numbers in (("train", (0, 1)), ("test", (2, 3))):
        (folder / name).mkdir()
        (folder / name / "nshards.txt").write_text("1\n")
        with webdataset.TarWriter(str(folder / name / "0.tar")) as writer:
            for number in numbers:
                writer.write({"__key__": f"s{number:07}", "jpg": jpeg(number), "cls": number % 2})
    return {"train": classes(0, 1), "test": classes(2, 3)}


def read(dataset: str, tmp_path: Path) -> tuple[Expected, list[str]]:
    """The rows of each split with the content of their images, and the lines logged."""
    reader = Reader(tmp_path / "cache", ImageSpec.clip(), FetchPolicy(), 10**8, 2)
    said: list[str] = []
    splits: Expected = {}
    for name, rows in load_splits(dataset, log=said.append, embedded=tmp_path / "embedded").items():
        splits[name] = []
        for image, title in zip(rows.image.to_pylist(), rows.title.to_pylist(), strict=True):
            splits[name].append((image if image.startswith("http") else shown(reader.read(image)), title))
    return splits, said


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder; the library's own copies go beside it."""
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "library" / name))
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@pytest.mark.parametrize("name", CASES)
def test_a_dataset_is_read_whole(name: str, folder: Path, tmp_path: Path) -> None:
    """People have their pairs in this form: a row would be missing, or stand beside another's title."""
    expected = CASES[name](folder)
    assert read(str(folder), tmp_path)[0] == expected


@pytest.mark.parametrize("place", ["dataset_coco.json", "annotations/captions_val2014.json", "captions.txt",
                                   "flickr30k_images/results.csv", "Flickr8k_text/Flickr8k.token.txt", "all.json"])
def test_a_file_of_captions_is_read_by_itself(place: str, folder: Path, tmp_path: Path) -> None:
    """--dataset names the file of a published layout instead of its folder; its name does not matter then."""
    writers = {"dataset_coco.json": karpathy_coco, "captions.txt": kaggle_flickr8k, "all.json": karpathy_flickr8k,
               "flickr30k_images/results.csv": kaggle_flickr30k, "Flickr8k_text/Flickr8k.token.txt": flickr8k_tokens}
    if place in writers:
        expected = writers[place](folder)
        if place == "all.json":
            (folder / "dataset_flickr8k.json").rename(folder / place)
    else:
        pictures(folder / "val2014", ["0.jpg"])
        (folder / "annotations").mkdir()
        (folder / place).write_text(coco(0))
        expected = {"train": split(0, captions=2)}
    assert read(str(folder / place), tmp_path)[0] == expected


def test_one_configuration_of_several_is_named(folder: Path, tmp_path: Path) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*.parquet\n"
                      for name in ("small", "large"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for number, name in enumerate(("small", "large")):
        (folder / name).mkdir()
        embedded(number).to_parquet(folder / name / "0.parquet")
    with pytest.raises(UserError, match=r":CONFIGURATION .*small.*large"):
        load_splits(str(folder))
    assert read(f"{folder}:large", tmp_path)[0] == {"train": split(1)}


@pytest.mark.parametrize(("write", "message"), [
    (lambda folder: (folder / "a.txt2").write_bytes(b"x"), r"holds a\.txt2; found neither tables"),
    (lambda folder: (folder / "a.xlsx").write_bytes(b"PK"), r"holds a\.xlsx; write a CSV: pandas\.read_excel"),
    (lambda folder: (folder / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
     "a pointer of Git LFS, not the file; run `git lfs pull`"),
    (zipped_images, r"its images lie in .*train\.zip; unpack that and pass the folder"),
    (lambda folder: (folder / "rows.zip").write_bytes(b"PK cut"), "holds rows.zip; unpack it and pass the folder"),
    (lambda folder: (folder / "dataset_coco.json").write_text(json.dumps(karpathy(["train"]))),
     r"its images \(e\.g\. '0\.jpg'\) are in none of .*images, or name their folder with --image-root"),
    (lambda folder: (folder / "captions_val.json").write_text('{"images": [{"id": 1, "file_name": "a.jpg"}], '
                                                              '"annotations": [{"image_id": 1, "bbox": []}]}'),
     r"is not a file of captions \(missing: 'caption'\)"),
    (lambda folder: (folder / "pairs.json").write_text('{"version": 1, "more": {}}'),
     r"an object with version, more; what can be read is an array"),
    (lambda folder: (folder / "pairs.csv.gz").write_bytes(b"\x1f\x8b\x08 cut"), "damaged gzip file"),
    (lambda folder: (folder / "pairs.csv.gz").write_bytes(b"image,title\na.jpg,b\n"), "damaged gzip file"),
    (lambda folder: (folder / "rows.feather").write_bytes(b"FEA1 of another time"), "not an Arrow file"),
    (lambda folder: (folder / "state.json").write_text("{}"), "save_to_disk and cannot be loaded"),
    (lambda folder: (folder / "set.py").write_text("raise SystemExit"), "scripts are never run here"),
])
def test_what_cannot_be_read_names_what_is_there_and_the_fix(
        write: Callable[[Path], object], message: str, folder: Path) -> None:
    write(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_splits(str(folder))
    assert "\n" not in str(caught.value)


def test_classes_without_names_are_refused(folder: Path) -> None:
    """A title "0" would be trained on as a text."""
    webdataset_classes_of_clip_benchmark(folder)
    (folder / "classnames.txt").unlink()
    with pytest.raises(UserError, match=r"class 0 of KEY\.cls has no name.*classnames\.txt beside the shards"):
        load_splits(str(folder))


def test_of_two_candidates_the_choice_is_said(folder: Path, tmp_path: Path) -> None:
    expected = karpathy_flickr8k(folder)
    kaggle_flickr8k(folder)
    pd.DataFrame({"image": ["Images/0.jpg"], "title": ["x"]}).to_csv(folder / "mine.csv", index=False)
    splits, said = read(str(folder), tmp_path)
    assert splits == expected
    assert any("read as Karpathy's splits (dataset_flickr8k.json), not captions.txt, mine.csv" in line for line in said)


def test_a_small_gzip_file_that_holds_too_much_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv_gz(folder)
    monkeypatch.setattr("data.reading.MAX_UNPACKED", 20)
    with pytest.raises(UserError, match=r"(train|test)\.csv\.gz: holds more than 20 bytes; unpack it"):
        load_splits(str(folder))


@pytest.mark.parametrize("name, head, tail", [
    ("train.csv", 'image,title\na.jpg,', "\n"), ("train.csv", 'image,title\na.jpg,"', "\n" * 9),
    ("train.jsonl", '{"image": "a.jpg", "title": "', '"}\n'), ("train.json", '[{"image": "a.jpg", "title": "', '"}'),
    ("train.json", '{"data": [{"image": "a.jpg", "title": "', '"}]}')])
def test_a_row_without_end_is_refused_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                                  head: str, tail: str) -> None:
    """A line, a quote or an object that nothing ends would be in memory as a whole, and its Python objects with it."""
    for module in ("data.reading", "data.sources.csv_tables", "data.sources.json_tables"):
        monkeypatch.setattr(f"{module}.MAX_LINE", 5000)
    monkeypatch.setattr("data.sources.csv_tables.BLOCK", 5000)
    monkeypatch.setattr("data.sources.json_tables.MAX_JSON", 5000)
    monkeypatch.setattr("data.sources.json_tables.BLOCK", 1000)
    (tmp_path / name).write_text(head + "0123456\n9" * 1000 + tail if '"' in head else head + "x" * 30000 + tail)
    with pytest.raises(UserError, match=rf"{name}.*(more than 5,000|is not JSON|line \d has more)"):
        load_splits(str(tmp_path))


def test_an_array_is_read_in_blocks_as_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item, a number or a letter that lies across two blocks would be cut."""
    rows = [{"image": f"{row}.jpg", "title": row if row % 3 else f"tïtle {row}", "more": [{}, [row, None]]}
            for row in range(40)]
    (tmp_path / "train.json").write_text("\n" + json.dumps(rows, ensure_ascii=False, indent=1) + "\n ")
    whole = load_splits(str(tmp_path))["train"]
    for block in (1, 7, 64):
        monkeypatch.setattr("data.sources.json_tables.BLOCK", block)
        assert load_splits(str(tmp_path))["train"].fingerprint() == whole.fingerprint()
    assert whole.title.to_pylist()[:2] == ["tïtle 0", "1"]


def test_damaged_captions_are_ledger_entries(folder: Path) -> None:
    """Captions of an image that the file does not list, or that are no text, would vanish."""
    coco_beside_its_images(folder)
    file = folder / "captions_train2014.json"
    value = json.loads(file.read_text())
    value["annotations"] += [{"image_id": 7, "caption": "an image that is not listed"}, {"image_id": 101, "caption": 5}]
    file.write_text(json.dumps(value).replace('"caption": 5', '"caption": [5]'))
    lost: list[dict[str, Any]] = []
    rows = load_splits(str(folder), ledger=lost.append)["train"]
    assert rows.title.to_pylist() == ["title 0.0", "title 0.1"]
    assert [(entry["row"], entry["reason"]) for entry in lost] == [(1, "not-text"), (2, "no-image")]


def test_captions_find_their_images_below_the_image_root(folder: Path, tmp_path: Path) -> None:
    """Images often lie on another disk than the file of captions."""
    expected = karpathy_coco(folder)
    (tmp_path / "elsewhere").mkdir()
    (folder / "dataset_coco.json").rename(tmp_path / "elsewhere/dataset_coco.json")
    options = ReadOptions(image_root=str(folder))
    splits = load_splits(str(tmp_path / "elsewhere"), options)
    assert {name: len(rows) for name, rows in splits.items()} == {name: len(rows) for name, rows in expected.items()}
    assert all(Path(image).is_file() for rows in splits.values() for image in rows.image.to_pylist())


def test_images_of_no_split_are_in_none(folder: Path) -> None:
    """An image without a split would train or be measured by accident."""
    pictures(folder, ["0.jpg", "1.jpg", "2.jpg"])
    value = karpathy(["train", "test", "val"])
    del value["images"][1]["split"]
    (folder / "dataset_coco.json").write_text(json.dumps(value))
    lost: list[dict[str, Any]] = []
    splits = load_splits(str(folder), ledger=lost.append)
    assert {name: rows.title.to_pylist() for name, rows in splits.items()} == {
        "train": several(0)[0], "valid": several(2)[0]}
    assert [(entry["row"], entry["reason"]) for entry in lost] == [(1, "no-split")]


def test_pictures_are_told_apart() -> None:
    """The other tests would pass whatever picture a row has."""
    assert [shown(jpeg(number)) for number in range(10)] == np.arange(10).tolist()


def test_flags_that_nothing_depends_on_are_said(folder: Path) -> None:
    """They were ignored without a word, and --image-template changed the names of the files of a folder."""
    pictures(folder, [f"{name}/{row}.jpg" for name in ("cat", "dog") for row in range(2)])
    said: list[str] = []
    options = ReadOptions(Columns(title=("caption",)), delimiter=";", encoding="cp1252", image_root=str(folder),
                          image_template="{}.png")
    rows = load_splits(str(folder), options, log=said.append)["train"]
    assert all(Path(image).is_file() for image in rows.image.to_pylist())
    assert said[-1].endswith("--title-column, --delimiter, --encoding, --image-root, --image-template")
    with webdataset.TarWriter(str(folder / "x.tar")) as writer:
        writer.write({"__key__": "0", "jpg": jpeg(1), "txt": "a dog"})
    rows = load_splits(str(folder / "x.tar"), ReadOptions(image_template="{}.png"), log=said.append)["train"]
    assert rows.image[0].as_py().rpartition("+")[2].isdecimal() and "--image-template" in said[-1]


def test_tables_beside_splits_are_said(folder: Path) -> None:
    for name in ("train", "valid", "extra"):
        frame(folder).to_csv(folder / f"{name}.csv", index=False)
    said: list[str] = []
    assert [*load_splits(str(folder), log=said.append)] == ["train", "valid"]
    assert len(said) == 1 and said[0].endswith("not used beside the splits: extra.csv")
    for name in ("train", "test", "holdout"):
        pictures(folder / "images", [f"{name}/cat/0.jpg", f"{name}/dog/1.jpg"])
    assert [*load_splits(str(folder / "images"), log=said.append)] == ["train", "test"]
    assert f"{folder}/images: not used beside the splits: holdout/" in said


def test_metadata_of_images_in_no_split_is_in_the_ledger(folder: Path) -> None:
    """Rows of images beside train/ and test/ were gone, and the others had wrong numbers."""
    pictures(folder, ["train/0.jpg", "test/1.jpg", "other/2.jpg"])
    names = ["other/2.jpg", "./train/0.jpg", "test/1.jpg", "test/gone.jpg"]
    pd.DataFrame({"file_name": names, "text": list("abcd")}).to_csv(folder / "metadata.csv", index=False)
    lost: list[dict[str, Any]] = []
    splits = load_splits(str(folder), ledger=lost.append)
    assert {name: rows.title.to_pylist() for name, rows in splits.items()} == {"train": ["b"], "test": ["c", "d"]}
    assert [(entry["row"], entry["reason"], entry["title"]) for entry in lost] == [(0, "no-split", "a")]


@pytest.mark.parametrize("layout", ["coco", "karpathy"])
def test_one_caption_that_is_null_costs_no_other(folder: Path, layout: str) -> None:
    pictures(folder, ["images/0.jpg"])
    if layout == "coco":
        captions = [{"image_id": 1, "caption": text} for text in ("a", None, "b")]
        content: dict[str, Any] = {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": captions}
    else:
        sentences = [{"raw": text} for text in ("a", None, "b")]
        content = {"images": [{"filename": "0.jpg", "split": "train", "sentences": sentences}]}
    path = folder / ("captions_x.json" if layout == "coco" else "dataset_x.json")
    path.write_text(json.dumps(content))
    lost: list[dict[str, Any]] = []
    assert load_splits(str(folder), ledger=lost.append)["train"].title.to_pylist() == ["a", "b"] and not lost


def test_an_object_of_splits(folder: Path) -> None:
    pictures(folder, ["0.jpg", "1.jpg"])
    content = {"train": [{"image": "0.jpg", "title": "a"}], "val": [{"image": "1.jpg", "title": "b"}]}
    (folder / "all.json").write_text(json.dumps(content))
    splits = load_splits(str(folder / "all.json"))
    assert {name: rows.title.to_pylist() for name, rows in splits.items()} == {"train": ["a"], "valid": ["b"]}


@pytest.mark.parametrize("name", ["test.csv", "val.jsonl", "valid-000.tar"])
def test_a_file_that_is_named_after_a_split_is_that_split(folder: Path, name: str) -> None:
    """The one shard of valid beside a stream, or a test.csv, was called train and divided in three."""
    table = frame(folder)
    if name.endswith(".csv"):
        table.to_csv(folder / name, index=False)
    elif name.endswith(".jsonl"):
        table.to_json(folder / name, orient="records", lines=True)
    else:
        with webdataset.TarWriter(str(folder / name)) as writer:
            writer.write({"__key__": "0", "jpg": jpeg(1), "txt": "a dog"})
    assert [*load_splits(str(folder / name))] == ["test" if name == "test.csv" else "valid"]


def test_class_names_of_shards_are_spelt_alike_where_they_are_streamed(folder: Path) -> None:
    """The stream trained on "golden_retriever" and was measured on "golden retriever"."""
    (folder / "classnames.txt").write_text("golden_retriever\ncat\n")
    with webdataset.TarWriter(str(folder / "x.tar")) as writer:
        for key, name in enumerate([0, 1, "tabby_cat"]):
            writer.write({"__key__": str(key), "jpg": jpeg(key), "cls": name})
    rows = load_splits(str(folder / "x.tar"))["train"]
    assert rows.title.to_pylist() == ["golden retriever", "cat", "tabby cat"]
    assert rows.label is not None and rows.label.to_pylist() == ["golden retriever", "cat", None]
    shard = folder / "x.tar"
    entry = Entry(str(shard), shard.stat().st_size, "")
    streamed = read_shard(0, entry, rules=TitleRules.of([entry], ()))
    assert [sample.title for sample in streamed] == rows.title.to_pylist()


def test_what_shards_bring_with_them_is_not_called_unused(folder: Path, tmp_path: Path) -> None:
    with ShardWriter(folder, "train") as writer:
        for key in range(4):
            writer.write(str(key), jpeg(key), f"title {key}")
    (folder / "ledger.jsonl").write_text("")
    said: list[str] = []
    load_splits(str(folder), log=said.append)
    assert not said


def test_texts_beside_images_that_a_table_replaces_are_said(folder: Path) -> None:
    frame(folder).to_csv(folder / "table.csv", index=False)
    (folder / "0.txt").write_text("another title")
    said: list[str] = []
    load_splits(str(folder), log=said.append)
    assert len(said) == 1 and "table.csv is read, not the texts beside the images" in said[0]


def test_a_table_in_many_files_is_not_described_by_each(folder: Path) -> None:
    """A thousand shards of classes gave a thousand lines, a thousand files with `;` another one."""
    pictures(folder, ["0.jpg", "1.jpg"])
    for part in range(40):
        table = pd.DataFrame({"image": ["0.jpg", "1.jpg"], "label": [f"cat{part}", "dog"]})
        table.to_csv(folder / f"part-{part:04}.csv", sep=";", index=False)
    said: list[str] = []
    assert len(load_splits(str(folder), log=said.append)["train"]) == 80
    for words in ("separator ';'", "names of 2 classes"):
        assert sum(words in line for line in said) == 6
    assert sum(line.startswith("35 more lines like: ") for line in said) == 2 and len(said) == 13
