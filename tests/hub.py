"""A loopback stand-in of the Hugging Face hub: serves model and dataset repositories, takes pushes, draws thumbnails.

It answers what huggingface_hub 2.4 and datasets 5.2 ask. Large files are redirected to another origin (`localhost` for
`127.0.0.1`) as the hub redirects to its CDN. Clients started with `Hub.env` reach nothing else: the stand-in is also
their proxy for every other host, and answers 404.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import threading
from pathlib import Path
from typing import Any, NamedTuple, Self

from aiohttp import web
from aiohttp.typedefs import Handler
from scenes import scene_thumbnail

LARGE = (".safetensors", ".bin", ".parquet", ".jpg", ".png")  # kept in large-file storage, as .gitattributes has it
REPO = r"/api/{kind:models|datasets}/{name:[^/]+/[^/]+}"
TIME = "2024-01-01T00:00:00.000Z"


class Asked(NamedTuple):
    """One request: the path with its query, or the whole URL where it was meant for another host."""

    method: str
    path: str


class Repo(NamedTuple):
    """The files of one repository by path; its commit is a digest of them."""

    files: dict[str, bytes]

    @property
    def commit(self) -> str:
        """40 hex digits that change with the content."""
        return hashlib.sha1("".join(f"{path} {self.etag(path)}\n" for path in sorted(self.files)).encode()).hexdigest()

    def etag(self, path: str) -> str:
        """The hub's name of a file's content: SHA-256 where it is large, else git's."""
        data = self.files[path]
        if path.endswith(LARGE):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def info(self, path: str) -> dict[str, Any]:
        """A file or a folder as the tree endpoint describes it."""
        if path not in self.files:
            return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
        size, oid = len(self.files[path]), self.etag(path)
        large = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if path.endswith(LARGE) else {}
        return {"type": "file", "path": path, "size": size, "oid": oid, **large}

    def listing(self, under: str, recursive: bool) -> list[dict[str, Any]]:
        """What lies under a folder ('' is the root), with its subfolders."""
        prefix, found = f"{under}/" if under else "", set[str]()
        for path in self.files:
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                found.update(prefix + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1 if recursive else 2))
        return [self.info(path) for path in sorted(found)]


class Hub:
    """Serves on a free port of 127.0.0.1 from `with` to its end; `home` is where its clients keep their caches.

    `requests` records every request; `missing` holds the thumbnail ids that answer 404 (with a JPEG body, as YouTube
    does); `token` is what a push must bear. `env` is all that a client process needs.
    """

    def __init__(self, home: Path, token: str = "hf_loopback") -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Asked] = []
        self.missing: set[str] = set()
        self.token = token
        self._stored: dict[str, bytes] = {}  # large-file storage, by SHA-256
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.env = {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # else datasets sends a HEAD to its bucket on S3
            # No switch keeps datasets from asking `datasets-server.` + the endpoint's host, so let it ask here.
            "http_proxy": self.url, "https_proxy": self.url, "all_proxy": self.url, "no_proxy": "127.0.0.1,localhost",
        }

    def add_model(self, name: str, folder: Path) -> None:
        """Serve `folder` as the model `OWNER/NAME`."""
        self.repos["models", name] = Repo(_read(folder))

    def add_dataset(self, name: str, folder: Path) -> None:
        """Serve `folder` as the dataset `OWNER/NAME`."""
        self.repos["datasets", name] = Repo(_read(folder))

    def __enter__(self) -> Self:
        started = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(started),), daemon=True)
        self._thread.start()
        if not started.wait(10):
            raise RuntimeError("the hub's stand-in did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[self._record], client_max_size=1 << 30)
        app.add_routes([
            web.get(REPO, self._info), web.get(REPO + "/revision/{revision}", self._info),
            web.get(REPO + "/tree/{revision}", self._tree), web.get(REPO + "/tree/{revision}/{path:.+}", self._tree),
            web.post(REPO + "/paths-info/{revision}", self._paths_info),
            web.get(r"/{name:[^/]+/[^/]+}/resolve/{revision}/{path:.+}", self._resolve),
            web.get(r"/{kind:datasets}/{name:[^/]+/[^/]+}/resolve/{revision}/{path:.+}", self._resolve),
            web.get("/lfs/{sha}", self._download), web.get(r"/thumbs/v{id:\d+}.jpg", self._thumbnail),
            web.post("/api/repos/create", self._create), web.post("/api/validate-yaml", self._validate),
            web.get("/api/whoami-v2", self._whoami), web.post(REPO + "/preupload/{revision}", self._preupload),
            web.post(REPO + "/commit/{revision}", self._commit), web.put("/lfs/{sha}", self._upload),
            web.post(r"/{name:[^/]+/[^/]+}.git/info/lfs/objects/batch", self._batch),
        ])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.SockSite(runner, self._listener).start()
        started.set()
        await self._stop.wait()
        await runner.cleanup()

    @web.middleware
    async def _record(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        ours = request.host in (f"127.0.0.1:{self._port}", f"localhost:{self._port}")
        self.requests.append(Asked(request.method, request.path_qs if ours else str(request.url).lstrip("/")))
        if not ours:
            raise web.HTTPNotFound
        return await handler(request)

    def _repo(self, request: web.Request) -> Repo:
        repo = self.repos.get((request.match_info.get("kind", "models"), request.match_info["name"]))
        if repo is None:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if request.match_info.get("revision", "main") not in ("main", repo.commit):
            raise web.HTTPNotFound(headers={"X-Error-Code": "RevisionNotFound"})
        return repo

    async def _info(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        return web.json_response({
            "id": request.match_info["name"], "sha": repo.commit, "private": False, "gated": False, "tags": [],
            "siblings": [{"rfilename": path} for path in repo.files], "lastModified": TIME, "createdAt": TIME})

    async def _tree(self, request: web.Request) -> web.Response:
        recursive = request.query.get("recursive") == "true"
        found = self._repo(request).listing(request.match_info.get("path", ""), recursive)
        if not found:
            raise web.HTTPNotFound(headers={"X-Error-Code": "EntryNotFound"})
        return web.json_response(found)

    async def _paths_info(self, request: web.Request) -> web.Response:
        repo, wanted = self._repo(request), (await request.post()).getall("paths")
        known = {entry["path"] for entry in repo.listing("", recursive=True)}
        return web.json_response([repo.info(str(path)) for path in wanted if path in known])

    async def _resolve(self, request: web.Request) -> web.Response:
        repo, path = self._repo(request), request.match_info["path"]
        headers = {"X-Repo-Commit": repo.commit}
        if path not in repo.files:
            raise web.HTTPNotFound(headers={**headers, "X-Error-Code": "EntryNotFound"})
        data, etag = repo.files[path], repo.etag(path)
        if not path.endswith(LARGE):
            return web.Response(body=data, headers={**headers, "ETag": f'"{etag}"'})
        self._stored[etag] = data
        raise web.HTTPFound(f"http://localhost:{self._port}/lfs/{etag}", headers={
            **headers, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))})

    async def _download(self, request: web.Request) -> web.Response:
        return web.Response(body=self._stored[request.match_info["sha"]])

    async def _thumbnail(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        return web.Response(body=scene_thumbnail(int(id)), status=404 if f"v{id}" in self.missing else 200,
                            content_type="image/jpeg")

    # What follows is for pushes; each must bear the token.
    def _admit(self, request: web.Request) -> None:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            raise web.HTTPUnauthorized(headers={"X-Error-Message": "Invalid username or password."})

    async def _whoami(self, request: web.Request) -> web.Response:
        self._admit(request)
        return web.json_response({"type": "user", "name": "tester", "fullname": "Tester", "orgs": []})

    async def _create(self, request: web.Request) -> web.Response:
        self._admit(request)
        wanted = await request.json()
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        key = (f"{wanted.get('type') or 'model'}s", name)
        status = 409 if key in self.repos else 200
        self.repos.setdefault(key, Repo({}))
        return web.json_response({"url": f"{self.url}/{name}"}, status=status)

    async def _validate(self, request: web.Request) -> web.Response:
        bare = not (await request.json())["content"].startswith("---\n")
        return web.json_response({"errors": [], "warnings": [{"message": "empty or missing yaml"}] if bare else []})

    async def _preupload(self, request: web.Request) -> web.Response:
        self._admit(request)
        repo, wanted = self._repo(request), (await request.json())["files"]
        return web.json_response({"files": [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False, "oid": repo.etag(file["path"]) if file["path"] in repo.files else None}
            for file in wanted]})

    async def _batch(self, request: web.Request) -> web.Response:
        self._admit(request)
        objects = [{**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}
                   for wanted in (await request.json())["objects"]]
        return web.json_response({"transfer": "basic", "objects": objects})

    async def _upload(self, request: web.Request) -> web.Response:
        data, sha = await request.read(), request.match_info["sha"]
        if hashlib.sha256(data).hexdigest() != sha:
            raise web.HTTPBadRequest
        self._stored[sha] = data
        return web.Response()

    async def _commit(self, request: web.Request) -> web.Response:
        self._admit(request)
        repo = self._repo(request)
        for line in (await request.text()).splitlines():
            match json.loads(line):
                case {"key": "file", "value": {"path": path, "content": content}}:
                    repo.files[path] = base64.b64decode(content)
                case {"key": "lfsFile", "value": {"path": path, "oid": sha}}:
                    repo.files[path] = self._stored[sha]
                case {"key": "deletedFile", "value": {"path": path}}:
                    del repo.files[path]
        url = f"{self.url}/{request.match_info['name']}/commit/{repo.commit}"
        return web.json_response({"success": True, "commitOid": repo.commit, "commitUrl": url})


def _read(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
