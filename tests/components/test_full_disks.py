"""Decompositions saved where there is no room: the named error, the old one whole, nothing left beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tl_paramdecomp.components import disk
from tl_paramdecomp.errors import DecompositionFileError, DiskSpaceError

from ..support.saved_folders import METADATA, TENSORS, contents
from ..support.small_disks import file_size_limit, full_disk
from .test_cut_off_saves import LOADERS, old_and_new, same

BY_KIND = pytest.mark.parametrize("kind", list(LOADERS))


def enlarged(made: Any) -> Any:
    """With as much in its JSON as in its tensors, so that either can be what there is no room for."""
    made.info["notes"] = "x" * 40_000
    return made


@BY_KIND
@pytest.mark.parametrize("left", [0, 4096, 12_288, 24_576, 40_960])
def test_a_full_disk(tmp_path: Path, kind: str, left: int) -> None:
    """With less room than both files take, or than one."""
    old, new = old_and_new(kind)
    with full_disk(tmp_path / "disk", left=left) as (place, filled):
        old.save(place / "dec")
        check(place, LOADERS[kind], old, enlarged(new), filled)


@BY_KIND
@pytest.mark.parametrize("size", [0, 100, 5000, 20_000])
def test_a_limit_on_the_size_of_files(tmp_path: Path, kind: str, size: int) -> None:
    old, new = old_and_new(kind)
    with file_size_limit(tmp_path, size) as (place, filled):
        old.save(place / "dec")
        check(place, LOADERS[kind], old, enlarged(new), filled)


def check(place: Path, load: Callable[[Path], Any], old: Any, new: Any, filled: Callable[[], Any]) -> None:
    before = contents(place / "dec")
    with filled():
        for folder in (place / "dec", place / "new", place / "a" / "b"):
            with pytest.raises(DiskSpaceError, match="Could not save into.*(No space left|File too large).*Free some"):
                new.save(folder)
        assert contents(place / "dec") == before and same(load(place / "dec"), old)
        left = {p.name for p in place.rglob("*")} - {"filler"}
        assert left == {"dec", TENSORS, METADATA}, "neither scratch files nor folders that were made for nothing"
    new.save(place / "dec")
    assert same(load(place / "dec"), new)


@pytest.mark.parametrize("number", disk.NO_ROOM)
def test_no_room_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A quota cannot be set here."""

    def fail(*given: Any) -> None:
        raise OSError(number, "no room")

    monkeypatch.setattr(disk.os, "fsync", fail)
    with pytest.raises(DiskSpaceError, match="no room"):
        old_and_new("components")[0].save(tmp_path / "dec")
    with pytest.raises(DiskSpaceError, match="no room"):
        disk.replace_text(tmp_path / "words.txt", "said")
    assert list(tmp_path.iterdir()) == []


def test_another_fault_of_the_disk_is_not_called_a_want_of_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk.os, "fsync", fail)
    with pytest.raises(DecompositionFileError, match="Input/output error") as caught:
        old_and_new("components")[0].save(tmp_path / "dec")
    assert not isinstance(caught.value, DiskSpaceError) and list(tmp_path.iterdir()) == []
