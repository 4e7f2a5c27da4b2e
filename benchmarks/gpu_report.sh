#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one call: builds csrc/ where nvcc is found, runs the tests marked `cuda`,
# and measures the training step of the configurations that have a published speed.
#
#   benchmarks/gpu_report.sh [arguments for throughput.py, e.g. --steps 50 --set data.micro_batch=16]
#   PYTHON=.venv/bin/python benchmarks/gpu_report.sh
#
# A stage that fails does not stop the others; the exit code is the number of stages that failed, or 64 without
# a GPU. Measurements are JSON in benchmarks/results/, one file per configuration.

set -u

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 64
results=benchmarks/results
stamp=$(date -u +%Y%m%dT%H%M%SZ)
python=${PYTHON:-python}
failed=()
mkdir -p "$results"

stage() {
    local name=$1
    shift
    printf '\n== %s\n   %s\n' "$name" "$*"
    "$@" || failed+=("$name (exit code $?)")
}

if ! gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null); then
    echo "error: torch sees no CUDA device; install a CUDA build of torch and check nvidia-smi" >&2
    exit 64
fi
echo "GPU: $gpu"

if command -v nvcc >/dev/null; then
    stage "build csrc" bash -c 'cmake -S . -B build && cmake --build build'
else
    printf '\n== build csrc: left out, nvcc is not on the PATH\n'
fi

stage "tests on the GPU" "$python" -m pytest -q -m cuda

for config in latent_256 jit_1024 jit_1024_tread; do
    stage "throughput of $config" "$python" benchmarks/throughput.py --config "configs/$config.json" \
        --conditioning cached --steps 20 --warmup 5 \
        --output "$results/throughput-$config-${gpu// /-}-$stamp.json" "$@"
done

printf '\n== results\n'
find "$results" -name "*-$stamp.json" -print
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
fi
exit ${#failed[@]}
