"""Models opened by the record of an earlier run: the same model to the bit, and never one whose files have changed.

When one of these fails, a warm run trains on another model than the one named, or loads what it does not use.
"""

from __future__ import annotations

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import HANGS_S, ROOT, call, start
from safetensors.torch import load_file, save_file
from test_loading import TITLES, WHOLE, Surgery, weights
from torch import Tensor

from data.batch import UserError
from data.images.decode import collate_tokens, tokenize
from engine.clip import facts
from engine.clip.facts import ModelRecords
from engine.clip.loading import Clip, load_clip, write_record
from engine.clip.towers import ImageTower, TextTower
from engine.clip.whole import load_whole
from engine.publish.export import write_model

ADDED = "re"
ODD_TITLES = [*TITLES, "", " ", "<cat-toy>s <|endoftext|> <|startoftext|>", "ＦＵＬＬ\u3000width e\u0301 \ud800",
              f"{ADDED} a{ADDED}b, c {ADDED} d", "!?"]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def recorded(folder: Path, records: ModelRecords) -> Clip:
    """The model as the first run has it, which leaves a record."""
    clip = load_clip(str(folder), records=records)
    write_record(clip, records, pytest.fail)
    return clip


def features(clip: Clip) -> tuple[Tensor, Tensor]:
    pixels = torch.arange(2 * 3 * 32 * 32).remainder(251).byte().view(2, 3, 32, 32)
    ids = tokenize(clip.tokenizer, TITLES, clip.max_tokens)
    with torch.no_grad():
        return (clip.head.text_projection(TextTower(clip)(collate_tokens(ids, clip.tokenizer.pad_token_id))),
                clip.head.visual_projection(ImageTower(clip)(pixels)))


def exported(clip: Clip, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    write_model(clip, {"text_projection.weight": clip.head.text_projection.weight + 1}, folder, "fp32")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_added_word(folder: Path) -> None:
    """A piece of the vocabulary that is matched before titles are normalised and split, and takes the spaces around."""
    from tokenizers import AddedToken
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert ADDED in tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(ADDED, lstrip=True, rstrip=True, normalized=False)])
    tokenizer.save_pretrained(folder)


MORE: dict[str, Surgery] = {
    "a word that is an added token": with_added_word,
    "fp16 weights": weights(lambda tensors: {name: value.half() for name, value in tensors.items()}),
    "bf16 weights": weights(lambda tensors: {name: value.bfloat16() for name, value in tensors.items()})}


@pytest.mark.parametrize("name", [*WHOLE, *MORE])
def test_a_recorded_model_is_the_same_to_the_bit(name: str, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (WHOLE | MORE)[name](folder)
    records = ModelRecords(tmp_path / "cache" / "models")
    cold = recorded(folder, records)
    warm = load_clip(str(folder), records=records)
    assert warm.record and cold.record is None and warm.facts == cold.facts
    theirs = AutoTokenizer.from_pretrained(folder / cold.facts.subfolder, truncation_side="right")
    wanted = [theirs(title.encode("utf-8", "replace").decode(), truncation=True, max_length=77).input_ids
              for title in ODD_TITLES]
    assert tokenize(warm.tokenizer, ODD_TITLES, 77) == tokenize(cold.tokenizer, ODD_TITLES, 77) == wanted
    assert exported(warm, tmp_path / "warm") == exported(cold, tmp_path / "cold")
    assert not {"model", "vision_model", "text_model"} & warm.__dict__.keys()
    TextTower(warm)
    assert not warm.is_loaded and "vision_model" not in warm.__dict__  # a new title loads the text tower alone
    for ours, whole in zip(features(warm), features(cold), strict=True):
        assert torch.equal(ours, whole)
    assert not warm.is_loaded and warm.model.text_projection is warm.head.text_projection  # one head, however loaded


def overwrite(folder: Path) -> None:
    """Other weights of the same size in the same file, whose modification time is set back."""
    file = folder / "model.safetensors"
    before = file.stat()
    tensors = {name: value + 1 for name, value in load_file(file).items()}
    save_file(tensors, folder.parent / "other", {"format": "pt"})
    with file.open("r+b") as opened:
        opened.write((folder.parent / "other").read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def replace_by_copy(folder: Path) -> None:
    """Another file of the same size and modification time, moved there."""
    file = folder / "model.safetensors"
    before = file.stat()
    save_file({name: value + 1 for name, value in load_file(file).items()}, folder.parent / "other", {"format": "pt"})
    os.utime(folder.parent / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder.parent / "other").replace(file)


def restore_another(folder: Path) -> None:
    """A folder that is moved away, and a copy of it with other weights in its place."""
    folder.rename(folder.parent / "old")
    shutil.copytree(folder.parent / "old", folder)
    replace_by_copy(folder)


CHANGES: dict[str, Surgery] = {
    "overwritten in place": overwrite, "replaced": replace_by_copy, "folder replaced": restore_another}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_read_again(name: str, folder: Path, tmp_path: Path) -> None:
    records = ModelRecords(tmp_path / "cache" / "models")
    before = recorded(folder, records).head.logit_scale.clone()  # transformers maps the file into memory
    CHANGES[name](folder)
    after = recorded(folder, records)
    assert after.record is None
    torch.testing.assert_close(after.head.logit_scale, before + 1)
    warm = load_clip(str(folder), records=records)
    assert warm.record and torch.equal(warm.head.logit_scale, after.head.logit_scale)


def test_a_new_file_beside_the_weights_is_looked_at(folder: Path, tmp_path: Path) -> None:
    from data.batch import UserError

    records = ModelRecords(tmp_path / "models")
    recorded(folder, records)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="PEFT adapter"):
        load_clip(str(folder), records=records)


def test_weights_that_change_during_a_run_are_not_exported(folder: Path, tmp_path: Path) -> None:
    from data.batch import UserError

    records = ModelRecords(tmp_path / "models")
    recorded(folder, records)
    warm = load_clip(str(folder), records=records)
    overwrite(folder)
    with pytest.raises(UserError, match="have changed since this run began"):
        exported(warm, tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "one letter", "empty", "another version", "another library"])
def test_a_record_that_does_not_hold_counts_as_absent(damage: str, folder: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    records = ModelRecords(tmp_path / "models")
    cold = recorded(folder, records)
    (file,) = records.folder.iterdir()
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "one letter":  # another title is spelt by these ids then, in a record that is JSON all the same
        file.write_bytes(content.replace(b"<|endoftext|>", b"<|endoftexT|>", 1))
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "another version":
        monkeypatch.setattr(facts, "RECORD_VERSION", 0)
    else:
        monkeypatch.setattr(facts, "version", lambda package: "0.1")
    again = recorded(folder, records)
    assert again.record is None and again.facts == cold.facts
    assert load_clip(str(folder), records=records).record  # it has been written anew


def test_a_record_of_another_model_is_found_by_reading_all(folder: Path, tmp_path: Path) -> None:
    """`verify` does not trust a record, and says where one was wrong."""
    records = ModelRecords(tmp_path / "models")
    cold = recorded(folder, records)
    record = records.find(str(folder))
    assert record
    records.write(str(folder), record._replace(facts=replace(cold.facts, pad_id=7)))
    said: list[str] = []
    write_record(load_clip(str(folder)), records, said.append)
    assert len(said) == 1 and "recorded anew" in said[0]
    again = records.find(str(folder))
    assert again and again.facts == cold.facts
    assert records.prune(str(folder)) == 0 and records.prune("") > 0 and records.find(str(folder)) is None


def test_one_rank_writes_and_a_model_is_found_by_any_path(folder: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(folder, ModelRecords(tmp_path / "models", writes=False))
    assert not (tmp_path / "models").exists()
    recorded(folder, ModelRecords(tmp_path / "models"))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for name in ("model", "link", f"{folder}/"):
        assert load_clip(name, records=ModelRecords(tmp_path / "models", writes=False)).record


def test_a_snapshot_of_the_hub_is_known_by_its_blobs(tiny_st_model: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a hub's cache may be copied to another disk, with other inodes, and are the same model.

    What was written through a link, as `save_pretrained` into a snapshot does, is another.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot_of(tiny_st_model, tmp_path / "hub" / "models--o--clip", "a" * 40)
    records = ModelRecords(tmp_path / "models")
    folder = facts.find_folder("o/clip")
    assert folder and folder.name == "a" * 40
    stamps = facts.stamp_files(folder)
    shutil.copytree(tmp_path / "hub", tmp_path / "copy", symlinks=True)
    shutil.rmtree(tmp_path / "hub")
    (tmp_path / "copy").rename(tmp_path / "hub")
    assert facts.stamp_files(folder) == stamps and {stamp[0] for stamp in stamps} >= {"modules.json"}
    clip = load_clip("o/clip", records=records)
    write_record(clip, records, pytest.fail)
    warm = load_clip("o/clip", records=records)
    assert warm.record and warm.commit == clip.commit == "a" * 40
    weights = folder / "0_CLIPModel" / "model.safetensors"
    assert weights.is_symlink()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # of a tower: the head is compared anyway
    weights.write_bytes(content)
    assert load_clip("o/clip", records=records).record is None
    snapshot_of(tiny_st_model, tmp_path / "hub" / "models--o--clip", "b" * 40)  # `hf download` has fetched a newer one
    assert load_clip("o/clip", records=records).record is None


def snapshot_of(model: Path, repository: Path, commit: str) -> None:
    """A model in the hub's cache, in huggingface_hub's layout."""
    for path in (path for path in model.rglob("*") if path.is_file()):
        name = path.relative_to(model)
        blob = repository / "blobs" / str(name).replace("/", "-")
        link = repository / "snapshots" / commit / name
        for parent in (blob.parent, link.parent, repository / "refs"):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs" / "main").write_text(commit)


WARM = """
import sys
from run import main
for arguments in {commands!r}:
    assert main(arguments) == 0, arguments
    assert "transformers" not in sys.modules, arguments
"""


def test_a_warm_run_imports_no_transformers_and_exports_the_same_bytes(tiny_st_model: Path, pairs: Path,
                                                                       tmp_path: Path) -> None:
    """Seconds of every run, and the memory of both towers, for what the store holds already."""
    model = ["--model", str(tiny_st_model), "--cache-dir", str(tmp_path / "cache"), "--precision", "fp32"]
    assert call(*model, "--dataset", pairs, "--out", tmp_path / "cold") == 0
    title = next(csv.DictReader((pairs / "train.csv").open(encoding="utf-8")))["title"]
    (tmp_path / "warm.py").write_text(WARM.format(commands=[
        [*model, "--dataset", str(pairs), "--out", str(tmp_path / "warm")],
        ["eval", *model, "--dataset", str(pairs), "--split", "test"],
        ["search", *model, "--dataset", str(pairs), title],
        ["export", "--run", str(tmp_path / "warm"), "--to", str(tmp_path / "out"), *model[2:4]]]))
    process = start([], program=tmp_path / "warm.py", env={"PYTHONPATH": str(ROOT)})
    error = process.communicate(timeout=HANGS_S)[1]
    assert process.returncode == 0, error
    written = [path for path in (tmp_path / "cold" / "model").iterdir() if path.name != ".thumbtune"]
    assert any(path.name == "model.safetensors" for path in written)
    for path in written:
        assert (tmp_path / "warm" / "model" / path.name).read_bytes() == path.read_bytes(), path.name
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_disk_that_is_full_while_the_tokenizer_is_written_is_one_sentence(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizers package raises a plain Exception, which would end the run with a traceback."""
    whole = load_whole(str(folder))
    monkeypatch.setattr(whole.processor.tokenizer, "save_pretrained", lambda folder, **_: whole.processor.tokenizer
                        .backend_tokenizer.save("/dev/full"))
    with pytest.raises(UserError, match="No space left on device; free space there or set TMPDIR"):
        facts.saved_files(whole)
