#!/usr/bin/env bash
# Each kernel untuned, then tuned, against torch and the memory roof; this GPU's tuning table.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT="${OUT:-out/gpu}"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
python3 benchmarks/gpu/tune_kernels.py
