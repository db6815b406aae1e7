"""A tiny random model of each family of dual encoders, saved as transformers saves it, with a tokenizer of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import tiny_clip

SIDE = 32
LETTERS = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:/'()é"))
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": SIDE, "patch_size": 8}
TEXT: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_family(name: str, folder: Path) -> Path:
    """Write the model `name`, a key of TINY; return `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TINY[name](folder)


def save(folder: Path, model: Any, images: Any, tokenizer: Any, processor: str) -> Path:
    import transformers

    for value in model.parameters():  # larger than as drawn, so that titles and pictures are clearly apart
        if value.dim() > 1:
            torch.nn.init.normal_(value, std=0.2)
    model.save_pretrained(folder)
    getattr(transformers, processor)(images, tokenizer).save_pretrained(folder)
    return folder


def bert_tokenizer(**settings: Any) -> Any:
    """WordPiece of letters: [CLS] title [SEP]."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "red"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, **settings)


def xlm_tokenizer(**settings: Any) -> Any:
    """A unigram model of letters: <s> title </s>, padded with the id 1."""
    from transformers import XLMRobertaTokenizer

    special: list[tuple[str, float]] = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return XLMRobertaTokenizer(vocab=[*special, *((letter, -4.0) for letter in LETTERS), ("▁red", -3.0),
                                      ("<mask>", 0.0)], **settings)


def siglip_2_tokenizer(**settings: Any) -> Any:
    """Letters, lower case, then <eos>; the settings of the checkpoints on the hub."""
    from tokenizers.processors import TemplateProcessing
    from transformers import Siglip2Tokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    usual: dict[str, Any] = {"padding_side": "right", "model_input_names": ["input_ids"], "model_max_length": 16}
    vocabulary = {word: number for number, word in enumerate([*special, *LETTERS])}
    tokenizer = Siglip2Tokenizer(vocabulary, [], **(usual | settings))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer


def squashing(**settings: Any) -> Any:
    """The image processor of ViT and SigLIP: no crop."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[.5] * 3, image_std=[.5] * 3,
                                   **settings)


def cropping() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def metaclip_2(folder: Path) -> Path:
    from transformers import MetaClip2Config, MetaClip2Model

    tokenizer = xlm_tokenizer()
    text = TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": 2, "bos_token_id": 0,
                   "pad_token_id": 1}
    model = MetaClip2Model(MetaClip2Config(text_config=text, vision_config=VISION, projection_dim=16))
    return save(folder, model, cropping(), tokenizer, "CLIPProcessor")


def altclip(folder: Path) -> Path:
    from transformers import AltCLIPConfig, AltCLIPModel

    tokenizer = xlm_tokenizer()
    text = TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 22, "project_dim": 20}
    model = AltCLIPModel(AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    return save(folder, model, cropping(), tokenizer, "AltCLIPProcessor")


def chinese_clip(folder: Path) -> Path:
    from transformers import ChineseCLIPConfig, ChineseCLIPModel
    from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil

    tokenizer = bert_tokenizer(model_max_length=18)
    text = TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 40}
    model = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    images = ChineseCLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    return save(folder, model, images, tokenizer, "ChineseCLIPProcessor")


def vit_and_bert(folder: Path) -> Path:
    from transformers import BertConfig, ViTConfig
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    tokenizer = bert_tokenizer()
    text = BertConfig(**TEXT, vocab_size=len(tokenizer), max_position_embeddings=20)
    images = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return dual_encoder(folder, ViTConfig(**VISION), text, images, tokenizer)


def clip_and_xlm_roberta(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, XLMRobertaConfig

    tokenizer = xlm_tokenizer()
    text = XLMRobertaConfig(**TEXT, vocab_size=len(tokenizer), max_position_embeddings=22)
    return dual_encoder(folder, CLIPVisionConfig(**VISION), text, cropping(), tokenizer)


def dual_encoder(folder: Path, vision: Any, text: Any, images: Any, tokenizer: Any) -> Path:
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    return save(folder, VisionTextDualEncoderModel(config), images, tokenizer, "VisionTextDualEncoderProcessor")


def siglip(folder: Path) -> Path:
    """SigLIP 2 of one image size has SigLIP's layout and model_type."""
    from transformers import SiglipConfig, SiglipModel

    tokenizer = siglip_2_tokenizer()
    text = TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    return save(folder, model, squashing(), tokenizer, "SiglipProcessor")


TINY = {"clip": tiny_clip, "metaclip_2": metaclip_2, "altclip": altclip, "chinese_clip": chinese_clip,
        "vision-text-dual-encoder: ViT, BERT": vit_and_bert,
        "vision-text-dual-encoder: CLIP, XLM-R": clip_and_xlm_roberta, "siglip": siglip}
