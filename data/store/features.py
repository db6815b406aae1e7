"""The feature store: the towers' outputs for each image and title, kept by content, so that each is encoded once."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batch import UserError
from data.reading import NotAFile
from data.store.segments import BLOCK, KEY, SUFFIX, Layout, Segment, hold, open_segment, remove_stale, write_segment

CHUNK = 8192  # rows moved to a device at a time
SEGMENT = 4096  # rows written at once by those who have many
POLL_S = 0.2
PIECE = 256  # rows copied at a time: few enough to stay in the processor's cache between two copies


class FeatureStore:
    """One space: append-only, shared by any number of processes; every byte is verified before it is used.

    Opening verifies everything but the values (size, header, keys, sums); `locate` verifies the blocks of values it
    points into, once per process, so `gather` only copies. A damaged segment is renamed `*.damaged`, warned about,
    listed in `damaged` and ignored: its rows count as missing, and are encoded again. Row numbers stay valid as long as
    the object lives; each process numbers rows on its own. Raises UserError when the folder cannot be read.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.width, self.dtype = Path(folder), width, dtype
        self.damaged: list[str] = []
        self._layout = Layout(self.folder.absolute().name, width, dtype)
        self._segments: list[Segment] = []
        self._known: set[str] = set()
        self._verified = np.zeros(0, bool)  # one per block
        self._index: list[tuple[np.ndarray, np.ndarray]] = []  # sorted keys and their rows, each part half of the last
        self._is_held = False
        remove_stale(self.folder)
        self.refresh()
        self._opened_with = len(self)

    def __len__(self) -> int:
        """Return the number of rows; content that several ranks wrote counts as often as it was written."""
        return sum(len(segment.keys) for segment in self._live())

    @property
    def grown(self) -> int:
        """Rows added since this store was opened, by any process."""
        return len(self) - self._opened_with

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(self._layout.header(len(segment.keys))[1] for segment in self._live())

    def refresh(self) -> None:
        """Load the segments that other processes wrote.

        Where content is stored several times, processes that see the same segments choose the same copy.
        """
        self._hold()
        try:
            names = os.listdir(self.folder) if self.folder.exists() else []
            for name in sorted(names):
                if name.endswith(SUFFIX) and name not in self._known:
                    self._load(self.folder / name)
        except OSError as error:
            raise UserError(f"cannot read features in {self.folder}: {error.strerror or error}; "
                            "mend its permissions or choose another --cache-dir") from error
        self._rebuild()

    def wait_for(self, keys: np.ndarray, seconds: float) -> np.ndarray:
        """Return `locate` of keys that other ranks have just written, waiting for those that are not visible yet.

        An NFS client may show an older listing of the folder until it changes something there itself.
        """
        deadline = time.monotonic() + seconds
        while True:
            self.refresh()
            rows = self.locate(keys)
            if (rows >= 0).all() or time.monotonic() > deadline:
                return rows
            # A file made here changes the folder, so that an NFS client asks the server for a new listing.
            with suppress(OSError), tempfile.TemporaryFile(dir=self.folder):
                time.sleep(POLL_S)

    def locate(self, keys: np.ndarray) -> np.ndarray:
        """Return row numbers [n] int64 of keys [n, 16] uint8, -1 where missing; every row returned is verified."""
        while True:
            rows = self._find(np.ascontiguousarray(keys, np.uint8).reshape(-1).view(f"S{KEY}"))
            wanted = np.zeros(len(self._verified), bool)
            wanted[rows[rows >= 0] // BLOCK] = True
            if self._verify(wanted & ~self._verified):
                return rows

    def sorted_keys(self) -> list[np.ndarray]:
        """Return all keys as sorted arrays [n] S16; the values that belong to them are not verified."""
        return [keys for keys, _ in self._index]

    def gather(self, rows: np.ndarray) -> Tensor:
        """Return values [n, width] of row numbers from `locate`, in a new CPU tensor; IndexError for any others."""
        out = torch.empty(len(rows), self.width, dtype=self.dtype)
        target = out.view(torch.uint8).numpy()
        starts = np.array([segment.start for segment in self._segments], np.int64)
        buffer = np.empty((PIECE, self._layout.row_bytes), np.uint8)
        # Ascending rows read each file front to back, and so each page of it once.
        order = np.argsort(rows)
        wanted = rows[order]
        cuts = [*np.searchsorted(wanted, starts).tolist(), len(wanted)]  # segment i: wanted[cuts[i] : cuts[i + 1]]
        if cuts[0]:
            raise IndexError(f"no row {wanted[0]}")
        for segment, first, last in zip(self._segments, cuts[:-1], cuts[1:], strict=True):
            for low in range(first, last, PIECE):
                high = min(low + PIECE, last)
                segment.take(wanted[low:high], buffer[: high - low])
                target[order[low:high]] = buffer[: high - low]
        return out

    def append(self, keys: np.ndarray, values: Tensor) -> None:
        """Write keys [n, 16] uint8 and values [n, width] as one segment, synced to disk when this returns.

        Raises UserError, with the store as it was, when the disk is full or the folder cannot be written.
        """
        # A wrong shape would be a segment that every later run sets aside as damaged.
        if keys.shape != (len(values), KEY) or values.shape != (len(keys), self.width):
            raise ValueError(f"keys {keys.shape}, values {tuple(values.shape)}: want [n, {KEY}], [n, {self.width}]")
        if not len(keys):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._hold()
            path = write_segment(self.folder, self._layout, keys, values)
        except OSError as error:
            raise UserError(f"cannot write features to {self.folder}: {error.strerror or error}; "
                            "make room there or choose another --cache-dir") from error
        segment = self._load(path)
        if segment is not None:
            self._add(segment.keys, np.arange(len(keys)) + segment.start)

    def verify(self) -> list[str]:
        """Read every byte again; return the names of all segments found damaged or gone since this store was opened."""
        for segment in self._live():
            try:
                open_segment(segment.path, segment.start, self._layout)
            except (FileNotFoundError, NotAFile, ValueError) as error:
                self._set_aside(segment.path, str(error))
        self._verify(np.ones(len(self._verified), bool))
        self._rebuild()
        return list(self.damaged)

    def _hold(self) -> None:
        """Keep others from pruning this space as long as this object lives."""
        lock = None if self._is_held else hold(self.folder)
        if lock is not None:
            self._is_held = True
            weakref.finalize(self, os.close, lock)

    def _live(self) -> list[Segment]:
        return [segment for segment in self._segments if segment.path.name not in self.damaged]

    def _load(self, path: Path) -> Segment | None:
        self._known.add(path.name)
        try:
            segment = open_segment(path, len(self._verified) * BLOCK, self._layout)
        except FileNotFoundError:  # set aside by another rank since it was listed
            if path.is_symlink():
                self._skip(path, "a link to a file that is not there")
            return None
        except NotAFile as error:
            self._skip(path, str(error.strerror))
            return None
        except PermissionError as error:
            self._skip(path, str(error.strerror))
            return None
        except ValueError as error:
            self._set_aside(path, str(error))
            return None
        self._segments.append(segment)
        self._verified = np.concatenate([self._verified, np.zeros(len(segment.sums), bool)])
        return segment

    def _skip(self, path: Path, reason: str) -> None:
        self.damaged.append(path.name)
        warnings.warn(f"feature segment {path} is skipped ({reason}); its rows will be encoded again", stacklevel=2)

    def _set_aside(self, path: Path, reason: str) -> None:
        with suppress(OSError):  # another rank was first, or the folder is read-only: ignoring the segment is enough
            os.replace(path, path.with_name(path.name + ".damaged"))
        self.damaged.append(path.name)
        warnings.warn(f"feature segment {path} is damaged ({reason}); its rows will be encoded again", stacklevel=2)

    def _rebuild(self) -> None:
        """Index all live segments again, in an order that is the same in every process."""
        live, self._index = sorted(self._live()), []
        if live:
            keys = np.concatenate([segment.keys for segment in live])
            rows = np.concatenate([segment.start + np.arange(len(segment.keys)) for segment in live])
            self._add(keys, rows)

    def _add(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Index these rows; parts of similar size are merged, so that many appends sort each row only a few times."""
        while self._index and len(self._index[-1][0]) <= 2 * len(keys):
            older_keys, older_rows = self._index.pop()
            keys, rows = np.concatenate([older_keys, keys]), np.concatenate([older_rows, rows])
        order = np.argsort(keys, kind="stable")
        self._index.append((keys[order], rows[order]))

    def _find(self, keys: np.ndarray) -> np.ndarray:
        result = np.full(len(keys), -1)
        # Sorted queries share the processor's cache lines: twice as fast.
        order = np.argsort(keys)
        for known, rows in self._index:
            position = np.minimum(np.searchsorted(known, keys[order]), len(known) - 1)
            is_hit = known[position] == keys[order]
            result[order[is_hit]] = rows[position[is_hit]]
        return result

    def _verify(self, wanted: np.ndarray) -> bool:
        """Read these blocks (bool [blocks]) and set aside damaged segments; return whether all were sound."""
        before = len(self.damaged)
        for segment in self._live() if wanted.any() else []:
            blocks = slice(segment.start // BLOCK, segment.start // BLOCK + len(segment.sums))
            bad = segment.first_bad(np.flatnonzero(wanted[blocks]))
            if bad is not None:
                self._set_aside(segment.path, f"values of rows {bad * BLOCK} and on")
            self._verified[blocks] |= wanted[blocks]
        if len(self.damaged) > before:
            self._rebuild()
        return len(self.damaged) == before
