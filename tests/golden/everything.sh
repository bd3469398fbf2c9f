#!/bin/bash
# Trains what a configuration says, on 2 nodes with 4 GPUs each:
#
#   sbatch job.sh [CONFIG]      default: 'configs/my config.yaml'
#
# Submit it from the folder that relative paths start from. Edit what you like: the lines follow
# from the section `slurm` of a configuration, and for any other they are printed by
#
#   vectorlm submit --config CONFIG --dry-run

#SBATCH --job-name=a.b-c_1
#SBATCH --partition=gpu,gpu-long
#SBATCH --account=def-prof_gpu
#SBATCH --qos=normal
#SBATCH --constraint=[a100|h100]&ib
#SBATCH --exclude=gpu[03,07-09]
#SBATCH --reservation=class
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:a100:4,lscratch:100
#SBATCH --cpus-per-task=6
#SBATCH --mem=120G
#SBATCH --time=1-12:00:00
#SBATCH --mail-user=you@example.org
#SBATCH --mail-type=END,FAIL
# So many seconds before the time limit, the processes are asked to save and stop.
#SBATCH --signal=USR1@300
# A job that starts again goes on where it was, and writes on in its log.
#SBATCH --no-requeue
#SBATCH --output=vectorlm-%j.log
#SBATCH --open-mode=append
#SBATCH --exclusive
#SBATCH --nice=100

config=${1:-'configs/my config.yaml'}

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

# Where the processes of all nodes meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export NCCL_SOCKET_IFNAME=ib0,ib1
export GLOO_SOCKET_IFNAME=ib0,ib1
export NCCL_IB_DISABLE=1

# Compute nodes have no internet: nothing is fetched, and `wandb sync` uploads afterwards.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export WANDB_MODE=${WANDB_MODE:-offline}
export PYTHONUNBUFFERED=1

# srun starts one process a GPU. When one fails, the others end at once, or are given up after 30 s:
# their node may be gone. srun forgets --cpus-per-task unless it is told again.
srun --export=ALL --kill-on-bad-exit=1 --wait=30 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    apptainer exec --nv --bind /scratch:/scratch,/host/y:/y:ro --pwd "$PWD" docker://nvcr.io/nvidia/pytorch:25.01-py3 \
    python -m vectorlm.train --config="$config"
code=$?

# Says what ended the processes, and has Slurm start this job again where that helps; the exit code
# of the job is this one.
python -m vectorlm.conclude --config="$config" --code="$code" --script="$0"
