#!/bin/sh
# Builds the GPU tests and the benchmark and puts the programs into a folder, for a machine with a GPU
# and without Rust: copy the repository and the folder there, and call run.sh.
#   tools/gpu/pack.sh FOLDER
# POLAR_CUDA_ARCHS=90a makes them smaller: Hopper only.
set -eu
out=${1:?usage: pack.sh FOLDER}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/../.."
command -v nvcc >/dev/null || PATH=$(dirname "$(tools/cuda_toolchain.sh)"):$PATH
export PATH
cargo=${CARGO:-cargo}

# Cargo's messages name each program; the library's unit tests are not wanted.
programs() {
    "$cargo" "$@" --locked --features cuda --no-run --message-format=json |
        python3 -c '
import json, sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable"):
        print(m["target"]["name"], m["executable"])
'
}
{
    programs test --test cuda_kernels --test cuda_backend --test cuda_steps --test cuda_driver --test cuda_faults \
        --test soak --test agreement --test fixtures
    programs bench --bench gpu
} | while read -r name file; do
    case $name in gpu) name=bench_gpu ;; esac
    strip -o "$out/$name" "$file"
done
ls -l "$out"
