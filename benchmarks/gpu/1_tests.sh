#!/usr/bin/env bash
# Kernels compiled and run on this machine's GPU, against float64 references.
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${OUT:-out/gpu}"
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks:$PWD/training:$PWD/export${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
# --noconftest: the shared fixtures want the exporter's libraries, these tests none of them.
python3 -m pytest -q -o addopts= -o timeout= --noconftest --import-mode=importlib \
  -p no:cacheprovider -W ignore --junit-xml="$out/kernel-tests.xml" -ra \
  tests/test_kernels_gpu.py tests/kernels_numerics.py
