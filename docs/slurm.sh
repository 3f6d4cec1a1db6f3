#!/bin/bash
#SBATCH --job-name=kappa-fom
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=24G
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
# Both stages: sbatch docs/slurm.sh, from the repository's root, with the packages in .venv (README). Stage 1 uses all
# GPUs that the job gets on its node: sbatch --gres=gpu:4 --cpus-per-task=32 --mem=96G docs/slurm.sh
# Further options of stage 1 go behind the script: sbatch docs/slurm.sh --nuisance all --params Omega_m,S8,A_IA
set -euo pipefail
LMAX=${LMAX:-200}
NOISE=${NOISE:-des_y3}
RESULTS=${RESULTS:-results}
TAG=${TAG:-lmax${LMAX}_${NOISE}}

source .venv/bin/activate
srun torchrun --standalone --nproc-per-node gpu \
    run_compressor.py --results-dir "$RESULTS" --lmax "$LMAX" --noise-level "$NOISE" --tag "$TAG" "$@"
srun python run_npe.py --ckpt "$RESULTS/field_compressor_runs/$TAG/best.ckpt"
