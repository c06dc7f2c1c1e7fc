#!/bin/bash
# Trains on two machines of a Slurm cluster, and goes on in a new job when the time is over: sbatch slurm.sh, from the
# folder of the repository, which all machines see.
#SBATCH --job-name=my_model
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# One task a machine is a launcher, which starts a process for each GPU; they load images with the cores of the task.
# Five minutes before the end of its time this script gets SIGUSR1. --requeue lets Slurm start it again after a
# preemption, or the failure of a machine.

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds for a step and a checkpoint, after which launchers end their workers
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a machine

# --wait: a machine that has lost the others saves its state before Slurm ends it, too. A launcher that did not ignore
# SIGUSR1 would be ended by it, where the processes that train write a checkpoint.
srun --wait=300 --kill-on-bad-exit=0 env --ignore-signal=USR1,USR2 torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node=gpu \
  --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$address:$port" \
  examples/text_to_image/train_text_to_image.py \
  --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir=my_images \
  --resolution=512 --train_batch_size=4 --gradient_checkpointing --mixed_precision=bf16 --use_ema \
  --learning_rate=1e-5 --max_train_steps=15000 --checkpointing_steps=500 --checkpoints_total_limit=2 \
  --output_dir="$SLURM_SUBMIT_DIR/my_model" --resume_from_checkpoint=latest &
training=$!

is_over=no
trap 'is_over=yes; kill -TERM "$training"' USR1 # srun hands it on; the run finishes its step and saves
trap : TERM                                     # comes with a preemption, and to the launchers as well

status=0
while kill -0 "$training" 2>/dev/null; do # a signal ends `wait` before the training has ended
  wait "$training"
  status=$?
done
if [ "$is_over" = yes ] && [ "$status" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
