"""Forward pass of frozen CLIP towers that computes only the pooled output: no padding, one row of the last layer.

CLIP pools one token of each input, so the last layer needs the other tokens only as keys and values. Layers are
transformers' own modules; the hidden states of all inputs are packed one after another, so that no product computes
padding, and attention runs in groups of equal length. Equal to transformers' pooled output up to rounding (5e-6 in
fp32).
Dimension key: B inputs, L tokens of the longest, R tokens of all inputs, D width of a head, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from data.batch import Tokens

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoder, CLIPTextModel, CLIPVisionModel

Groups = Sequence[tuple[int, int]]  # (inputs, tokens of each), in the order of their rows


def can_pool(tower: CLIPVisionModel | CLIPTextModel) -> bool:
    """Return whether every part of this tower is of the class whose forward pass is reimplemented here."""
    from transformers.models.clip import modeling_clip as clip

    if type(getattr(tower, "embeddings", None)) not in (clip.CLIPTextEmbeddings, clip.CLIPVisionEmbeddings):
        return False
    known = (clip.CLIPEncoderLayer, clip.CLIPAttention, clip.CLIPMLP)
    return all((type(layer), type(layer.self_attn), type(layer.mlp)) == known for layer in tower.encoder.layers)


def pool_images(tower: CLIPVisionModel, pixels_BCSS: Tensor, patches: int | None = None) -> Tensor:
    """Return the pooled output [B, E] of a CLIP vision tower, the class token, for normalised pixels.

    With `patches`, only the first patches of each image are seen.
    """
    hidden_BLE = tower.embeddings(pixels_BCSS)
    if patches is not None:
        hidden_BLE = hidden_BLE[:, :1 + patches]
    hidden_BLE = tower.pre_layrnorm(hidden_BLE)
    count, length, width = hidden_BLE.shape
    first_B = torch.arange(count, device=hidden_BLE.device) * length
    pooled_BE = _encode(tower.encoder, hidden_BLE.reshape(-1, width), [(count, length)], first_B, causal=False)
    return tower.post_layernorm(pooled_BE)


def pool_texts(tower: CLIPTextModel, tokens: Tokens) -> Tensor:
    """Return the pooled output [B, E] of a CLIP text tower, the first EOS; tokens after it are left out."""
    ids_BL = tokens.ids_BL
    # Old configs have the wrong EOS 2; transformers then pools at the highest id.
    eos: Any = tower.eos_token_id  # declared as a list or None too, which loading refuses
    score_BL = ids_BL if eos == 2 else ids_BL.eq(eos).int()
    length_B, order_B = (score_BL.argmax(-1) + 1).sort()
    position_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
    kept_BL = position_BL < length_B[:, None]
    token_RE = tower.embeddings.token_embedding(ids_BL[order_B][kept_BL])
    position_RE = tower.embeddings.position_embedding(position_BL[kept_BL])
    lengths, counts = torch.unique_consecutive(length_B, return_counts=True)
    groups = list(zip(counts.tolist(), lengths.tolist(), strict=True))
    last_B = length_B.cumsum(0) - 1
    pooled_BE = _encode(tower.encoder, token_RE + position_RE, groups, last_B, causal=True)
    pooled_BE = tower.final_layer_norm(pooled_BE)
    return torch.empty_like(pooled_BE).index_copy_(0, order_B, pooled_BE)


def _encode(encoder: CLIPEncoder, hidden_RE: Tensor, groups: Groups, pooled_B: Tensor, causal: bool) -> Tensor:
    """Run all layers, the last one only for the rows `pooled_B`: [B, E]."""
    *layers, last = encoder.layers
    for layer in layers:
        hidden_RE = _layer(layer, hidden_RE, groups, causal, None)
    # No causal mask in the last layer: where attention is causal, the pooled row is the last of its input.
    return _layer(last, hidden_RE, groups, False, pooled_B)


def _layer(layer: Any, hidden_RE: Tensor, groups: Groups, causal: bool, pooled_B: Tensor | None) -> Tensor:
    """Run one CLIPEncoderLayer; with `pooled_B` only these rows are queries, each attending to its whole input."""
    attended_RE = _attend(layer.self_attn, layer.layer_norm1(hidden_RE), groups, causal, pooled_B)
    hidden_RE = (hidden_RE if pooled_B is None else hidden_RE[pooled_B]) + attended_RE
    del attended_RE  # frees memory, and cache, for the products that follow
    return hidden_RE + layer.mlp(layer.layer_norm2(hidden_RE))


def _attend(attention: CLIPAttention, rows_RE: Tensor, groups: Groups, causal: bool,
            pooled_B: Tensor | None) -> Tensor:
    """Compute attention within each input."""
    rows_RE = rows_RE.to(attention.q_proj.weight.dtype)  # once; autocast would cast for each of the three products
    sizes = [count * length for count, length in groups]
    query_sizes = sizes if pooled_B is None else [count for count, _ in groups]
    queries_RE = attention.q_proj(rows_RE if pooled_B is None else rows_RE[pooled_B])
    queries = queries_RE.split(query_sizes)
    keys = attention.k_proj(rows_RE).split(sizes)
    values = attention.v_proj(rows_RE).split(sizes)
    parts = []
    for (count, _), *rows in zip(groups, queries, keys, values, strict=True):
        q, k, v = (part.view(count, -1, attention.num_heads, attention.head_dim).transpose(1, 2) for part in rows)
        attended = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=attention.scale)
        parts.append(attended.transpose(1, 2).reshape(-1, queries_RE.shape[1]))
    return attention.out_proj(parts[0] if len(parts) == 1 else torch.cat(parts))
