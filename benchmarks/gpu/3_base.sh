#!/usr/bin/env bash
# One pass of base's denoiser over a clip: eager, compiled, and each with our kernels.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT="${OUT:-out/gpu}"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
python3 benchmarks/gpu/base_latency.py
