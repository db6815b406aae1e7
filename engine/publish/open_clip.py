"""The tuned model as a folder that open_clip loads: `create_model_and_transforms("local-dir:FOLDER")`.

open_clip has the same two towers under other names, with query, key and value in one matrix and the projections
transposed. What it cannot express is refused; where it is installed, its embeddings are compared with ours.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from data.batch import UserError
from data.files import replaced_folder
from data.images.decode import ImageSpec, collate_tokens, decode_image, tokenize
from engine.clip.families import CLIP
from engine.clip.loading import Clip
from engine.clip.model import Head, draw_ramps
from engine.clip.tokenizer import HISTORIC_EOS
from engine.clip.towers import Towers
from engine.clip.weights import save_file
from engine.config.fields import Config
from engine.publish.card import HERE, write_card
from engine.publish.export import Tuned, weights_of
from engine.run_folder.folder import write_json

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
NO_TOKENIZER = {"config.json", "preprocessor_config.json", "processor_config.json"}
# SHA-256 of CLIP's tokens in the order of their ids, without the two of start and end, which open_clip names otherwise.
CLIP_VOCABULARY = "2aa62de6fbcee25ff9208d541af84acf036f885617f7384bb2a433bf4492e29e"
DEFAULT_EPS = 1e-5  # of open_clip's layer norms
MAX_DIFFERENCE = 1e-4  # of unit embeddings in fp32; rounding alone stays below a tenth of it
TITLES = ("a red bicycle in the rain", "How to bake BREAD at home", "24 cafés, one rating: 10/10!", "many words " * 200)
# transformers' names of parameters and modules -> open_clip's: outside the transformer blocks, and within one.
OUTSIDE_BLOCKS = {
    "logit_scale": "logit_scale",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # transformers' own spelling
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.final_layer_norm": "ln_final",
}
TOWERS = {"vision_model": "visual.transformer", "text_model": "transformer"}
INSIDE_BLOCKS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                 "self_attn.out_proj": "attn.out_proj"}
QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # one matrix in open_clip, in this order
LAYER = re.compile(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def export(clip: Clip, folder: Path, tuned: Tuned, table: str, cfg: Config, say: Callable[[str], None]) -> None:
    """Write weights, config, model card and, unless it is CLIP's own, the tokenizer, replacing the folder as a whole.

    Raises UserError for a model that open_clip cannot hold or of which it computes other embeddings.
    """
    config = open_clip_config(clip)
    with replaced_folder(folder, "model") as new:
        weights = weights_of(clip, tuned.tensors, cfg.dtype)
        save_file(convert(weights), new / WEIGHTS, {"format": "pt"})
        write_json(new / CONFIG, config)
        if "hf_tokenizer_name" in config["model_cfg"]["text_cfg"]:
            for name in clip.facts.files.keys() - NO_TOKENIZER:
                (new / name).write_text(clip.facts.files[name], encoding="utf-8")
        write_card(new / "README.md", tuned.origin, table, cfg.license, "open_clip")
        with torch.no_grad():  # compared are the weights as stored, with the rounding of --dtype
            for name, parameter in clip.named_parameters(weights).items():
                parameter.copy_(weights[name])
        say(compare(clip, new))


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a CLIPModel under open_clip's names. Raises UserError for one that it has no place for."""
    renamed: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}  # open_clip's name -> query, key and value by their own
    for name, tensor in state.items():
        layer = LAYER.fullmatch(name)
        module, _, ending = name.rpartition(".")
        if name in OUTSIDE_BLOCKS:
            new_name = OUTSIDE_BLOCKS[name]
            renamed[new_name] = tensor.T if new_name.endswith("proj") or new_name == "text_projection" else tensor
        elif module in OUTSIDE_BLOCKS:
            renamed[f"{OUTSIDE_BLOCKS[module]}.{ending}"] = tensor
        elif layer and layer[3] in INSIDE_BLOCKS:
            renamed[f"{TOWERS[layer[1]]}.resblocks.{layer[2]}.{INSIDE_BLOCKS[layer[3]]}.{ending}"] = tensor
        elif layer and layer[3] in QUERY_KEY_VALUE:
            joined_name = f"{TOWERS[layer[1]]}.resblocks.{layer[2]}.attn.in_proj_{ending}"
            attention.setdefault(joined_name, {})[layer[3]] = tensor
        else:
            _refuse(f"has no place for {name}")
    for joined_name, parts in attention.items():
        renamed[joined_name] = torch.cat([parts[name] for name in QUERY_KEY_VALUE])
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in renamed.items()}


def open_clip_config(clip: Clip) -> dict[str, Any]:
    """Return open_clip_config.json: the towers' sizes and the preprocessing. Raises UserError for what has no name."""
    if clip.family is not CLIP:
        _refuse(f"gets CLIPModel checkpoints alone from thumbtune, and this is a {clip.family.model_class}")
    config: Any = clip.model.config
    vision, text = config.vision_config, config.text_config
    activations = {vision.hidden_act, text.hidden_act}
    if activations not in ({"quick_gelu"}, {"gelu"}):
        _refuse(f"has quick_gelu or gelu in both towers, not {' and '.join(sorted(activations))}")
    if vision.num_channels != 3:
        _refuse(f"reads images of 3 channels, not {vision.num_channels}")
    vision_cfg = {"image_size": vision.image_size, "patch_size": vision.patch_size,
                  "head_width": vision.hidden_size // vision.num_attention_heads, **_layers(vision)}
    text_cfg = {"context_length": clip.max_tokens, "vocab_size": text.vocab_size,
                "heads": text.num_attention_heads, **_layers(text), **_tokens(clip, text.eos_token_id)}
    return {"model_cfg": {"embed_dim": config.projection_dim, "quick_gelu": activations == {"quick_gelu"},
                          "vision_cfg": vision_cfg, "text_cfg": text_cfg},
            "preprocess_cfg": _preprocessing(clip.spec)}


def _refuse(reason: str) -> NoReturn:
    raise UserError(f"--format open_clip: open_clip {reason}; export this model with --format transformers")


def _layers(tower: Any) -> dict[str, Any]:
    """Return the sizes that both towers have."""
    width, inner = tower.hidden_size, tower.intermediate_size
    ratio = inner / width
    if int(width * ratio) != inner:  # as open_clip computes it: the quotient was rounded down
        ratio = (inner + .5) / width
    eps = {} if tower.layer_norm_eps == DEFAULT_EPS else {"norm_kwargs": {"eps": tower.layer_norm_eps}}
    return {"width": width, "layers": tower.num_hidden_layers, "mlp_ratio": ratio, **eps}


def _tokens(clip: Clip, pooled: int) -> dict[str, Any]:
    """Return the entries of text_cfg for the tokenizer and for the token that is pooled, whose id here is `pooled`.

    There are none for CLIP's own vocabulary. open_clip pools at the highest id of a title unless told of an end token.
    That is the first end of text where no token has a higher id, and what transformers does for the historic end token
    2.
    """
    known = clip.tokenizer.backend_tokenizer.get_vocab()
    tokens = sorted(known, key=known.__getitem__)
    eos = tokenize(clip.tokenizer, [""], clip.max_tokens)[0][-1]
    is_clip = vocabulary_digest(tokens) == CLIP_VOCABULARY
    pooling: dict[str, Any] = {}
    if pooled != HISTORIC_EOS and eos != known[tokens[-1]]:
        pooling = {"pool_type": "eos", "eos_id": eos}
    return pooling if is_clip and not pooling else {"hf_tokenizer_name": HERE, **pooling}


def vocabulary_digest(tokens: Sequence[str]) -> str:
    """Return the SHA-256 of tokens in the order of their ids, without the last two."""
    return hashlib.sha256(json.dumps(tokens[:-2]).encode()).hexdigest()


def _preprocessing(spec: ImageSpec) -> dict[str, Any]:
    height, width = spec.crop
    if spec.resize == height == width:
        mode = "shortest"
    elif spec.resize == spec.crop:
        mode = "squash"
    else:
        _refuse(f"resizes to the size that it crops to, not to {spec.resize} for a crop of {height}x{width}")
    factor = 255 * spec.rescale  # open_clip divides by 255
    return {"size": [height, width], "mode": "RGB", "mean": [value / factor for value in spec.mean],
            "std": [value / factor for value in spec.std],
            "interpolation": "bicubic" if spec.resample == Image.Resampling.BICUBIC else "bilinear",
            "resize_mode": mode}


def compare(clip: Clip, folder: Path) -> str:
    """Return how far open_clip's embeddings of a few drawn pictures and titles are from ours, as a line.

    Raises UserError where they differ by more than rounding.
    """
    if find_spec("open_clip") is None:
        return "not compared with open_clip, which is not installed here"
    try:
        import open_clip
    except Exception as error:  # a torchvision of another torch raises errors of several kinds
        return f"not compared with open_clip, which cannot be imported here ({type(error).__name__}: {error})"
    pictures = draw_pictures(*clip.spec.crop)
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        pixels = torch.stack([preprocess(picture) for picture in pictures])
        image_BE = model.eval().encode_image(pixels, normalize=True)
        title_BE = model.encode_text(open_clip.get_tokenizer(name)(list(TITLES)), normalize=True)
    apart = float((torch.cat([image_BE, title_BE]) - embed(clip, pictures)).abs().max())
    if not apart <= MAX_DIFFERENCE:  # NaN is not
        _refuse(f"{open_clip.__version__} computes other embeddings of it (largest difference {apart:.2g})")
    return (f"open_clip {open_clip.__version__} computes the same embeddings of {len(pictures)} pictures and "
            f"{len(TITLES)} titles: largest difference {apart:.2g}")


def draw_pictures(height: int, width: int) -> list[Image.Image]:
    """Return two ramps and noise, of the size that the towers see: no library's resizing comes in between."""
    noise_HWC = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0)).byte()
    ramps_BHWC = draw_ramps(height, width).permute(0, 2, 3, 1)
    return [Image.fromarray(pixels_HWC.contiguous().numpy()) for pixels_HWC in (*ramps_BHWC, noise_HWC)]


def embed(clip: Clip, pictures: list[Image.Image]) -> Tensor:
    """Return our unit embeddings of pictures, then of TITLES, in fp32."""
    towers, head = Towers(clip), Head(clip, 1.0)
    pixels = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        pixels.append(torch.from_numpy(decode_image(file.getvalue(), clip.spec)))
    tokens = collate_tokens(tokenize(clip.tokenizer, TITLES, clip.max_tokens), clip.tokenizer.pad_token_id)
    with torch.no_grad():
        return torch.cat([head.image(towers.image(torch.stack(pixels))), head.text(towers.text(tokens))])
