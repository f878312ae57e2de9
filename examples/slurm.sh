#!/bin/bash
# Four nodes with 8 GPUs each, by torchrun: `sbatch examples/slurm.sh MODEL PROMPTS OUT`.
# OUT is a folder that all nodes share. A job that ran out of time is submitted again and goes on.
#SBATCH --job-name=fewstep
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue

set -euo pipefail
model=$1 prompts=$2 out=$3
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
    -m fewstep sample "$model" --prompts "$prompts" --out "$out" \
    --device cuda --dtype float16 --features inception
