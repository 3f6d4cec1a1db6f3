#!/bin/bash
#SBATCH --job-name=kappa-fom
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=24G
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
# Both stages: sbatch docs/slurm.sh, from the repository's root, after `make .venv/installed`. Stage 1 uses all GPUs that
# the job gets on its node: sbatch --gres=gpu:4 --cpus-per-task=32 --mem=96G docs/slurm.sh
set -euo pipefail
LMAX=${LMAX:-200}
NOISE=${NOISE:-des_y3}
RESULTS=${RESULTS:-results}
BACKBONE=${BACKBONE:-efficientnet_v2_s}

source .venv/bin/activate
srun torchrun --standalone --nproc-per-node gpu \
    run_compressor.py --results-dir "$RESULTS" --lmax "$LMAX" --noise-level "$NOISE" --backbone "$BACKBONE"
srun python run_npe.py --ckpt "$RESULTS/field_compressor_runs/field_mse_lmax${LMAX}_${NOISE}_${BACKBONE}/best.ckpt"
