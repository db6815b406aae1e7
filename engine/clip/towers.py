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
from engine.clip.loading import HEAD, Clip
from engine.clip.pooled import can_pool, pool_images, pool_texts

PROBE_PATCHES = 16


def freeze(clip: Clip, trainable: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let only parameters train whose name holds one of `trainable` (`all`: every one); return them by name.

    CLIP's own `logit_scale` stays frozen unless asked for by name: the loss has its own scale.
    Raises UserError when nothing matches, naming what there is.
    """
    names = list(clip.facts.shapes)
    def wanted(name: str) -> bool:
        if name == "logit_scale":
            return "logit_scale" in trainable
        return any(part == "all" or part in name for part in trainable)
    for part in trainable:
        if part != "all" and not any(part in name for name in names):
            tops = sorted({".".join(name.split(".")[:2]) for name in names})
            raise UserError(f"--trainable {part} matches no parameter; names begin with {', '.join(tops)}")
    named = clip.named_parameters([name for name in names if wanted(name)])
    for name, parameter in named.items():
        parameter.requires_grad_(wanted(name))
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def pick_mode(wanted: str, trainable: dict[str, nn.Parameter]) -> bool:
    """Return True for cached: all trainable parameters come after the towers, whose features are then constants.

    Raises UserError when `cached` is asked for although a layer inside a tower trains.
    """
    inside = [name for name in trainable if name not in HEAD]
    if wanted == "cached" and inside:
        raise UserError(f"--mode cached cannot train {inside[0]}: features change with it; use --mode streaming")
    return wanted != "streaming" and not inside


def describe_trainable(clip: Clip, trainable: dict[str, nn.Parameter]) -> str:
    """Return one line with the number of trainable parameters, e.g. `1,376,256 of 427,616,513 (0.32 %)`, and names."""
    # logit_scale is a scalar of the loss; the reference counts it, so the totals are comparable.
    total = clip.facts.parameters
    count = sum(p.numel() for p in trainable.values())
    shown = list(trainable) if len(trainable) <= 4 else [*list(trainable)[:3], f"… {len(trainable) - 3} more"]
    return f"{count:,} of {total:,} parameters train ({100 * count / total:.2f} %): {', '.join(shown)}"


class Tower(nn.Module):
    """One of the model's towers; while all of it is frozen, its weights are held in the dtype of autocast."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        use_quick_gelu(model)
        self.model = model
        self.pools = can_pool(model)
        self._held: list[Any] = []  # in a list, as it is no part of this module: the model that is exported stays fp32

    def for_pass(self, device: torch.device) -> Any:
        """Return the tower for one pass on a device."""
        if not torch.is_autocast_enabled(device.type) or any(x.requires_grad for x in self.model.parameters()):
            return self.model
        if not self._held:
            self._held.append(hold_weights(self.model, torch.get_autocast_dtype(device.type)))
        return self._held[0]


class ImageTower(Tower):
    """uint8 pixels [B, 3, S, S] -> image features [B, V], fp32; they are normalised here, on the device."""

    gain_C11: Tensor
    shift_C11: Tensor

    def __init__(self, clip: Clip) -> None:
        super().__init__(clip.vision_model)
        mean, std = torch.tensor(clip.spec.mean), torch.tensor(clip.spec.std)
        self.register_buffer("gain_C11", (clip.spec.rescale / std)[:, None, None], persistent=False)
        self.register_buffer("shift_C11", (-mean / std)[:, None, None], persistent=False)

    def forward(self, pixels_BCSS: Tensor, patches: int | None = None) -> Tensor:
        """Return features, of the first `patches` of each image alone where the tower pools."""
        if not len(pixels_BCSS):
            return self.gain_C11.new_zeros(0, self.model.config.hidden_size)
        normalised = torch.addcmul(self.shift_C11, pixels_BCSS.float(), self.gain_C11)
        tower = self.for_pass(normalised.device)
        if self.pools and not torch.is_grad_enabled():
            return pool_images(tower, normalised, patches).float()
        return tower(pixel_values=normalised).pooler_output.float()


class TextTower(Tower):
    """Tokens [B, L] -> text features [B, T], fp32: the hidden state at the first EOS."""

    def __init__(self, clip: Clip) -> None:
        super().__init__(clip.text_model)

    def forward(self, tokens: Tokens) -> Tensor:
        """Return features."""
        if not len(tokens.ids_BL):
            return torch.zeros(0, self.model.config.hidden_size, device=tokens.ids_BL.device)
        tower = self.for_pass(tokens.ids_BL.device)
        if self.pools and not torch.is_grad_enabled():
            return pool_texts(tower, tokens).float()
        # Without the mask: attention is causal, so padding does not reach the EOS before it, and transformers would
        # read the values of a mask on the host, a sync.
        return tower(input_ids=tokens.ids_BL).pooler_output.float()


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
        for tower in (self.image.model, self.text.model):
            for layer in tower.encoder.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def forward(self, batch: Batch) -> Features:
        """One Batch of tower inputs -> its Features."""
        negative_BHT = None
        image_BV, title_BT = self.image(batch.pixels_BCSS), self.text(batch.title)
        if batch.negative is not None and batch.negative_id_BH is not None:
            negative_BHT = self.text(batch.negative).unflatten(0, batch.negative_id_BH.T.shape).transpose(0, 1)
        return Features(image_BV, title_BT, negative_BHT, batch.image_id_B, batch.title_id_B, batch.negative_id_BH)


def hold_weights(tower: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the tower with the weights of its products cast to `dtype`; all else is shared with it.

    Autocast would cast them in every pass, to the same bits: 196 of the 411 operations of a ViT-B/32's image tower.
    Layer norms and embeddings stay in fp32, as autocast has them.
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
    for name, tensor in sorted(clip.facts.digests.items()):
        if name.startswith(f"{tower}."):
            digest.update(f"{name}={tensor}".encode())
    return digest.hexdigest()
