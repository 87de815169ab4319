"""Pictures cut short by a kill, or by a full disk, never become answers."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from PIL import Image

from ivcp_eval.files import DiskFullError
from ivcp_eval.vlmeval_bridge.reading.pictures import unpacked, whole
from tests.runs.conftest import Bench


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "named_so.png"])
def test_cut_pictures_are_recognised(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.effect_noise((40, 30), 50).convert("RGB").save(
        path, "JPEG" if "so" in name or name.endswith("jpg") else "PNG"
    )
    assert whole(path)
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert not whole(path), length
    assert whole(tmp_path / "other.webp")


def test_cut_pictures_are_unpacked_again(bench: Bench) -> None:
    assert bench.call("run", "--quiet") == 0
    pictures = sorted(bench.lmu.glob("images/*/*.png"))
    assert len(pictures) >= 10
    before = [path.read_bytes() for path in pictures]
    for path in pictures[::2]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = bench.elsewhere(bench.folder.parent / "again")
    assert again.call("run", "--quiet") == 0
    assert [path.read_bytes() for path in pictures] == before
    assert again.results() == bench.results()


def test_a_full_disk_is_no_broken_sample(tmp_path: Path) -> None:
    def full() -> list[dict[str, str]]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFullError):
        unpacked(full, again=True)
