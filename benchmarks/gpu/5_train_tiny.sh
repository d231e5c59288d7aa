#!/usr/bin/env bash
# Data, codec, texture, stage 1, stage 2 of tiny, eight and a half minutes at a time: run it again
# while it exits with 75. `--preset nano` is a dry run without a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT="${OUT:-out/gpu}"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks:$PWD/training:$PWD/export${PYTHONPATH:+:$PYTHONPATH}"
"${PYTHON:-python3}" benchmarks/gpu/train_tiny.py "$@"
