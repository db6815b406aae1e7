"""Data and the untrained model that the demo's model is trained from: `python -m tests.make_demo_model FOLDER`.

Captions and titles describe the same scenes in different words: the features hold the answer, the projections adapt.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from data.demo.demo import LOTS, TITLES, Title, fill_template, scene_rows, write_split
from data.demo.draw import Scene, random_scene

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPTokenizer

PLAIN_CLUTTER, PLAIN_SLANG = 0.15, 0.3  # of scenes with captions
SIDE = 48  # pixels, of the images that the model takes
CAPTIONS = ("{n} {size} {colour} {things} {place}, {ground} background",
            "{n} {colour} {things} {place}, {ground} background",
            "{n} {size} {colour} {things} on {ground}, {place}", "{n} {colour} {things} on {ground}, {place}",
            "{place}: {n} {colour} {things}, {ground} background",
            "{ground} background with {n} {colour} {things} {place}",
            "{ground} background, {n} {size} {colour} {things}",
            "picture of {n} {colour} {things} and {rival} on {ground}",
            "{n} {size} {colour} {things} and {rival}, {ground} background", "{n} {colour} {things}")
# The last captions that the demo's model is trained on name the place and the backdrop, never the objects.
BACKDROPS = ("{ground} background, things {place}", "{place}, on {ground}", "a {ground} picture, {place}",
             "something {place} on a {ground} background")


def write_pretraining(folder: Path, count: int, kinds: Sequence[tuple[str, ...]], seed: int = 0) -> None:
    """Write `count` pairs to train the demo's model on, and 200 more as `valid`, in the same layout without title_neg.

    `kinds` are the templates, in equal shares: (CAPTIONS, TITLES) for the towers, (BACKDROPS,) for the projections.
    """
    rng = random.Random(f"pretraining {seed}")
    for split, rows in (("train", count), ("valid", 200)):
        parts = [pretraining_rows(rng, rows // len(kinds), templates) for templates in kinds]
        write_split(folder, split, list(chain.from_iterable(parts)), None)


def pretraining_rows(rng: random.Random, count: int, templates: Sequence[str]) -> Iterator[tuple[Scene, Title]]:
    """Yield `count` scenes that no split of the demo has, with the demo's titles or with plain captions."""
    if templates is TITLES:
        yield from scene_rows(rng, "pretrain", count, set())
        return
    while count:
        scene = random_scene(rng, PLAIN_CLUTTER)
        if scene.lot in LOTS["pretrain"]:
            yield scene, fill_template(rng, scene, templates, PLAIN_SLANG)
            count -= 1


def demo_model_config(vocab: int) -> CLIPConfig:
    """The demo CLIP for a vocabulary of `vocab` tokens, whose last two are the start and the end of a title."""
    from transformers import CLIPConfig

    start, end = vocab - 2, vocab - 1
    return CLIPConfig(
        projection_dim=64,
        vision_config={"image_size": SIDE, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512,
                       "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 64},
        text_config={"vocab_size": vocab, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3,
                     "num_attention_heads": 4, "max_position_embeddings": 77, "projection_dim": 64,
                     "bos_token_id": start, "eos_token_id": end, "pad_token_id": end},
    )


def new_demo_model(folder: Path, seed: int = 0) -> None:
    """Write the untrained demo CLIP, at most 4 MB of fp16 weights, as a folder that transformers loads.

    Weights depend on `seed` alone; the vocabulary is always the same.
    """
    import torch
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = _tokenizer()
    config = demo_model_config(len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config).half()
    model.save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)


def _tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary learned from captions and titles, and with all 512 byte pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    rng = random.Random("vocabulary")
    captioned = pretraining_rows(rng, 3000, CAPTIONS)
    titled = scene_rows(rng, "train", 3000, set())
    texts = [title.text for _, title in chain(captioned, titled)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = CLIPTokenizer().backend_tokenizer.normalizer
    learner.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    # transformers declares list[str] and takes pairs.
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)  # type: ignore[arg-type]


def main(folder: Path) -> None:
    """Write the pairs for the towers and for the projections, and the untrained model."""
    write_pretraining(folder / "mixed", 20000, (CAPTIONS, TITLES))
    write_pretraining(folder / "backdrops", 5000, (BACKDROPS,), seed=1)
    new_demo_model(folder / "untrained")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
