"""Freeze a CLIPModel by parameter name, choose between cached and streaming, and run the towers.

Dimension key: B batch, H hard negatives of a row, V/T image/text feature width, L tokens, C colour channels, S image
side.
"""

from __future__ import annotations

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


class ImageTower(nn.Module):
    """uint8 pixels [B, 3, S, S] -> image features [B, V], fp32; they are normalised here, on the device."""

    gain_C11: Tensor
    shift_C11: Tensor

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.vision_model: Any = clip.vision_model
        use_quick_gelu(self.vision_model)
        self.pools = can_pool(self.vision_model)
        mean, std = torch.tensor(clip.spec.mean), torch.tensor(clip.spec.std)
        self.register_buffer("gain_C11", (clip.spec.rescale / std)[:, None, None], persistent=False)
        self.register_buffer("shift_C11", (-mean / std)[:, None, None], persistent=False)

    def forward(self, pixels_BCSS: Tensor, patches: int | None = None) -> Tensor:
        """Return features, of the first `patches` of each image alone where the tower pools."""
        if not len(pixels_BCSS):
            return self.gain_C11.new_zeros(0, self.vision_model.config.hidden_size)
        normalised = torch.addcmul(self.shift_C11, pixels_BCSS.float(), self.gain_C11)
        if self.pools and not torch.is_grad_enabled():
            return pool_images(self.vision_model, normalised, patches).float()
        return self.vision_model(pixel_values=normalised).pooler_output.float()


class TextTower(nn.Module):
    """Tokens [B, L] -> text features [B, T], fp32: the hidden state at the first EOS."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.text_model: Any = clip.text_model
        use_quick_gelu(self.text_model)
        self.pools = can_pool(self.text_model)

    def forward(self, tokens: Tokens) -> Tensor:
        """Return features."""
        if not len(tokens.ids_BL):
            return torch.zeros(0, self.text_model.config.hidden_size, device=tokens.ids_BL.device)
        if self.pools and not torch.is_grad_enabled():
            return pool_texts(self.text_model, tokens).float()
        # Without the mask: attention is causal, so padding does not reach the EOS before it, and transformers would
        # read the values of a mask on the host, a sync.
        return self.text_model(input_ids=tokens.ids_BL).pooler_output.float()


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
        for tower in (self.image.vision_model, self.text.text_model):
            for layer in tower.encoder.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def forward(self, batch: Batch) -> Features:
        """One Batch of tower inputs -> its Features."""
        negative_BHT = None
        image_BV, title_BT = self.image(batch.pixels_BCSS), self.text(batch.title)
        if batch.negative is not None and batch.negative_id_BH is not None:
            negative_BHT = self.text(batch.negative).unflatten(0, batch.negative_id_BH.T.shape).transpose(0, 1)
        return Features(image_BV, title_BT, negative_BHT, batch.image_id_B, batch.title_id_B, batch.negative_id_BH)


def pick_precision(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype of autocast; `auto` is bf16 only on hardware with bf16 units, as it is slower elsewhere.

    Measured: a CPU without such units runs bf16 autocast 4.3x slower than fp32, one with them 1.8x faster.
    """
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def fingerprint(clip: Clip, tower: str, preprocessing: str, precision: torch.dtype) -> str:
    """Return the id of a feature space: a digest of the tower's config, weights, preprocessing and precision.

    `tower` is vision_model or text_model.
    """
    digest = hashlib.sha256(f"{preprocessing}|{precision}|{clip.facts.configs[tower]}".encode())
    for name, tensor in sorted(clip.facts.digests.items()):
        if name.startswith(f"{tower}."):
            digest.update(f"{name}={tensor}".encode())
    return digest.hexdigest()
