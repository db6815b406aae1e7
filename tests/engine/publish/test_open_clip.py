"""`export --format open_clip`: the same embeddings by open_clip's architecture, and by open_clip itself where it is."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import inside, make_pairs, tiny_clip
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from data.batch import UserError
from data.images.decode import collate_tokens, decode_image, tokenize
from engine.clip.loading import load_clip
from engine.clip.model import Head
from engine.clip.towers import Towers
from engine.publish import open_clip as publish
from engine.publish.card import HERE

TITLES = ["3 red circles", "A title that is LONGER than the other", "NA", "many words " * 200]


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A residual block with the parameter names of open_clip's."""

    def __init__(self, width: int, heads: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, inner))
        self.mlp.add_module("gelu", activation)
        self.mlp.add_module("c_proj", nn.Linear(inner, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


def blocks(cfg: dict[str, Any], heads: int, activation: nn.Module) -> nn.Module:
    inner = int(cfg["width"] * cfg["mlp_ratio"])
    stack = nn.Module()
    stack.resblocks = nn.ModuleList(Block(cfg["width"], heads, inner, activation) for _ in range(cfg["layers"]))
    return stack


class Naive(nn.Module):
    """CLIP as open_clip's config and parameter names describe it, written down without open_clip."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        vision, text, width = cfg["vision_cfg"], cfg["text_cfg"], cfg["embed_dim"]
        activation = QuickGelu() if cfg["quick_gelu"] else nn.GELU()
        self.pool = text.get("eos_id")
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        self.visual = visual = nn.Module()
        visual.conv1 = nn.Conv2d(3, vision["width"], vision["patch_size"], vision["patch_size"], bias=False)
        visual.class_embedding = nn.Parameter(torch.empty(vision["width"]))
        visual.positional_embedding = nn.Parameter(torch.empty(patches + 1, vision["width"]))
        visual.ln_pre, visual.ln_post = nn.LayerNorm(vision["width"]), nn.LayerNorm(vision["width"])
        visual.transformer = blocks(vision, vision["width"] // vision["head_width"], activation)
        visual.proj = nn.Parameter(torch.empty(vision["width"], width))
        self.token_embedding = nn.Embedding(text["vocab_size"], text["width"])
        self.positional_embedding = nn.Parameter(torch.empty(text["context_length"], text["width"]))
        self.transformer = blocks(text, text["heads"], activation)
        self.ln_final = nn.LayerNorm(text["width"])
        self.text_projection = nn.Parameter(torch.empty(text["width"], width))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def images(self, pixels: Tensor) -> Tensor:
        visual: Any = self.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        first = visual.class_embedding.expand(len(x), 1, -1)
        x = visual.ln_pre(torch.cat([first, x], 1) + visual.positional_embedding)
        for block in visual.transformer.resblocks:
            x = block(x, None)
        return nn.functional.normalize(visual.ln_post(x)[:, 0] @ visual.proj, dim=-1)

    def titles(self, ids: Tensor) -> Tensor:
        transformer: Any = self.transformer
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        for block in transformer.resblocks:
            x = block(x, mask)
        end = ids.argmax(-1) if self.pool is None else ids.eq(self.pool).int().argmax(-1)
        return nn.functional.normalize(self.ln_final(x)[torch.arange(len(ids)), end] @ self.text_projection, dim=-1)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_st_model: Path) -> Path:
    """A finished run on the historic config, whose end token 2 means: pool at the highest id."""
    home = tmp_path_factory.mktemp("tuned")
    pairs = make_pairs(home / "pairs", 12, 4, 4)
    done = inside(["--model", tiny_st_model, "--dataset", pairs, "--out", home / "run", "--cache-dir", home / "cache",
                   "--precision", "fp32", "--lr", "1e-2", "--epochs", "1", "--batch-size", "4"])
    assert done.returncode == 0, done.stderr
    return home / "run"


@pytest.fixture(scope="module")
def peer() -> Any:
    """The module open_clip; the test is skipped where it is not installed, or its torchvision is of another torch."""
    try:
        import open_clip
    except Exception as error:
        pytest.skip(f"open_clip cannot be imported here: {error}")
    return open_clip


def ours(folder: Path, pictures: list[Image.Image]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised pixels, token ids, and our unit embeddings of both, of a transformers folder."""
    clip = load_clip(str(folder))
    spec, towers, head = clip.spec, Towers(clip).eval(), Head(clip, 20.0)
    encoded = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        encoded.append(torch.from_numpy(decode_image(file.getvalue(), spec)))
    pixels = torch.stack(encoded)
    tokens = collate_tokens(tokenize(clip.tokenizer, TITLES, clip.max_tokens), clip.tokenizer.pad_token_id)
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    with torch.no_grad():
        return ((pixels * spec.rescale - mean) / std, tokens.ids_BL, head.image(towers.image(pixels)),
                head.text(towers.text(tokens)))


def pictures(count: int, size: tuple[int, int]) -> list[Image.Image]:
    noise = torch.randint(256, (count, size[1], size[0], 3), generator=torch.Generator().manual_seed(1)).byte()
    return [Image.fromarray(each.numpy()) for each in noise]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / publish.CONFIG).read_text(encoding="utf-8"))


def test_the_files_give_our_embeddings_in_the_architecture_that_open_clip_names(tuned: Path, tmp_path: Path) -> None:
    done = inside(["export", "--run", tuned, "--format", "open_clip", "--to", tmp_path / "out"])
    assert done.returncode == 0 and "open_clip" in done.stdout + done.stderr, done.stderr
    config = config_of(tmp_path / "out")
    model = Naive(config["model_cfg"]).eval()
    model.load_state_dict(load_file(tmp_path / "out" / publish.WEIGHTS))  # strict: no name too many or too few
    pixels, ids, image, title = ours(tuned / "model", pictures(3, (32, 32)))
    with torch.no_grad():
        torch.testing.assert_close(model.images(pixels), image, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.titles(ids), title, atol=1e-5, rtol=0)
    assert config["preprocess_cfg"]["size"] == [32, 32] and config["preprocess_cfg"]["interpolation"] == "bicubic"
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]  # not CLIP's vocabulary: its tokenizer is beside it
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "library_name: open_clip" in card and "create_model_and_transforms" in card and "CLIPModel." not in card


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_compared_with_our_model_rounded_alike(dtype: str, tuned: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the rounding of the weights counts as an error of open_clip's wherever it is installed: an export refused.
    """
    def compare(clip: Any, folder: Path) -> str:
        model = Naive(config_of(folder)["model_cfg"]).eval()
        model.load_state_dict({name: value.float() for name, value in load_file(folder / publish.WEIGHTS).items()})
        shown = publish.draw_pictures(32, 32)
        ids = tokenize(clip.tokenizer, publish.TITLES, clip.max_tokens)
        tokens = collate_tokens(ids, clip.tokenizer.pad_token_id)
        with torch.no_grad():
            our_title_BE = publish.embed(clip, shown)[len(shown) :]
            torch.testing.assert_close(model.titles(tokens.ids_BL), our_title_BE, atol=1e-5, rtol=0)
        return "compared here"

    monkeypatch.setattr(publish, "compare", compare)
    done = inside(["export", "--run", tuned, "--format", "open_clip", "--to", tmp_path / "out", "--dtype", dtype])
    assert done.returncode == 0 and "compared here" in done.stderr, done.stderr


def test_an_end_of_text_that_is_not_the_highest_id_is_named(tiny_model: Path) -> None:
    """open_clip pools at the highest id by default: titles would be pooled at an added token instead."""
    clip = load_clip(str(tiny_model))
    assert "pool_type" not in publish.open_clip_config(clip)["model_cfg"]["text_cfg"]
    clip.tokenizer.backend_tokenizer.add_tokens(["<|extra|>"])
    text = publish.open_clip_config(clip)["model_cfg"]["text_cfg"]
    assert (text["pool_type"], text["eos_id"]) == ("eos", tokenize(clip.tokenizer, [""], clip.max_tokens)[0][-1])


@pytest.mark.parametrize("change", ["activation", "resize", "tensor"])
def test_what_open_clip_cannot_hold_is_refused(change: str, tiny_model: Path) -> None:
    """Else the folder would load and give other embeddings."""
    clip = load_clip(str(tiny_model))
    state = clip.model.state_dict()
    if change == "activation":
        clip.model.text_model.config.hidden_act = "gelu"
    elif change == "resize":
        clip.facts = replace(clip.facts, spec=replace(clip.spec, resize=36))
    else:
        state["visual_projection.bias"] = torch.zeros(16)
    with pytest.raises(UserError, match="--format open_clip"):
        publish.convert(state)
        publish.open_clip_config(clip)


def test_a_push_of_an_open_clip_folder_says_how_to(tuned: Path) -> None:
    done = inside(["export", "--run", tuned, "--format", "open_clip", "--push-to-hub", "o/n"])
    assert done.returncode == 2 and "hf upload" in done.stderr


def test_open_clip_itself_loads_the_folder_with_our_embeddings(tuned: Path, tmp_path: Path, peer: Any) -> None:
    """By `local-dir:`, and as a checkpoint file of a named model; the card's code runs."""
    folder = tmp_path / "out"
    done = inside(["export", "--run", tuned, "--format", "open_clip", "--to", folder])
    assert done.returncode == 0, done.stderr
    said = re.search(r"open_clip [\d.]+ computes the same .* largest difference (\S+)", done.stdout + done.stderr)
    assert said and float(said[1]) <= publish.MAX_DIFFERENCE
    shown = pictures(3, (32, 32))
    _, _, image, title = ours(tuned / "model", shown)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tuned.json").write_text(json.dumps(config_of(folder)["model_cfg"]), encoding="utf-8")
    peer.add_model_config(tmp_path / "configs")
    by_name = peer.create_model_and_transforms("tuned", pretrained=str(folder / publish.WEIGHTS))[0].eval()
    model, _, preprocess = peer.create_model_and_transforms(f"local-dir:{folder}")
    ids = peer.get_tokenizer(f"local-dir:{folder}")(TITLES)
    with torch.no_grad():
        pixels = torch.stack([preprocess(picture) for picture in shown])
        for each in (model.eval(), by_name):
            torch.testing.assert_close(each.encode_image(pixels, normalize=True), image, atol=1e-5, rtol=0)
            torch.testing.assert_close(each.encode_text(ids, normalize=True), title, atol=1e-5, rtol=0)
    card = (folder / "README.md").read_text(encoding="utf-8").replace(HERE, str(folder))
    told: dict[str, Any] = {"image": shown[0]}
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(code, told)
    torch.testing.assert_close(told["image_embeds"], image[:1], atol=1e-5, rtol=0)


def test_clips_own_vocabulary_is_known_by_its_digest(peer: Any) -> None:
    """Else open_clip would need transformers for every CLIP, and a checkpoint file alone would have no tokenizer."""
    tokens = [*peer.tokenizer.SimpleTokenizer().encoder]
    assert publish.vocabulary_digest(tokens) == publish.CLIP_VOCABULARY


def test_gelu_and_other_layer_norms_are_kept(tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "gelu")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in ("text_config", "vision_config"):
        config[part] |= {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    clip = load_clip(str(folder))
    cfg = publish.open_clip_config(clip)["model_cfg"]
    assert not cfg["quick_gelu"]
    assert cfg["text_cfg"]["norm_kwargs"] == cfg["vision_cfg"]["norm_kwargs"] == {"eps": 1e-6}
