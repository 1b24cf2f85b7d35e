#!/bin/sh
# Runs on a machine with a GPU what pack.sh made. From the repository's folder:
#   tools/gpu/run.sh FOLDER WHAT [arguments]
# WHAT is one of
#   tests      kernels, backend, faults and fixtures on the GPU
#   sanitize   compute-sanitizer over the kernel tests, and over a short soak
#   soak       10,000 steps of random traffic (POLAR_TEST_STEPS)
#   agreement  greedy tokens against the CPU's, on the trained fixtures
#   bench      the benchmark, records in benches/results; arguments name parts
#   rivals     the same kernels and steps by others; arguments go to tools/rivals/gpu.py
# Prints a line per program at the end; fails if one failed.
set -u
bin=$(cd "${1:?usage: run.sh FOLDER WHAT}" && pwd)
what=${2:?usage: run.sh FOLDER WHAT}
shift 2
cd "$(dirname "$0")/../.."
summary=""
failed=0

# One program under a limit of seconds.
step() {
    name=$1 limit=$2
    shift 2
    echo "== $name"
    began=$(date +%s)
    if timeout -k 5 "$limit" "$@"; then verdict=ok; else verdict="FAILED ($?)" failed=1; fi
    summary="$summary$(printf '%-34s %5ss  %s' "$name" "$(($(date +%s) - began))" "$verdict")
"
}

# One test program on the GPU; one test at a time, since they share the device's stream.
on_gpu() {
    name=$1 limit=$2
    shift 2
    step "$name $*" "$limit" env POLAR_TEST_GPU=1 POLAR_TEST_DEVICE=1 "$bin/$name" --test-threads=1 "$@"
}

case $what in
tests)
    for name in cuda_driver cuda_kernels cuda_backend cuda_steps cuda_faults; do on_gpu $name 150; done
    if [ -f fixtures/llama-tiny/model.safetensors ] && [ -f fixtures/opt-tiny/model.safetensors ]; then
        on_gpu fixtures 200 --nocapture
    else
        echo "fixtures: skipped, the models are not here"
    fi
    ;;
sanitize)
    # Tools may be named: each takes minutes.
    [ $# -gt 0 ] || set -- memcheck racecheck initcheck synccheck
    for tool in "$@"; do
        step "$tool cuda_kernels" 280 env POLAR_TEST_GPU=1 compute-sanitizer --tool "$tool" \
            --error-exitcode 9 --print-limit 20 "$bin/cuda_kernels" --test-threads=1
    done
    step "memcheck soak" 200 env POLAR_TEST_DEVICE=1 POLAR_TEST_STEPS=80 compute-sanitizer \
        --tool memcheck --error-exitcode 9 --print-limit 20 "$bin/soak" --nocapture
    ;;
soak)
    step soak 500 env POLAR_TEST_DEVICE=1 POLAR_TEST_STEPS="${POLAR_TEST_STEPS:-10000}" "$bin/soak" --nocapture
    ;;
agreement)
    step agreement 200 env POLAR_TEST_DEVICE=1 "$bin/agreement" --nocapture "$@"
    ;;
bench)
    step bench 590 "$bin/bench_gpu" --results benches/results "$@"
    ;;
rivals)
    step rivals 590 python3 tools/rivals/gpu.py "$@"
    ;;
*)
    echo "no such run: $what" >&2
    exit 2
    ;;
esac
printf '\n%s' "$summary"
exit $failed
