"""Damage to a folder's files is found, whatever it is, and named."""

import errno
import hashlib
import json
import os

import pytest

from sdtune import digests
from sdtune.digests import find_damage, write_digests


@pytest.fixture
def folder(tmp_path):
    """A folder with its digests, as a checkpoint's."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(b"weights" * 1000)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "progress.json").write_text("{}")
    write_digests(tmp_path)
    return tmp_path


def test_digests_are_of_all_files_but_their_own(folder):
    digests = json.loads((folder / "digests.json").read_text())
    assert digests == {
        "empty": [0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"],  # of nothing
        "progress.json": [2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"],  # of {}
        "unet/weights": [7000, hashlib.sha256(b"weights" * 1000).hexdigest()],
    }
    before = (folder / "digests.json").read_text()
    write_digests(folder)
    assert (folder / "digests.json").read_text() == before


def test_a_whole_folder_has_no_damage(folder):
    assert find_damage(folder) is None
    (folder / "notes.txt").write_text("mine")
    (folder / "unet" / "weights").touch()
    assert find_damage(folder) is None


def test_a_folder_without_digests_is_damaged(folder, tmp_path):
    """A copy that was cut off, maybe; nobody knows what else of it is missing."""
    (folder / "digests.json").unlink()
    assert find_damage(folder) == "digests.json is missing"
    (tmp_path / "bare").mkdir()
    assert find_damage(tmp_path / "bare") == "digests.json is missing"


def test_damage_to_files_that_are_not_used_is_none(folder):
    (folder / "empty").unlink()
    assert find_damage(folder, "em*") is None
    assert find_damage(folder, "unet/*") == "empty is missing"
    (folder / "unet" / "weights").write_bytes(b"WEIGHTS" * 1000)
    assert find_damage(folder, "em*") == "the content of unet/weights has changed since it was written"
    assert find_damage(folder, "[eu]*") is None


def test_what_the_disk_cannot_read_is_damage(folder, monkeypatch):
    read = digests.sha256_of

    def fail(path):
        if path.name == "weights":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(digests, "sha256_of", fail)
    assert find_damage(folder) == "unet/weights cannot be read"


@pytest.mark.parametrize("place", [0, 3500, 6999])
def test_a_flipped_bit_is_found(folder, place):
    path = folder / "unet" / "weights"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert find_damage(folder) == "the content of unet/weights has changed since it was written"


def test_missing_and_cut_files_are_found(folder):
    os.truncate(folder / "unet" / "weights", 6999)
    assert find_damage(folder) == "unet/weights has 6999 bytes instead of 7000"
    (folder / "progress.json").unlink()
    assert find_damage(folder) == "progress.json is missing"
    (folder / "progress.json").mkdir()
    assert find_damage(folder) == "progress.json is missing"


@pytest.mark.parametrize("content", [b"", b'{"empty": [0', b"[]\xff", b"[1, 2]", b'{"empty": 3}', b'{"empty": [0]}'])
def test_damaged_digests_are_damage(folder, content):
    (folder / "digests.json").write_bytes(content)
    assert find_damage(folder) == "digests.json cannot be read"
