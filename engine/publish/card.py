"""The model card: front matter for the hub, results, recipe, how to load, limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from data.text import printable
from engine.clip.families import CLIP, Family
from engine.config.settings import toml_value

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from engine.publish.export import Origin

HERE = "path/to/this/folder"  # replaced by the repository's name when the folder is pushed
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?", re.ASCII)  # : configuration
REPORTED = ("image_to_text_R@1", "image_to_text_R@10", "image_to_text_mrr", "text_to_image_R@1", "text_to_image_R@10",
            "text_to_image_mrr", "triplet_accuracy")  # shares: the hub lists single numbers, without their unit
CARD = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
LOADING = {library: Path(__file__).with_name(f"load_{library}.md").read_text(encoding="utf-8").rstrip()
           for library in ("transformers", "open_clip", "dual_encoder")}  # whose folder it is -> how to load it


def write_card(path: Path, origin: Origin, table: str, licence: str, library: str = "transformers",
               family: Family = CLIP) -> None:
    """Write README.md: front matter that the hub accepts whatever the names are, then text; `library` loads the model.

    sentence-transformers loads CLIPModel folders alone, so other families are shown with transformers only.
    """
    from huggingface_hub import ModelCardData

    base, dataset = _public_name(origin.base), _public_name(origin.dataset)
    loading = library if family is CLIP else "dual_encoder"
    front_matter = ModelCardData(
        library_name=library,
        pipeline_tag="zero-shot-image-classification",
        license=licence,
        license_name="see-base-model-and-data" if licence == "other" else None,
        base_model=origin.base if origin.commit else None,
        datasets=[origin.dataset.partition(":")[0]] if HUB_NAME.fullmatch(origin.dataset) else None,
        tags=[family.model_type, *(["sentence-transformers"] if loading == "transformers" else []), "thumbtune"],
        model_name=f"{base} tuned",
        eval_results=_results(origin),
    ).to_yaml()
    link = base
    if origin.commit:
        link = f"[{origin.base}](https://huggingface.co/{origin.base}) (commit {origin.commit[:12]})"
    trained = map(plain, origin.recipe.get("trainable", ["projection"]))
    recipe = []
    for key, value in origin.recipe.items():
        toml = toml_value(tuple(value) if isinstance(value, list) else value).replace("`", "'")
        recipe.append(printable(f"{key.replace('_', '-')} = {toml}"))
    text = CARD.format(base=base, dataset=dataset, link=link, table=table or "Not measured.", here=HERE,
                       loading=LOADING[loading].format(
                           here=HERE, model=family.model_class, processor=family.processor_class,
                           padding='"max_length"' if family.pooling == "last" else "True"),
                       model=family.model_class, trainable="`, `".join(trained),
                       recipe="\n".join(recipe))
    path.write_text(f"---\n{front_matter}\n---\n\n{text}", encoding="utf-8", errors="replace")


def card_on_hub(path: Path, name: str, licence: str) -> str:
    """Return the text of a card for the repository `name`, with `licence` in place of the old one unless `other`."""
    from huggingface_hub import ModelCard

    card = ModelCard(path.read_text(encoding="utf-8").replace(HERE, name))
    if licence != "other":
        card.data["license"], card.data["license_name"] = licence, None
    return str(card)


def _results(origin: Origin) -> list[EvalResult] | None:
    """Return the tuned model's metrics on the test split, else on the last split, as the hub's model-index has them."""
    from huggingface_hub import EvalResult

    splits = origin.metrics.get("tuned", {})
    if not splits:
        return None
    split = "test" if "test" in splits else next(reversed(splits))
    on_hub, configuration = "custom", ""
    if HUB_NAME.fullmatch(origin.dataset):
        on_hub, _, configuration = origin.dataset.partition(":")
    results = []
    for name in REPORTED:
        if name in splits[split]:
            results.append(EvalResult(
                task_type="zero-shot-image-classification",
                task_name="image-text retrieval",
                dataset_type=on_hub,
                dataset_name=_public_name(origin.dataset),
                dataset_config=configuration or None,
                dataset_split=split,
                metric_type=name,
                metric_name=name.replace("_", " "),
                metric_value=round(float(splits[split][name]), 4),
            ))
    return results or None


def _public_name(name: str) -> str:
    """Return a name to publish: of a path only the last part, as the rest is private."""
    return plain(name if HUB_NAME.fullmatch(name) else Path(name).name) or "pairs"


def plain(text: str) -> str:
    """Return `text` on one line, without characters that Markdown would interpret."""
    return re.sub(r"[`\[\]<>]", " ", printable(text))
