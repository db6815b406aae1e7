"""The size in memory of an Arrow file whose buffers are compressed, from its headers alone."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from data.reading import open_regular

if TYPE_CHECKING:
    import pyarrow as pa

# Fields of the tables in format/Message.fbs of Apache Arrow, by their place there.
HEADER_TYPE, HEADER, BUFFERS, COMPRESSION, DICTIONARY_DATA = 1, 2, 2, 3, 1
DICTIONARY_BATCH, RECORD_BATCH = 2, 3  # types of headers


class _Flatbuffer:
    """A table in the format of FlatBuffers: fields by their number."""

    def __init__(self, data: memoryview, place: int) -> None:
        self._data, self._place = data, place
        self._fields = place - self._read("<i", place)

    def _read(self, kind: str, place: int) -> int:
        return int(struct.unpack_from(kind, self._data, place)[0])

    def field(self, number: int) -> int:
        """Return the place of a field, 0 where it is absent."""
        offset = 4 + 2 * number
        if offset >= self._read("<H", self._fields):
            return 0
        relative = self._read("<H", self._fields + offset)
        return self._place + relative if relative else 0

    def table(self, number: int) -> _Flatbuffer | None:
        """Return the table that a field refers to."""
        place = self.field(number)
        return _Flatbuffer(self._data, place + self._read("<I", place)) if place else None

    def byte(self, number: int) -> int:
        """Return a field of one byte, 0 where it is absent."""
        place = self.field(number)
        return self._data[place] if place else 0

    def pairs(self, number: int) -> list[tuple[int, int]]:
        """Return a vector of structs of two 64-bit numbers."""
        place = self.field(number)
        if not place:
            return []
        start = place + self._read("<I", place)
        count = self._read("<I", start)
        first, bytes_in_all = (start + 4), 16 * count
        return list(struct.iter_unpack("<qq", self._data[first : first + bytes_in_all]))


def unpacked_size(path: Path) -> int:
    """Return the bytes that the compressed buffers of an Arrow file or stream take in memory, 0 for one without any.

    Raises pyarrow.ArrowException, ValueError where it is damaged, OSError.
    """
    import pyarrow as pa

    open_regular(path).close()
    size = 0
    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) != b"ARROW1":
                file.seek(0)
            else:
                file.seek(8)  # an Arrow file is a stream between its marks
            reader = pa.ipc.MessageReader.open_stream(file)
            while True:
                message = reader.read_next_message()
                size += _message_size(message)
    except (StopIteration, EOFError):
        return size
    except (struct.error, IndexError) as error:
        raise ValueError(f"a damaged header: {error}") from None


def _message_size(message: pa.ipc.Message) -> int:
    data = memoryview(message.metadata)
    root = _Flatbuffer(data, struct.unpack_from("<I", data)[0])
    header = root.table(HEADER)
    kind = root.byte(HEADER_TYPE)
    if header is not None and kind == DICTIONARY_BATCH:
        header = header.table(DICTIONARY_DATA)
    if header is None or kind not in (DICTIONARY_BATCH, RECORD_BATCH) or header.field(COMPRESSION) == 0:
        return 0
    size = 0
    body = memoryview(message.body)
    for offset, length in header.pairs(BUFFERS):
        if length >= 8:
            unpacked = struct.unpack_from("<q", body, offset)[0]
            size += unpacked if unpacked > 0 else length  # -1: this buffer is not compressed
    return size
