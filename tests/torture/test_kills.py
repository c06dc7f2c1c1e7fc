"""A run that is killed goes on from its newest whole checkpoint, to the bit."""

import pytest
from lives import BUCKETS, CACHE, NAMES, kill_at_random, kill_in_every_file, torture

SHORT = "train_text_to_image"
LONG = pytest.mark.torture
CACHED = [name for name in NAMES if "flax" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("name, number", [(SHORT, 2), *[pytest.param(name, 10, marks=LONG) for name in NAMES]])
def test_killed_at_random(tmp_path, name, number):
    kills = torture(kill_at_random, name, tmp_path / "run", number, number)
    print(name, dict(kills))
    assert kills.total() == number


@LONG
@pytest.mark.parametrize("name", CACHED)
def test_killed_at_random_with_cache_and_buckets(tmp_path, name):
    kills = torture(kill_at_random, name, tmp_path / "run", 5, 5, variant={**CACHE, **BUCKETS})
    assert kills.total() == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, limit",
    [
        (SHORT, 1),
        *[pytest.param(name, limit, marks=LONG) for name in NAMES for limit in (1, 2) if (name, limit) != (SHORT, 1)],
    ],
)
def test_killed_in_every_file_of_a_checkpoint(tmp_path, name, limit):
    written = torture(kill_in_every_file, name, tmp_path / "run", limit)
    print(name, written)
    assert {"args.json", "digests.json", "progress.json"} < written.keys()
    assert any(file.endswith(".safetensors") for file in written)
