#!/usr/bin/env bash
# Every benchmark on a CUDA device in under 10 minutes, with nothing but Python, torch, torchvision and the checkout, and
# the tests marked gpu where pytest and hypothesis are installed.
# Each writes benchmarks/results/NAME_cuda.json as it goes, so what is stopped keeps what it has.
# Usage: benchmarks/gpu.sh [PYTHON] [RESULT FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
results=${2:-benchmarks/results}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0
mkdir -p "$results"

# run NAME SECONDS [OPTIONS]: stops it after so many seconds and goes on with the next.
run() {
    local name=$1 seconds=$2
    shift 2
    timeout --signal=INT --kill-after=5 "$seconds" "$python" -m "benchmarks.$name" --device cuda --out "$results/${name}_cuda.json" "$@"
    local code=$?
    if [ "$code" -ne 0 ]; then
        echo "$name ended with $code" >&2
        failed=1
    fi
}

# Those that need no Composer: streams that are late, graphs, 100 steps during which nothing may synchronise, and models
# that FSDP2 and tensor parallelism shard over a mesh of one, with NCCL.
run_tests() {
    if ! "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
        echo 'left out: the gpu tests, which need pytest and hypothesis' >&2
        return
    fi
    timeout --signal=INT --kill-after=5 60 "$python" -m pytest -m gpu --noconftest -p no:cacheprovider -rs \
        tests/test_{stream,fused,kernels,shadow,optimizer,offload,custom,sharded_device}.py | tee "$results/gpu_tests.txt" || failed=1
}

run_tests
run host 30 --rounds 300 --seconds 5
run update 120 --seconds 4
run memory 30
run scaling 60 --seconds 2
run step 290 --budget-seconds 250
exit "$failed"
