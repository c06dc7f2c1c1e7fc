"""The state of a run in JAX, written into checkpoints and read from them."""

import functools

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from sdtune.checkpoints import AVERAGED, read_undamaged, take_settings
from sdtune.flax.weights import arrays_of, copy_weights
from sdtune.models import read_models, write_models

WEIGHTS = {"unet", "ema"}  # parts of the state that are weights of the UNet


def named_leaves(state):
    """The arrays of a nested state by their paths, such as unet/conv_in.bias."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def write_arrays(pipeline, run, folder):
    """Writes the arrays of the run's state into a checkpoint's folder: weights, averaged ones too, as UNets that
    people can load, the rest as arrays by their paths."""
    for name in WEIGHTS & run.state.keys():
        copy_weights(run.state[name], pipeline.unet)
        write_models({"unet": pipeline.unet}, folder, AVERAGED if name == "ema" else "")
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(others_of(run.state)).items()}
    save_file(arrays, folder / "state.safetensors")


def read_arrays(pipeline, run, folder):
    """The state that `write_arrays` wrote, shaped as the run's. Raises `ValueError` for a state of another shape."""
    saved = load_file(folder / "state.safetensors")
    wanted = named_leaves(others_of(run.state))
    if {name: leaf.shape for name, leaf in saved.items()} != {name: leaf.shape for name, leaf in wanted.items()}:
        raise ValueError("it holds the state of another model")
    others = others_of(run.state)
    state = jax.tree.unflatten(jax.tree.structure(others), [saved[name] for name in wanted])
    for name in WEIGHTS & run.state.keys():
        read_models({"unet": pipeline.unet}, folder, AVERAGED if name == "ema" else "")
        state[name] = {key: array.copy() for key, array in arrays_of(pipeline.unet).items()}
    return {name: state[name] for name in run.state}


def others_of(state):
    """The parts of a state that are no weights."""
    return {name: part for name, part in state.items() if name not in WEIGHTS}


def resume(pipeline, run, checkpoint, free, fixed):
    """Loads a checkpoint into the run; `free` and `fixed` as in `compare_settings`. Raises `InputError`."""
    take_settings(run, checkpoint, free, fixed)
    run.state = read_undamaged(checkpoint, functools.partial(read_arrays, pipeline, run))
