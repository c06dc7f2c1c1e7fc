"""Writes a pipeline in memory as one file in the original layout, by tools/convert_checkpoint.py."""

from pathlib import Path

import torch
from running import REPO
from safetensors.torch import save_file


def original_state_dict(pipeline):
    """Returns {original name: weight} of a pipeline, with the buffers of its noise schedule."""
    from conftest import load_script  # here: conftest imports modules beside this one

    tool = load_script(REPO / "tools" / "convert_checkpoint.py")
    models = {part: getattr(pipeline, part) for part in tool.PARTS}
    weights = {(part, name): value for part, model in models.items() for name, value in model.state_dict().items()}
    state = tool.to_original(weights, models, "pipeline") | tool.schedule(pipeline.scheduler.config)
    return {name: value.detach().clone() for name, value in state.items()}


def save_original(pipeline, path):
    """Writes the pipeline's weights to one `.safetensors` or `.ckpt` file; returns the path."""
    state, path = original_state_dict(pipeline), Path(path)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 0}, path)
    return path
