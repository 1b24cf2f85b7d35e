#!/bin/sh
# Fetches PyTorch from PyPI, as a rival for `make bench TORCH=1`. Its wheel carries CUDA libraries
# that it wants even on a machine without a GPU: 4.9 GB unpacked.
#
#   tools/rivals/torch.sh [DIR]     DIR: where its venv goes, default target/rivals
set -eu
dir=${1:-target/rivals}
mkdir -p "$dir"
[ -x "$dir/torch-venv/bin/python" ] || python3 -m venv "$dir/torch-venv"
"$dir/torch-venv/bin/python" -c "import torch" 2>/dev/null ||
    "$dir/torch-venv/bin/pip" install -q torch==2.11.0 numpy
echo "$dir/torch-venv/bin/python"
