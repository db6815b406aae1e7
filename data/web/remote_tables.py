"""Files of a store copied whole to this machine, once as long as they do not change, whatever the number of ranks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from data.files import fsync, replace_text
from data.locks import locked
from data.reading import read_text
from data.web.fetched import disk_errors_as_user_errors
from data.web.storage import RemoteFile, open_stream, public_name, stat


def copy_file(address: str, folder: Path, log: Callable[[str], None]) -> RemoteFile:
    """Return the copy of a file in `folder`, made if there is none or the file has changed in size or version.

    Without a version in the store the file is copied every time. Raises UserError.
    """
    place = folder / hashlib.blake2b(address.encode(), digest_size=16).hexdigest()
    path, note = place / public_name(address).rpartition("/")[2], place / "version.json"
    with disk_errors_as_user_errors(folder), locked(place / "lock"):
        entry = stat(address)
        version = json.dumps([public_name(address), entry.size, entry.version])
        is_there = path.exists() and note.exists() and entry.size == path.stat().st_size
        if is_there and entry.version and read_text(note) == version:
            return RemoteFile(address, path)
        if is_there and entry.version:
            log(f"{public_name(address)} has changed since it was copied: it is copied again")
        part = place / ".part"
        with open_stream(address, entry) as stream, open(part, "wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        os.replace(fsync(part), path)
        replace_text(note, version)
    return RemoteFile(address, path)
