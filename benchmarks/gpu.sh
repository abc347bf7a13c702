#!/usr/bin/env bash
# make gpu: all that needs a GPU, in under 9 minutes, with whatever python3 has torch, triton, timm and pytest.
# Writes to $OUT if that is set, else to benchmarks/results/. A part that fails does not keep the next from running.
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=0

part() {  # seconds, name, command ...
    local limit=$1 name=$2
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/gpu-$name.log"
    local status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then
        echo "== $name failed with exit code $status (124: ran past its $limit seconds)"
        failed=1
    fi
}

part 30 device "$PYTHON" -m smi_fast doctor
part 20 driver nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm,memory.total --format=csv
part 200 tests "$PYTHON" -m pytest -m "kernel or gpu" tests/kernels tests/test_gpu.py -p no:cacheprovider --durations=5
part 160 kernels "$PYTHON" -m benchmarks.kernels --seconds 120 --out "$OUT/kernels-cuda.csv"
part 130 engine "$PYTHON" -m benchmarks.engine --device cuda --model deit_base_patch16_224 --batch 64 --quick \
    --stages sparse --rounds 7 --steps 5 --out "$OUT/engine-cuda-deit_base_patch16_224-b64.csv"
exit $failed
