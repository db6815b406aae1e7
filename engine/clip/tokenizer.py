"""The tokenizer of a model: loaded by transformers, refused where it does not fit the text tower."""

from __future__ import annotations

from typing import Any

from data.images.decode import tokenize
from engine.clip.families import CLIP, SHIFTED_POSITIONS, SIGLIP_2, Family
from engine.clip.model_files import ModelFiles

HISTORIC_EOS = 2  # in configs of old transformers versions; transformers then pools at the highest token id
HISTORIC_BOS = 0
# Any of these is a whole tokenizer, for families other than CLIP.
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model",
                "tokenizer.model")
EXAMPLE = "A title: 24 cafés, (one) Rating!"


def find_tokenizer_files(files: ModelFiles, family: Family) -> list[str]:
    """Return the tokenizer's JSON files. Refuses a folder without: transformers would make an empty tokenizer."""
    if files.config("tokenizer_config.json").get("tokenizer_class") == "SiglipTokenizer":
        files.refuse("tokenizer_config.json names SiglipTokenizer, which has no fast version; the nearest that has one "
                     f"is a SigLIP 2, such as {SIGLIP_2}")
    whole = files.path("tokenizer.json")
    missing = [name for name in ("vocab.json", "merges.txt") if not files.path(name)]
    if family is not CLIP and any(files.path(name) for name in VOCABULARIES):
        missing = []
    if missing and whole is None:
        files.refuse(f"the tokenizer is missing: there is no tokenizer.json and no {' or '.join(missing)}; copy the "
                     "tokenizer files from the base model")
    names = ("tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")
    return [name for name in names if files.path(name)]


def longest_title(family: Family, text: Any, tokenizer: Any) -> int:
    """Return how many tokens a title may have, special tokens included: as many as the tower has positions for.

    `text` is the config of the text tower. Families that do not pool at the end token may have been trained with
    fewer tokens, which the tokenizer's `model_max_length` says.
    """
    positions = text.max_position_embeddings
    if text.model_type in SHIFTED_POSITIONS:
        positions -= text.pad_token_id + 1
    return positions if family.pooling == "eos" else min(positions, tokenizer.model_max_length)


def check_tokenizer(files: ModelFiles, tokenizer: Any, text: Any, family: Family) -> None:
    """Refuse a tokenizer that does not fit the text tower: ids without embeddings, or no token where the tower pools.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        files.refuse(f"tokenizer_config.json names {type(tokenizer).__name__}, which has no fast version; give a model "
                     "with a tokenizer.json")
    known = tokenizer.get_vocab()
    highest = max(known, key=known.__getitem__)
    if family.pooling == "eos" and not isinstance(text.eos_token_id, int):
        files.refuse(f"config.json has text_config.eos_token_id={text.eos_token_id}; write the one id that titles end "
                     f"with ({tokenizer.eos_token_id})")
    if known[highest] >= text.vocab_size:
        files.refuse(f"the tokenizer's token {highest!r} has the id {known[highest]}, but text_config.vocab_size in "
                     f"config.json is {text.vocab_size}; remove added tokens, or give the tokenizer of this model")
    if tokenizer.pad_token_id is None:
        files.refuse(f'tokenizer_config.json names no pad_token; add "pad_token": "{tokenizer.eos_token}"')
    if family.pooling == "eos":
        _check_ends(files, tokenizer, text, family)
    else:
        _check_pooled_token(files, tokenizer, text, family)
    if family is not CLIP:  # the Python class of a tokenizer may do more than its tokenizer.json, which is what we run
        longest = longest_title(family, text, tokenizer)
        ours = tokenize(tokenizer, [EXAMPLE], longest)[0]
        theirs = tokenizer(EXAMPLE, truncation=True, max_length=longest)["input_ids"]
        if ours != theirs:
            files.refuse(f"{type(tokenizer).__name__} does more than its tokenizer.json says: {EXAMPLE!r} is {theirs} "
                         f"and not {ours}; save it again with AutoTokenizer.from_pretrained and save_pretrained")


def _check_ends(files: ModelFiles, tokenizer: Any, text: Any, family: Family) -> None:
    """Refuse a tokenizer whose titles do not end where the tower pools."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    known = tokenizer.get_vocab()
    highest = max(known, key=known.__getitem__)
    if family is CLIP and text.eos_token_id == HISTORIC_EOS:
        if eos is not None and known[highest] > eos:
            files.refuse(f"config.json has text_config.eos_token_id=2, which pools at the highest id of a title, and "
                         f"the tokenizer's {highest!r} is above the end of text; write eos_token_id {eos}")
    elif eos != text.eos_token_id:
        files.refuse(f"the tokenizer ends titles with the id {eos}, but text_config.eos_token_id in config.json is "
                     f"{text.eos_token_id}; copy both from the same model")
    if family is CLIP and text.bos_token_id not in (None, HISTORIC_BOS, bos):  # others' config is not read for it
        files.refuse(f"the tokenizer begins titles with the id {bos}, but text_config.bos_token_id in config.json is "
                     f"{text.bos_token_id}; copy both from the same model")
    title = tokenize(tokenizer, ["a title"], text.max_position_embeddings)[0]
    if title[0] != bos or title[-1] != eos or len(title) < 3:
        files.refuse(f"the tokenizer turns 'a title' into {title}, which does not begin with {bos} and end with {eos}; "
                     "copy tokenizer.json and tokenizer_config.json from the base model")


def _check_pooled_token(files: ModelFiles, tokenizer: Any, text: Any, family: Family) -> None:
    """Refuse a tokenizer whose first token, or padding, is not what a tower that pools there was trained with."""
    title = tokenize(tokenizer, ["a title"], text.max_position_embeddings)[0]
    if family.pooling == "last":
        if tokenizer.padding_side != "right" or "attention_mask" in tokenizer.model_input_names:
            files.refuse('the tower was trained with padding on the right, without a mask; write "padding_side": '
                         '"right" and "model_input_names": ["input_ids"] into tokenizer_config.json')
        if len(title) < 2:
            files.refuse(f"the tokenizer turns 'a title' into {title}; copy tokenizer.json from the base model")
        return
    first = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    if title[0] != first or len(title) < 3:
        files.refuse(f"the tokenizer turns 'a title' into {title}, which does not begin with {first}, the token that "
                     "is pooled; copy tokenizer.json and tokenizer_config.json from the base model")
    if text.model_type in SHIFTED_POSITIONS and tokenizer.pad_token_id != text.pad_token_id:
        files.refuse(f"the tokenizer pads with the id {tokenizer.pad_token_id}, but text_config.pad_token_id in "
                     f"config.json, from which positions are counted, is {text.pad_token_id}; copy both from the same "
                     "model")


def set_lengths(tokenizer: Any, max_tokens: int) -> None:
    """Set lengths so that other libraries cut and pad titles as `tokenize` does when they load the exported tokenizer.
    """
    tokenizer.model_max_length = max_tokens
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for key in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):  # of a stored truncation
        tokenizer.init_kwargs.pop(key, None)
