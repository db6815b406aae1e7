"""The model card: front matter for the hub, results, recipe, how to load, limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.text import printable
from engine.config.settings import toml_value

HERE = "path/to/this/folder"  # replaced by the repository's name when the folder is pushed
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?", re.ASCII)  # : configuration
REPORTED = ("image_to_text_R@1", "image_to_text_R@10", "image_to_text_mrr", "text_to_image_R@1", "text_to_image_R@10",
            "text_to_image_mrr", "triplet_accuracy")  # shares: the hub lists single numbers, without their unit

CARD = """# {base}, tuned on {dataset}

A CLIPModel tuned with thumbtune so that the thumbnails and titles of `{dataset}` find each other. Parameters whose
name holds `{trainable}` were trained; everything else is that of the base model {link}.

## Before and after

{table}

Queries and candidates are the distinct images and titles of the split. Square brackets: 95 % interval over independent
images with their titles. R@K: share of images with a right title among the first K; text to image the other way round.

## Recipe

```toml
{recipe}
```

## How to load

transformers:

```python
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("{here}")
processor = CLIPProcessor.from_pretrained("{here}")
inputs = processor(text=["a title"], images=[image], return_tensors="pt", padding=True, truncation=True)
outputs = model(**inputs)  # outputs.image_embeds, outputs.text_embeds: unit vectors
```

sentence-transformers:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{here}")
image_and_title = [model.encode(one, normalize_embeddings=True) for one in ([image], ["a title"])]
```

thumbtune, to search in a folder, table or hub dataset of images:

```bash
python run.py search "a title" --model {here} --dataset path/to/pairs
```

open_clip has other parameter names and reads this folder only after conversion. `projections.safetensors` holds the
trained parameters alone; `python run.py export --run FILE --to DIR` puts them back on the base model.

## Limits

The figures hold for pairs like the ones above, and for galleries of that size: recall falls as a gallery grows.
Whatever limits and biases the base model has, this one has too. The licences of the base model and of the data apply.
"""


def write_card(path: Path, origin: Mapping[str, Any], table: str, licence: str) -> None:
    """Write README.md: front matter that the hub accepts whatever the names are, then text.

    `origin` is an `export.Origin` as a dictionary.
    """
    from huggingface_hub import ModelCardData

    hub_base = origin["base"] if origin["commit"] else None
    data = ModelCardData(
        library_name="transformers", pipeline_tag="zero-shot-image-classification", license=licence,
        license_name="see-base-model-and-data" if licence == "other" else None, base_model=hub_base,
        datasets=[origin["dataset"].partition(":")[0]] if HUB_NAME.fullmatch(origin["dataset"]) else None,
        tags=["clip", "sentence-transformers", "thumbtune"], model_name=f"{_shown(origin['base'])} tuned",
        eval_results=_results(origin))
    recipe = origin["recipe"]
    text = CARD.format(
        base=_shown(origin["base"]), dataset=_shown(origin["dataset"]), table=table or "Not measured.", here=HERE,
        link=f"[{hub_base}](https://huggingface.co/{hub_base}) (commit {origin['commit'][:12]})" if hub_base
        else _shown(origin["base"]),
        trainable="`, `".join(map(_line, recipe.get("trainable", ["projection"]))),
        recipe="\n".join(f"{key.replace('_', '-')} = {_toml(value)}" for key, value in recipe.items()))
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8", errors="replace")


def card_on_hub(path: Path, name: str, licence: str) -> str:
    """Return the text of a card for the repository `name`, with `licence` in place of the old one unless `other`."""
    from huggingface_hub import ModelCard

    card = ModelCard(path.read_text(encoding="utf-8").replace(HERE, name))
    if licence != "other":
        card.data["license"], card.data["license_name"] = licence, None
    return str(card)


def _results(origin: Mapping[str, Any]) -> list[Any] | None:
    """Return the tuned model's metrics on the test split, else on the last split, as the hub's model-index has them."""
    from huggingface_hub import EvalResult

    splits = origin["metrics"].get("tuned") or {}
    split = "test" if "test" in splits else next(reversed(splits), None)
    dataset = origin["dataset"]
    name_on_hub, _, configuration = dataset.partition(":") if HUB_NAME.fullmatch(dataset) else ("custom", "", "")
    results = []
    for name in REPORTED:
        if name in splits.get(split, {}):
            results.append(EvalResult(
                task_type="zero-shot-image-classification", task_name="image-text retrieval",
                dataset_type=name_on_hub, dataset_name=_shown(dataset), dataset_config=configuration or None,
                dataset_split=split, metric_type=name, metric_name=name.replace("_", " "),
                metric_value=round(float(splits[split][name]), 4)))
    return results or None


def _shown(name: str) -> str:
    """Return a name to publish: of a path only the last part, as the rest is private."""
    return _line(name if HUB_NAME.fullmatch(name) else Path(name).name) or "pairs"


def _line(text: str) -> str:
    """Return `text` on one line, without characters that Markdown would interpret."""
    return re.sub(r"[`\[\]<>]", " ", printable(text))


def _toml(value: Any) -> str:
    return toml_value(tuple(value) if isinstance(value, list) else value).replace("`", "'")
