"""One frozen dataclass holds every setting; flags, TOML keys and `--help` derive from it. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any


def setting(default: Any, group: str, text: str, choices: tuple[str, ...] = (), bare: str = "") -> Any:
    """A dataclass field that also knows its `--help` group, line, choices, and what the flag alone means."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices, "bare": bare})


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the reference recipe."""

    # What to tune, on what, and where results go.
    model: str = setting("sentence-transformers/clip-ViT-L-14", "model", "hub name or folder of a CLIPModel")
    dataset: str = setting("shawhin/yt-title-thumbnail-pairs", "data",
                           "hub name, folder or file of pairs, or shards (http(s) too)")
    out: str = setting("", "output", "run folder (default: runs/DATE-DATASET)")
    cache_dir: str = setting("~/.cache/thumbtune", "output", "feature store and fetched images")
    # Columns are detected by name; these override the detection.
    image_column: str = setting("", "data", "column with the image or its URL (default: detected)")
    title_column: str = setting("", "data", "column with the title (default: detected)")
    negative_column: str = setting("", "data", "column with the hard negative title (default: detected)")
    eval_splits: tuple[str, ...] = setting((), "loop", "splits to measure (default: all; on the way train and valid); "
                                           "a train split of millions is best left out")
    split: str = setting("test", "data", "the split to measure or to search in; all: every split")
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
    l2_sp: float = setting(0.0, "recipe", "weight of the squared distance to the pretrained weights, of what trains")
    micro_batch: int = setting(0, "recipe", "streaming: rows a rank whose activations are held at once; 0: all")
    augment: bool = setting(False, "recipe", "train on random crops (90 to 100 % of the area); towers run every step")
    seed: int = setting(42, "recipe", "seeds the order of the pairs")
    interpolate: str = setting("", "recipe", "export a mix of base and tuned: a share of tuned within 0 and 1, or auto "
                               "(best on valid)")
    recipe: str = setting("reference", "recipe", "settings to start from; flags win", ("reference", "best"))
    probe: str = setting("", "data", "pairs of another kind, to see what tuning forgets (their test split)")
    # Searching settings.
    space: str = setting("", "sweep", "what to try: 'lr=1e-4..1e-2:log epochs=2,10'")
    trials: int = setting(0, "sweep", "configurations drawn from the space; 0: all combinations of its lists")
    folds: int = setting(5, "sweep", "parts of train and valid that are held out in turn")
    seeds: int = setting(1, "sweep", "times that everything is repeated with other folds and orders")
    # When to look and to save.
    log_every: int = setting(10, "loop", "steps between flushes of the log (the only host sync)")
    eval_every: int = setting(0, "loop", "steps between evaluations; 0: every epoch")
    save_every: int = setting(0, "loop", "steps between checkpoints; 0: every epoch")
    keep: int = setting(3, "loop", "checkpoints kept beside `last` and `best`")
    resume: str = setting("off", "loop", "carry on from the newest valid checkpoint in --out; auto: or start there",
                          ("off", "on", "auto"), bare="on")
    best_metric: str = setting("image_to_text_mrr", "loop", "what makes a checkpoint `best`: a metric of the valid "
                               "split")  # moves with every rank, so it tells small gains apart where R@1 cannot
    patience: int = setting(0, "loop", "stop after this many evaluations without a better one, and export the best; "
                            "0: never stop, export the last")
    # The machine.
    device: str = setting("auto", "machine", "where to compute", ("auto", "cpu", "cuda"))
    precision: str = setting("auto", "machine", "auto: bf16 where it is faster", ("auto", "bf16", "fp32"))
    workers: int = setting(2, "machine", "threads a rank that decode images")
    compile: str = setting("auto", "machine", "the image tower; auto: a GPU's, for many images", ("auto", "on", "off"))
    cuda_graph: str = setting("auto", "machine", "launch a whole cached step at once; auto: one GPU, 500 steps or so",
                              ("auto", "off"))
    gradient_checkpointing: bool = setting(False, "machine", "where layers in towers train: less memory, more time")
    profile: bool = setting(False, "machine", "write a trace of a few steps to the run folder")
    dist_timeout: float = setting(600.0, "machine", "seconds after which a stalled rank is an error")
    # Reading.
    mine_negatives: str = setting("off", "data", "give rows without a negative the most similar title (hard) or the "
                                  "least (far)", ("off", "hard", "far"))
    resize: int = setting(0, "output", "store JPEG crops of this many pixels a side; 0 keeps the original bytes")
    retry_failed: bool = setting(False, "data", "ask again for URLs that failed for good in an earlier run")
    variants: bool = setting(False, "data", "YouTube: try the maxres, sd and hq thumbnails in this order")
    allow_host: tuple[str, ...] = setting((), "data", "private hosts that images and shards may be fetched from")
    proxy: str = setting("", "data", "fetch images and shards through this HTTP proxy, such as http://HOST:3128")
    max_bad: float = setting(0.05, "data", "stop when a larger share of the rows (5% or 0.05) is unusable")
    max_pixels: int = setting(25_000_000, "data", "refuse images with more pixels than this")
    prune: bool = setting(False, "output", "delete the stored features of all models but --model")
    strict: bool = setting(False, "output", "exit 1 when there are errors")
    json: bool = setting(False, "output", "print JSON to stdout")
    quiet: bool = setting(False, "output", "say nothing but errors and the final table")
    # Searching.
    query: tuple[str, ...] = setting((), "query", "titles whose best thumbnails are wanted, each in quotes")
    queries: str = setting("", "query", "file with one title a line")
    image: str = setting("", "query", "image file or URL whose best titles are wanted")
    top: int = setting(10, "query", "answers to each query")
    html: str = setting("", "output", "write a page with the pictures to this file")
    # Handing on.
    run: str = setting("", "model", "run folder; export takes projections.safetensors alone, or its folder, too")
    to: str = setting("", "output", "folder to write the Hugging Face model to")
    checkpoint: str = setting("", "model", "checkpoint of --run: last, best or step-N (default: the finished model)")
    dtype: str = setting("fp32", "output", "how weights are stored", ("fp32", "fp16", "bf16"))
    push_to_hub: str = setting("", "output", "push the model to OWNER/NAME on the hub")
    private: bool = setting(False, "output", "make that hub repository private")
    license: str = setting("other", "output", "licence that the model card names, such as mit or cc-by-4.0")


def config_fields() -> dict[str, Field[Any]]:
    """The settings by name, in order."""
    return {f.name: f for f in fields(Config)}


def as_dict(config: Config) -> dict[str, Any]:
    """The settings as plain JSON values, without a proxy that carries a password."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    return {**plain, "proxy": "" if "@" in config.proxy else config.proxy}

