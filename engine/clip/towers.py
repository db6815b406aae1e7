"""Freeze a CLIPModel by parameter name, choose between cached and streaming, and run the towers.

Dimension key: B batch, H hard negatives of a row, V/T image/text feature width, L tokens, C colour channels, S image
side.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batch import Batch, Features, Tokens, UserError
from engine.clip.encoder import use_quick_gelu
from engine.clip.families import HEAD
from engine.clip.loading import Clip
from engine.clip.pooled import can_pool, pool_images, pool_texts

PROBE_PATCHES = 16


def freeze(clip: Clip, trainable: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let only parameters train whose name contains one of `trainable`; return them by name.

    `all` matches every name, `projection` the last linear layer of each side, whatever it is called. The model's own
    `logit_scale` trains only if named in full, as the loss has its own scale, and SigLIP's `logit_bias` never, as no
    loss here uses it. Raises UserError where one of `trainable` matches nothing.
    """
    def matches(part: str, name: str) -> bool:
        if part == "projection":
            return name in clip.family.projections
        return part == "all" or part in name

    def should_train(name: str) -> bool:
        if name == "logit_scale":
            return "logit_scale" in trainable
        return name != "logit_bias" and any(matches(part, name) for part in trainable)

    names = [name for name in clip.facts.shapes if name != "logit_bias"]
    for part in trainable:
        if not any(matches(part, name) for name in names):
            beginnings = sorted({".".join(name.split(".")[:2]) for name in names})
            raise UserError(f"--trainable {part} matches no parameter; names begin with {', '.join(beginnings)}")
    named = clip.named_parameters([name for name in names if should_train(name)])
    for name, parameter in named.items():
        parameter.requires_grad_(should_train(name))
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def pick_mode(wanted: str, trainable: dict[str, nn.Parameter]) -> bool:
    """Return True for cached: everything that trains comes after the features, which are then constants.

    Raises UserError when `cached` is asked for although a layer inside a tower trains.
    """
    inside = [name for name in trainable if name not in HEAD]
    if wanted == "cached" and inside:
        raise UserError(f"--mode cached cannot train {inside[0]}: features change with it; use --mode streaming")
    return wanted != "streaming" and not inside


def describe_trainable(clip: Clip, trainable: dict[str, nn.Parameter]) -> str:
    """Return one line with the number of trainable parameters, e.g. `1,376,256 of 427,616,513 (0.32 %)`, and names."""
    # The total includes logit_scale, as the reference's does.
    total = clip.facts.parameters
    count = sum(p.numel() for p in trainable.values())
    shown = list(trainable) if len(trainable) <= 4 else [*list(trainable)[:3], f"… {len(trainable) - 3} more"]
    return f"{count:,} of {total:,} parameters train ({100 * count / total:.2f} %): {', '.join(shown)}"


class Tower(nn.Module):
    """One of the model's towers. While all of it is frozen, autocast runs a copy whose weights are cast already."""

    def __init__(self, clip: Clip, name: str) -> None:
        super().__init__()
        self.model: Any = getattr(clip, name)
        use_quick_gelu(self.model)
        self.family, self.width = clip.family, clip.facts.widths[name]
        self.pools = can_pool(self.model)
        # Without the head's layer, which in SigLIP lies inside the tower: features do not depend on it.
        self._inner = [value for inner, value in self.model.named_parameters() if f"{name}.{inner}" not in HEAD]
        self._cast_copy: list[Any] = []  # in a list, so that it is no submodule: .to() and state_dict() leave it out

    def for_pass(self, device: torch.device) -> Any:
        """Return the module to run in one pass on a device: the tower, or its copy in the dtype of autocast."""
        if not torch.is_autocast_enabled(device.type) or any(x.requires_grad for x in self._inner):
            return self.model
        if not self._cast_copy:
            self._cast_copy.append(cast_weights(self.model, torch.get_autocast_dtype(device.type)))
        return self._cast_copy[0]


class ImageTower(Tower):
    """uint8 pixels [B, 3, S, S] -> image features [B, V], fp32; they are normalised here, on the device."""

    gain_C11: Tensor
    shift_C11: Tensor

    def __init__(self, clip: Clip) -> None:
        super().__init__(clip, "vision_model")
        mean, std = torch.tensor(clip.spec.mean), torch.tensor(clip.spec.std)
        self.register_buffer("gain_C11", (clip.spec.rescale / std)[:, None, None], persistent=False)
        self.register_buffer("shift_C11", (-mean / std)[:, None, None], persistent=False)

    def forward(self, pixels_BCSS: Tensor, patches: int | None = None) -> Tensor:
        """Return features; towers that `pooled.py` can run see only the first `patches` of each image, if given."""
        if not len(pixels_BCSS):
            return self.gain_C11.new_zeros(0, self.width)
        normalised = torch.addcmul(self.shift_C11, pixels_BCSS.float(), self.gain_C11)
        tower = self.for_pass(normalised.device)
        if self.pools and not torch.is_grad_enabled():
            return pool_images(tower, normalised, patches).float()
        return self.family.image_features(tower, normalised).float()


class TextTower(Tower):
    """Tokens [B, L] -> text features [B, T], fp32."""

    def __init__(self, clip: Clip) -> None:
        super().__init__(clip, "text_model")
        self.max_tokens, self.pad_id = clip.max_tokens, clip.facts.pad_id

    def forward(self, tokens: Tokens) -> Tensor:
        """Return features."""
        if not len(tokens.ids_BL):
            return torch.zeros(0, self.width, device=tokens.ids_BL.device)
        tower = self.for_pass(tokens.ids_BL.device)
        if self.pools and not torch.is_grad_enabled():
            return pool_texts(tower, tokens).float()
        return self.family.text_features(tower, tokens, self.max_tokens, self.pad_id).float()


class Towers(nn.Module):
    """Both towers up to their pooled outputs."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.image, self.text = ImageTower(clip), TextTower(clip)

    def probe(self, pixels_BCSS: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return features of a few inputs, to check the model; images are cut to their first PROBE_PATCHES patches.

        On a CPU whole images would cost a ViT-L/14 seconds in every run.
        """
        return self.image(pixels_BCSS, PROBE_PATCHES), self.text(tokens)

    def recompute(self) -> None:
        """Checkpoint each layer: keep its input alone and compute its activations again in the backward pass."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        for tower in (self.image.model, self.text.model):
            for layer in tower.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    # Towers stay in eval mode, without dropout, so there is no random state to restore.
                    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def forward(self, batch: Batch) -> Features:
        """Return the features of the tower inputs of one step."""
        negative_BHT = None
        image_BV, title_BT = self.image(batch.pixels_BCSS), self.text(batch.title)
        if batch.negative is not None and batch.negative_id_BH is not None:
            negative_BHT = self.text(batch.negative).unflatten(0, batch.negative_id_BH.T.shape).transpose(0, 1)
        return Features(image_BV, title_BT, negative_BHT, batch.image_id_B, batch.title_id_B, batch.negative_id_BH)


def cast_weights(tower: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the tower with the weights of its products cast to `dtype`; it shares all other tensors.

    Autocast would cast them in every pass, to the same bits: 196 of the 411 operations of a ViT-B/32's image tower.
    Layer norms and embeddings stay in fp32, as under autocast.
    """
    shared = [*tower.parameters(), *tower.buffers()]
    copies: dict[int, Any] = {id(tensor): tensor for tensor in shared}  # what deepcopy takes instead of copying
    for module in tower.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            for weight in module.parameters(recurse=False):
                copies[id(weight)] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(tower, copies)


def fingerprint(clip: Clip, tower: str, preprocessing: str, precision: torch.dtype) -> str:
    """Return the id of a feature space: a digest of the tower's config, weights, preprocessing and precision.

    `tower` is vision_model or text_model.
    """
    digest = hashlib.sha256(f"{preprocessing}|{precision}|{clip.facts.configs[tower]}".encode())
    if tower == "text_model" and clip.family.pooling == "last":  # titles attend to their padding
        digest.update(f"padding={clip.facts.pad_id}\n".encode())
    for name, tensor in sorted(clip.facts.digests.items()):
        if name.startswith(f"{tower}.") and name not in HEAD:
            digest.update(f"{name}={tensor}".encode())
    return digest.hexdigest()
