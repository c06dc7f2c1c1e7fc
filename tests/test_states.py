"""A run's state comes back whole, and no larger than it was."""

import threading
import time
from pathlib import Path

import pytest
import torch
from copies import run_copies
from diffusers import UNet2DConditionModel
from image_data import write_image_folder
from tiny import HIDDEN_SIZE, make_pipeline
from training import words

from sdtune.models import read_models, write_models
from sdtune.states import own_tensors

MEGABYTE = 2**20


def make_medium_unet():
    """A UNet of 13 million parameters, whose state is large beside what else a run takes."""
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(128, 256),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=HIDDEN_SIZE,
        attention_head_dim=8,
    )


def watch_memory(peaks, pid="self"):
    """Notes the largest size so far of what a process has in memory and could not drop, in bytes: not of files."""
    while True:
        status = Path(f"/proc/{pid}/status").read_text().split()
        peaks.append(int(status[status.index("RssAnon:") + 1]) * 1024)
        time.sleep(0.002)


class Measured:
    """A script whose main() writes down the peak of its memory over what it began with."""

    def __init__(self, script, file):
        self.script, self.file = script, file

    def main(self, argv):
        peaks = []
        threading.Thread(target=watch_memory, args=(peaks,), daemon=True).start()
        while not peaks:
            time.sleep(0.001)
        self.script.main(argv)
        self.file.write_text(str(max(peaks) - peaks[0]))


@pytest.mark.slow
def test_a_resume_takes_no_more_memory_than_training(train_script, tmp_path):
    """Weights, average and moments are read into their places: the state is there once."""
    pipeline = make_pipeline()
    pipeline.register_modules(unet=make_medium_unet())
    pipeline.save_pretrained(tmp_path / "base")
    state_bytes = 16 * pipeline.unet.num_parameters()  # weights, average and two moments, in float32
    assert state_bytes > 150 * MEGABYTE
    images = write_image_folder(tmp_path / "images", 4)
    settings = {"use_ema": True, "checkpointing_steps": 2, "max_train_steps": 4}
    peaks = {}
    for name, more in {
        "straight": {},
        "resumed": {"resume_from_checkpoint": tmp_path / "straight/checkpoint-2"},
    }.items():
        file, said = tmp_path / f"{name}.txt", tmp_path / "said"
        line = words(tmp_path / "base", images, tmp_path / name, **settings, **more)
        assert run_copies(Measured(train_script, file), line, said, 1) == [0], said.read_text()
        peaks[name] = int(file.read_text())
    assert peaks["straight"] > state_bytes
    assert peaks["resumed"] < peaks["straight"] + 0.1 * state_bytes


def test_weights_of_another_model_are_refused(tmp_path):
    """Be it one more layer or fewer; what fits is read to the bit."""
    unet = make_pipeline().unet
    write_models({"unet": unet}, tmp_path)
    other = make_pipeline(seed=1).unet
    assert not torch.equal(other.conv_in.weight, unet.conv_in.weight)
    read_models({"unet": other}, tmp_path)
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in other.state_dict().items())
    larger, smaller = make_pipeline(layers_per_block=2).unet, make_pipeline().unet
    with pytest.raises(ValueError, match="unet is of another model, or not whole"):
        read_models({"unet": larger}, tmp_path)
    del smaller.conv_out
    with pytest.raises(ValueError, match="unet is of another model, or not whole"):
        read_models({"unet": smaller}, tmp_path)


def test_tensors_of_a_file_become_the_optimizers_own(tmp_path):
    """Else a checkpoint that is removed would stay on the disk, and its pages in the memory."""
    parameter = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.AdamW([parameter])
    torch.save(torch.arange(1000.0), tmp_path / "moments.bin")
    optimizer.state[parameter] = {"exp_avg": torch.load(tmp_path / "moments.bin", mmap=True), "count": 3}
    before = optimizer.state[parameter]["exp_avg"]
    own_tensors(optimizer)
    own = optimizer.state[parameter]["exp_avg"]
    assert own.data_ptr() != before.data_ptr()
    assert torch.equal(own, torch.arange(1000.0))
    assert optimizer.state[parameter]["count"] == 3
