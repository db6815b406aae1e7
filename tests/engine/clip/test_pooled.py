"""Towers that compute the pooled row alone, without padding, against transformers' own pooled output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import EXACT, in_float64, tiny_tokenizer
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from data.batch import Tokens
from data.images.decode import collate_tokens
from engine.clip.loading import Clip
from engine.clip.towers import Towers
from engine.clip.whole import WholeModel


def small(eos: int = 95, act: str = "quick_gelu", layers: int = 3, **config: Any) -> Clip:
    """A CLIPModel whose weights are large enough for every token to matter."""
    shared = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4,
              "hidden_act": act}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(
        vision_config=shared | {"image_size": 32, "patch_size": 8},
        text_config=shared | {"vocab_size": 96, "max_position_embeddings": 20, "eos_token_id": eos, "bos_token_id": 94,
                              "pad_token_id": 95}, projection_dim=16, **config)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data.mul_(4)
    processor = CLIPProcessor(CLIPImageProcessorPil(image_mean=[0.5, 0.4, 0.4], image_std=[0.3] * 3), tiny_tokenizer())
    return Clip("small", WholeModel(model, processor))


def titles(eos: int = 95) -> Tokens:
    """Lengths mixed and repeated, one with a second EOS that must not count, one without any, one of full length."""
    generator = torch.Generator().manual_seed(1)
    rows = [[94, *torch.randint(3, 94, (n,), generator=generator).tolist(), eos] for n in (5, 0, 18, 5, 9, 1, 5, 9)]
    return collate_tokens([*rows, [94, 7, eos, 8, 9, eos], [94, *range(3, 22)]], 95 if eos == 2 else eos)


def both(clip: Clip, tokens: Tokens, precision: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """(ours, transformers' own), images and titles; ours must not have gone through transformers' own pass."""
    towers = Towers(clip)
    assert towers.image.pools and towers.text.pools
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision.itemsize < 4):
        ours = towers.image(pixels), towers.text(tokens)
        towers.image.pools = towers.text.pools = False
        return list(zip(ours, (towers.image(pixels), towers.text(tokens)), strict=True))


def in_double(clip: Clip, tokens: Tokens) -> list[tuple[Tensor, Tensor]]:
    """`both`, computed in float64."""
    clip.model.double()
    with in_float64():
        pairs = both(clip, tokens)
    assert all(part.dtype == torch.float64 for pair in pairs for part in pair)
    return pairs


@pytest.mark.parametrize("settings", [{}, {"act": "gelu"}, {"layers": 1}, {"attn_implementation": "eager"}], ids=str)
def test_pooled_rows_equal_those_of_transformers(settings: dict[str, Any]) -> None:
    for ours, theirs in in_double(small(**settings), titles()):
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=EXACT)


def test_old_configs_pool_the_highest_id() -> None:
    tokens = titles()
    for ours, theirs in in_double(small(eos=2), Tokens(tokens.ids_BL[:8], tokens.mask_BL[:8])):
        torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=EXACT)


def test_bf16_differs_by_its_rounding() -> None:
    clip, tokens = small(), titles()
    exact = [theirs for _, theirs in both(clip, tokens)]
    for (ours, theirs), right in zip(both(clip, tokens, torch.bfloat16), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - right).abs().mean() <= 1.2 * (theirs - right).abs().mean() < 0.1


def test_a_layer_of_another_class_runs_as_it_is() -> None:
    class Doubled(CLIPEncoderLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(*args, **kwargs)

    clip = small()
    clip.model.vision_model.encoder.layers[0].__class__ = Doubled
    towers, pixels = Towers(clip), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert not towers.image.pools
    with torch.no_grad():
        doubled = towers.image(pixels)
        towers.image.pools = True
        assert not torch.allclose(doubled, towers.image(pixels), atol=1e-2)


def test_where_layers_train_autograd_sees_all_of_transformers_pass() -> None:
    clip = small()
    towers = Towers(clip).requires_grad_()
    towers.text(titles()).sum().backward()
    assert all(parameter.grad is not None for parameter in clip.model.text_model.parameters())
