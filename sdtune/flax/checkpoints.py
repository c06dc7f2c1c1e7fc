"""The state of a run in JAX, written into checkpoints and read from them."""

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from sdtune.checkpoints import compare_settings, read_checkpoint, take_progress
from sdtune.errors import InputError
from sdtune.files import copy_mode


def named_leaves(state):
    """The arrays of a nested state by their paths, such as unet/conv_in.bias."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def write_arrays(run, folder):
    """Writes the arrays of the run's state into a checkpoint's folder."""
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(run.state).items()}
    save_file(arrays, folder / "state.safetensors")
    copy_mode(run.output_dir / "args.json", [folder / "state.safetensors"])


def read_arrays(folder):
    """The arrays of the state in a checkpoint's folder, by their paths."""
    return load_file(folder / "state.safetensors")


def resume(run, checkpoint, free, fixed):
    """Loads a checkpoint into the run; `free` and `fixed` as in `compare_settings`. Raises `InputError`."""
    before, progress, saved = read_checkpoint(checkpoint, read_arrays)
    changed = compare_settings(run, checkpoint, before, free, fixed)
    take_progress(run, checkpoint, progress, changed)
    wanted = named_leaves(run.state)
    shapes_saved = {name: leaf.shape for name, leaf in saved.items()}
    shapes_wanted = {name: leaf.shape for name, leaf in wanted.items()}
    if shapes_saved != shapes_wanted:
        raise InputError(f"--resume_from_checkpoint: {checkpoint} holds the state of another model")
    run.state = jax.tree.unflatten(jax.tree.structure(run.state), [saved[name] for name in wanted])
