"""The titles that a sample of a stream trains with: its own, or made from the name of its class as in `labels.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from data.shards.samples import spell_class
from data.shards.stream import class_names
from data.web.storage import Entry, parent


@dataclass(frozen=True)
class TitleRules:
    """Tells which texts are class names, and makes titles of them."""

    templates: Sequence[str] = ()  # of --template
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by folder of shards, from a file there

    @classmethod
    def of(cls, shards: Iterable[Entry], templates: Sequence[str]) -> TitleRules:
        """Return the rules for these shards. Raises UserError."""
        folders = {parent(shard.address): shard.address for shard in shards}
        return cls(templates, {folder: class_names(address) for folder, address in folders.items()})

    def classes_of(self, shard: Entry) -> Sequence[str]:
        """Return the names of the classes of a shard."""
        return self.classes.get(parent(shard.address), ())

    def known_names(self, shard: Entry) -> frozenset[str]:
        """Return the titles in a shard that are names of its classes, spelt as `row` gives them."""
        return frozenset(map(spell_class, self.classes_of(shard)))

    def titles(self, texts: Sequence[str], known: frozenset[str]) -> list[tuple[str, str]]:
        """Return each title with the class name that it is made from, "" for a title of its own.

        A sample's only text is a class name if it is among the `known` ones. Where no class names are known, all texts
        are class names if --template is given, and none otherwise.
        """
        is_class = len(texts) == 1 and texts[0] in known if known else bool(self.templates)
        if not is_class:
            return [(text, "") for text in texts]
        titles = []
        for name in texts:
            spelt = spell_class(name)
            titles += [(template.replace("{}", spelt), spelt) for template in self.templates or ("{}",)]
        return titles


AS_THEY_ARE = TitleRules()
