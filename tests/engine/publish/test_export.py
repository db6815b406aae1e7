"""Handing a model on: the same embeddings in other libraries, back from projections alone, the card, the hub."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import call, run, tiny_clip
from hub import Hub
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.batch import UserError
from engine.publish.card import HERE, write_card
from engine.publish.export import PROJECTIONS_FILE, Origin, read_tuned

TITLES = ["3 red circles", "a title that is longer than the other", "NA", "café 🎬 مرحبا", "many words " * 200]


@pytest.fixture(scope="module")
def tuned(pairs: Path, tiny_st_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint at each of its three steps."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert call("--model", tiny_st_model, "--dataset", pairs, "--out", out, "--cache-dir", out.parent / "cache",
                "--precision", "fp32", "--lr", "1e-2", "--epochs", "1", "--save-every", "1") == 0
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_other_libraries_give_the_same_embeddings(tuned: Path, pairs: Path) -> None:
    from PIL import Image
    from sentence_transformers import SentenceTransformer
    from transformers import CLIPModel, CLIPProcessor

    from data.images.decode import collate_tokens, decode_image, tokenize
    from engine.clip.loading import load_clip
    from engine.clip.model import Head
    from engine.clip.towers import Towers

    folder, pictures = tuned / "model", sorted((pairs / "images").iterdir())[:8]
    clip = load_clip(str(folder))
    towers, head, spec = Towers(clip).eval(), Head(clip, 20.0), clip.spec
    pixels = torch.stack([torch.from_numpy(decode_image(path.read_bytes(), spec)) for path in pictures])
    tokens = collate_tokens(tokenize(clip.tokenizer, TITLES, clip.max_tokens), clip.tokenizer.pad_token_id)
    images = [Image.open(path) for path in pictures]
    with torch.no_grad():
        ours = torch.cat([head.image(towers.image(pixels)), head.text(towers.text(tokens))])
        model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
        out = model(**processor(text=TITLES, images=images, return_tensors="pt", padding=True, truncation=True,
                                max_length=77))
    theirs = torch.cat([out.image_embeds, out.text_embeds])
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)  # pixels may differ by 2/255
    torch.testing.assert_close(ours[len(pictures):], out.text_embeds, atol=1e-5, rtol=0)
    peer = SentenceTransformer(str(folder), device="cpu")
    embedded = [torch.from_numpy(peer.encode(inputs, normalize_embeddings=True)) for inputs in (images, TITLES)]
    torch.testing.assert_close(torch.cat(embedded), theirs, atol=1e-5, rtol=0)
    card = (folder / "README.md").read_text(encoding="utf-8").replace(HERE, str(folder))
    told: dict[str, Any] = {"image": images[0]}
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):  # what the card tells people to type
        exec(code, told)
    torch.testing.assert_close(told["outputs"].image_embeds, theirs[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(told["image_and_title"][0]), theirs[:1], atol=1e-5, rtol=0)
    assert told["image_and_title"][1].shape == (1, 16)


def test_projections_alone_go_back_on_their_base(tuned: Path, tiny_st_model: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    alone = load_file(tuned / "model" / PROJECTIONS_FILE)
    assert set(alone) == {"visual_projection.weight", "text_projection.weight"}
    assert all(torch.equal(weights(tuned / "model")[name], value) for name, value in alone.items())
    (tmp_path / "mail").mkdir()
    shutil.copy(tuned / "model" / PROJECTIONS_FILE, tmp_path / "mail")
    moved = shutil.copytree(tiny_st_model, tmp_path / "base")
    for number, flags in enumerate((["--run", tmp_path / "mail"], ["--run", tmp_path / "mail" / PROJECTIONS_FILE],
                                    ["--run", tmp_path / "mail", "--model", moved], ["--run", tuned])):
        assert call("export", *flags, "--to", tmp_path / str(number)) == 0
        assert same(tmp_path / str(number), tuned / "model")
        names = sorted(path.name for path in (tuned / "model").iterdir())
        assert sorted(path.name for path in (tmp_path / str(number)).iterdir()) == names
        assert (tmp_path / str(number) / "README.md").read_bytes() == (tuned / "model" / "README.md").read_bytes()
    other = tiny_clip(tmp_path / "other", seed=1)
    capsys.readouterr()
    assert call("export", "--run", tmp_path / "mail", "--model", other, "--to", tmp_path / "x") == 2
    said = capsys.readouterr().err
    assert "its frozen weights differ" in said and str(tiny_st_model) in said and not (tmp_path / "x").exists()


def test_any_checkpoint_and_an_unfinished_run(tuned: Path, tmp_path: Path) -> None:
    steps = sorted(path.name for path in (tuned / "checkpoints").glob("step-*"))
    assert [int(step[5:]) for step in steps] == [1, 2, 3]
    for which, step in (("last", steps[-1]), ("step-2", steps[1]), (steps[0], steps[0])):
        to = tmp_path / f"of-{which}"
        assert call("export", "--run", tuned, "--checkpoint", which, "--to", to) == 0
        held, got = load_file(tuned / "checkpoints" / step / "trainable.safetensors"), weights(to)
        assert all(torch.equal(got[name], value) for name, value in held.items())
    assert same(tmp_path / "of-last", tuned / "model") and not same(tmp_path / "of-step-2", tuned / "model")
    assert "tuned" not in json.loads(metadata(tmp_path / "of-step-2" / PROJECTIONS_FILE))["metrics"]  # not measured
    cut = shutil.copytree(tuned, tmp_path / "cut", symlinks=True)
    shutil.rmtree(cut / "model")
    damaged = cut / "checkpoints" / steps[-1] / "trainable.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    assert call("export", "--run", cut, "--to", tmp_path / "cut-out") == 0  # the newest that is whole
    assert same(tmp_path / "cut-out", tmp_path / "of-step-2")


def metadata(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return file.metadata()["thumbtune"]


def test_half_precision_is_half_the_size_and_nearly_the_same(tuned: Path, tmp_path: Path) -> None:
    assert call("export", "--run", tuned, "--to", tmp_path / "half", "--dtype", "fp16") == 0
    half, full = weights(tmp_path / "half"), weights(tuned / "model")
    assert {value.dtype for name, value in half.items() if "position_ids" not in name} == {torch.float16}
    for name, value in half.items():
        torch.testing.assert_close(value.float(), full[name].float(), atol=1e-3, rtol=1e-3)
    assert all(torch.equal(value, load_file(tuned / "model" / PROJECTIONS_FILE)[name])
               for name, value in load_file(tmp_path / "half" / PROJECTIONS_FILE).items())


def test_weights_that_overflow_fp16_are_not_exported_as_fp16(tiny_model: Path, tmp_path: Path) -> None:
    from engine.clip.loading import load_clip
    from engine.publish.export import Tuned, export

    clip = load_clip(str(tiny_model))
    clip.model.text_projection.weight.data[0, 0] = 1e5
    tuned = Tuned({"text_projection.weight": clip.model.text_projection.weight}, Origin("base", "", "", "pairs"))
    with pytest.raises(UserError, match="--dtype fp16 cannot hold text_projection.weight; use --dtype bf16"):
        export(clip, tmp_path / "out", tuned, "", dtype="fp16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["o'brien: \"x\" #1\n---\n", "../a/--- b", "owner/name", "日本 \x07🎬", "`rm`",
                                  "- x: [", "\ud800"])
def test_the_hub_accepts_the_card_whatever_things_are_called(name: str, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    scores = {"image_to_text_R@1": 0.25, "image_to_text_R@1_ci95": [0.1, 0.4], "triplet_accuracy": 1.0}
    origin = Origin(f"/home/me/{name}", "", "", name, {"trainable": [name], "lr": 1e-05, "mode": "auto"},
                    {"base": {"test": scores}, "tuned": {"train": scores, "test": scores}})
    write_card(tmp_path / "README.md", origin, "| table |", "mit")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    assert card.data.get("datasets") == ([name] if name == "owner/name" else None) and not card.data.get("base_model")
    assert {(one.metric_type, one.metric_value, one.dataset_split) for one in card.data.eval_results} == {
        ("image_to_text_R@1", 0.25, "test"), ("triplet_accuracy", 1.0, "test")}
    assert "| table |" in card.text and "/home/me" not in card.content and "lr = 1e-05" in card.text
    write_card(tmp_path / "README.md", replace(origin, base="o/clip", commit="a" * 40), "", "other")
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "o/clip"


@pytest.mark.parametrize("change", [
    {"metrics": {"tuned": {"</td><script>alert(1)</script>\n\x9b2J\u202e": {"image_to_text_R@1": 0.5}}}},
    {"recipe": {"lr": 1e-05, "schedule": "`x`\n# [a](http://evil)", "loss": "\u202e\x9b"}},
    {"base": "x](http://evil)", "commit": "a" * 40},
    {"metrics": {"tuned": [1]}}, {"metrics": {"tuned": {"test": {"image_to_text_R@1": "<b>"}}}}, {"metrics": 3},
    {"recipe": [1]}, {"recipe": {"a\nb": 1}}, {"recipe": {"lr": {}}}, {"recipe": {"trainable": 3}}, {"base": 3}])
def test_a_foreign_header_puts_nothing_but_text_into_the_card(change: dict[str, Any], tuned: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Names in a file from elsewhere would be markup on a page, or a traceback."""
    ours = read_tuned(str(tuned / "model" / PROJECTIONS_FILE))
    header = {"thumbtune": json.dumps({**asdict(ours.origin), **change})}
    save_file({name: value.contiguous() for name, value in ours.tensors.items()}, tmp_path / PROJECTIONS_FILE, header)
    base = Path(ours.origin.base)
    code = call("export", "--run", tmp_path / PROJECTIONS_FILE, "--model", base, "--to", tmp_path / "to")
    said = capsys.readouterr().err
    if code:
        assert code == 2 and "Traceback" not in said and said.count("run.py export: --run") == 1, said
        return
    card = (tmp_path / "to" / "README.md").read_text("utf-8")
    text = card.partition("\n---\n")[2]
    assert not any(part in text for part in ("<script", "x](http://evil", "\x9b", "\u202e", "\n# [a]", "<b>"))


def test_a_push_arrives_and_the_card_says_from_where_to_load(tuned: Path, hub: Hub, tmp_path: Path) -> None:
    """A process of its own: huggingface_hub reads its address once, and here it is offline."""
    copy = shutil.copytree(tuned, tmp_path / "run", symlinks=True)
    done = run(["export", "--run", copy, "--push-to-hub", "me/clip", "--private", "--license", "cc-by-4.0"],
               env={**hub.env, "HF_TOKEN": hub.token})
    assert done.returncode == 0 and f"pushed to {hub.url}/me/clip" in done.stderr, done.stderr
    files = hub.repos["models", "me/clip"].files
    written = {path.name: path.read_bytes() for path in (tuned / "model").iterdir()}
    del written[".thumbtune"]  # the mark of a folder on this machine
    assert files == written | {name: files[name] for name in ("README.md", PROJECTIONS_FILE)}
    assert not any(str(tuned.parent).encode() in content for content in files.values())  # nobody's business
    (tmp_path / PROJECTIONS_FILE).write_bytes(files[PROJECTIONS_FILE])
    theirs, ours = read_tuned(str(tmp_path / PROJECTIONS_FILE)), read_tuned(str(tuned))
    assert theirs.origin == replace(ours.origin, base=Path(ours.origin.base).name)
    assert all(tensor.equal(ours.tensors[name]) for name, tensor in theirs.tensors.items())
    card, local = files["README.md"].decode(), (copy / "model" / "README.md").read_bytes()
    assert local == (tuned / "model" / "README.md").read_bytes()  # what `verify` knows stays as it is
    assert 'from_pretrained("me/clip")' in card and HERE not in card and "license: cc-by-4.0" in card


class Broken:
    """A hub that admits everybody and then goes away."""

    def whoami(self) -> None:
        pass

    def create_repo(self, name: str, **_: Any) -> None:
        raise ConnectionError(f"{name} is not\nto be reached")


def test_a_failed_push_keeps_the_run_and_says_how_to_push_later(pairs: Path, tiny_model: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub

    out = tmp_path / "my run"
    flags = ["--model", tiny_model, "--dataset", pairs, "--cache-dir", tmp_path / "cache", "--out", out]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert call(*flags, "--push-to-hub", "me/clip") == 2 and not out.exists()  # before any work
    assert "hf auth login" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub, "HfApi", Broken)
    assert call(*flags, "--push-to-hub", "me/clip", "--private") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"python run.py export --run '{out}' --push-to-hub me/clip --private"
    assert "me/clip is not to be reached" in said[-2] and weights(out / "model")
    assert call("export", "--run", out, "--checkpoint", "last", "--push-to-hub", "clip") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"python run.py export --run '{out}' --push-to-hub clip --checkpoint last")


def test_an_export_never_replaces_what_is_there(tuned: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert call("export", "--run", tuned, "--to", tmp_path / "mine") == 2
    assert "choose a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
