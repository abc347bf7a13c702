#!/usr/bin/env bash
# make gpu, gpu-speed, gpu-more: all that needs a GPU, each in under 10 minutes, with whatever python3 has torch, triton,
# timm and pytest. gpu.sh tests | speed | more
# Writes to $OUT if that is set, else to benchmarks/results/. A part that fails does not keep the next from running.
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "$PYTHON: its torch finds no CUDA device here (make gpu PYTHON=... for another)"
    exit 1
}
mkdir -p "$OUT"
failed=0

note() {  # exit code, name
    [ "$1" -eq 0 ] && return
    echo "== $2 failed with exit code $1 (124: out of time)"
    failed=1
}

part() {  # seconds, name, command ...
    local limit=$1 name=$2
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/gpu-$name.log"
    note "${PIPESTATUS[0]}" "$name"
}

part 30 device "$PYTHON" -m smi_fast doctor
part 10 driver nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm,memory.total --format=csv

start_tests() {  # seconds, name, mark, file; beside the others, in a process group that ends as a whole
    timeout --kill-after=10 "$1" "$PYTHON" -m pytest -m "$3" "$4" -p no:cacheprovider --durations=3 \
        > "$OUT/gpu-$2.log" 2>&1 &
    running[$2]=$!
}

run_tests() {
    # most of a test's time is compiling kernels, one core each: a process a file
    echo "== tests"
    declare -A running
    for file in tests/kernels/test_*.py tests/test_gpu.py; do
        name=$(basename "$file" .py)
        [ "$name" = test_ahead_of_time ] && continue
        start_tests 180 "$name" "(kernel or gpu) and not sanitizer" "$file"
    done
    # the sanitizer may need all of its time, and must not take the other tests' summary with it
    start_tests 180 sanitizer sanitizer tests/test_gpu.py
    for name in "${!running[@]}"; do
        wait "${running[$name]}"
        status=$?
        echo "$name: $(tail -n 1 "$OUT/gpu-$name.log")"
        [ "$status" -eq 0 ] || grep -E "^(E  |FAILED|ERROR)" "$OUT/gpu-$name.log" | head -n 40
        note "$status" "$name"
    done
    part 120 kernels "$PYTHON" -m benchmarks run kernels --seconds 85 --compiled 1 --out "$OUT/kernels-cuda.csv"
    part 190 engine "$PYTHON" -m benchmarks run engine --device cuda --model deit_base_patch16_224 --batch 64 --quick \
        --stages sparse --rounds 7 --steps 5 --out "$OUT/engine-cuda-deit_base_patch16_224-b64.csv"
}

run_speed() {
    # without the rows of single kernels, whose compilation would take the time of the others; by hand:
    # python -m benchmarks run waterfall --device cuda --rows "+ Triton kernels" "+ tile attention" "+ norms with their sums"
    part 400 waterfall "$PYTHON" -m benchmarks run waterfall --device cuda --model deit_base_patch16_224 --batch 64 \
        --rounds 5 --steps 20 --rows "tuned eager" "+ kept-first patchify" "+ CLS-only last block" "+ compile" \
        "+ GELU in the products" "+ CUDA graphs" "+ folding" "+ attention choice" "+ batch per bucket" "+ fp8" \
        --out "$OUT/waterfall-cuda-deit_base_patch16_224-b64.csv"
    part 130 profile "$PYTHON" -m benchmarks run profile --device cuda --model deit_base_patch16_224 --batch 64 \
        --impl compiled --out "$OUT/profile-cuda-deit_base_patch16_224-b64.csv"
}

run_more() {
    part 240 scaling "$PYTHON" -m benchmarks run scaling --device cuda --seconds 190 --out "$OUT/scaling-cuda.csv"
    part 180 quality "$PYTHON" -m benchmarks run equal-quality --device cuda --out "$OUT/equal-quality-cuda.csv"
    part 130 tiny "$PYTHON" -m benchmarks run waterfall --device cuda --model deit_tiny_patch16_224 --batch 256 --rounds 5 \
        --steps 20 --quality-iterations 20 --rows "tuned eager" "+ CUDA graphs" \
        --out "$OUT/waterfall-cuda-deit_tiny_patch16_224-b256.csv"
}

"run_${1:-tests}"
exit $failed
