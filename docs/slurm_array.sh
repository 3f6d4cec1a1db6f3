#!/bin/bash
#SBATCH --job-name=kappa-fom-sweep
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=24G
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A-%a.log
# A point of a sweep for every task of an array, with the sweep's own options behind the script:
# sbatch --array=1-9 docs/slurm_array.sh --lmax 200,400,600 --seeds 3
set -euo pipefail
source .venv/bin/activate
srun python run_sweep.py "$@" --point "$SLURM_ARRAY_TASK_ID"
