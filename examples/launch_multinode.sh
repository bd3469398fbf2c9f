#!/bin/bash
# Trains what a configuration says, on 2 nodes with 4 GPUs each:
#
#   sbatch examples/launch_multinode.sh [CONFIG]      default: configs/config_multinode.yaml
#
# Submit it from the folder that relative paths start from. Edit what you like: the lines follow
# from the section `slurm` of a configuration, and for any other they are printed by
#
#   vectorlm submit --config CONFIG --dry-run

#SBATCH --job-name=vectorlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=08:00:00
# So many seconds before the time limit, the processes are asked to save and stop.
#SBATCH --signal=USR1@180
# A job that starts again goes on where it was, and writes on in its log.
#SBATCH --requeue
#SBATCH --output=vectorlm-%j.log
#SBATCH --open-mode=append

config=${1:-configs/config_multinode.yaml}

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

# Where the processes of all nodes meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

# Compute nodes have no internet: nothing is fetched, and `wandb sync` uploads afterwards.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export WANDB_MODE=${WANDB_MODE:-offline}
export PYTHONUNBUFFERED=1

# srun starts one process a GPU. When one fails, the others end at once, or are given up after 30 s:
# their node may be gone. srun forgets --cpus-per-task unless it is told again.
srun --export=ALL --kill-on-bad-exit=1 --wait=30 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    python -m vectorlm.train --config="$config"
code=$?

# Says what ended the processes, and has Slurm start this job again where that helps; the exit code
# of the job is this one.
python -m vectorlm.conclude --config="$config" --code="$code" --script="$0"
