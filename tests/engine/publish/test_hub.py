"""The hub's stand-in against its real clients: datasets, transformers, sentence-transformers and huggingface_hub.

Run as a script, this file is the client: `test_hub.py TOKEN FOLDER OUT`, in the environment `Hub.env`.
"""

from __future__ import annotations

import http.client
import io
import os
import pickle
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
from hub import Asked, Hub
from PIL import Image
from scenes import scene_picture

MODEL, DATASET, PUSHED = "sentence-transformers/clip-ViT-L-14", "shawhin/yt-title-thumbnail-pairs", "me/pushed"
TITLES = ["3 red circles for Beginners", "Why 2 blue bars?"]


def client(token: str, folder: str) -> dict[str, Any]:
    """Everything the four libraries are asked here, in one process because their imports take most of the time."""
    reached: set[str] = set()
    sys.addaudithook(lambda event, args: reached.add(str(args[0])) if event == "socket.getaddrinfo" else
                     reached.add(str(args[1][0])) if event == "socket.connect" else None)
    import torch
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from sentence_transformers import SentenceTransformer
    from transformers import CLIPModel, CLIPProcessor

    told: dict[str, Any] = {"splits": {name: split.to_dict() for name, split in load_dataset(DATASET).items()}}
    model = CLIPModel.from_pretrained(MODEL, subfolder="0_CLIPModel")
    processor = CLIPProcessor.from_pretrained(MODEL, subfolder="0_CLIPModel")
    told["weights"] = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        out = model(**processor(text=TITLES, images=scene_picture(1), return_tensors="pt", padding=True))
    told["clip"] = torch.cat([out.text_embeds, out.image_embeds]).numpy()
    encoder = SentenceTransformer(MODEL, device="cpu")
    told["encoded"] = np.vstack([encoder.encode(TITLES, normalize_embeddings=True),
                                 encoder.encode([scene_picture(1)], normalize_embeddings=True)])
    api, stranger = HfApi(token=token), HfApi(token="hf_of_a_stranger")
    told["name"] = api.whoami()["name"]
    for attempt in (lambda: stranger.create_repo(PUSHED), lambda: HfApi(token=False).create_repo(PUSHED)):
        with pytest.raises(HfHubHTTPError, match="401"):
            attempt()
    api.create_repo(PUSHED)
    api.create_repo(PUSHED, exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="401"):
        stranger.upload_folder(repo_id=PUSHED, folder_path=folder)
    told["commits"] = [api.upload_folder(repo_id=PUSHED, folder_path=folder).oid for _ in range(2)]
    told["listing"] = api.list_repo_files(PUSHED)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("no/such")
    with pytest.raises(OSError, match="no/such"):
        CLIPModel.from_pretrained("no/such")
    return {**told, "reached": reached}


@pytest.fixture(scope="module")
def told(hub: Hub, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the client found, run once; it pushes the folder `tiny_model`."""
    out, asked_before = tmp_path_factory.mktemp("client") / "told", len(hub.requests)
    ran = subprocess.run([sys.executable, __file__, hub.token, str(tiny_model), str(out)], timeout=500, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **hub.env},
                         capture_output=True)
    assert ran.returncode == 0, ran.stderr
    return {**pickle.loads(out.read_bytes()), "requests": hub.requests[asked_before:]}


def test_datasets_gets_the_three_splits_as_they_were_written(told: dict[str, Any], hub: Hub, tmp_path: Path) -> None:
    files = hub.repos["datasets", DATASET].files
    for split, rows in {"train": 53, "valid": 11, "test": 12}.items():
        written = pq.read_table(io.BytesIO(files[f"data/{split}-00000-of-00001.parquet"])).to_pydict()
        assert list(written) == ["video_id", "title", "thumbnail_url", "title_neg"]
        assert told["splits"][split] == written and len(set(written["title"])) == rows


def test_both_libraries_load_the_same_model(told: dict[str, Any], tiny_st_model: Path) -> None:
    from transformers import CLIPModel

    local = CLIPModel.from_pretrained(tiny_st_model / "0_CLIPModel").state_dict()
    assert local.keys() == told["weights"].keys()
    assert all(np.array_equal(tensor.numpy(), told["weights"][name]) for name, tensor in local.items())
    assert told["encoded"].shape == (3, 16)
    np.testing.assert_allclose(told["encoded"], told["clip"], atol=1e-6)


def test_a_push_needs_the_token_and_arrives_whole(told: dict[str, Any], hub: Hub, tiny_model: Path) -> None:
    repo = hub.repos["models", PUSHED]
    assert repo.files == {file.name: file.read_bytes() for file in tiny_model.iterdir()}
    assert sorted(told["listing"]) == sorted(repo.files) and told["commits"] == [repo.commit] * 2
    assert told["name"] == "tester"
    assert Asked("PUT", f"/lfs/{repo.etag('model.safetensors')}") in told["requests"]


def test_nothing_but_loopback_is_contacted(told: dict[str, Any], hub: Hub) -> None:
    assert told["reached"] <= {"127.0.0.1", "localhost", "::1"}
    strays = {path for _, path in told["requests"] if not path.startswith("/")}
    assert strays <= {hub.url.replace("//", "//datasets-server.") + f"/info?dataset={DATASET}"}


def test_thumbnails_look_like_those_of_youtube(hub: Hub) -> None:
    status, _, body = ask(hub, "/thumbs/v0000000007.jpg")
    picture = np.asarray(Image.open(io.BytesIO(body)))
    assert status == 200 and picture.shape == (360, 480, 3)
    assert picture[:40].max() < 16 and picture[-40:].max() < 16
    assert np.abs(picture[45:315] - np.asarray(scene_picture(7, (480, 270)), dtype=float)).mean() < 8
    hub.missing.add("v0000000007")
    status, kind, body = ask(hub, "/thumbs/v0000000007.jpg")
    hub.missing.clear()
    assert (status, kind) == (404, "image/jpeg") and Image.open(io.BytesIO(body)).format == "JPEG"


def ask(hub: Hub, path: str) -> tuple[int, str | None, bytes]:
    """Status, content type and body of one GET."""
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    with closing(connection):
        return answer.status, answer.getheader("Content-Type"), answer.read()


if __name__ == "__main__":
    Path(sys.argv[3]).write_bytes(pickle.dumps(client(sys.argv[1], sys.argv[2])))
