"""A CLIPModel as a run uses it: its facts and projections at once, its towers when something has to be encoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from data.images.decode import ImageSpec, ModelTokenizer
from engine.clip.facts import (
    ModelFacts,
    ModelRecord,
    ModelRecords,
    StampedFolder,
    refuse_changed,
    stamped_folder,
    tensor_digest,
)
from engine.clip.weights import UNREADABLE, locate_weights, read_weights
from engine.clip.whole import WholeModel, load_tower, load_whole

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel

HEAD = ("logit_scale", "visual_projection.weight", "text_projection.weight")


class HeadLayers(NamedTuple):
    """The parts of a CLIPModel behind its towers."""

    visual_projection: nn.Linear
    text_projection: nn.Linear
    logit_scale: nn.Parameter


class Clip:
    """A CLIPModel in fp32, frozen, with its own preprocessing.

    It is `whole`, or begins with what a `record` knows of it: then the head comes from the weight files at once, and
    a tower or the whole model on first use. Either way there is one head, whose training changes the `model`.
    """

    def __init__(self, name: str, whole: WholeModel | None = None, record: ModelRecord | None = None,
                 stamped: StampedFolder | None = None) -> None:
        self.name, self.record, self.stamped = name, record, stamped
        if whole is not None:
            self.facts = ModelFacts.of(whole)
            self.model = whole.model.requires_grad_(False)
            self.head = HeadLayers(self.model.visual_projection, self.model.text_projection, self.model.logit_scale)
            # As loaded, tensors lie at any address of the file; products of few rows differ in the last bit between
            # aligned weights, which a run with a record has, and others.
            for parameter in (self.head[0].weight, self.head[1].weight):
                parameter.data = parameter.data.clone()
        elif record is not None:
            self.facts = record.facts
            self.head = _read_head(record)

    @property
    def commit(self) -> str | None:
        """The commit of a hub repository; None for a folder."""
        return self.facts.commit

    @property
    def spec(self) -> ImageSpec:
        """How the model's images are prepared."""
        return self.facts.spec

    @property
    def max_tokens(self) -> int:
        """The longest title the text tower has positions for, special tokens included."""
        return self.facts.max_tokens

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The model's tokenizer, of the file that is exported with it."""
        from tokenizers import Tokenizer

        return ModelTokenizer(Tokenizer.from_str(self.facts.files["tokenizer.json"]), self.facts.pad_id)

    @property
    def is_loaded(self) -> bool:
        """Whether the whole model is in memory."""
        return "model" in self.__dict__

    @cached_property
    def model(self) -> CLIPModel:
        """The whole model."""
        model = load_whole(self.name, self.commit).model.requires_grad_(False)
        model.visual_projection, model.text_projection, model.logit_scale = self.head
        return model

    @cached_property
    def vision_model(self) -> CLIPVisionModel:
        """The image tower."""
        return self._tower("vision_model")

    @cached_property
    def text_model(self) -> CLIPTextModel:
        """The text tower."""
        return self._tower("text_model")

    def _tower(self, name: str) -> Any:
        if self.is_loaded:
            return getattr(self.model, name)
        return load_tower(self.name, self.commit, name).requires_grad_(False)

    def named_parameters(self, names: Collection[str]) -> dict[str, nn.Parameter]:
        """Return all parameters in memory by name, in the model's order; the whole model if the head lacks a name."""
        head: dict[str, Any] = {"logit_scale": self.head.logit_scale}
        for name in ("visual_projection", "text_projection"):
            head[f"{name}.weight"] = getattr(self.head, name).weight
        if self.is_loaded or not head.keys() >= set(names):
            return dict(self.model.named_parameters())
        return {name: head[name] for name in self.facts.shapes if name in head}

    def frozen_weights(self, trained: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield all parameters but the `trained` ones, in fp32. Raises UserError where the files have changed."""
        names = [name for name in self.facts.shapes if name not in trained]
        if self.is_loaded or self.record is None:
            loaded = dict(self.model.named_parameters())
            yield from ((name, loaded[name].detach().cpu()) for name in names)
            return
        refuse_changed(self.record, self.name)
        yield from read_weights(self.record.folder / self.facts.subfolder, self.record.weights, names)


def _read_head(record: ModelRecord) -> HeadLayers:
    """Read the head from the weight files. Raises one of UNREADABLE, which a digest of another content is as well."""
    tensors = {}
    for name, tensor in read_weights(record.folder / record.facts.subfolder, record.weights, HEAD):
        if tensor_digest(tensor) != record.facts.digests[name]:
            raise ValueError(f"{name} is not the one of the record")
        tensors[name] = tensor.clone()
    return HeadLayers(_linear(tensors["visual_projection.weight"]), _linear(tensors["text_projection.weight"]),
                      nn.Parameter(tensors["logit_scale"], requires_grad=False))


def _linear(weight_EW: Tensor) -> nn.Linear:
    layer = nn.Linear(weight_EW.shape[1], weight_EW.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight_EW, requires_grad=False)
    return layer


def load_clip(name: str, commit: str | None = None, records: ModelRecords | None = None) -> Clip:
    """Open a model by its record, if there is one that fits; load it whole, with every check, if not.

    Raises UserError as `load_whole` does.
    """
    record = records.find(name, commit) if records else None
    if record:
        try:
            return Clip(name, record=record)
        except UNREADABLE:  # what is wrong with the files is for a whole load to say
            pass
    before = stamped_folder(name, commit)
    whole = load_whole(name, commit)
    # The hub may have given a newer snapshot, whose files nobody edits; a folder must be as it was before the load.
    return Clip(name, whole, stamped=stamped_folder(name, whole.commit) if whole.commit else before)


def write_record(clip: Clip, records: ModelRecords, log: Callable[[str], None]) -> None:
    """Leave a record of a model that has been loaded whole, if its weights can be read one by one."""
    if clip.stamped is None:
        return
    known = records.find(clip.name)
    if known and known.facts != clip.facts:  # the model was read again in spite of it, by `verify`
        log(f"what an earlier run recorded of {clip.name} is not what its files hold; recorded anew")
    folder, stamps = clip.stamped
    with suppress(*UNREADABLE):
        weights = locate_weights(folder / clip.facts.subfolder, clip.facts.shapes)
        records.write(clip.name, ModelRecord(clip.facts, folder, stamps, weights))
