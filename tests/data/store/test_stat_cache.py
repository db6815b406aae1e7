"""A file that was exchanged for another is read again, whatever its times say."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data.store.stat_cache import StatCache
from data.web.fetched import cached_path


@pytest.mark.parametrize("field", ["st_size", "st_mtime_ns", "st_ctime_ns", "st_ino", "st_dev"])
def test_any_change_of_what_identifies_a_file_counts(field: str, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a restored backup, or another disk mounted at the same place, trains on the features of other pictures."""
    monkeypatch.setattr("data.store.stat_cache.SETTLED", -60.0)  # all files count as settled
    (tmp_path / "a.jpg").write_bytes(b"a picture")
    real: Callable[..., os.stat_result] = os.stat

    class Changed:
        def __init__(self, status: os.stat_result) -> None:
            self.status = status

        def __getattr__(self, name: str) -> int:
            return int(getattr(self.status, name)) + (name == field)

    paths = pa.array([str(tmp_path / "a.jpg")], pa.large_string())
    cache = StatCache(tmp_path / "seen", paths, tmp_path / "fetched")
    cache.remember(np.ones((1, 16), np.uint8), np.ones(1, bool))
    assert StatCache(tmp_path / "seen", paths, tmp_path / "fetched").known.tolist() == [True]
    with monkeypatch.context() as patch:
        patch.setattr("data.store.stat_cache.os.stat", lambda path: Changed(real(path)))
        assert StatCache(tmp_path / "seen", paths, tmp_path / "fetched").known.tolist() == [False]
    (file,) = (tmp_path / "seen").iterdir()
    with np.load(file) as kept:
        np.savez(file, stamps=kept["stamps"][:, :3], keys=kept["keys"])  # as an older version wrote it
    assert StatCache(tmp_path / "seen", paths, tmp_path / "fetched").known.tolist() == [False]


def test_every_kind_of_reference_has_the_stamps_of_its_own_file(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Else, in a dataset that mixes files, ranges, URLs and rows without a picture, one counts as unchanged by another.
    """
    monkeypatch.setattr("data.store.stat_cache.PIECE", 2)
    monkeypatch.setattr("data.titles.CHUNK", 3)
    fetched, url = tmp_path / "fetched", "HTTPS://host/a.jpg"
    files = [tmp_path / name for name in ("a.jpg", "b#1+2", "c.tar", "d.tar")] + [cached_path(url, fetched)]
    for size, file in enumerate(files, 1):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
    a, b, c, d, _ = map(str, files)
    sizes = {a: 1, "": -1, f"{c}#512+9": 3, url: 5, f"{d}#0+1": 4, f"{c}#0+7": 3, f"{b}#0+1": 2, b: -1, f"{a}\0": -1,
             f"{a}\n": -1, "http://host/other": -1, "s3://bucket/a.jpg": 0, "s3://bucket/a.tar#512+9": -1,
             f"{c}#0+0": -1, f"{d}#5+1": 4}
    cache = StatCache(tmp_path / "seen", pa.array([*sizes], pa.large_string()), fetched)
    assert dict(zip(sizes, cache.stamps[:, 0].tolist(), strict=True)) == sizes
    remote = {"", url, "http://host/other", "s3://bucket/a.jpg", "s3://bucket/a.tar#512+9"}
    assert [path for path, is_local in zip(sizes, cache.is_local, strict=True) if not is_local] == [
        path for path in sizes if path in remote]
