"""Writing WebDataset shards, each with its index, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.batch import BadSample, UserError
from data.files import fsync
from data.locks import try_lock
from data.shards.index import INDEX, indexed, seal, sidecar
from data.shards.samples import IMAGES, MAX_TEXT, check_image, titles_and_negatives
from data.shards.tar import BLOCK, END, open_tar

MAX_KEY = 1000  # characters, of what is written
# Keys that the webdataset package reads back unchanged, and that cannot leave the folder they are extracted to.
KEY = re.compile(r"(?!__[^/]*__/)((?!\.{1,2}/)[^\0-\x1f\ud800-\udfff/]+/)*[^\0-\x1f\ud800-\udfff./]+")


class ShardWriter:
    """Writes FOLDER/NAME-000000.tar, … and their indexes, the same bytes for the same samples; a context manager.

    A tar appears under its name when it and its index are safe on disk. After a kill, give a new writer the samples
    whose keys are not in `done()`, in the same order: the result is that of a run never interrupted. Leaving the block
    by an exception drops the incomplete shard. Raises UserError where another process writes, or a tar of that name is
    not a complete shard; OSError.
    """

    def __init__(self, folder: Path, name: str, max_bytes: int = 1 << 28, max_samples: int = 10_000) -> None:
        self.folder, self.name, self.max_bytes, self.max_samples = folder, name, max_bytes, max_samples
        self._part, self._index = folder / f".{name}.part", folder / f".{name}.index.part"
        self._done: set[str] = set()
        self._number = 0
        self._rows: dict[str, tuple[Any, ...]] = {}
        self._digest = hashlib.sha256()  # of the tar so far

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._begin()
        try:
            for path in self.folder.iterdir():
                if re.fullmatch(rf"{re.escape(self.name)}-\d{{6,}}\.tar", path.name):
                    self._done.update(_keys_of_complete(path))
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._rows:
                self._finish()
        finally:
            self._abandon()

    def done(self) -> frozenset[str]:
        """Return the keys in complete shards, of this run and of earlier ones."""
        return frozenset(self._done)

    def write(self, key: str, image: bytes, title: str, title_neg: str | Sequence[str] | None = None,
              extra: Mapping[str, Any] | None = None) -> None:
        """Add a sample: `image` as it is; KEY.json holds `title_neg`, one text as itself and several as a list, and
        `extra`. Raises BadSample where it could not be read back:

        bad-key, duplicate-key, empty, not-image, too-large, bad-title, no-title, bad-json.
        """
        if len(key) > MAX_KEY or not KEY.fullmatch(key):
            raise BadSample("bad-key", f"{key[:200]!r} cannot name a sample")
        if key in self._rows or key in self._done:
            raise BadSample("duplicate-key", key)
        if title_neg is not None and not isinstance(title_neg, str):
            title_neg = title_neg[0] if len(title_neg) == 1 else [*title_neg] or None
        files = _files(image, title, {**(extra or {}), "title_neg": title_neg})
        # As they will be read back, without BOM and final line ends.
        texts = titles_and_negatives([files["txt"]], files["json"])
        members, at = b"", 0
        for ending, content in sorted(files.items()):
            members += _tar_header(f"{key}.{ending}", len(content))
            at = len(members) if ending in IMAGES else at
            members += content + bytes(-len(content) % BLOCK)
        room = self.max_bytes - self._bytes - len(END)
        if self._rows and (len(self._rows) >= self.max_samples or len(members) > room):
            self._finish()
            self._begin()
        self._append(members)
        self._rows[key] = key, self._bytes - len(members) + at, len(image), *texts, hashlib.sha256(image).hexdigest()

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def _begin(self) -> None:
        self._file, self._bytes, self._digest = open(self._part, "ab+"), 0, hashlib.sha256()
        is_ours = False
        with suppress(FileNotFoundError):
            # Its owner may have renamed the file after we opened it; then it is a finished shard, not to be emptied.
            is_ours = try_lock(self._file) and os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._part))
        if not is_ours:
            self._file.close()
            raise UserError(f"{self.folder}: another process is writing {self.name} shards there; wait for it")
        self._file.truncate(0)

    def _finish(self) -> None:
        while (path := self.folder / f"{self.name}-{self._number:06d}.tar").exists():
            self._number += 1
        self._append(END)
        columns = dict(zip(INDEX, zip(*self._rows.values(), strict=True), strict=True))
        body = json.dumps({"tar_sha256": self._digest.hexdigest(), **columns}, ensure_ascii=False,
                          separators=(",", ":")).encode()
        with open(self._index, "wb") as index:
            index.write(json.dumps(seal(self._file, body)).encode() + b"\n" + body)
            index.flush()
            os.fsync(index.fileno())
        os.fsync(self._file.fileno())
        # The index first: a tar under its name is a complete shard, so its index must be on the disk already.
        os.replace(self._index, sidecar(path))
        fsync(self.folder)
        os.replace(self._part, path)
        fsync(self.folder)
        self._file.close()
        self._done.update(self._rows)
        self._rows = {}

    def _abandon(self) -> None:
        """Remove the files of an incomplete shard; does nothing after `_finish`."""
        if not self._file.closed:
            self._part.unlink(missing_ok=True)
            self._index.unlink(missing_ok=True)
            self._file.close()


def _files(image: bytes, title: str, record: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a sample by ending. Raises BadSample."""
    check_image("the image", len(image))
    ending = next((name for name, magic in IMAGES.items() if magic and re.match(magic, image, re.DOTALL)), None)
    if ending is None:
        raise BadSample("not-image", f"starts with {image[:16]!r}")
    try:
        files = {ending: image, "json": json.dumps(record, sort_keys=True).encode(), "txt": title.encode()}
    except UnicodeEncodeError as error:
        raise BadSample("bad-title", str(error)) from None
    if max(len(files["json"]), len(files["txt"])) > MAX_TEXT:
        raise BadSample("too-large", f"more than {MAX_TEXT} bytes of text")
    return files


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # mode 644, everything else zero: the same bytes on every machine and day
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _keys_of_complete(path: Path) -> list[str]:
    with open_tar(path) as file:
        table = indexed(path, file)
    if table is None:
        raise UserError(f"{path}: not a complete shard, for no index fits it; remove it, or write elsewhere")
    return table["key"].to_pylist()
