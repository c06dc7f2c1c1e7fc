"""Writes a pipeline in memory as one file in the original layout, as `sdtune convert` writes folders."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from sdtune.pipeline_folder import PARTS
from sdtune.single_file import schedule, to_original


def original_state_dict(pipeline):
    """Returns {original name: weight} of a pipeline, with the buffers of its noise schedule."""
    models = {part: getattr(pipeline, part) for part in PARTS}
    weights = {}
    for part, model in models.items():
        for name, value in model.state_dict().items():
            weights[part, name] = value
    state = {**to_original(weights, models, "pipeline"), **schedule(pipeline.scheduler.config)}
    return {name: value.detach().clone() for name, value in state.items()}


def save_original(pipeline, path):
    """Writes the pipeline's weights to one `.safetensors` or `.ckpt` file; returns the path."""
    state, path = original_state_dict(pipeline), Path(path)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 0}, path)
    return path
