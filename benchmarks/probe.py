"""Runs a training script as it is, and tells the process that measures it of each step.

    python benchmarks/probe.py SCRIPT [the script's flags]

The process that measures listens at the address in the variable BENCHMARK_ADDRESS (`measuring.py`); without one the
script just runs. It is told when the UNet is first called with gradients and after every optimizer step, by PyTorch's
own hooks, so that any script is measured alike and none is changed. After each message the script waits for its turn.

Where torchvision is missing, a script that imports its transforms gets `transforms.py` in their place.
"""

import importlib.util
import os
import runpy
import sys
import time
import types
from multiprocessing.connection import Client
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook


def stand_in_for_torchvision():
    """Makes `from torchvision import transforms` give the module beside this one."""
    # They look for torchvision when they are imported, or once, and would try to use what they see.
    import datasets  # noqa: F401
    import diffusers  # noqa: F401
    import transformers
    import transforms

    transformers.utils.is_torchvision_available()
    package = types.ModuleType("torchvision")
    package.transforms = transforms
    package.__spec__ = importlib.util.spec_from_loader("torchvision", loader=None)
    sys.modules.update({"torchvision": package, "torchvision.transforms": transforms})


def report_to(connection):
    """Sends (what happened, seconds of CPU and of time in its own turns, bytes of the device) and waits for an answer,
    whenever a step begins or ends."""
    on_device = torch.accelerator.is_available()
    clock = {"waited": 0.0}

    def tell(event):
        if on_device:
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - clock["waited"]
        memory = torch.accelerator.max_memory_reserved() if on_device else 0
        connection.send((event, time.process_time(), seconds, memory))
        asked = time.perf_counter()
        connection.recv()
        clock["waited"] += time.perf_counter() - asked

    def first_call(module, inputs):
        if type(module).__name__ == "UNet2DConditionModel" and torch.is_grad_enabled():
            hook.remove()
            tell("first step")

    hook = register_module_forward_pre_hook(first_call)
    register_optimizer_step_post_hook(lambda *_: tell("step"))


def main():
    """Runs the script that the command line names, with the words behind it."""
    script = sys.argv[1]
    if "torchvision" in Path(script).read_text(encoding="utf-8") and not importlib.util.find_spec("torchvision"):
        stand_in_for_torchvision()
    if os.environ.get("RANK", "0") == "0" and "BENCHMARK_ADDRESS" in os.environ:  # the first of several processes
        report_to(Client(os.environ["BENCHMARK_ADDRESS"]))
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
