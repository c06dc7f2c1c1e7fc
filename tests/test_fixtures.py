"""What the other tests stand on is what it claims to be."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from diffusers import StableDiffusionPipeline
from image_data import make_image, snapshot
from PIL import Image
from running import command_for, environment, run_script
from tiny import make_pipeline, make_tokenizer


def test_tiny_pipeline_depends_on_the_seed_alone_and_generates(tiny_pipeline):
    before = torch.random.get_rng_state()
    again = make_pipeline()
    assert torch.equal(before, torch.random.get_rng_state())
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    for name in ("unet", "vae", "text_encoder"):
        expected, loaded = [getattr(one, name).state_dict() for one in (again, pipeline)]
        assert expected.keys() == loaded.keys()
        assert all(torch.equal(expected[key], loaded[key]) for key in expected)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red circle", height=32, width=32, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)


def test_v_pipeline_differs_in_the_scheduler_only(tiny_pipeline, tiny_pipeline_v):
    first, second = snapshot(tiny_pipeline), snapshot(tiny_pipeline_v)
    changed = {path for path in first if first[path][2] != second[path][2]}
    assert changed == {"scheduler/scheduler_config.json"}


def test_tokenizer_survives_saving_and_knows_its_limit(tiny_pipeline):
    tokenizer, text = make_tokenizer(), "a Picture of creatures, number 7!"
    loaded = StableDiffusionPipeline.from_pretrained(tiny_pipeline).tokenizer
    assert len(loaded) == len(tokenizer) <= 400
    assert loaded.model_max_length == 77
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]
    padded = loaded("word " * 200, padding="max_length", truncation=True).input_ids
    assert len(padded) == 77
    assert padded[-1] == loaded.eos_token_id


def test_images_are_distinct():
    assert len({make_image(index).tobytes() for index in range(61)}) == 61


def test_messy_folder_has_every_defect_once(messy_folder):
    messy = messy_folder(num_good=3)
    lines = (messy.path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {}
    for line in lines:
        row = json.loads(line)
        rows[row["file_name"]] = row
    assert len(rows) == 3 + 5
    with Image.open(messy.bad["truncated"]) as image, pytest.raises(OSError, match="truncated"):
        image.load()
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(messy.bad["not_an_image"])
    assert rows["no_caption.png"]["text"] is None
    assert not messy.bad["no_file"].exists()
    for path in [messy.bad["too_small"], *messy.good]:
        with Image.open(path) as image:
            image.load()
            assert min(image.size) == (32 if path in messy.good else 3)


def test_snapshot_sees_every_change(image_folder):
    folder = image_folder(num_images=2)
    before = snapshot(folder)
    assert snapshot(folder) == before
    os.utime(folder / "00.png", ns=(1, 1))
    assert snapshot(folder) != before
    shutil.copy(folder / "00.png", folder / "new.png")
    assert "new.png" in snapshot(folder)


SCRIPT = """
import os, sys
print(sys.argv[1:], os.environ.get("WORLD_SIZE"), os.environ.get("OMP_NUM_THREADS"), os.environ["HF_HUB_OFFLINE"])
sys.exit(2)
"""
RANK_SCRIPT = """
from pathlib import Path
from accelerate import Accelerator
state = Accelerator()
Path(f"rank_{state.process_index}").write_text(f"{state.num_processes} {state.device.type}")
state.end_training()
"""


def test_run_script_hands_over_arguments_and_status(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = run_script(["--flag", 3], env={"HF_HUB_OFFLINE": "0"}, script=script)
    assert result.returncode == 2
    assert result.stdout.strip() == "['--flag', '3'] None 1 0"


@pytest.mark.slow
def test_two_processes_are_two(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RANK_SCRIPT)
    command, additions = command_for([], script=script, nproc=2)
    subprocess.run(command, env=environment(additions), cwd=tmp_path, check=True, capture_output=True, timeout=120)
    for rank in (0, 1):
        assert (tmp_path / f"rank_{rank}").read_text() == "2 cpu"
