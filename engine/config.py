"""One frozen dataclass holds every setting; flags, TOML keys and `--help` derive from it. Imports nothing heavy."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints


def setting(default: Any, group: str, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that also knows its `--help` group, line and choices."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the reference recipe."""

    # What to tune, on what, and where results go.
    model: str = setting("sentence-transformers/clip-ViT-L-14", "model", "hub name or folder of a CLIPModel")
    dataset: str = setting("shawhin/yt-title-thumbnail-pairs", "data", "hub name, folder or file of pairs")
    out: str = setting("", "output", "run folder (default: runs/DATE-DATASET)")
    cache_dir: str = setting("~/.cache/thumbtune", "output", "feature store and fetched images")
    # Columns are detected by name; these override the detection.
    image_column: str = setting("", "data", "column with the image or its URL (default: detected)")
    title_column: str = setting("", "data", "column with the title (default: detected)")
    negative_column: str = setting("", "data", "column with the hard negative title (default: detected)")
    split: str = setting("test", "data", "split that `eval` measures")
    # What trains: substrings of parameter names.
    trainable: tuple[str, ...] = setting(("projection",), "recipe",
                                         "train parameters whose name holds one of these, or all")
    mode: str = setting("auto", "recipe", "cached: features once; streaming: towers every step; auto: cached if it can",
                        ("auto", "cached", "streaming"))
    # Optimisation, as the reference does it.
    epochs: int = setting(2, "recipe", "passes over the training pairs")
    batch_size: int = setting(16, "recipe", "pairs a step, over all ranks together")
    lr: float = setting(1e-4, "recipe", "peak learning rate")
    schedule: str = setting("linear", "recipe", "decay of the learning rate", ("linear", "cosine", "constant"))
    warmup: float = setting(0.0, "recipe", "share of all steps spent warming the learning rate up")
    weight_decay: float = setting(0.0, "recipe", "AdamW weight decay")
    clip_norm: float = setting(1.0, "recipe", "gradient norm is clipped at this; 0 turns clipping off")
    scale: float = setting(20.0, "recipe", "inverse temperature of the loss")
    # The loss: what is ranked against what, and what repeats mean.
    loss: str = setting("image-to-text", "recipe", "which way pairs are told apart",
                        ("image-to-text", "symmetric", "sigmoid"))
    duplicates: str = setting("mask", "recipe", "identical titles or images: mask: no negatives; multi: right answers "
                              "too; keep: negatives, as the reference", ("mask", "multi", "keep"))
    hardness: float = setting(0.0, "recipe", "weight of similar negatives: adds X * cosine to their logits")
    label_smoothing: float = setting(0.0, "recipe", "share of the target spread evenly over all candidates")
    l2_sp: float = setting(0.0, "recipe", "weight of the squared distance to the pretrained weights, of what trains")
    micro_batch: int = setting(0, "recipe", "streaming: rows a rank whose activations are held at once; 0: all")
    seed: int = setting(42, "recipe", "seeds the order of the pairs")
    # When to look and to save.
    log_every: int = setting(10, "loop", "steps between flushes of the log (the only host sync)")
    eval_every: int = setting(0, "loop", "steps between evaluations; 0: every epoch")
    save_every: int = setting(0, "loop", "steps between checkpoints; 0: every epoch")
    keep: int = setting(3, "loop", "checkpoints kept beside `last` and `best`")
    resume: bool = setting(False, "loop", "carry on from the newest valid checkpoint in --out")
    # The machine.
    device: str = setting("auto", "machine", "where to compute", ("auto", "cpu", "cuda"))
    precision: str = setting("auto", "machine", "auto: bf16 where it is faster", ("auto", "bf16", "fp32"))
    workers: int = setting(2, "machine", "threads a rank that decode images")
    profile: bool = setting(False, "machine", "write a trace of a few steps to the run folder")
    dist_timeout: float = setting(600.0, "machine", "seconds after which a stalled rank is an error")
    # Reading.
    mine_negatives: str = setting("off", "data", "give rows without a negative the most similar title (hard) or the "
                                  "least (far)", ("off", "hard", "far"))
    resize: int = setting(0, "output", "store JPEG crops of this many pixels a side; 0 keeps the original bytes")
    retry_failed: bool = setting(False, "data", "ask again for URLs that failed for good in an earlier run")
    variants: bool = setting(False, "data", "YouTube: try the maxres, sd and hq thumbnails in this order")
    allow_host: tuple[str, ...] = setting((), "data", "private hosts that images may be fetched from")
    max_bad: float = setting(0.05, "data", "stop when a larger share of the rows is unusable")
    max_pixels: int = setting(25_000_000, "data", "refuse images with more pixels than this")
    strict: bool = setting(False, "output", "exit 1 when there are errors")
    json: bool = setting(False, "output", "print JSON to stdout")


def config_fields() -> dict[str, Field[Any]]:
    """The settings by name, in order."""
    return {f.name: f for f in fields(Config)}


def unknown(what: str, word: str, known: Sequence[str]) -> str:
    """A sentence that names the word nobody knows and the nearest one somebody does."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"unknown {what} {word}" + (f"; did you mean {near[0]}?" if near else f"; there is {', '.join(known)}"
                                       if len(known) < 12 else "")


def comma_list(text: str) -> tuple[str, ...]:
    """The parts of `a,b`, blanks and empty parts left out."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises ValueError with one sentence for an unknown key or a wrong type."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--config {path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"--config {path}: {error}") from None
    hints, values = get_type_hints(Config), {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise ValueError(f"--config {path}: " + unknown("key", name, list(hints)))
        default = config_fields()[name].default
        if isinstance(default, tuple) and isinstance(value, (list, str)):
            value = tuple(value) if isinstance(value, list) else comma_list(value)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise ValueError(f"--config {path}: {key} must be {type(default).__name__}, not {type(value).__name__}")
        values[name] = value
    return values


def check(config: Config) -> None:
    """Raises ValueError with one sentence for a value that cannot work."""
    at_least = {"epochs": 1, "batch_size": 1, "log_every": 1, "eval_every": 0, "save_every": 0, "keep": 1,
                "workers": 1, "resize": 0, "lr": 0,
                "weight_decay": 0, "clip_norm": 0, "max_bad": 0, "max_pixels": 1, "scale": 1e-9,
                "dist_timeout": 1,
                "hardness": 0, "label_smoothing": 0, "l2_sp": 0, "micro_batch": 0}
    for name, low in at_least.items():
        value = getattr(config, name)
        if not value >= low:  # `not >=` refuses NaN as well
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low:g}, not {value:g}")
    if not 0 <= config.warmup < 1:
        raise ValueError(f"--warmup is a share of all steps between 0 and 1, not {config.warmup:g}")
    if not config.label_smoothing < 1:
        raise ValueError(f"--label-smoothing is a share below 1, not {config.label_smoothing:g}")
    if config.loss == "sigmoid" and (config.hardness or config.label_smoothing):
        raise ValueError("--loss sigmoid judges each pair alone; --hardness and --label-smoothing need a softmax: "
                         "leave them out or use --loss symmetric")
    for name, spec in config_fields().items():
        allowed = spec.metadata["choices"]
        if allowed and getattr(config, name) not in allowed:
            raise ValueError(f"--{name.replace('_', '-')} must be one of {', '.join(allowed)}, "
                             f"not {getattr(config, name)!r}")
    if not config.trainable:
        raise ValueError("--trainable names nothing; try --trainable projection")


def as_dict(config: Config) -> dict[str, Any]:
    """The settings as plain JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}

