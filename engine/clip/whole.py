"""Load a whole CLIPModel, its tokenizer and its image processor, and refuse whatever does not fit together.

transformers builds an empty tokenizer where files are missing, draws missing weights at random, and pads over what a
config leaves out. Here each of these is a UserError of one line that names the file and the fix. No code of a folder
runs: `auto_map` is refused, and pickled weights are read with `weights_only`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from data.batch import UserError
from data.images.decode import ImageSpec, tokenize
from engine.clip.model_files import ModelFiles
from engine.clip.weights import WEIGHTS

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionModel

CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".h5", ".msgpack")
HISTORIC_EOS = 2  # in configs of old transformers versions; it means: pool at the highest token id
HISTORIC_BOS = 0


class WholeModel(NamedTuple):
    """A CLIPModel in fp32 with its own preprocessing, as transformers has loaded both."""

    model: CLIPModel
    processor: Any
    commit: str | None = None  # of a hub repository
    subfolder: str = ""  # of the CLIPModel in a sentence-transformers folder


def load_whole(name: str, commit: str | None = None) -> WholeModel:
    """Load a plain CLIPModel or a sentence-transformers folder, by hub name (at `commit`) or path, in fp32.

    Raises UserError when there is no such model, when it is something other than a CLIPModel, and when its files are
    damaged, incomplete or do not fit one another.
    """
    with _errors_of(name):
        files = ModelFiles(name, commit)
        config = _load_config(files)
        processor = _load_processor(files, config)
        return WholeModel(_load_model(files, config), processor, files.commit(), files.where["subfolder"])


def load_tower(name: str, commit: str | None, tower: str) -> CLIPVisionModel | CLIPTextModel:
    """Load vision_model or text_model alone, of a model that has been loaded whole before. Raises UserError."""
    from transformers import CLIPTextModel, CLIPVisionModel

    with _errors_of(name):
        files = ModelFiles(name, commit)
        config: Any = _load_config(files)
        kind: Any = {"vision_model": CLIPVisionModel, "text_model": CLIPTextModel}[tower]
        part: Any = config.vision_config if tower == "vision_model" else config.text_config
        model, report = kind.from_pretrained(files.source, **files.where, config=part, dtype=torch.float32,
                                             trust_remote_code=False, output_loading_info=True)
        if report["missing_keys"]:
            files.refuse(f"its weights lack {min(report['missing_keys'])}; its files have changed since this run began")
        return model.eval()


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Keep transformers quiet meanwhile; turn its errors into a UserError of one line."""
    try:
        with _quiet_transformers():
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of many kinds, from several libraries; all of them are about this model
        raise UserError(_load_failure(name, error)) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars, which every rank prints, and its warnings, which are errors here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _one_line(error: Exception) -> str:
    """Return the message of an error on one line, cut to 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _load_failure(name: str, error: Exception) -> str:
    if Path(name).expanduser().is_dir():
        return f"--model {name} does not load as a CLIPModel folder: {_one_line(error)}"
    return (f"--model {name}: no such folder, and the hub did not give it ({_one_line(error)}); check the name and "
            "the network, or `hf auth login` for a private model")


def _load_config(files: ModelFiles) -> CLIPConfig:
    """Load config.json; refuse whatever would load something else than a plain CLIPModel."""
    from transformers import CLIPConfig
    from transformers.utils import cached_file

    if files.path("adapter_config.json"):
        files.refuse("adapter_config.json: a PEFT adapter (LoRA); put it into its base model with merge_and_unload() "
                     "and give the folder saved from that")
    if not files.path("config.json"):
        cached_file(files.source, "config.json", **files.where)  # raises the hub's reason: no such name, no network
        files.refuse("there is no config.json; give the folder or repository of a CLIPModel")
    for name in CONFIGS:
        if _has_key(files.config(name), "auto_map"):
            files.refuse(f"{name} names code of its own (auto_map), which is never run; give a model that transformers "
                         "has a CLIPModel for, or remove auto_map if this is one")
    content = files.config("config.json")
    if content.get("model_type") != "clip":
        files.refuse(f"config.json says this is a {content.get('model_type')!r} model; thumbtune tunes CLIPModel "
                     "checkpoints (model_type 'clip')")
    for part in (content, content.get("text_config"), content.get("vision_config")):
        _refuse_variants(files, part or {})
    try:
        return CLIPConfig.from_pretrained(files.source, **files.where)
    except Exception as error:  # of many kinds; all of them are about this file
        files.refuse(f"config.json holds no CLIPConfig ({_one_line(error)}); copy it again from the base model")


def _has_key(content: object, key: str) -> bool:
    """Return whether a dictionary, or one anywhere inside it, has this key."""
    if not isinstance(content, dict):
        return False
    return key in content or any(_has_key(part, key) for part in content.values())


def _refuse_variants(files: ModelFiles, config: Mapping[str, Any]) -> None:
    """Refuse a config that needs other weights or another attention than a plain CLIPModel has."""
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        files.refuse(f"config.json has a quantization_config ({method}), and rounded weights are no base to tune; give "
                     "the checkpoint that was quantized")
    for key in ("_attn_implementation", "attn_implementation", "_flash_attn_2_enabled"):
        if config.get(key) not in (None, False, "eager", "sdpa"):
            files.refuse(f"config.json has {key}={config[key]!r}; thumbtune runs attention through torch, so remove "
                         f"{key}")


def _load_processor(files: ModelFiles, config: CLIPConfig) -> Any:
    """Load the CLIPProcessor and compare its image processor and tokenizer with the config."""
    from transformers import CLIPProcessor

    tables = _tokenizer_files(files)
    settings = files.config("processor_config.json").get("image_processor")
    source = "processor_config.json" if settings else "preprocessor_config.json"
    settings = settings or files.config(source)
    if not settings:
        files.refuse("there is no preprocessor_config.json, so nothing says how images are prepared; copy it from the "
                     "base model")
    try:
        processor = CLIPProcessor.from_pretrained(files.source, **files.where, trust_remote_code=False)
    except Exception:
        for name in tables:
            files.read(name)  # raises UserError where the file is the reason
        raise
    _check_images(files, source, settings, processor.image_processor, config)
    text: Any = config.text_config  # declared as a dictionary or None as well, which it is before __post_init__ alone
    _check_tokenizer(files, processor.tokenizer, text)
    _set_lengths(processor.tokenizer, text.max_position_embeddings)
    return processor


def _check_images(files: ModelFiles, source: str, settings: Mapping[str, Any], image_processor: Any,
                  config: CLIPConfig) -> None:
    """Compare the image processor with the vision tower. `settings` are those in the file `source`."""
    for key in ("image_mean", "image_std") if settings.get("do_normalize", True) else ():
        values = settings.get(key)
        if not isinstance(values, list) or len(values) != 3 or (key == "image_std" and min(values) <= 0):
            files.refuse(f"{source} has {key}={values}; write the three values the model was trained with")
    vision: Any = config.vision_config
    side = vision.image_size
    crop = ImageSpec.from_processor(image_processor).crop
    if list(crop) != (side if isinstance(side, list) else [side, side]):
        files.refuse(f"{source} crops to {crop[0]}x{crop[1]} pixels where vision_config.image_size in config.json is "
                     f"{side}; copy both from the same model")


def _tokenizer_files(files: ModelFiles) -> list[str]:
    """Return the tokenizer's JSON files. Refuses a folder without: transformers would make an empty tokenizer."""
    whole = files.path("tokenizer.json")
    missing = [name for name in ("vocab.json", "merges.txt") if not files.path(name)]
    if missing and whole is None:
        files.refuse(f"the tokenizer is missing: there is no tokenizer.json and no {' or '.join(missing)}; copy the "
                     "tokenizer files from the base model")
    names = ("tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")
    return [name for name in names if files.path(name)]


def _check_tokenizer(files: ModelFiles, tokenizer: Any, text: Any) -> None:
    """Compare the tokenizer with the text tower: its ids have embeddings, and a title ends where the tower pools."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        files.refuse(f"tokenizer_config.json names {type(tokenizer).__name__}, which has no fast version; give a model "
                     "with a tokenizer.json")
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    known = tokenizer.get_vocab()
    highest = max(known, key=known.__getitem__)
    if not isinstance(text.eos_token_id, int):
        files.refuse(f"config.json has text_config.eos_token_id={text.eos_token_id}; write the one id that titles end "
                     f"with ({eos})")
    if known[highest] >= text.vocab_size:
        files.refuse(f"the tokenizer's token {highest!r} has the id {known[highest]}, but text_config.vocab_size in "
                     f"config.json is {text.vocab_size}; remove added tokens, or give the tokenizer of this model")
    if tokenizer.pad_token_id is None:
        files.refuse(f'tokenizer_config.json names no pad_token; add "pad_token": "{tokenizer.eos_token}"')
    if text.eos_token_id == HISTORIC_EOS:
        if eos is not None and known[highest] > eos:
            files.refuse(f"config.json has text_config.eos_token_id=2, which pools at the highest id of a title, and "
                         f"the tokenizer's {highest!r} is above the end of text; write eos_token_id {eos}")
    elif eos != text.eos_token_id:
        files.refuse(f"the tokenizer ends titles with the id {eos}, but text_config.eos_token_id in config.json is "
                     f"{text.eos_token_id}; copy both from the same model")
    if text.bos_token_id not in (None, HISTORIC_BOS, bos):
        files.refuse(f"the tokenizer begins titles with the id {bos}, but text_config.bos_token_id in config.json is "
                     f"{text.bos_token_id}; copy both from the same model")
    title = tokenize(tokenizer, ["a title"], text.max_position_embeddings)[0]
    if title[0] != bos or title[-1] != eos or len(title) < 3:
        files.refuse(f"the tokenizer turns 'a title' into {title}, which does not begin with {bos} and end with {eos}; "
                     "copy tokenizer.json and tokenizer_config.json from the base model")


def _set_lengths(tokenizer: Any, max_tokens: int) -> None:
    """Make other libraries that load the exported tokenizer cut and pad titles as `tokenize` does."""
    tokenizer.model_max_length = max_tokens
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for key in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):  # of a stored truncation
        tokenizer.init_kwargs.pop(key, None)


def _load_model(files: ModelFiles, config: CLIPConfig) -> CLIPModel:
    """Load the CLIPModel in fp32; refuse weights that are missing, unexpected, of another shape or not finite."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers import CLIPModel

    weights = _check_weight_files(files) if files.is_local else "the checkpoint"
    loaded: Any  # declared as the model alone, without the report that output_loading_info adds
    try:
        loaded = CLIPModel.from_pretrained(
            files.source, **files.where, config=config, dtype=torch.float32, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True)
    except (UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        raise UserError(f"--model {files.name}: {weights}: its weights are damaged, or hold code, which is never run; "
                        "give them as safetensors") from error
    model, report = loaded
    for name, stored, expected in sorted(report["mismatched_keys"]):
        files.refuse(f"{weights} has {name} as {_shape(stored)}, but config.json asks for {_shape(expected)}; copy "
                     "both from the same model")
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if missing or unexpected:
        files.refuse(f"{weights} is not this CLIPModel: {len(missing)} weights are missing{_first_name(missing)}, "
                     f"{len(unexpected)} unexpected{_first_name(unexpected)}; "
                     "give one saved by CLIPModel.save_pretrained")
    if bad := non_finite(model):
        files.refuse(f"{weights} holds NaN or infinity in {bad}; give another checkpoint (a cast to fp16 may have "
                     "overflowed)")
    return model.eval()


def _shape(size: Collection[int]) -> str:
    return "x".join(map(str, size))


def _first_name(names: Collection[str]) -> str:
    """Return the first of `names` in brackets, for a message; nothing where there are none."""
    return f" ({min(names)}{', …' if len(names) > 1 else ''})" if names else ""


def non_finite(model: nn.Module) -> str | None:
    """Return the name of a parameter that holds NaN or infinity; None where all are finite."""
    return next((name for name, value in model.named_parameters() if not is_finite(value.detach())), None)


def is_finite(value: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    # The sum is cheaper than a mask, and not finite where a value is not; it may overflow where all are finite.
    return bool(value.sum().isfinite() or value.isfinite().all())


def _check_weight_files(files: ModelFiles) -> str:
    """Check the files of a local folder that transformers reads the weights from; return the first one's name."""
    from safetensors import SafetensorError, safe_open

    first = next((name for name in WEIGHTS if files.path(name)), None)
    if first is None:
        folder = Path(files.source) / files.where["subfolder"]
        others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_WEIGHTS)
        only = f" (only {', '.join(others[:3])})" if others else ""
        files.refuse(f"there are no weights: no model.safetensors{only}; save the model with "
                     "CLIPModel.save_pretrained")
    index = files.config(first).get("weight_map") if first.endswith(".index.json") else {}
    if not isinstance(index, dict):
        files.refuse(f"{first} has no weight_map; copy it again from where the model came from")
    for name in sorted(set(index.values())) or [first]:
        path = files.path(name)
        if path is None:
            files.refuse(f"{name} is missing, which {first} lists; copy it from where the model came from")
        if name.endswith(".safetensors"):
            try:
                with safe_open(path, "pt"):
                    pass  # the header is whole, and the file has the length that it states
            except SafetensorError as error:
                files.refuse(f"{name}: its weights are damaged or cut off ({error}); copy it again from where the "
                             "model came from")
    return first
