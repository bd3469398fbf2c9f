#!/bin/bash
# Prepares the data that a configuration names:
#
#   sbatch preprocess.sh [CONFIG]      default: configs/config.yaml
#
# Submit it from the folder that relative paths start from. Edit what you like: the lines follow
# from the section `slurm` of a configuration, and for any other they are printed by
#
#   vectorlm submit --config CONFIG --dry-run

#SBATCH --job-name=a.b-c_1-data
#SBATCH --partition=cpu
#SBATCH --account=def-prof_gpu
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=90
#SBATCH --mail-user=you@example.org
#SBATCH --mail-type=END,FAIL
#SBATCH --output=vectorlm-data-%j.log
#SBATCH --open-mode=append

config=${1:-configs/config.yaml}

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "$0: this is a job script; submit it: sbatch $0" >&2
    exit 2
fi

# A signal to the whole job must not end this shell before it has heard how the processes ended.
trap : TERM INT USR1 USR2

job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
start=$((${SLURM_RESTART_COUNT:-0} + ${VECTORLM_EARLIER_STARTS:-0} + 1))
echo "== vectorlm: job $job, start $start, $(date -Is), on $SLURM_JOB_NODELIST"

# What this cluster needs first.
module load cuda/12.4
export GREETING="a b"

# The Python environment that was active at submission; where none was, .venv if it is here.
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
    # shellcheck source=/dev/null
    [ ! -f .venv/bin/activate ] || source .venv/bin/activate
fi
if ! reason=$(python -c "import vectorlm.config.load" 2>&1); then
    echo "VectorLM cannot be imported here (${reason##*$'\n'}), by $(command -v python)" >&2
    echo "Activate its environment before you submit, or have slurm.setup do so." >&2
    exit 2
fi
if [ ! -f "$config" ]; then
    echo "$config: no such file in $PWD; submit from the folder that the path is relative to" >&2
    exit 2
fi

# Compute nodes have no internet: nothing is fetched, and `wandb sync` uploads afterwards.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export WANDB_MODE=${WANDB_MODE:-offline}
export PYTHONUNBUFFERED=1

srun --export=ALL --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    --container-image=docker://nvcr.io/nvidia/pytorch:25.01-py3 \
    --container-mounts="$PWD:$PWD",/scratch:/scratch,/host/y:/y:ro --container-workdir="$PWD" \
    python -m vectorlm.cli preprocess --config="$config"
