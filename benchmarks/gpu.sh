#!/usr/bin/env bash
# Every benchmark on a CUDA device in under 10 minutes, with nothing but Python, torch, torchvision and the checkout, and
# the tests of it where pytest and hypothesis are installed; peers and Composer take part where they can be imported.
# Each writes NAME_cuda.json into the result folder as it goes, so what is stopped keeps what it has.
# Usage: benchmarks/gpu.sh [PYTHON] [RESULT FOLDER] [PART...]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
results=${2:-benchmarks/results}
known=(tests update scaling step offload memory host adamw)
parts=("${@:3}")
[ ${#parts[@]} -gt 0 ] || parts=("${known[@]}")
for part in "${parts[@]}"; do
    if [[ " ${known[*]} " != *" $part "* ]]; then
        echo "no part is called '$part'. Name some of: ${known[*]}." >&2
        exit 2
    fi
done
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

has() { "$python" -c "import $1" 2>/dev/null; }

# run_pytest NAME SECONDS FILES AND OPTIONS
run_pytest() {
    local name=$1 seconds=$2 options=(-p no:cacheprovider -q -rfE)
    shift 2
    has composer || options+=(--noconftest)
    timeout --signal=INT --kill-after=5 "$seconds" "$python" -m pytest "${options[@]}" "$@" | tee "$results/$name.txt"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || failed=1
    return "$code"
}

# First, side by side where pytest-xdist is installed, what is computed: each variant of the kernel, compiled and compared
# with the reference; models that FSDP2 and tensor parallelism shard over a mesh of one, with NCCL. Then, alone, what
# needs a device's time: streams that are late, and 100 steps during which nothing may synchronise.
run_tests() {
    if ! has pytest || ! has hypothesis; then
        echo 'left out: the tests, which need pytest and hypothesis' >&2
        return
    fi
    local workers=() timed=(tests/test_{stream,optimizer_stepping,offload}.py)
    has xdist && workers=(--numprocesses 8 --dist worksteal)
    has composer && timed+=(tests/test_ema_beside_others.py)
    run_pytest kernel_tests 90 "${workers[@]}" tests/test_fused.py &
    run_pytest gpu_tests 90 "${workers[@]}" -m gpu tests/test_{kernels,shadow,custom,sharded_device}.py
    wait $! || failed=1
    run_pytest timed_tests 60 -m gpu "${timed[@]}"
}

for part in "${parts[@]}"; do
    case $part in
    tests) run_tests ;;
    update) run update 70 --seconds 2 ;;
    scaling) run scaling 60 --seconds 1 ;;
    step) run step 170 --budget-seconds 140 --precision tf32 --contestants none,inline,optimizer,multi ;;
    offload) run offload 55 --seconds 6 ;;
    memory) run memory 30 ;;
    host) run host 20 --rounds 300 --seconds 4 ;;
    adamw) run adamw 30 --seconds 3 ;;
    esac
done
exit "$failed"
