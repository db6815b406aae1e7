"""Pictures that could be decoded when a run began and cannot be any more, or are others now, as streaming meets them.

The rule, in the process that meets the loss, on any number of ranks and after a resume: such a picture is read again a
few times, then named, entered into the ledger and not asked for any more. In training the first row after it whose
picture can be read takes its place; evaluations leave its rows out. A resumed run has the rows that it began with: what
it has lost, and cannot read now either, stays lost; what is back, with the same content, is used again. When more than
--max-bad of all rows are lost, the run saves and ends.

Dimension key: D distinct images by content, K bytes of a key, N rows of a split.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import AgreedError, BadSample, Team, UserError
from data.catalogue import Catalogue, DecodeResults, Split, check_bad_share, keys_and_usable
from data.images.feed import Lot
from data.images.reader import Reader
from data.images.worker import Job, Outcome, Spent, Task, do_task
from data.ledger import LINES, discard, dropped_rows
from data.sources.embedded import shown_name
from data.store.segments import KEY
from data.web import storage

RETRIES = 2  # of all that fails in a lot
END = (1 << 62) - 1  # the last step of all
ALWAYS = END + 1
Entry = dict[str, Any]  # as in the ledger, with "content", and the steps without the picture: from "step" to "back"


@dataclass
class LostPictures:
    """The pictures that a run has lost, by number of the distinct image, and what that means for rows and ledger."""

    catalogue: Catalogue
    splits: Mapping[str, Split]
    example_D: np.ndarray  # a reference of each distinct image, ascending
    key_DK: np.ndarray  # its content when the run began
    reader: Reader
    dropped: Sequence[Mapping[str, Any]]  # the ledger of the opening
    rows: int  # of all splits, those in it included
    max_bad: float
    log: Callable[[str], None]
    is_measured: bool = True  # evaluations read pictures too, not stored features
    record: Callable[[Sequence[Entry]], None] = discard  # writes new entries at once: the next checkpoint may not come
    stop: Callable[[], None] = lambda: None  # asks the loop to save and end
    step: int = 0  # the first step without what is lost from now on; counted from 1
    met: list[int] = field(default_factory=list)  # steps at which this process has found a picture lost
    _open: dict[int, list[Entry]] = field(default_factory=dict)  # by image: entries of those that are lost now
    _closed: list[Entry] = field(default_factory=list)  # of those that were lost for a while
    _spans: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # by image: first step without it, and with
    _returned: list[Entry] = field(default_factory=list)  # of those that are back; `begin` moves them to _closed
    _stand_ins: tuple[tuple[str, tuple[int, ...]], Tensor] | None = None  # split, lost images and rows: the last answer

    def image_of(self, reference: int) -> int:
        """Return the number of the distinct image of which this is the example."""
        return int(np.searchsorted(self.example_D, reference))

    def is_lost(self, image: int, step: int) -> bool:
        """Return whether an image is lost at a step."""
        return any(low <= step < high for low, high in self._spans.get(image, ()))

    def lost_images(self, step: int = END) -> tuple[int, ...]:
        """Return the images that are lost at a step, ascending; without one those lost at the end."""
        return tuple(sorted(image for image in self._spans if self.is_lost(image, step)))

    def task(self, reference: int, crop: tuple[int, int, int | None] | None = None,
             step: int = END) -> Task | BadSample:
        """Return the task of decoding the example of an image, a BadSample if it is lost."""
        if self.is_lost(self.image_of(reference), step):
            return BadSample("lost")
        return Task(self.catalogue.references[reference].as_py(), crop)

    def stand_ins(self, split: Split, step: int = END) -> Tensor | None:
        """Return for each row itself or, where its picture is lost, the next row whose picture is not.

        None where no row is lost. The answer depends on no rank and no history: all ranks, and a resumed run, have the
        same.
        """
        lost = self.lost_images(step)
        if not lost:
            return None
        if self._stand_ins is None or self._stand_ins[0] != (split.name, lost):
            self._stand_ins = (split.name, lost), torch.from_numpy(next_good(np.isin(split.image_N.numpy(), lost)))
        return self._stand_ins[1]

    def read_again(self, lot: Lot[int], tasks: Sequence[Task | BadSample | np.ndarray], job: Job) -> list[int]:
        """Decode what has failed in a lot a few times more, into its records; return the places that are lost."""
        problems = self._problems(lot, range(len(tasks)))
        for tried in range(RETRIES):
            failed = {place: task for place in problems if isinstance(task := tasks[place], Task)}
            if not failed or self.too_many:
                break
            time.sleep(storage.BACKOFF * 2**tried)
            self._decode(lot, failed, job)
            problems = self._problems(lot, problems)
        return self._enter(lot, problems)

    def read_others(self, lot: Lot[int], tasks: Mapping[int, tuple[int, Task | BadSample]], job: Job) -> list[int]:
        """Decode other pictures, reference and task each, into places of a lot; return the places still without one."""
        for place, (reference, task) in tasks.items():
            lot.tags[place] = reference
            lot.outcomes[place] = Outcome(b"", (task.reason, "") if isinstance(task, BadSample) else None)
        self._decode(lot, {place: task for place, (_, task) in tasks.items() if isinstance(task, Task)}, job)
        return self._enter(lot, self._problems(lot, tasks))

    def _decode(self, lot: Lot[int], tasks: Mapping[int, Task], job: Job) -> None:
        for place, task in tasks.items():
            lot.outcomes[place] = do_task(task, job, self.reader, lot.records, place, Spent())

    def _problems(self, lot: Lot[int], places: Iterable[int]) -> dict[int, BadSample]:
        """Return why pictures at these places of a lot cannot be used: unreadable, or other ones than before."""
        problems = {}
        for place in places:
            key, problem = lot.outcomes[place].key, lot.outcomes[place].problem
            if problem is not None:
                problems[place] = BadSample(*problem)
            elif key and key != self.key_DK[self.image_of(lot.tags[place])].tobytes():
                problems[place] = BadSample("changed-file", "it is another picture now")
        return problems

    def _enter(self, lot: Lot[int], problems: Mapping[int, BadSample]) -> list[int]:
        """Enter the pictures of `problems` that are not known as lost yet into the ledger; return all the places."""
        new = {self.image_of(lot.tags[place]): problem for place, problem in problems.items()}
        new = {image: problem for image, problem in new.items() if not self.is_lost(image, self.step)}
        if not new:
            return [*problems]
        entries = self._entries(new)
        before = len(self._open)
        self._take(entries)
        self.met.append(self.step)
        self.record([*chain.from_iterable(entries.values())])
        for number, of_image in enumerate(entries.values(), before + 1):
            self._say(of_image, number)
        if self.too_many:
            self.stop()
        return [*problems]

    def _entries(self, problems: Mapping[int, BadSample]) -> dict[int, list[Entry]]:
        """Return the ledger entries of all rows of each image."""
        entries: dict[int, list[Entry]] = {image: [] for image in problems}
        for name, split in self.splits.items():
            image_N = split.image_N.numpy()
            for place in np.flatnonzero(np.isin(image_N, [*problems])).tolist():
                image, row = int(image_N[place]), int(split.row_N[place])
                problem = problems[image]
                detail = f"could be decoded when the run began, and cannot be now: {problem.detail or problem.reason}"
                entries[image].append({
                    "split": name, "row": row, "image": self._name(image), "title": self.catalogue.title(name, row),
                    "reason": problem.reason, "detail": detail, "content": self.key_DK[image].tobytes().hex(),
                    "step": self.step})
        return entries

    def _name(self, image: int) -> str | None:
        return shown_name(self.catalogue.references[int(self.example_D[image])].as_py()) or None

    def _say(self, entries: Sequence[Entry], number: int) -> None:
        """Log what was lost, the first LINES of them."""
        if number <= LINES and entries:
            more = "; further ones are in ledger.jsonl alone" if number == LINES else ""
            left_out = ", evaluations leave it out" if self.is_measured else ""
            self.log(f"{entries[0]['image'] or 'a picture of the dataset'} {entries[0]['detail']}; the run goes on "
                     f"without it (in training another row takes its place{left_out}){more}")

    def _take(self, entries: Mapping[int, list[Entry]]) -> None:
        for image, of_image in entries.items():
            self._open[image] = of_image
            self._spans.setdefault(image, []).append((of_image[0]["step"] if of_image else 0, ALWAYS))

    @property
    def too_many(self) -> bool:
        """Return whether more than `max_bad` of all rows are lost or were dropped at the opening."""
        return dropped_rows(self.ledger()) + dropped_rows(self.dropped) > self.max_bad * self.rows

    def ledger(self) -> list[Entry]:
        """Return the entries, those of pictures that were lost for a while with 0 rows."""
        entries = [*self._closed]
        for image in sorted(self._open):
            entries += self._open[image]
        return entries

    def share(self, team: Team) -> None:
        """Tell all ranks what each of them has lost. Raises AgreedError where it is more than `max_bad` together."""
        parts: list[tuple[int, int, list[Entry]]] = []
        for lost_on_rank in team.exchange(self._open):
            parts += [(entries[0]["step"], image, entries) for image, entries in lost_on_rank.items() if entries]
        parts.sort(key=lambda part: part[:2])
        for _, image, entries in parts:
            if image not in self._open:
                self._take({image: entries})
                self._say(entries, len(self._open))
        # Two ranks may have lost one picture at different steps. The earliest is set last, so that all ranks keep it.
        for _, image, entries in sorted(parts, key=lambda part: part[:2], reverse=True):
            self._open[image] = entries
        if self.too_many:
            try:
                check_bad_share(self.rows, [*self.ledger(), *self.dropped], self.max_bad)
            except UserError as error:
                raise AgreedError(str(error)) from None

    def adopt(self, ledger: Sequence[Mapping[str, Any]], results: Sequence[DecodeResults], replays: bool) -> None:
        """Take over the losses in the ledger of an earlier process; `results` are those of this opening, of all ranks.

        A run that goes on uses what is back. One that is replayed has each picture at the steps at which it was there.
        """
        # 1. The lost pictures that this opening could not read either, and why.
        unreadable = {}
        restored = chain.from_iterable(part.restored.items() for part in results)
        for reference, problem in sorted(restored, key=itemgetter(0)):
            image = min(self.image_of(reference), len(self.example_D) - 1)
            if self.example_D[image] == reference:  # not a copy of another file
                unreadable[image] = problem
        # 2. Each entry of the ledger is closed, still open, or of a picture that is back.
        returned = dict[int, list[Entry]]()
        rows = set[tuple[str, int]]()  # of entries without an end
        for entry in map(dict, ledger):
            row_image = self._image_at(entry) if is_loss(entry) else None
            if row_image is None:
                continue
            image = row_image
            place = (entry["split"], entry["row"])
            if place in rows:  # the entry of a second rank that lost the same picture
                continue
            if "back" not in entry:
                rows.add(place)
            if "back" in entry:
                self._closed.append(entry)
                self._spans.setdefault(image, []).append((entry["step"], entry["back"]))
            elif replays or image in unreadable:
                self._open.setdefault(image, []).append(entry)
            else:
                returned.setdefault(image, []).append(entry)
        for image, entries in self._open.items():
            self._spans.setdefault(image, []).append((entries[0]["step"] if replays else 0, ALWAYS))
        for entries in returned.values():
            self.log(f"{entries[0]['image']}, lost since step {entries[0]['step']}, is back and used again")
        self._returned = [*chain.from_iterable(returned.values())]
        # 3. What is lost since the last process ended is in no ledger yet.
        new = {} if replays else {image: problem for image, problem in unreadable.items() if image not in self._open}
        if new:
            self._take(self._entries(new))
            for number, image in enumerate(new, 1):
                self._say(self._open[image], number)

    def begin(self, step: int) -> None:
        """Note the step that a run goes on from: what the opening found lost, or back, is so from the next step on."""
        self.step = step + 1
        for entries in self._open.values():
            for entry in entries:
                entry["step"] = entry["step"] or step + 1
        self._closed += [{**entry, "rows": 0, "back": step + 1} for entry in self._returned]
        self._returned = []

    def _image_at(self, entry: Mapping[str, Any]) -> int | None:
        """Return the image of a ledger entry's row, None where there is no such row."""
        split = self.splits.get(entry.get("split", ""))
        place = 0 if split is None else int(np.searchsorted(split.row_N, entry["row"]))
        if split is None or place == len(split) or split.row_N[place] != entry["row"]:
            return None
        return int(split.image_N[place])


def is_loss(entry: Mapping[str, Any]) -> bool:
    """Return whether a ledger entry is that of a picture that a run has lost, and whole."""
    return {"split", "row", "image", "step"} <= entry.keys() and len(entry.get("content", "")) == 2 * KEY


def lost_files(ledger: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Return the paths of the pictures that a run has lost, by its ledger."""
    images = [str(entry["image"] or "") for entry in ledger if is_loss(entry)]
    return frozenset(filter(os.path.isabs, images))


def restore(catalogue: Catalogue, results: Sequence[DecodeResults], ledger: Sequence[Mapping[str, Any]],
            last_key_MK: np.ndarray, log: Callable[[str], None]) -> None:
    """Count pictures that a run has lost as read, so that it has the rows that it began with.

    In `results`, of all ranks, they get their content from the ledger, else from the time when they were last read. The
    digest of the data then tells whether all rows are those that the run began with. Other pictures under old names, of
    which the ledger knows nothing, are logged here and refused by that digest.
    """
    key_MK, good_M = keys_and_usable(results, len(catalogue.references))
    require_rows(catalogue, ledger)
    failed = [reference for part in results for reference in part.problems]
    wanted = {reference: last_key_MK[reference].tobytes() for reference in failed if last_key_MK[reference].any()}
    for entry in ledger:
        image_N = catalogue.image_N.get(entry.get("split", ""))
        if image_N is None or not 0 <= entry.get("row", -1) < len(image_N) or "file" in entry:
            continue
        reference = int(image_N[entry["row"]])
        if not is_loss(entry):  # could not be used when the run began either
            if entry.get("reason") != "no-title":
                wanted.pop(reference, None)
        elif not good_M[reference] or key_MK[reference].tobytes().hex() != entry["content"]:
            wanted[reference] = bytes.fromhex(entry["content"])
    is_other_M = good_M & last_key_MK.any(1) & (key_MK != last_key_MK).any(1)
    for reference in [number for number in np.flatnonzero(is_other_M).tolist() if number not in wanted][:LINES]:
        log(f"{shown_name(catalogue.references[reference].as_py())} is another picture than when it was last read")
    for part in results:
        part.restore(wanted)


def require_rows(catalogue: Catalogue, ledger: Sequence[Mapping[str, Any]]) -> None:
    """Raise AgreedError, which names it, where a file that a run has lost is no row any more."""
    import pyarrow as pa
    import pyarrow.compute as pc

    losses = [entry for entry in ledger if lost_files([entry]) and entry["split"] in catalogue.image_N]
    images = pa.array([entry["image"] for entry in losses], pa.large_string())
    unknown = pc.invert(pc.is_in(images, catalogue.references)).to_numpy(zero_copy_only=False)
    for entry in (losses[number] for number in np.flatnonzero(unknown)):
        image_N, row = catalogue.image_N[entry["split"]], entry["row"]
        row_image = catalogue.references[int(image_N[row])].as_py() if 0 <= row < len(image_N) else ""
        if os.path.basename(row_image) != os.path.basename(entry["image"]):  # else the dataset has moved
            raise AgreedError(f"{entry['image']}, which the run lost at step {entry['step']}, is no row of the dataset "
                              "as it is read now; put it back, or an empty file in its place")


def next_good(lost_N: np.ndarray) -> np.ndarray:
    """Return for each row itself or, where it is lost, the first row after it that is not; all lost: themselves."""
    good = np.flatnonzero(~lost_N)
    if not len(good):
        return np.arange(len(lost_N))
    return good[np.searchsorted(good, np.arange(len(lost_N))) % len(good)]


def fill_places(rows_B: Tensor, pixels: np.ndarray, lost: Sequence[int],
                spare: tuple[int, np.ndarray] | None) -> Tensor:
    """Return the rows with one that was decoded, of this step or else `spare`, in the lost places, also in `pixels`."""
    good = next((place for place in range(len(rows_B)) if place not in lost), None)
    if good is not None:
        spare = int(rows_B[good]), pixels[good]
    if spare is None:
        raise UserError("none of the pictures of a step can be read any more; mend them, and --resume goes on from "
                        "the last checkpoint")
    rows_B = rows_B.clone()
    rows_B[[*lost]], pixels[[*lost]] = spare
    return rows_B
