"""Families of dual encoders: how transformers lays each out, what trains in it, and what its towers pool.

Features are the inputs of the last linear layer of a side. In CLIP that layer is a projection after the tower. In
SigLIP it lies inside the tower: for titles it is `head`; for images it is the last layer of the pooling head's MLP,
whose output is added to the pooled image. An image's features are then both, the pooled image and the layer's inputs,
so that embeddings are a linear function of features and of what trains.
To add a family: a `Family` in FAMILIES, and a tiny random model of it in tests/families.py.
Dimension key: B batch, L tokens, V/T image/text width, I inner width of a pooling head, F = V + I.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from data.batch import Tokens


class HeadLayers(NamedTuple):
    """The last linear layer of each side, and the inverse temperature that the model was trained with."""

    visual_projection: nn.Linear
    text_projection: nn.Linear
    logit_scale: nn.Parameter


@dataclass(frozen=True)
class Family:
    """Dual encoders that transformers loads by one class.

    `pooling` says which output of the text tower is a title's feature:
    eos     the hidden state at the first end token; attention is causal, so padding behind it needs no mask
    pooler  `pooler_output`
    first   the last hidden state of the first token
    last    the last hidden state of the last token, padding included: titles are always as long as they may be
    """

    model_type: str  # in config.json
    model_class: str  # in transformers
    processor_class: str
    pooling: str
    image_layer: str = "visual_projection"
    text_layer: str = "text_projection"
    has_bias: bool = False  # in both layers
    has_pooling_head: bool = False  # in the image tower, with the image layer as its last one
    towers_load_alone: bool = False  # transformers has a class for each tower, so one can be loaded without the other

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the parameters of both layers; `--trainable projection` trains these."""
        kinds = ("weight", "bias") if self.has_bias else ("weight",)
        return tuple(f"{layer}.{kind}" for layer in (self.image_layer, self.text_layer) for kind in kinds)

    def head_of(self, model: Any) -> HeadLayers:
        """Return the layers of a model."""
        return HeadLayers(model.get_submodule(self.image_layer), model.get_submodule(self.text_layer),
                          model.logit_scale)

    def set_head(self, model: Any, head: HeadLayers) -> None:
        """Replace the layers of a model by those of `head`."""
        for path, layer in ((self.image_layer, head.visual_projection), (self.text_layer, head.text_projection)):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
        model.logit_scale = head.logit_scale

    def image_features(self, tower: Any, pixels_BCSS: Tensor) -> Tensor:
        """Return the features of normalised pixels by transformers' own forward pass: [B, V], or [B, F]."""
        outputs = tower(pixel_values=pixels_BCSS)
        if self.has_pooling_head:
            return _run_pooling_head(tower.head, outputs.last_hidden_state)
        return outputs.pooler_output

    def text_features(self, tower: Any, tokens: Tokens, max_tokens: int, pad_id: int) -> Tensor:
        """Return the features [B, T] of titles by transformers' own forward pass."""
        if self.pooling == "eos":
            # Without the mask: attention is causal, so padding does not reach the EOS before it, and transformers would
            # read the values of a mask on the host, a sync.
            return tower(input_ids=tokens.ids_BL).pooler_output
        if self.pooling == "last":
            padded_BL = pad(tokens.ids_BL, (0, max_tokens - tokens.ids_BL.shape[1]), value=pad_id)
            return tower(input_ids=padded_BL).last_hidden_state[:, -1]
        outputs = tower(input_ids=tokens.ids_BL, attention_mask=tokens.mask_BL)
        return outputs.pooler_output if self.pooling == "pooler" else outputs.last_hidden_state[:, 0]


def _run_pooling_head(head: Any, hidden_BLV: Tensor) -> Tensor:
    """Return the pooled image and the inputs of the pooling head's last layer, side by side: [B, F]."""
    probe_B1V = head.probe.expand(len(hidden_BLV), -1, -1)
    pooled_BV = head.attention(probe_B1V, hidden_BLV, hidden_BLV)[0][:, 0]
    inner_BI = head.mlp.activation_fn(head.mlp.fc1(head.layernorm(pooled_BV)))
    return torch.cat([pooled_BV, inner_BI], -1)


def feature_width(layer: nn.Linear, has_pooling_head: bool = False) -> int:
    """Return the width of the features that `apply_layer` takes."""
    return layer.in_features + (layer.out_features if has_pooling_head else 0)


def apply_layer(layer: nn.Linear, features_BF: Tensor) -> Tensor:
    """Return the embeddings, not normalised, of features: layer(features).

    Features of a pooling head hold V more numbers, at the front: the pooled image, to which the output is added.
    """
    pooled_width = features_BF.shape[-1] - layer.in_features
    if not pooled_width:
        return layer(features_BF)
    return features_BF[..., :pooled_width] + layer(features_BF[..., pooled_width:])


CLIP = Family("clip", "CLIPModel", "CLIPProcessor", "eos", towers_load_alone=True)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (
    CLIP,
    Family("metaclip_2", "MetaClip2Model", "CLIPProcessor", "eos"),
    Family("altclip", "AltCLIPModel", "AltCLIPProcessor", "pooler"),
    Family("chinese_clip", "ChineseCLIPModel", "ChineseCLIPProcessor", "first"),
    Family("vision-text-dual-encoder", "VisionTextDualEncoderModel", "VisionTextDualEncoderProcessor", "pooler"),
    Family("siglip", "SiglipModel", "SiglipProcessor", "last", "vision_model.head.mlp.fc2", "text_model.head",
           has_bias=True, has_pooling_head=True),
)}
# Names of all parameters that features do not depend on, of all families.
HEAD = frozenset(name for family in FAMILIES.values() for name in ("logit_scale", *family.projections))

# The towers of a VisionTextDualEncoderModel that are known to have a `pooler_output`.
VISION_TOWERS = ("beit", "clip_vision_model", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "swin", "swinv2",
                 "vit")
TEXT_TOWERS = ("albert", "bert", "camembert", "ernie", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
               "xlm-roberta-xl")
ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # their positions fit images of any size
# Text towers whose position ids start at pad_token_id + 1.
SHIFTED_POSITIONS = ("altclip_text_model", "camembert", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
                     "xlm-roberta-xl")

SIGLIP_2 = "google/siglip2-base-patch16-224"
META_CLIP_2 = "facebook/metaclip-2-worldwide-huge-quickgelu"
OPENAI_CLIP = "openai/clip-vit-base-patch32"
# model_type -> why it cannot be tuned, and the nearest model that can.
REFUSED = {
    "align": f"its image features are embeddings already, without a linear layer; the nearest is {OPENAI_CLIP}",
    "blip": f"its towers see each other's inputs; the nearest dual encoder is {SIGLIP_2}",
    "blip-2": f"its towers see each other's inputs; the nearest dual encoder is {SIGLIP_2}",
    "bridgetower": f"its towers see each other's inputs; the nearest dual encoder is {SIGLIP_2}",
    "clip_text_model": f"it has no image tower; give the whole model, such as {OPENAI_CLIP}",
    "clip_vision_model": f"it has no text tower; give the whole model, such as {OPENAI_CLIP}",
    "clipseg": f"it segments by a CLIP inside it; the nearest is {OPENAI_CLIP}",
    "flava": f"its image features are not pooled; the nearest is {OPENAI_CLIP}",
    "groupvit": f"its projections are not linear; the nearest is {OPENAI_CLIP}",
    "jina_clip": f"transformers has no class for it, and its own code is never run; the nearest are {SIGLIP_2} and "
                 f"{META_CLIP_2}",
    "owlv2": f"it finds objects by a CLIP inside it; the nearest is {OPENAI_CLIP}",
    "owlvit": f"it finds objects by a CLIP inside it; the nearest is {OPENAI_CLIP}",
    "siglip2": f"it is a SigLIP 2 NaFlex, whose number of patches differs by image; the nearest is {SIGLIP_2}, of one "
               "size",
    "siglip_text_model": f"it has no image tower; give the whole model, such as {SIGLIP_2}",
    "siglip_vision_model": f"it has no text tower; give the whole model, such as {SIGLIP_2}",
    "xclip": f"it reads videos; the nearest is {OPENAI_CLIP}",
}


def is_inside_tower(name: str, tower: str = "") -> bool:
    """Return whether a parameter lies before the features, in vision_model or text_model; by default in either."""
    return name not in HEAD and name.startswith((f"{tower}.",) if tower else ("vision_model.", "text_model."))
