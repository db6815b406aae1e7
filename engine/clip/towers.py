"""Freeze a CLIPModel by parameter name, choose between cached and streaming, and run the towers.

Dimension key: B batch, H hard negatives of a row, V/T image/text feature width, L tokens, C colour channels, S image
side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batch import Batch, Features, Tokens, UserError
from engine.clip.encoder import CastOnce, use_quick_gelu
from engine.clip.loading import Clip
from engine.clip.pooled import can_pool, pool_images, pool_texts

if TYPE_CHECKING:
    from transformers import CLIPModel

PROBE_PATCHES = 16
HEAD = ("visual_projection.", "text_projection.", "logit_scale")


def freeze(model: CLIPModel, trainable: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let only parameters train whose name holds one of `trainable` (`all`: every one); return them by name.

    CLIP's own `logit_scale` stays frozen unless asked for by name: the loss has its own scale.
    Raises UserError when nothing matches, naming what there is.
    """
    named = dict(model.named_parameters())
    def wanted(name: str) -> bool:
        if name == "logit_scale":
            return "logit_scale" in trainable
        return any(part == "all" or part in name for part in trainable)
    for part in trainable:
        if part != "all" and not any(part in name for name in named):
            tops = sorted({".".join(name.split(".")[:2]) for name in named})
            raise UserError(f"--trainable {part} matches no parameter; names begin with {', '.join(tops)}")
    for name, parameter in named.items():
        parameter.requires_grad_(wanted(name))
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def pick_mode(wanted: str, trainable: dict[str, nn.Parameter]) -> bool:
    """Return True for cached: all trainable parameters come after the towers, whose features are then constants.

    Raises UserError when `cached` is asked for although a layer inside a tower trains.
    """
    inside = [name for name in trainable if not name.startswith(HEAD)]
    if wanted == "cached" and inside:
        raise UserError(f"--mode cached cannot train {inside[0]}: features change with it; use --mode streaming")
    return wanted != "streaming" and not inside


def describe_trainable(model: CLIPModel, trainable: dict[str, nn.Parameter]) -> str:
    """Return one line with the number of trainable parameters, e.g. `1,376,256 of 427,616,513 (0.32 %)`, and names."""
    # logit_scale is a scalar of the loss; the reference counts it, so the totals are comparable.
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in trainable.values())
    shown = list(trainable) if len(trainable) <= 4 else [*list(trainable)[:3], f"… {len(trainable) - 3} more"]
    return f"{count:,} of {total:,} parameters train ({100 * count / total:.2f} %): {', '.join(shown)}"


class Towers(nn.Module):
    """Both towers up to their pooled outputs; uint8 pixels are normalised here, on the device."""

    gain_C11: Tensor
    shift_C11: Tensor

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.vision_model: Any = clip.model.vision_model
        self.text_model: Any = clip.model.text_model
        for tower in (self.vision_model, self.text_model):
            use_quick_gelu(tower)
        self._image_tower, self._text_tower = CastOnce(self.vision_model), CastOnce(self.text_model)
        self.pools = can_pool(self.vision_model) and can_pool(self.text_model)
        settings = clip.image_processor
        mean = torch.tensor(settings.image_mean if settings.do_normalize else [0.0] * 3)
        std = torch.tensor(settings.image_std if settings.do_normalize else [1.0] * 3)
        rescale = settings.rescale_factor if settings.do_rescale else 1.0
        self.register_buffer("gain_C11", (rescale / std)[:, None, None], persistent=False)
        self.register_buffer("shift_C11", (-mean / std)[:, None, None], persistent=False)

    def image(self, pixels_BCSS: Tensor) -> Tensor:
        """uint8 pixels [B, 3, S, S] -> image features [B, V], fp32."""
        if not len(pixels_BCSS):
            return self.gain_C11.new_zeros(0, self.vision_model.config.hidden_size)
        return self._image(pixels_BCSS)

    def probe(self, pixels_BCSS: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return features of a few inputs, to check the model; images are cut to their first PROBE_PATCHES patches.

        On a CPU whole images would cost a ViT-L/14 seconds in every run.
        """
        return self._image(pixels_BCSS, PROBE_PATCHES), self._text(tokens)

    def _image(self, pixels_BCSS: Tensor, patches: int | None = None) -> Tensor:
        normalised = torch.addcmul(self.shift_C11, pixels_BCSS.float(), self.gain_C11)
        tower = self._image_tower.of_pass(self.gain_C11.device)
        if self.pools and not torch.is_grad_enabled():
            return pool_images(tower, normalised, patches).float()
        return tower(pixel_values=normalised).pooler_output.float()

    def text(self, tokens: Tokens) -> Tensor:
        """Tokens [B, L] -> text features [B, T], fp32: the hidden state at the first EOS."""
        if not len(tokens.ids_BL):
            return self.gain_C11.new_zeros(0, self.text_model.config.hidden_size)
        return self._text(tokens)

    def _text(self, tokens: Tokens) -> Tensor:
        tower = self._text_tower.of_pass(self.gain_C11.device)
        if self.pools and not torch.is_grad_enabled():
            return pool_texts(tower, tokens).float()
        # Without the mask: attention is causal, so padding does not reach the EOS before it, and transformers would
        # read the values of a mask on the host, a sync.
        return tower(input_ids=tokens.ids_BL).pooler_output.float()

    def recompute(self) -> None:
        """Checkpoint each layer: keep its input alone and compute its activations again in the backward pass."""
        for tower in (self.vision_model, self.text_model):
            for layer in tower.encoder.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def forward(self, batch: Batch) -> Features:
        """One Batch of tower inputs -> its Features."""
        negative_BHT = None
        image_BV, title_BT = self.image(batch.pixels_BCSS), self.text(batch.title)
        if batch.negative is not None and batch.negative_id_BH is not None:
            negative_BHT = self.text(batch.negative).unflatten(0, batch.negative_id_BH.T.shape).transpose(0, 1)
        return Features(image_BV, title_BT, negative_BHT, batch.image_id_B, batch.title_id_B, batch.negative_id_BH)


def fingerprint(clip: Clip, tower: str, preprocessing: str, precision: torch.dtype) -> str:
    """Return the id of a feature space: a digest of the tower's config, weights, preprocessing and precision.

    `tower` is vision_model or text_model.
    """
    config = getattr(clip.model, tower).config.to_json_string()
    digest = hashlib.sha256(f"{preprocessing}|{precision}|{config}".encode())
    for name, tensor in sorted(clip.digests.items()):
        if name.startswith(f"{tower}."):
            digest.update(f"{name}={tensor}".encode())
    return digest.hexdigest()
