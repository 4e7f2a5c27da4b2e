#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one call and within a time: benchmarks/gpu_report.sh --help
#
#   benchmarks/gpu_report.sh --minutes 30
#   PYTHON=.venv/bin/python benchmarks/gpu_report.sh --minutes 60
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/report/gpu_report.py" "$@"
