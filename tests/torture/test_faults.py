"""Faults around a run cost nothing that can be kept, and are told in a line."""

import faults
import pytest
from lives import NAMES, torture

SHORT = "train_text_to_image"


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize(
    "name", [name if name == SHORT else pytest.param(name, marks=pytest.mark.torture) for name in NAMES]
)
def test_fault(tmp_path, monkeypatch, name, fault):
    monkeypatch.chdir(tmp_path)
    if "flax" in name and fault is faults.disk_full_in_cache:
        pytest.skip("it has no such cache")
    torture(fault, name, tmp_path / "run", channels=(32, 64))
