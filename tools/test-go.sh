#!/bin/sh
# Run the tests of the Go package against a built library, under the race detector.
#   tools/test-go.sh FOLDER      FOLDER holds libpolar_sparsity.so
set -eu

built=$(cd "${1:?usage: test-go.sh FOLDER}" && pwd)
here=$(cd "$(dirname "$0")/.." && pwd)
link=$(mktemp -d)
trap 'rm -rf "$link"' EXIT
ln -s "$built/libpolar_sparsity.so" "$link/libpolar_sparsity.so"
ln -s "$built/libpolar_sparsity.so" "$link/libpolar_sparsity.so.0"

cd "$here/bindings/go"
export CGO_CFLAGS="-I$here/include" CGO_LDFLAGS="-L$link -lpolar_sparsity" LD_LIBRARY_PATH="$link"
# No pkg-config: nothing is installed.
export POLAR_TEST_DATA="$here/tests/data/golden"
"${GO:-go}" vet -tags polar_nopkgconfig ./...
"${GO:-go}" test -tags polar_nopkgconfig -race -count=1 ./...
GODEBUG=cgocheck=2 GOGC=1 "${GO:-go}" test -tags polar_nopkgconfig -count=1 ./...
