"""The files in examples/accelerate are taken by what they are for: accelerate, Slurm's script by bash, Kubernetes' by
YAML and the script's own parser."""

import os
import re
import shlex
import signal
import subprocess
import time

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import UNet2DConditionModel
from running import REPO, catches, wait_for
from torch.distributed.run import get_args_parser

FOLDER = REPO / "examples" / "accelerate"
KUBERNETES = FOLDER / "kubernetes.yaml"
CONFIGURATIONS = sorted(set(FOLDER.glob("*.yaml")) - {KUBERNETES})
every_configuration = pytest.mark.parametrize("path", CONFIGURATIONS, ids=[path.stem for path in CONFIGURATIONS])
# Keys of a file with values that fit a machine, and not any.
OF_A_MACHINE = {"num_processes", "main_process_ip", "main_process_port", "machine_rank", "gpu_ids"}
ANYWHERE = {"num_processes": 1, "machine_rank": 0, "gpu_ids": "all"}


def launched_by(path, *options):
    """What `accelerate launch` makes of a configuration."""
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), *options, "script.py"])
    )
    return args


# ------------------------------------------------------------------------------------------------------- accelerate


def test_configurations_are_there():
    assert {"one_gpu", "several_gpus", "fsdp2", "several_machines"} <= {path.stem for path in CONFIGURATIONS}


@every_configuration
def test_a_configuration_is_loaded_and_obeyed(path):
    """Unknown keys are refused by accelerate; others are not all obeyed: rdzv_backend is not, for one."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == settings["num_processes"]
    args = vars(launched_by(path))
    nested = {"dynamo_config", "fsdp_config", "deepspeed_config"}
    apart = {"compute_environment", "distributed_type", "same_network", "downcast_bf16"}
    for name, value in settings.items():
        if name not in nested | apart:
            assert args[name] == value, name
    for name, value in (settings.get("fsdp_config") or {}).items():
        assert args[name] == value, name
    assert args["mixed_precision"] == "no"  # the script's flag decides


@every_configuration
def test_what_fits_one_machine_alone_is_marked(path):
    """By a comment on its line."""
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(":")
        value = yaml.safe_load(rest)
        if name in OF_A_MACHINE and value != ANYWHERE.get(name):
            assert " # " in rest, line


@pytest.mark.parametrize("rank", [0, 1])
def test_several_machines_meet_at_the_first(rank):
    options = [f"--machine_rank={rank}", "--main_process_ip=127.0.0.1", "--num_processes=4"]
    args = launched_by(FOLDER / "several_machines.yaml", *options)
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "2", rank)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "127.0.0.1:29500")


def test_fsdp2_splits_the_blocks_of_the_unet(tiny_pipeline_sd1, monkeypatch):
    for name, value in prepare_multi_gpu_env(launched_by(FOLDER / "fsdp2.yaml")).items():
        monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline_sd1, subfolder="unet")
    kinds = [type(module).__name__ for module in unet.modules()]
    assert set(plugin.transformer_cls_names_to_wrap) <= set(kinds)
    of_blocks = [module for module in unet.modules() if type(module).__name__ in plugin.transformer_cls_names_to_wrap]
    inside = sum(parameter.numel() for block in of_blocks for parameter in block.parameters())
    assert inside > 0.8 * unet.num_parameters()


# ------------------------------------------------------------------------------------------------------------ Slurm

# A launcher that leaves what it was called with, survives SIGUSR1 only if that is ignored, and ends on SIGTERM as
# torchrun does when its workers have saved.
TORCHRUN = """#!/usr/bin/env python3
import os, signal, sys, time
def end(*_):
    open("ended", "a").write("saved\\n")
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
open("called.new", "w").write("\\0".join(sys.argv[1:]))
os.rename("called.new", "called")
for _ in range(600):
    if os.path.exists("finish"):
        sys.exit(0)
    time.sleep(0.05)
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> srun_options; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo machine7; echo machine8; else echo "$@" >> requeued; fi
"""


@pytest.fixture
def start_job(tmp_path):
    """A function that starts slurm.sh as Slurm does, where it finds stand-ins for Slurm's commands."""
    for name, text in (("torchrun", TORCHRUN), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "machine[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_SUBMIT_DIR": "/somewhere",
    }
    jobs = []

    def start():
        command = ["bash", str(FOLDER / "slurm.sh")]
        job = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **variables}, start_new_session=True)
        jobs.append(job)
        wait_for(lambda: (tmp_path / "called").exists() and catches(job, signal.SIGUSR1), job)
        return job

    yield start
    for job in jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def test_slurm_starts_a_launcher_on_each_machine(start_job, tmp_path, train_script):
    job = start_job()
    words = (tmp_path / "called").read_text().split("\0")
    (tmp_path / "finish").touch()
    assert job.wait(30) == 0
    assert not (tmp_path / "requeued").exists()
    options = get_args_parser().parse_args(words)
    assert (options.nnodes, options.nproc_per_node) == ("2", "gpu")
    assert (options.rdzv_backend, options.rdzv_id, options.rdzv_endpoint) == ("c10d", "123456", "machine7:23456")
    assert (REPO / options.training_script).is_file()
    parse = train_script.parse_flags
    args, problems = parse(train_script.make_parser(), options.training_script_args, {})
    assert problems == []
    assert (args.output_dir, args.resume_from_checkpoint) == ("/somewhere/my_model", "latest")
    given = re.findall(r"^#SBATCH (--[\w-]+)", (FOLDER / "slurm.sh").read_text(encoding="utf-8"), flags=re.M)
    assert {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--signal", "--requeue"} <= set(given)


def test_slurm_saves_and_is_queued_again_when_its_time_is_over(start_job, tmp_path):
    job = start_job()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 1
    assert (tmp_path / "ended").read_text() == "saved\n"
    assert (tmp_path / "requeued").read_text() == "requeue 123456\n"


def test_slurm_that_is_done_in_time_is_not_queued_again(start_job, tmp_path):
    """Nor one that is preempted, for which Slurm does it."""
    job = start_job()
    job.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert job.poll() is None  # it waits for the launchers, which get the signal from Slurm
    (tmp_path / "finish").touch()
    assert job.wait(30) == 0
    assert not (tmp_path / "requeued").exists()


def test_slurms_launchers_survive_the_signal_for_a_checkpoint(start_job, tmp_path):
    """Which scancel sends to all processes of a job but this script's."""
    job = start_job()
    (launcher,) = psutil.Process(job.pid).children()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        launcher.send_signal(number)
    time.sleep(0.2)
    (tmp_path / "finish").touch()
    assert job.wait(30) == 0
    assert not (tmp_path / "ended").exists()


# ------------------------------------------------------------------------------------------------------- Kubernetes


def test_kubernetes_runs_the_same_on_all_machines(train_script):
    job = yaml.safe_load(KUBERNETES.read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    roles = job["spec"]["pytorchReplicaSpecs"]
    assert set(roles) == {"Master", "Worker"}
    assert roles["Master"]["replicas"] == 1
    assert roles["Master"]["template"] == roles["Worker"]["template"]
    assert {role["restartPolicy"] for role in roles.values()} == {"OnFailure"}
    pod = roles["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"shared": "/storage", "memory": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
    patience = {row["name"]: row["value"] for row in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert 30 < int(patience) < pod["terminationGracePeriodSeconds"]

    words = [*container["command"], *container["args"]]
    assert words[0] == "torchrun"
    options = get_args_parser().parse_args(words[1:])
    assert (REPO / options.training_script).is_file()
    parser = train_script.make_parser()
    args, problems = train_script.parse_flags(parser, options.training_script_args, {})
    assert problems == []
    assert (args.output_dir, args.resume_from_checkpoint) == ("/storage/my_model", "latest")
    assert shlex.join(words) == " ".join(words)  # nothing that a shell would change
