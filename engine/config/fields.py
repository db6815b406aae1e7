"""Every setting, declared once: value, help, commands, bounds. Flags, TOML keys and `--help` derive from it.

Imports nothing heavy, as `--help` has to be instant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from data.text import without_secrets

# Commands that take a setting.
TRAINING = ("train", "demo", "sweep")
SINGLE_RUN = ("train", "demo")
OWN_DATA = ("train", "sweep", "eval", "shards", "check", "search", "embed")  # demo draws its pairs
IMAGES = (*OWN_DATA, "verify")
TOWERS = (*TRAINING, "eval", "search", "embed", "verify")


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting: its default, how it is shown, which commands take it, which values it allows."""

    default: Any
    group: str  # heading in `--help` and in written TOML
    commands: tuple[str, ...]
    help: str
    choices: tuple[str, ...] = ()
    bare: str = ""  # value of the flag without one
    low: float = 0.0  # bounds of a number, both allowed
    high: float = math.inf
    range_text: str = ""  # names the bounds if "at least LOW" is not enough
    resumable: bool = False  # may change on --resume; digests guard model and dataset
    advanced: bool = False  # shown by --help-all alone


def setting(default: Any, group: str, commands: tuple[str, ...], text: str, **rules: Any) -> Any:
    """Return a dataclass field with a Setting as metadata; `rules` are the Setting's further fields."""
    return field(default=default, metadata={"setting": Setting(default, group, commands, text, **rules)})


@dataclass(frozen=True)
class Config:
    """Every setting of a run, in the order of `--help`. The defaults are the reference recipe."""

    # What to search for.
    query: tuple[str, ...] = setting((), "query", ("search",),
                                     "titles whose best thumbnails are wanted, each in quotes")
    queries: str = setting("", "query", ("search",), "file with one title a line")
    image: str = setting("", "query", ("search",), "image file or URL whose best titles are wanted")
    top: int = setting(10, "query", ("search",), "answers to each query", low=1)

    # The model.
    model: str = setting("sentence-transformers/clip-ViT-L-14", "model",
                         ("train", "sweep", "eval", "search", "embed", "export", "verify"),
                         "hub name or folder of a CLIPModel or another dual encoder", resumable=True)
    run: str = setting("", "model", ("export", "verify"),
                       "run folder; export takes projections.safetensors alone, or its folder, too")
    checkpoint: str = setting("", "model", ("export",),
                              "checkpoint of --run: last, best or step-N (default: the finished model)")

    # The data. What is detected (columns, format, splits) can be set.
    dataset: str = setting("shawhin/yt-title-thumbnail-pairs", "data", IMAGES,
                           "hub name, folder, file or shards of pairs, also at s3:// gs:// az:// hf:// https://",
                           resumable=True)
    image_column: str = setting("", "data", OWN_DATA, "column with the image or its URL (default: detected)")
    title_column: tuple[str, ...] = setting((), "data", OWN_DATA, "columns with titles, each a row (default: detected)")
    negative_column: tuple[str, ...] = setting((), "data", OWN_DATA,
                                               "columns with hard negative titles (default: detected)")
    split_column: str = setting("", "data", OWN_DATA, "column that says the split of each row (default: split)")
    splits: tuple[str, ...] = setting((), "data", OWN_DATA,
                                      "the dataset's own splits or values to use, such as train=test,valid=val")
    template: tuple[str, ...] = setting((), "data", OWN_DATA, "makes titles of class names, such as 'a photo of a {}'")
    image_root: str = setting("", "data", OWN_DATA, "folder of relative image paths (default: the table's)",
                              resumable=True)
    image_template: str = setting("", "data", OWN_DATA, "makes a path of an image id, such as '{}.jpg'", advanced=True)
    delimiter: str = setting("", "data", OWN_DATA, "separator of text tables, such as ';' or tab (default: found)",
                             advanced=True)
    encoding: str = setting("", "data", OWN_DATA, "encoding of text tables, such as cp1252 (default: found)",
                            advanced=True)
    split: str = setting("test", "data", ("eval", "search", "embed"),
                         "the split to measure, to search in or to embed; all: every split")
    probe: str = setting("", "data", SINGLE_RUN,
                         "pairs of another kind, to see what tuning forgets (their test split)")
    mine_negatives: str = setting("off", "data", TRAINING, "give rows without a negative the most similar title (hard) "
                                  "or the least (far)", choices=("off", "hard", "far"))
    retry_failed: bool = setting(False, "data", OWN_DATA, "ask again for URLs that failed for good in an earlier run",
                                 resumable=True)
    variants: bool = setting(False, "data", OWN_DATA, "YouTube: try the maxres, sd and hq thumbnails in this order",
                             resumable=True, advanced=True)
    allow_host: tuple[str, ...] = setting((), "data", IMAGES,
                                          "private hosts that images and shards may be fetched from", resumable=True)
    proxy: str = setting("", "data", IMAGES,
                         "fetch images and shards through this HTTP proxy, such as http://HOST:3128",
                         resumable=True, advanced=True)
    max_bad: float = setting(0.05, "data", ("train", "sweep", "eval", "shards", "embed"),
                             "stop when a larger share of the rows (5% or 0.05) is unusable",
                             high=1, range_text="a share of the rows, such as 5% or 0.05", resumable=True)
    max_pixels: int = setting(25_000_000, "data", IMAGES, "refuse images with more pixels than this",
                              low=1, resumable=True, advanced=True)

    # What trains: substrings of parameter names.
    trainable: tuple[str, ...] = setting(("projection",), "recipe", TRAINING,
                                         "train parameters whose name holds one of these, or all")
    mode: str = setting("auto", "recipe", TRAINING,
                        "cached: features once; streaming: towers every step; auto: cached if it can",
                        choices=("auto", "cached", "streaming"), advanced=True)
    # Optimisation, as the reference does it.
    epochs: int = setting(2, "recipe", TRAINING, "passes over the training pairs", low=1)
    batch_size: int = setting(16, "recipe", TRAINING, "pairs a step, over all ranks together", low=1)
    lr: float = setting(1e-4, "recipe", TRAINING, "peak learning rate")
    lr_tower: float = setting(0.0, "recipe", SINGLE_RUN, "that of layers inside the towers; 0: as --lr", advanced=True)
    lr_text: float = setting(0.0, "recipe", SINGLE_RUN, "that of layers inside the text tower; 0: as --lr-tower",
                             advanced=True)
    schedule: str = setting("linear", "recipe", TRAINING, "decay of the learning rate",
                            choices=("linear", "cosine", "constant"), advanced=True)
    warmup: float = setting(0.0, "recipe", TRAINING, "share of all steps spent warming the learning rate up",
                            high=math.nextafter(1.0, 0.0), range_text="a share of all steps between 0 and 1 (not 1)",
                            advanced=True)
    weight_decay: float = setting(0.0, "recipe", TRAINING, "AdamW weight decay, of matrices (not of biases, norms)",
                                  advanced=True)
    clip_norm: float = setting(1.0, "recipe", TRAINING, "gradient norm is clipped at this; 0 turns clipping off",
                               advanced=True)
    scale: float = setting(20.0, "recipe", TRAINING, "inverse temperature of the loss", low=1e-9)
    # The loss: what is ranked against what, and what repeats mean.
    loss: str = setting("image-to-text", "recipe", TRAINING, "softmax one way or both, or sigmoid: each pair alone",
                        choices=("image-to-text", "symmetric", "sigmoid"))
    duplicates: str = setting("mask", "recipe", TRAINING, "identical titles or images: mask: no negatives; multi: "
                              "right answers too; keep: negatives, as the reference", choices=("mask", "multi", "keep"),
                              advanced=True)
    hardness: float = setting(0.0, "recipe", TRAINING,
                              "weight of similar negatives: adds X * cosine to their logits", advanced=True)
    l2_sp: float = setting(0.0, "recipe", TRAINING,
                           "weight of the squared distance to the pretrained weights, of what trains")
    relative: bool = setting(False, "recipe", TRAINING, "lr and l2-sp in units of the standard deviation of each "
                             "pretrained tensor", advanced=True)
    micro_batch: int = setting(0, "recipe", TRAINING,
                               "streaming: rows a rank whose activations are held at once; 0: all", advanced=True)
    augment: bool = setting(False, "recipe", SINGLE_RUN,
                            "train on random crops (90 to 100 % of the area); towers run every step")
    shuffle_buffer: int = setting(0, "recipe", ("train",), "streaming: read shards in sequence and draw from so many "
                                  "samples; 0: exact random order")
    train_samples: int = setting(0, "recipe", ("train",), "with --shuffle-buffer: samples of an epoch (default: as the "
                                 "shards' indexes count)")
    seed: int = setting(42, "recipe", (*TRAINING, "check", "search", "embed"), "seeds the order of the pairs",
                        high=2**32)
    interpolate: str = setting("", "recipe", TRAINING, "export a mix of base and tuned: a share of tuned within 0 and "
                               "1, or auto (best on valid)")
    recipe: str = setting("reference", "recipe", TRAINING, "settings to start from, flags win; auto: chosen on your "
                          "own pairs by cross-validation", choices=("reference", "auto"))

    # Searching settings.
    space: str = setting("", "sweep", ("sweep",), "what to try: 'lr=1e-4..1e-2:log epochs=2,10'", resumable=True)
    trials: int = setting(0, "sweep", ("sweep",),
                          "configurations drawn from the space; 0: all combinations of its lists", resumable=True)
    folds: int = setting(5, "sweep", ("sweep",), "parts of train and valid that are held out in turn", low=2)
    seeds: int = setting(1, "sweep", ("sweep",), "times that everything is repeated with other folds and orders",
                         low=1, advanced=True)

    # When to evaluate and to save.
    eval_splits: tuple[str, ...] = setting((), "loop", SINGLE_RUN, "splits to measure (default: all; on the way train "
                                           "and valid); a train split of millions is best left out")
    log_every: int = setting(10, "loop", TRAINING, "steps between flushes of the log",
                             low=1, resumable=True, advanced=True)
    eval_every: int = setting(0, "loop", SINGLE_RUN, "steps between evaluations; 0: every epoch", resumable=True)
    save_every: int = setting(0, "loop", SINGLE_RUN, "steps between checkpoints; 0: every epoch",
                              resumable=True, advanced=True)
    keep: int = setting(3, "loop", SINGLE_RUN, "checkpoints kept beside `last` and `best`",
                        low=1, resumable=True, advanced=True)
    resume: str = setting("off", "loop", TRAINING,
                          "carry on from the newest valid checkpoint in --out; auto: or start there",
                          choices=("off", "on", "auto"), bare="on", resumable=True)
    # The mean reciprocal rank moves with every rank, so it separates small gains where R@1 cannot.
    best_metric: str = setting("image_to_text_mrr", "loop", TRAINING,
                               "what makes a checkpoint `best`: a metric of the valid split", advanced=True)
    patience: int = setting(0, "loop", TRAINING, "stop after this many evaluations without a better one, and export "
                            "the best; 0: never stop, export the last", resumable=True)

    # Where results go and what is shown.
    out: str = setting("", "output", (*TRAINING, "eval", "shards", "embed"), "run folder (default: runs/DATE-DATASET)",
                       resumable=True)
    cache_dir: str = setting("~/.cache/thumbtune", "output", (*IMAGES, "demo", "export"),
                             "feature store and fetched images", resumable=True)
    resize: int = setting(0, "output", ("shards",),
                          "store JPEG crops of this many pixels a side; 0 keeps the original bytes")
    prune: bool = setting(False, "output", ("verify",), "delete stored features and records of all models but --model")
    strict: bool = setting(False, "output", ("check",), "exit 1 when there are errors")
    json: bool = setting(False, "output", ("check", "search"), "print JSON to stdout")
    quiet: bool = setting(False, "output", (*TOWERS, "shards", "check"),
                          "say nothing but errors, damage and the final table", resumable=True)
    html: str = setting("", "output", ("search",), "write a page with the pictures to this file")
    to: str = setting("", "output", ("export",), "folder to write the Hugging Face model to")
    format: str = setting("transformers", "output", ("export",), "whose folder --to is: transformers and "
                          "sentence-transformers, or open_clip", choices=("transformers", "open_clip"))
    dtype: str = setting("fp32", "output", ("export", "embed"), "how weights or embeddings are stored",
                         choices=("fp32", "fp16", "bf16"))
    vectors: str = setting("both", "output", ("embed",), "where embeddings go: .npy files (faiss, clip-retrieval), the "
                           "Parquet files (databases), or both", choices=("both", "npy", "parquet"))
    push_to_hub: str = setting("", "output", (*TRAINING, "export"), "push the model to OWNER/NAME on the hub",
                               resumable=True)
    private: bool = setting(False, "output", (*TRAINING, "export"), "make that hub repository private",
                            resumable=True, advanced=True)
    license: str = setting("other", "output", (*TRAINING, "export"),
                           "licence that the model card names, such as mit or cc-by-4.0",
                           resumable=True, advanced=True)

    # The machine.
    device: str = setting("auto", "machine", TOWERS, "where to compute", choices=("auto", "cpu", "cuda"),
                          resumable=True)
    precision: str = setting("auto", "machine", TOWERS, "auto: bf16, or fp16 on older GPUs, where it is faster",
                             choices=("auto", "bf16", "fp16", "fp32"))
    workers: int = setting(0, "machine", (*IMAGES, "demo"), "processes or threads a rank that decode images; "
                            "0: one for each core of its share", resumable=True)
    compile: str = setting("auto", "machine", TOWERS, "the image tower; auto: a GPU's, for many images",
                           choices=("auto", "on", "off"), resumable=True, advanced=True)
    cuda_graph: str = setting("auto", "machine", TRAINING,
                              "launch a whole cached step at once; auto: on a GPU, from 500 steps on",
                              choices=("auto", "off"), resumable=True, advanced=True)
    gradient_checkpointing: bool = setting(False, "machine", SINGLE_RUN,
                                           "where layers in towers train: less memory, more time",
                                           resumable=True, advanced=True)
    profile: str = setting("off", "machine", SINGLE_RUN, "write a trace of a few steps to the run folder; 100:110: of "
                           "steps 100 to 109 (the first is 0), with stacks and memory", bare="on", resumable=True)
    dist_timeout: float = setting(600.0, "machine", TOWERS, "seconds after which a stalled rank is an error",
                                  low=1, high=1e7, resumable=True, advanced=True)


def config_fields() -> dict[str, Setting]:
    """Return the settings by name, in order."""
    return {spec.name: spec.metadata["setting"] for spec in fields(Config)}


def command_settings(command: str) -> list[str]:
    """Return the names of the settings that a command takes, in order."""
    return [name for name, spec in config_fields().items() if command in spec.commands]


def flag_of(name: str) -> str:
    """Return the flag of a setting: `--batch-size` for batch_size."""
    return "--" + name.replace("_", "-")


def as_dict(config: Config, command: str) -> dict[str, Any]:
    """Return the settings of a command as plain JSON values, without what is secret in addresses."""
    plain: dict[str, Any] = {}
    for name in command_settings(command):
        value = getattr(config, name)
        plain[name] = list(value) if isinstance(value, tuple) else value
        if isinstance(value, str):
            plain[name] = without_secrets(value)
        if name == "proxy" and "@" in value:  # it holds a password; a resumed run may be given another proxy
            plain[name] = ""
    return plain
