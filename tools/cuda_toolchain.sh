#!/bin/sh
# Puts NVIDIA's CUDA compiler (wheels from PyPI, no driver or root needed) into a folder and prints
# the path of nvcc. Usage: tools/cuda_toolchain.sh [folder], default target/cuda-toolchain.
# The five wheels are the least that compiles device code, pinned because each pulls newer siblings;
# CUDA 13.0 because drivers of the 580 branch run it.
set -eu
root=${1:-target/cuda-toolchain}
version=13.0.88
if [ ! -x "$root/venv/bin/python3" ]; then
    mkdir -p "$root"
    python3 -m venv "$root/venv"
fi
set -- "$root"/venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc
if [ ! -x "$1" ]; then
    "$root/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        nvidia-cuda-nvcc==$version nvidia-cuda-crt==$version nvidia-nvvm==$version \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 >&2
    set -- "$root"/venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc
fi
cd "$(dirname "$1")"
echo "$(pwd)/nvcc"
