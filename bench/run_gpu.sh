#!/usr/bin/env bash
# All that needs a GPU, on a bare machine with torch, triton and pytest and no network, in stages
# that each leave results in FOLDER and take under nine minutes: see run_gpu.py. What has ended there
# at the same commit is skipped, unless it is asked for --again; --seconds is for all stages together.
#
#     bench/run_gpu.sh [--again] [--seconds N] FOLDER [stage ...]
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$repository:$repository/bench${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "no GPU is seen"
exec python3 "$repository/bench/run_gpu.py" "$@"
