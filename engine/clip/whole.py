"""Load a whole dual encoder, its tokenizer and its image processor, and refuse whatever does not fit together.

transformers builds an empty tokenizer where files are missing, draws missing weights at random, and pads over what a
config leaves out. Here each of these is a UserError of one line that names the file and the fix. No code of a folder
runs: `auto_map` is refused, and pickled weights are read with `weights_only`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from data.batch import UserError
from data.images.decode import ImageSpec
from engine.clip.families import ANY_SIZE, CLIP, FAMILIES, REFUSED, TEXT_TOWERS, VISION_TOWERS, Family
from engine.clip.model_files import ModelFiles
from engine.clip.tokenizer import check_tokenizer, find_tokenizer_files, longest_title, set_lengths
from engine.clip.weights import WEIGHTS

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel

CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
UNUSED = re.compile(r"\.(pooler\.dense\.(weight|bias)|position_ids|token_type_ids)$")
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".h5", ".msgpack")


class WholeModel(NamedTuple):
    """A CLIPModel, or another dual encoder, in fp32, and its processor, both as transformers loads them."""

    model: CLIPModel
    processor: Any
    commit: str | None = None  # of a hub repository
    subfolder: str = ""  # of the CLIPModel in a sentence-transformers folder
    family: Family = CLIP


def load_whole(name: str, commit: str | None = None) -> WholeModel:
    """Load a model of one of FAMILIES or a sentence-transformers folder, by hub name (at `commit`) or path, in fp32.

    Raises UserError when there is no such model, when it is something else, and when its files are damaged, incomplete
    or do not fit one another.
    """
    with _errors_of(name):
        files = ModelFiles(name, commit)
        family = find_family(files)
        config = _load_config(files, family)
        processor = _load_processor(files, config, family)
        model = _load_model(files, config, family)
        return WholeModel(model, processor, files.commit(), files.where["subfolder"], family)


def load_tower(name: str, commit: str | None, tower: str) -> CLIPVisionModel | CLIPTextModel:
    """Load vision_model or text_model alone, of a model that has been loaded whole before. Raises UserError."""
    from transformers import CLIPTextModel, CLIPVisionModel

    with _errors_of(name):
        files = ModelFiles(name, commit)
        config = _load_config(files, find_family(files))
        kind: Any = {"vision_model": CLIPVisionModel, "text_model": CLIPTextModel}[tower]
        part: Any = config.vision_config if tower == "vision_model" else config.text_config
        model, report = kind.from_pretrained(files.source, **files.where, config=part, dtype=torch.float32,
                                             trust_remote_code=False, output_loading_info=True)
        if report["missing_keys"]:
            files.refuse(f"its weights lack {min(report['missing_keys'])}; its files have changed since this run began")
        return model.eval()


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Silence transformers meanwhile; turn its errors into a UserError of one line."""
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


def find_family(files: ModelFiles) -> Family:
    """Return the family of the model, by its config.json; refuse models that cannot be tuned or bring code."""
    from transformers.utils import cached_file

    if files.path("adapter_config.json"):
        files.refuse("adapter_config.json: a PEFT adapter (LoRA); put it into its base model with merge_and_unload() "
                     "and give the folder saved from that")
    if not files.path("config.json"):
        if files.path("open_clip_config.json"):
            files.refuse("open_clip_config.json without a config.json: an open_clip folder. Most on the hub are there "
                         "for transformers too, under laion/ or google/; one shaped as OpenAI's converts with "
                         "transformers' models/clip/convert_clip_original_pytorch_to_hf.py")
        cached_file(files.source, "config.json", **files.where)  # raises the hub's reason: no such name, no network
        files.refuse("there is no config.json; give the folder or repository of a CLIPModel")
    kind = str(files.config("config.json").get("model_type"))
    if kind in REFUSED:
        files.refuse(f"config.json says this is a {kind!r} model: {REFUSED[kind]}")
    for name in CONFIGS:
        if _has_key(files.config(name), "auto_map"):
            files.refuse(f"{name} names code of its own (auto_map), which is never run; give a model that transformers "
                         "has a CLIPModel for, or remove auto_map if this is one")
    if kind not in FAMILIES:
        files.refuse(f"config.json says this is a {kind!r} model; thumbtune tunes CLIPModel checkpoints (model_type "
                     f"'clip') and those of {', '.join(list(FAMILIES)[1:])}")
    return FAMILIES[kind]


def _load_config(files: ModelFiles, family: Family) -> Any:
    """Load config.json; refuse settings under which anything but a plain model of the family would load."""
    import transformers

    content = files.config("config.json")
    for part in (content, content.get("text_config"), content.get("vision_config")):
        _refuse_variants(files, part or {})
    kind = getattr(transformers, family.model_class).config_class
    try:
        config = kind.from_pretrained(files.source, **files.where)
    except Exception as error:  # of many kinds; all of them are about this file
        files.refuse(f"config.json holds no {kind.__name__} ({_one_line(error)}); copy it again from the base model")
    if family.model_type == "vision-text-dual-encoder":
        for name, known in (("vision_config", VISION_TOWERS), ("text_config", TEXT_TOWERS)):
            tower = getattr(config, name).model_type
            if tower not in known:
                files.refuse(f"config.json has a tower of the kind {tower!r} as {name}; supported are "
                             f"{', '.join(known)}")
    return config


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


def _load_processor(files: ModelFiles, config: Any, family: Family) -> Any:
    """Load the processor and compare its image processor and tokenizer with the config."""
    import transformers

    tables = find_tokenizer_files(files, family)
    settings = files.config("processor_config.json").get("image_processor")
    source = "processor_config.json" if settings else "preprocessor_config.json"
    settings = settings or files.config(source)
    if not settings:
        files.refuse("there is no preprocessor_config.json, so nothing says how images are prepared; copy it from the "
                     "base model")
    try:
        kind = getattr(transformers, family.processor_class)
        processor = kind.from_pretrained(files.source, **files.where, trust_remote_code=False)
    except Exception:
        for name in tables:
            files.read(name)  # raises UserError where the file is the reason
        raise
    _check_images(files, source, settings, processor.image_processor, config)
    check_tokenizer(files, processor.tokenizer, config.text_config, family)
    set_lengths(processor.tokenizer, longest_title(family, config.text_config, processor.tokenizer))
    return processor


def _check_images(files: ModelFiles, source: str, settings: Mapping[str, Any], image_processor: Any,
                  config: Any) -> None:
    """Compare the image processor with the vision tower. `settings` are those in the file `source`."""
    for key in ("image_mean", "image_std") if settings.get("do_normalize", True) else ():
        values = settings.get(key)
        if not isinstance(values, list) or len(values) != 3 or (key == "image_std" and min(values) <= 0):
            files.refuse(f"{source} has {key}={values}; write the three values the model was trained with")
    side = config.vision_config.image_size
    crop = ImageSpec.from_processor(image_processor).crop
    if config.vision_config.model_type in ANY_SIZE:
        return
    if list(crop) != (side if isinstance(side, list) else [side, side]):
        files.refuse(f"{source} crops to {crop[0]}x{crop[1]} pixels where vision_config.image_size in config.json is "
                     f"{side}; copy both from the same model")


def _load_model(files: ModelFiles, config: Any, family: Family) -> Any:
    """Load the model in fp32; refuse weights that are missing, unexpected, of another shape or not finite."""
    from pickle import UnpicklingError

    import transformers
    from safetensors import SafetensorError

    weights = _check_weight_files(files) if files.is_local else "the checkpoint"
    # Other shapes are let through here, and refused below with the name of one tensor in place of a list of all.
    try:
        model, report = getattr(transformers, family.model_class).from_pretrained(
            files.source, **files.where, config=config, dtype=torch.float32, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True)
    except (UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        raise UserError(f"--model {files.name}: {weights}: its weights are damaged, or hold code, which is never run; "
                        "give them as safetensors") from error
    for name, stored, expected in sorted(report["mismatched_keys"]):
        files.refuse(f"{weights} has {name} as {_shape(stored)}, but config.json asks for {_shape(expected)}; copy "
                     "both from the same model")
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if family is not CLIP:  # a BERT is often saved with a pooler that is not part of the dual encoder
        unexpected = {name for name in unexpected if not UNUSED.search(name)}
    if missing or unexpected:
        files.refuse(f"{weights} is not this {family.model_class}: {len(missing)} weights are missing"
                     f"{_first_name(missing)}, {len(unexpected)} unexpected{_first_name(unexpected)}; "
                     f"give one saved by {family.model_class}.save_pretrained")
    if buffers := set(model.state_dict()) - {name for name, _ in model.named_parameters()}:
        files.refuse(f"its towers hold values that are no parameters ({min(buffers)}), which an export would lose; "
                     "give a model with another tower")
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
