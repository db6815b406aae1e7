"""A CLIPModel as a run uses it: settings and projections are read at once, towers when they have to encode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

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
from engine.clip.families import CLIP, FAMILIES, Family, HeadLayers
from engine.clip.weights import UNREADABLE, locate_weights, read_weights
from engine.clip.whole import WholeModel, load_tower, load_whole

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel


class Clip:
    """A CLIPModel, or another dual encoder of `families`, in fp32, frozen, with its own preprocessing.

    It is made from a model in memory (`whole`), or from the `record` of an earlier run: then the head is read from the
    weight files at once, and a tower or the whole model on first use. There is one head in either case, so training it
    changes `model`.
    """

    def __init__(self, name: str, whole: WholeModel | None = None, record: ModelRecord | None = None,
                 stamped: StampedFolder | None = None) -> None:
        self.name, self.record, self.stamped = name, record, stamped
        self._loading = threading.RLock()  # both towers may be wanted at once
        if whole is not None:
            self.facts = ModelFacts.of(whole)
            self.model = whole.model.requires_grad_(False)
            self.head = whole.family.head_of(self.model)
            # Loaded tensors lie at any address of the mapped file, those of a run with a record are aligned, and
            # products of few rows differ between the two in the last bit. So align them here as well.
            for layer in self.head[:2]:
                for parameter in layer.parameters():
                    parameter.data = parameter.data.clone()
        elif record is not None:
            self.facts = record.facts
            self.head = _read_head(record)

    @property
    def family(self) -> Family:
        """How the model is laid out."""
        return FAMILIES[self.facts.family]

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
        self.family.set_head(model, self.head)
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
        if self.family.towers_load_alone and not self.is_loaded:
            return load_tower(self.name, self.commit, name).requires_grad_(False)
        with self._loading:
            return getattr(self.model, name)

    def named_parameters(self, names: Collection[str]) -> dict[str, nn.Parameter]:
        """Return all parameters in memory by name, in the model's order; the whole model if the head lacks a name."""
        head: dict[str, Any] = {"logit_scale": self.head.logit_scale}
        for path, layer in zip((self.family.image_layer, self.family.text_layer), self.head[:2], strict=True):
            head |= {f"{path}.{kind}": value for kind, value in layer.named_parameters()}
        if self.is_loaded or not head.keys() >= set(names):
            return dict(self.model.named_parameters())
        return {name: head[name] for name in self.facts.shapes if name in head}

    def frozen_weights(self, trained: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield all parameters but the `trained` ones, in fp32. Raises UserError where the files have changed.

        They are read one by one from the files, unless the model is in memory, or transformers changes some of them as
        it loads, so that the files do not hold them.
        """
        names = [name for name in self.facts.shapes if name not in trained]
        if self.record is not None and not self.is_loaded:
            refuse_changed(self.record, self.name)
        if self.is_loaded or self.record is None or not self.record.weights.keys() >= set(names):
            loaded = dict(self.model.named_parameters())
            yield from ((name, loaded[name].detach().cpu()) for name in names)
            return
        yield from read_weights(self.record.folder / self.facts.subfolder, self.record.weights, names)


def _read_head(record: ModelRecord) -> HeadLayers:
    """Return the head from the weight files. Raises one of UNREADABLE, also where a digest is not the record's."""
    family = FAMILIES[record.facts.family]
    names = ("logit_scale", *family.projections)
    tensors = {}
    for name, tensor in read_weights(record.folder / record.facts.subfolder, record.weights, names):
        if tensor_digest(tensor) != record.facts.digests[name]:
            raise ValueError(f"{name} is not the one of the record")
        tensors[name] = tensor.clone()
    image_layer, text_layer = (_linear(tensors[f"{path}.weight"], tensors.get(f"{path}.bias"))
                               for path in (family.image_layer, family.text_layer))
    return HeadLayers(image_layer, text_layer, nn.Parameter(tensors["logit_scale"], requires_grad=False))


def _linear(weight_EW: Tensor, bias_E: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight_EW.shape[1], weight_EW.shape[0], bias=bias_E is not None, device="meta")
    layer.weight = nn.Parameter(weight_EW, requires_grad=False)
    if bias_E is not None:
        layer.bias = nn.Parameter(bias_E, requires_grad=False)
    return layer


def load_clip(name: str, commit: str | None = None, records: ModelRecords | None = None) -> Clip:
    """Open a model by its record, if there is one that fits; load it whole, with every check, if not.

    Raises UserError as `load_whole` does.
    """
    record = records.find(name, commit) if records else None
    if record:
        try:
            return Clip(name, record=record)
        except UNREADABLE:  # loading the whole model says what is wrong with the files
            pass
    before = stamped_folder(name, commit)
    whole = load_whole(name, commit)
    # A folder's stamps must be from before the load, so that an edit during it is noticed. The hub may have given a
    # newer snapshot than there was before, and nobody edits the files of a snapshot.
    stamped = stamped_folder(name, whole.commit) if whole.commit else before
    return Clip(name, whole, stamped=stamped)


def write_record(clip: Clip, records: ModelRecords, log: Callable[[str], None]) -> None:
    """Write a record of a model that has been loaded whole, if its weights can be read one by one."""
    if clip.stamped is None:
        return
    known = records.find(clip.name)
    if known and known.facts != clip.facts:  # `verify` loads the whole model although there is a record
        log(f"what an earlier run recorded of {clip.name} is not what its files hold; recorded anew")
    folder, stamps = clip.stamped
    facts, source = clip.facts, folder / clip.facts.subfolder
    with suppress(*UNREADABLE):
        weights = locate_weights(source, facts.shapes, facts.saved_names)
        if clip.family is not CLIP:
            # transformers may change a weight as it loads (it zeroes a ChineseCLIPModel's embedding of padding). Only
            # weights that the file holds as they are in memory are recorded.
            stored = read_weights(source, weights, [*weights])
            unchanged = [name for name, tensor in stored if tensor_digest(tensor) == facts.digests[name]]
            weights = {name: weights[name] for name in unchanged}
        records.write(clip.name, ModelRecord(facts, folder, stamps, weights))
