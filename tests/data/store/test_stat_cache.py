"""A file that was exchanged for another is read again, whatever its times say."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data.store.stat_cache import StatCache


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
