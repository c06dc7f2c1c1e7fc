"""A run's state comes back whole, and no larger than it was."""

import threading
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
    """A UNet of 17 million parameters, whose state is large beside what else a run takes."""
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(128, 256),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=HIDDEN_SIZE,
        attention_head_dim=8,
    )


def memory():
    """What this process has in memory and could not drop, in bytes: nothing of files."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) * 1024


class Measured:
    """A script whose resume writes down by how much its memory grew at most."""

    def __init__(self, script, file):
        self.main, self.file, self.script, self.read_state = script.main, file, script, script.read_state

    def watched(self, *args):
        """Reads a state, and looks at the memory meanwhile."""
        before, peaks, is_done = memory(), [], threading.Event()

        def look():
            while not is_done.wait(0.001):
                peaks.append(memory())

        watcher = threading.Thread(target=look)
        watcher.start()
        self.read_state(*args)
        is_done.set()
        watcher.join()
        self.file.write_text(str(max(peaks) - before))


def test_a_resume_takes_no_more_memory_than_training(train_script, tmp_path, monkeypatch):
    """Weights and average are read into their places, tensor by tensor; all that is new are the moments."""
    pipeline = make_pipeline()
    pipeline.register_modules(unet=make_medium_unet())
    pipeline.save_pretrained(tmp_path / "base")
    weight_bytes = 4 * pipeline.unet.num_parameters()
    assert weight_bytes > 60 * MEGABYTE
    images, said = write_image_folder(tmp_path / "images", 4), tmp_path / "said"
    settings = {"use_ema": True, "checkpointing_steps": 1, "max_train_steps": 2}
    line = words(tmp_path / "base", images, tmp_path / "run", **settings)
    assert run_copies(train_script, line, said, 1) == [0], said.read_text()
    measured = Measured(train_script, tmp_path / "growth")
    monkeypatch.setattr(train_script, "read_state", measured.watched)
    line = words(tmp_path / "base", images, tmp_path / "resumed", **settings)
    line.append(f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-1'}")
    assert run_copies(measured, line, said, 1) == [0], said.read_text()
    growth = int((tmp_path / "growth").read_text())
    assert growth < 2.2 * weight_bytes  # less where memory that was freed before is used again


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
