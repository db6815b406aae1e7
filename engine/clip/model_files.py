"""The files of a model, in a folder or on the hub, each checked before it is read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from data.batch import UserError
from data.reading import NotAFile, Unfinished, open_descriptor

LFS_POINTER = b"version https://git-lfs"
TEXTS, WEIGHTS = (".json", ".txt", ".jinja", ".model"), (".safetensors", ".bin")  # endings of what is read
MAX_TEXT = 1 << 28  # bytes


class ModelFiles:
    """The files of a model folder, or of a hub repository at a commit, by their names."""

    def __init__(self, name: str, commit: str | None) -> None:
        path = Path(name).expanduser()
        if path.exists() and not path.is_dir():
            raise UserError(f"--model {name} is a file; give the folder that holds config.json")
        if path.is_symlink() and not path.exists():
            raise UserError(f"--model {name} is a link that leads nowhere; give the folder itself")
        self.name, self.is_local = name, path.is_dir()
        self.source = str(path) if self.is_local else name
        self.where: dict[str, Any] = {"revision": commit, "subfolder": ""}
        self._refuse_odd_files(path)
        self.where["subfolder"] = self._subfolder()
        self._refuse_odd_files(path / self.where["subfolder"])

    def refuse(self, problem: str) -> NoReturn:
        """Raise UserError: the model's name, then `problem`, which names a file and the fix."""
        raise UserError(f"--model {self.name}: {problem}")

    def _refuse_odd_files(self, folder: Path) -> None:
        """Refuse a local folder with a pipe, a device or a huge text, which libraries would read without end."""
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix not in (*TEXTS, *WEIGHTS) or path.is_dir():
                continue
            try:
                descriptor = open_descriptor(path)
            except NotAFile as error:
                self.refuse(f"{path.name} is {error.strerror}; remove it, or copy it again")
            except Unfinished as error:
                self.refuse(f"{path.name}: {error.strerror}")
            except OSError:  # a dead link, no permission: said by what needs the file
                continue
            size = os.fstat(descriptor).st_size
            os.close(descriptor)
            if path.suffix in TEXTS and size > MAX_TEXT:
                self.refuse(f"{path.name} has {size:,} bytes, {MAX_TEXT:,} allowed; copy it again from where the model "
                            "came from")

    def path(self, name: str) -> Path | None:
        """Return the local path of a file; None where there is none."""
        from transformers.utils import cached_file

        # None in place of an error: a missing file may be optional, and for one that is not the caller names the fix.
        path = cached_file(self.source, name, **self.where, _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False)
        if path is None:
            return None
        with Path(path).open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            self.refuse(f"{name} is a Git LFS pointer, not the file itself; run `git lfs pull` in the folder")
        if not start:
            self.refuse(f"{name} is empty; copy it again from where the model came from")
        return Path(path)

    def read(self, name: str) -> Any:
        """Return the content of a JSON file; {} where there is none."""
        path = self.path(name)
        if path is None:
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            self.refuse(f"{name} is cut off or no JSON ({error}); copy it again from where the model came from")

    def config(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file that holds settings; {} where there is none."""
        content = self.read(name)
        if not isinstance(content, dict):
            self.refuse(f"{name} holds no settings; copy it again from where the model came from")
        return content

    def commit(self) -> str | None:
        """Return the commit of a hub repository; None for a folder."""
        match = re.search(r"/snapshots/([0-9a-f]{40})/", str(self.path("config.json")))
        return match[1] if match else None

    def _subfolder(self) -> str:
        """Return the subfolder of the CLIPModel in a sentence-transformers folder; '' for a plain CLIPModel."""
        modules = self.read("modules.json")
        if not modules:
            return ""
        try:
            folder = str(modules[0]["path"])
            kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        except (KeyError, TypeError):
            self.refuse("modules.json is no list of sentence-transformers modules; copy it again")
        if kinds[0] not in ("CLIPModel", "Transformer") or set(kinds[1:]) - {"Normalize"}:
            self.refuse(f"modules.json lists {', '.join(kinds)}, of which thumbtune would run a CLIPModel alone; give "
                        "a plain CLIPModel")
        if not re.fullmatch(r"[\w-][\w.-]*|", folder):
            self.refuse(f"modules.json looks for its CLIPModel in {folder!r}; it has to be a folder beside it")
        return folder
