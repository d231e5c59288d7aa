#!/usr/bin/env bash
# Whole clips of base per condition set: plain, compiled, ours; few steps; the small decoder.
# `bash benchmarks/gpu/4_clips.sh --preset tiny` does tiny; `--preset nano` is a dry run without GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT="${OUT:-out/gpu}"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks:$PWD/training:$PWD/export${PYTHONPATH:+:$PYTHONPATH}"
"${PYTHON:-python3}" benchmarks/gpu/clip_latency.py "$@"
