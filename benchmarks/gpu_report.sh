#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one call and within a time: builds csrc/, runs the CUDA tests of the
# kernels, measures the kernels, the post's rows and routing, then runs the CUDA tests of the rest.
#
#   benchmarks/gpu_report.sh [--seconds N] [arguments for throughput.py, e.g. --set data.micro_batch=16]
#   PYTHON=.venv/bin/python benchmarks/gpu_report.sh --seconds 600
#
# Stages run in order of importance. Each may take its share of the time that is left (1800 seconds in all, if
# nothing else is said); what it does not use, the later ones have. A stage that fails, or runs out of time,
# does not stop the others. Measurements are JSON in benchmarks/results/, written as they come. A stage whose
# compiler or Python packages are missing is left out and named: torch, Triton, NumPy and pytest are enough
# for the kernels. The exit code is the number of stages that failed, 64 without a GPU or with bad arguments.

set -u

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 64
python=${PYTHON:-python3}
results=benchmarks/results
stamp=$(date -u +%Y%m%dT%H%M%SZ)
total=1800
if [[ ${1:-} == --seconds ]]; then
    total=${2:-}
    if ! [[ $total =~ ^[1-9][0-9]*$ ]]; then
        echo "error: --seconds takes a whole number of seconds, got '$total'" >&2
        exit 64
    fi
    shift 2
fi
throughput_arguments=("$@")

# Name, share, what it needs (commands as `command:nvcc`, Python packages by name), what runs.
names=() shares=() needs=() functions=()
plan() {
    names+=("$1") shares+=("$2") needs+=("$3") functions+=("$4")
}

plan "install"               2  ""                       install
plan "build csrc"           12  "command:nvcc command:cmake" build
plan "tests of the kernels" 20  "pytest"                 kernel_tests
plan "kernels"              30  "triton"                 kernels
plan "throughput suite"     30  "deepspeed pydantic einops"           suite
plan "routing"               6  "deepspeed pydantic einops diffusers" routing
plan "tests of the engine"   4  "deepspeed pydantic einops pytest"    engine_tests

# Each writes the command of its stage into `command`; $1 is the time it has.
install() {
    command=("$python" -m pip install --quiet --no-deps --no-build-isolation --editable .)
    "$python" -c 'import millrace.kernels' 2>/dev/null && command=()
}
build() {
    # With the torch of this Python, not of whichever comes first.
    command=(bash -c 'cmake -S . -B build -DPython3_EXECUTABLE="$0" && cmake --build build --parallel'
        "$(command -v "$python")")
}
kernel_tests() { command=("$python" -m pytest -q -m cuda tests/kernels tests/csrc); }
kernels() {
    # It starts no case after nine tenths of its time, so that the last one can end.
    command=("$python" -m benchmarks kernels --seconds $(($1 * 9 / 10))
        --output "$results/kernels-$slug-$stamp.json")
}
suite() {
    # It begins no case that may end after nine tenths of its time; the first ones are the most telling.
    command=("$python" benchmarks/throughput.py --suite post --seconds $(($1 * 9 / 10)) --profile
        --output "$results/suite-$slug-$stamp.json"
        ${throughput_arguments[@]+"${throughput_arguments[@]}"})
}
routing() {
    command=("$python" -m benchmarks routing --device cuda --compile --width 1792 --image-tokens 1024
        --batch 16 --output "$results/routing-$slug-$stamp.json")
}
engine_tests() { command=("$python" -m pytest -q -m cuda tests --ignore tests/kernels --ignore tests/csrc); }

missing() {
    local need
    for need in $1; do
        if [[ $need == command:* ]]; then
            command -v "${need#command:}" >/dev/null || echo "${need#command:}"
        else
            "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$need') is None)" || echo "$need"
        fi
    done
}

if ! gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null); then
    echo "error: torch sees no CUDA device; install a CUDA build of torch and check nvidia-smi" >&2
    exit 64
fi
slug=${gpu// /-}
echo "GPU: $gpu, $total seconds"
mkdir -p "$results"

failed=0
outcomes=()
for i in "${!names[@]}"; do
    left=$((total - SECONDS))
    shares_left=0
    for share in "${shares[@]:i}"; do shares_left=$((shares_left + share)); done
    limit=$((left * shares[i] / shares_left))
    absent=$(missing "${needs[i]}")
    command=()
    printf '\n== %s\n' "${names[i]}"
    if [[ -n $absent ]]; then
        outcome="left out, missing: ${absent//$'\n'/ }"
    elif ((limit < 1)); then
        outcome="left out, no time" failed=$((failed + 1))
    else
        "${functions[i]}" "$limit"
        if ((${#command[@]} == 0)); then
            outcome="not needed"
        else
            printf '   at most %s s: %s\n' "$limit" "${command[*]}"
            started=$SECONDS
            # An interrupt, so that programs publish what they have; then the hard way.
            timeout --signal=INT --kill-after=20 "$limit" "${command[@]}"
            code=$?
            case $code in
                0) outcome="passed" ;;
                124 | 137) outcome="failed: out of time ($limit s)" failed=$((failed + 1)) ;;
                *) outcome="failed: exit code $code" failed=$((failed + 1)) ;;
            esac
            outcome+=", $((SECONDS - started)) s"
        fi
    fi
    outcomes+=("${names[i]}: $outcome")
    echo "   $outcome"
done

printf '\n== summary, %s s\n' "$SECONDS"
printf '%s\n' "${outcomes[@]}"
printf '\n== results\n'
find "$results" -name "*-$stamp.*" -print
exit "$failed"
