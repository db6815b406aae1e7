"""Each family of dual encoders against transformers: features, embeddings, training, export, search.

When one of these fails, a model of that family is trained on other embeddings than transformers computes of it, or the
exported folder is not the model that was measured.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SIDE, TINY, bert_tokenizer, siglip_2_tokenizer, tiny_family, xlm_tokenizer
from helpers import inside
from PIL import Image
from test_loading import Surgery, both, edit
from torch import Tensor

from data.batch import UserError
from data.images.decode import collate_tokens, decode_image, tokenize
from engine.clip.facts import ModelRecords
from engine.clip.loading import Clip, load_clip, write_record
from engine.clip.model import Head, ModelOptions, open_model
from engine.clip.towers import Towers, freeze

TITLES = ["red", "a red bicycle in the rain", "How to bake BREAD: 24 ways!", "", "many words " * 20, "10/10"]
CPU = torch.device("cpu")
# Unit vectors, two ways of the same fp32 products: a few dozen roundings of values below 1.
ROUNDING = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", params=TINY)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_family(request.param, tmp_path_factory.mktemp("family") / "model")


def pictures() -> list[Image.Image]:
    """Of the side that the towers see: no library's resizing comes in between."""
    noise = torch.randint(256, (3, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(1)).byte()
    return [Image.fromarray(pixels.numpy()) for pixels in noise]


def decoded(clip: Clip, images: list[Image.Image]) -> Tensor:
    pixels = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        pixels.append(torch.from_numpy(decode_image(file.getvalue(), clip.spec)))
    return torch.stack(pixels)


@torch.no_grad()
def ours(clip: Clip, titles: list[str] = TITLES) -> tuple[Tensor, Tensor]:
    """Our unit embeddings of the pictures and of titles."""
    towers, head = Towers(clip), Head(clip, 1.0)
    tokens = collate_tokens(tokenize(clip.tokenizer, titles, clip.max_tokens), clip.tokenizer.pad_token_id)
    return head.image(towers.image(decoded(clip, pictures()))), head.text(towers.text(tokens))


def code_of_card(folder: Path) -> str:
    """The first block of Python in the model card, which is transformers' without its last line."""
    return (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


@torch.no_grad()
def theirs(folder: Path) -> tuple[Tensor, Tensor]:
    """transformers' normalised features by AutoModel and AutoProcessor, titles padded as the model's page says."""
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    padding = "max_length" if model.config.model_type == "siglip" else True
    longest = load_clip(str(folder)).max_tokens
    inputs = processor(text=TITLES, images=pictures(), return_tensors="pt", padding=padding, truncation=True,
                       max_length=longest)
    image_BE = model.get_image_features(pixel_values=inputs.pop("pixel_values")).pooler_output
    title_BE = model.get_text_features(**inputs).pooler_output
    return torch.nn.functional.normalize(image_BE, dim=-1), torch.nn.functional.normalize(title_BE, dim=-1)


def test_embeddings_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    """Loaded whole, and again by the record; alone and beside longer titles."""
    records = ModelRecords(tmp_path)
    wanted = theirs(folder)
    clip = load_clip(str(folder), records=records)
    for part, expected in zip(ours(clip), wanted, strict=True):
        torch.testing.assert_close(part, expected, atol=ROUNDING, rtol=0)
        assert (part[0] - part[1]).abs().max() > 1e-3  # else this test would pass whatever is pooled
    torch.testing.assert_close(ours(clip, TITLES[:1])[1], wanted[1][:1], atol=ROUNDING, rtol=0)

    write_record(clip, records, pytest.fail)
    warm = load_clip(str(folder), records=records)
    assert warm.record is not None and warm.facts == clip.facts and warm.family == clip.family
    for cold_part, warm_part in zip(ours(clip), ours(warm), strict=True):
        assert cold_part.equal(warm_part)


def test_pixels_are_those_of_the_processor(folder: Path) -> None:
    """A photo that is neither square nor of the towers' size: whole and squashed, or its middle."""
    from transformers import AutoProcessor

    noise = torch.randint(256, (40, 70, 3), generator=torch.Generator().manual_seed(2)).byte()
    photo = Image.fromarray(noise.numpy()).resize((210, 120))
    clip = load_clip(str(folder))
    theirs = AutoProcessor.from_pretrained(folder).image_processor(photo, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (clip.spec.mean, clip.spec.std))
    apart = (theirs * std + mean) / clip.spec.rescale - decoded(clip, [photo])
    assert apart.abs().max() < 2.01


def test_gradients_reach_the_head_through_streaming(folder: Path) -> None:
    """Streaming computes the same features with a graph, and gives every trainable parameter a gradient."""
    cached = ours(load_clip(str(folder)))
    model = open_model(str(folder), ModelOptions(("projection",), "streaming", precision="fp32", recompute=True), CPU)
    clip = model.clip
    tokens = collate_tokens(tokenize(clip.tokenizer, TITLES, clip.max_tokens), clip.tokenizer.pad_token_id)
    image_BE = model.head.image(model.towers.image(decoded(clip, pictures())))
    title_BE = model.head.text(model.towers.text(tokens))
    for part, expected in zip((image_BE, title_BE), cached, strict=True):
        torch.testing.assert_close(part, expected, atol=ROUNDING, rtol=0)
    (image_BE[:, 0].sum() + title_BE[:, 0].sum()).backward()
    assert {*model.trainable} == {*clip.family.projections}
    for name, parameter in model.trainable.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_autocast_runs_every_tower(folder: Path) -> None:
    """Towers that hold their weights in bf16 give the same features up to bf16's rounding."""
    clip = load_clip(str(folder))
    tokens = collate_tokens(tokenize(clip.tokenizer, TITLES, clip.max_tokens), clip.tokenizer.pad_token_id)
    freeze(clip, ["projection"])
    towers, head = Towers(clip), Head(clip, 1.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        image_BV, title_BT = towers.image(decoded(clip, pictures())), towers.text(tokens)
    assert towers.image._cast_copy and towers.text._cast_copy and image_BV.dtype == title_BT.dtype == torch.float32
    with torch.no_grad():
        for part, expected in zip((head.image(image_BV), head.text(title_BT)), ours(clip), strict=True):
            assert (part * expected).sum(-1).min() > 0.99


def test_a_run_exports_what_it_measured(folder: Path, pairs: Path, tmp_path: Path) -> None:
    """Train from stored features; the code of the model card loads the export with the tuned embeddings; search, eval.
    """
    flags = ["--cache-dir", tmp_path / "cache", "--precision", "fp32", "--device", "cpu"]
    for out in ("cold", "warm"):
        done = inside(["--model", folder, "--dataset", pairs, "--epochs", 1, "--out", tmp_path / out, "--lr", "1e-2",
                       *flags])
        assert done.returncode == 0, done.stderr
    model = tmp_path / "cold" / "model"
    for path in sorted(model.iterdir()):  # opened by the record of the first run, the second writes the same bytes
        if path.name != "README.md":
            assert path.read_bytes() == (tmp_path / "warm" / "model" / path.name).read_bytes(), path.name

    tuned, base = load_clip(str(model)), load_clip(str(folder))
    trained = {name for name, digest in tuned.facts.digests.items() if digest != base.facts.digests[name]}
    assert trained == {*base.family.projections}
    wanted = ours(tuned)
    assert all((after - before).abs().max() > 1e-3 for after, before in zip(wanted, ours(base), strict=True))
    scope: dict[str, Any] = {"image": pictures()[0]}
    code = code_of_card(model).replace("path/to/this/folder", str(model)).replace('"a title"', repr(TITLES[1]))
    with torch.no_grad():
        exec(code, scope)
    for part, expected in ((scope["outputs"].image_embeds, wanted[0][:1]), (scope["outputs"].text_embeds,
                                                                           wanted[1][1:2])):
        torch.testing.assert_close(part, expected, atol=ROUNDING, rtol=0)

    found = inside(["search", "red", "--model", model, "--dataset", pairs, "--json", "--top", "3", *flags])
    assert found.returncode == 0 and json.loads(found.stdout), found.stderr
    measured = inside(["eval", "--model", model, "--dataset", pairs, "--split", "test", *flags])
    assert measured.returncode == 0, measured.stderr
    recorded = json.loads((tmp_path / "cold" / "metrics.json").read_text(encoding="utf-8"))["tuned"]["test"]
    again = json.loads(measured.stdout)["test"]
    assert again["image_to_text_mrr"] == pytest.approx(recorded["image_to_text_mrr"])


def retokenized(tokenizer: Callable[..., Any], **settings: Any) -> Surgery:
    return lambda folder: tokenizer(**settings).save_pretrained(folder)


def open_clip_alone(folder: Path) -> None:
    (folder / "config.json").rename(folder / "open_clip_config.json")


JINA = both(edit("config.json", model_type="jina_clip"),
            edit("config.json", auto_map={"AutoModel": "jinaai/jina-clip-implementation--modeling_clip.JinaCLIPModel"}))
PAIR = "vision-text-dual-encoder: ViT, BERT"
# What is done to a family's folder, and the words of the refusal: what is wrong, and the fix or the nearest model.
REFUSALS: dict[str, tuple[str, Surgery, tuple[str, ...]]] = {
    "jina": ("clip", JINA, ("'jina_clip' model", "never run", "google/siglip2-base-patch16-224")),
    "open_clip alone": ("clip", open_clip_alone, ("open_clip", "laion/", "convert_clip_original_pytorch_to_hf.py")),
    "NaFlex": ("siglip", edit("config.json", model_type="siglip2"), ("NaFlex", "google/siglip2-base-patch16-224")),
    "text tower without a pooler": (PAIR, edit("config.json", text_config={"model_type": "electra"}),
                                    ("'electra'", "text_config", "xlm-roberta")),
    "vision tower without a pooler": (PAIR, edit("config.json", vision_config={"model_type": "convnext"}),
                                      ("'convnext'", "vision_config", "dinov2")),
    "mask": ("siglip", retokenized(siglip_2_tokenizer, model_input_names=["input_ids", "attention_mask"]),
             ("without a mask", "model_input_names")),
    "slow tokenizer": ("siglip", edit("tokenizer_config.json", tokenizer_class="SiglipTokenizer"),
                       ("SiglipTokenizer", "google/siglip2-base-patch16-224")),
    "padding on the left": ("siglip", retokenized(siglip_2_tokenizer, padding_side="left"), ("padding_side",)),
    "another family's tokenizer": ("altclip", retokenized(bert_tokenizer), ("vocab_size", "tokenizer")),
    "positions from another padding": ("altclip", retokenized(xlm_tokenizer, pad_token="<s>"),
                                       ("pads with the id 0", "pad_token_id")),
    "another end of title": ("metaclip_2", edit("config.json", text_config__eos_token_id=7), ("eos_token_id", "7")),
    "no tokenizer": ("chinese_clip", lambda folder: (folder / "tokenizer.json").unlink(), ("tokenizer is missing",)),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_tuned_is_refused_with_the_nearest_that_can(name: str, tmp_path: Path) -> None:
    family, change, words = REFUSALS[name]
    folder = tiny_family(family, tmp_path / "model")
    change(folder)
    with pytest.raises(UserError) as refusal:
        load_clip(str(folder))
    said = str(refusal.value)
    assert all(word in said for word in words) and "\n" not in said, said


def test_what_only_clip_can_is_refused_for_others(pairs: Path, tmp_path: Path) -> None:
    """open_clip's layout, and --recipe auto of layers with a bias; SigLIP's logit_bias has no loss here."""
    folder = tiny_family("siglip", tmp_path / "model")
    flags = ["--cache-dir", tmp_path / "cache", "--precision", "fp32", "--device", "cpu"]
    train = ["--model", folder, "--dataset", pairs, "--out", tmp_path / "out", *flags]
    assert "--recipe auto" in inside([*train, "--recipe", "auto"]).stderr
    assert "logit_bias matches no parameter" in inside([*train, "--trainable", "logit_bias"]).stderr
    refused = inside([*train, "--lr-tower", "1e-5"])  # the head lies inside SigLIP's towers, but is not one of theirs
    assert refused.returncode == 2 and "--lr-tower" in refused.stderr
    assert inside([*train, "--epochs", "1", "--trainable", "projection,logit_scale"]).returncode == 0
    converted = inside(["export", "--run", tmp_path / "out", "--to", tmp_path / "open", "--format", "open_clip",
                        "--cache-dir", tmp_path / "cache"])
    assert converted.returncode == 2 and "SiglipModel" in converted.stderr and not (tmp_path / "open").exists()
    assert inside(["export", "--run", tmp_path / "out", "--to", tmp_path / "again",
                   "--cache-dir", tmp_path / "cache"]).returncode == 0
    again, first = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "again",
                                                                               tmp_path / "out" / "model"))
    assert again == first
