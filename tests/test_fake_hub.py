"""The stand-in for the Hub keeps what the real client uploads, and fails when told to."""

import os
import subprocess
import sys

import pytest
from fake_hub import LFS_SIZE, TOKEN
from running import environment

UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
repo_id = api.create_repo(sys.argv[2], private=True, exist_ok=True).repo_id
api.upload_folder(repo_id=repo_id, folder_path=sys.argv[1], commit_message="Add a model", ignore_patterns=["skip*"])
"""
DOWNLOAD = """
import sys
from huggingface_hub import hf_hub_download, snapshot_download
print(snapshot_download(sys.argv[1], local_dir=sys.argv[2]))
"""


def run(code, *args, env):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=environment(env),
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    """A text, a small binary with a suffix for LFS, and a file that goes to LFS for its size alone."""
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "unet" / "model.safetensors").write_bytes(os.urandom(3000))
    (folder / "unet" / "large.data").write_bytes(os.urandom(LFS_SIZE + 1))
    (folder / "skip.txt").write_text("not for the Hub")
    return folder


def test_upload_arrives_unchanged_and_can_be_read_back(fake_hub, folder, tmp_path):
    result = run(UPLOAD, folder, "tester/creatures", env=fake_hub.env)
    assert result.returncode == 0, result.stderr
    repo = fake_hub.repos["tester/creatures"]
    assert repo.private
    assert [commit.message for commit in repo.commits] == ["Add a model"]
    expected = {name: (folder / name).read_bytes() for name in repo.files}
    assert sorted(expected) == ["README.md", "unet/large.data", "unet/model.safetensors"]
    assert repo.files == expected
    assert fake_hub.tokens == {TOKEN}
    assert sum(method == "PUT" for method, _ in fake_hub.requests) == 2

    result = run(DOWNLOAD, "tester/creatures", tmp_path / "copy", env=fake_hub.env)
    assert result.returncode == 0, result.stderr
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in expected} == expected


def test_second_upload_to_the_same_repository_is_a_second_commit(fake_hub, folder):
    (folder / "unet" / "large.data").unlink()
    for text in ("one", "two"):
        (folder / "notes.txt").write_text(text)
        result = run(UPLOAD, folder, "creatures", env=fake_hub.env)
        assert result.returncode == 0, result.stderr
    repo = fake_hub.repos["tester/creatures"]
    assert repo.files["notes.txt"] == b"two"
    assert len(repo.commits) == 2


@pytest.mark.parametrize("stage", ["create", "upload", "commit"])
def test_fails_where_it_is_told_to(fake_hub, folder, stage):
    (folder / "unet" / "large.data").unlink()
    fake_hub.fail[stage] = 403
    result = run(UPLOAD, folder, "tester/creatures", env=fake_hub.env)
    assert result.returncode == 1
    assert f"fail at {stage}" in result.stderr
    repo = fake_hub.repos.get("tester/creatures")
    assert repo is None or not repo.files
