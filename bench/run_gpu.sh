#!/usr/bin/env bash
# All that needs a GPU, on a bare machine with torch, triton and pytest and no network: tests of the
# kernels, the sweep beside its peers, serving a model, the tuner, vLLM with our blocks beside its own
# caches where it is installed, and what memory checks say. Each part has a time limit, and what it
# wrote by then is kept.
#
#     bench/run_gpu.sh [folder for results and logs]
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(mkdir -p "${1:-bench/results/gpu}" && cd "${1:-bench/results/gpu}" && pwd)
export PYTHONPATH="$PWD:$PWD/bench" PYTHONUNBUFFERED=1

part() { # name, seconds, command ...
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" >"$results/$name.log" 2>&1
    echo "== $name: exit $? after $((SECONDS - start)) s"
    tail -n 25 "$results/$name.log"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
part tests 240 python3 -m pytest -q -n 8 -W default -p no:cacheprovider tests/kernels/test_triton_kernels.py \
    tests/kernels/test_xformers_attention.py tests/kernels/test_triton_windowed.py
part sweep 300 python3 bench/bench_gpu_attention.py --json "$results/attention_gpu.json"
part throughput 300 python3 bench/bench_throughput.py --device cuda --json "$results/throughput_gpu.json"
part tune 420 python3 bench/tools/tune.py --json "$results/tune.json"
if python3 -c "import vllm" 2>/dev/null; then
    part vllm 540 python3 bench/bench_vllm.py --dtype bfloat16 --rounds 1 --json "$results/vllm_gpu.json" \
        --peers fp8 int8_per_token_head int4_per_token_head turboquant_4bit_nc
fi
if command -v compute-sanitizer >/dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
        part "$tool" 240 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -m pytest -q \
            -W default -p no:cacheprovider tests/kernels/test_triton_kernels.py -k "head_dim and 128"
    done
fi
