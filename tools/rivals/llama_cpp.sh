#!/bin/sh
# Builds llama.cpp's bench tool for this machine's processor, as a rival for `make bench`.
# Its source comes from PyPI by name (the source package of llama-cpp-python carries it); nothing of
# it is kept in this repository. Needs: python3 with pip and venv, a C++ compiler.
#
#   tools/rivals/llama_cpp.sh [DIR]     DIR: where to build, default target/rivals
#
# Prints the path of llama-bench on the last line.
set -eu
dir=${1:-target/rivals}
version=0.3.36
mkdir -p "$dir"
cd "$dir"
if [ ! -x llama.cpp-build/bin/llama-batched-bench ]; then
    [ -x venv/bin/python ] || python3 -m venv venv
    venv/bin/pip install -q cmake ninja numpy gguf==0.19.0
    [ -f "llama_cpp_python-$version.tar.gz" ] ||
        venv/bin/pip download -q --no-deps --no-build-isolation --no-binary llama-cpp-python "llama-cpp-python==$version" 2>/dev/null ||
        venv/bin/pip download -q --no-deps --no-binary llama-cpp-python "llama-cpp-python==$version"
    [ -d "llama_cpp_python-$version" ] || tar xzf "llama_cpp_python-$version.tar.gz"
    PATH="$PWD/venv/bin:$PATH"
    cmake -S "llama_cpp_python-$version/vendor/llama.cpp" -B llama.cpp-build -G Ninja \
        -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \
        -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF >cmake.log
    ninja -C llama.cpp-build llama-bench llama-batched-bench >build.log
fi
echo "$PWD/llama.cpp-build/bin/llama-bench"
