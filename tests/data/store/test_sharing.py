"""A cache folder per node: who shares one is found out first, and everybody ends up with all features."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import as_ranks

from data.batch import Team
from data.store import sharing
from data.store.features import FeatureStore
from data.store.segments import KEY
from data.store.sharing import find_caches, missing_everywhere, share_features, share_files


def machine_of_thread() -> str:
    """As if each rank were on a machine of its own."""
    return threading.current_thread().name


@pytest.mark.parametrize("same_machine", [True, False])
def test_ranks_learn_who_has_their_cache_before_anything_is_encoded(same_machine: bool, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, they encoded for hours and then found no features of the others."""
    monkeypatch.setattr(sharing, "NETWORK_FOLDER_S", 1.0)
    if not same_machine:
        monkeypatch.setattr(sharing, "_machine", machine_of_thread)
    said: list[str] = []
    folders = [tmp_path / name for name in "abba"]

    def find(team: Team, folders: list[Path]) -> Team:
        folders[team.rank].mkdir(exist_ok=True)
        return find_caches(folders[team.rank], team, said.append)

    teams = as_ranks(4, lambda team: find(team, folders))
    assert all(isinstance(team, Team) and team.cache_of == (0, 1, 1, 0) and team.has_caches for team in teams)
    assert [team.leads_cache for team in teams if isinstance(team, Team)] == [True, True, False, False]
    assert {line[:26] for line in said} == {"2 cache folders for 4 rank"} and not [*tmp_path.rglob(".probe*")]
    teams = as_ranks(4, lambda team: find(team, [tmp_path / "a"] * 4))
    assert all(isinstance(team, Team) and team.cache_of == (0,) * 4 and not team.has_caches for team in teams)


def test_a_folder_that_shows_its_files_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS clients show a new file seconds later: two nodes with one folder must not take it for two."""
    monkeypatch.setattr(sharing, "_machine", machine_of_thread)
    looks: list[Path] = []
    exists = sharing._exists

    def late(path: Path) -> bool:
        looks.append(path)
        return len(looks) > 12 and exists(path)

    monkeypatch.setattr(sharing, "_exists", late)
    teams = as_ranks(2, lambda team: find_caches(tmp_path, team, print))
    assert all(isinstance(team, Team) and team.cache_of == (0, 0) for team in teams)


def test_every_cache_gets_what_the_others_hold_and_nothing_twice(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "ROUND", 3 * 4 * 8 * 5)  # five rows of three ranks at a time
    keys = np.frombuffer(np.random.default_rng(0).bytes(100 * KEY), np.uint8).reshape(100, KEY)
    values = torch.randn(100, 8)
    held = {0: np.arange(40), 2: np.arange(30, 90)}  # by the leader of each cache; nobody holds the last ten
    cache_of = (0, 0, 2)

    def share(team: Team) -> tuple[np.ndarray, int]:
        team = Team(team.rank, team.size, team.exchange, cache_of)
        store = FeatureStore(tmp_path / str(cache_of[team.rank]) / "space", 8)
        if team.leads_cache:
            store.append(keys[held[team.rank]], values[held[team.rank]])
        team.exchange(None)
        store.refresh()
        missing = missing_everywhere(store, keys, team)
        share_features(store, keys, team, print)
        assert torch.equal(store.gather(store.locate(keys[:90])), values[:90])
        return missing, len(store)

    for result in as_ranks(3, share):
        assert not isinstance(result, Exception), result
        assert result[0].tolist() == [*range(90, 100)] and result[1] == 90


def test_files_are_copied_to_the_caches_that_lack_them(tmp_path: Path) -> None:
    """The manifests of streamed shards: without them another node would stream the shards again."""
    def share(team: Team) -> list[bytes]:
        team = Team(team.rank, team.size, team.exchange, (0, 1))
        folder = tmp_path / str(team.rank)
        folder.mkdir()
        (folder / "both").write_bytes(b"both")
        (folder / f"only-{team.rank}").write_bytes(b"%d" % team.rank)
        names = ["both", "only-0", "only-1"]
        share_files([folder / name for name in (*names, "none")], team)
        return [(folder / name).read_bytes() for name in names]

    assert as_ranks(2, share) == [[b"both", b"0", b"1"]] * 2
