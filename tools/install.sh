#!/bin/sh
# Install headers, libraries, pkg-config and CMake files.
#   PREFIX=/usr/local LIBDIR=$PREFIX/lib DESTDIR= tools/install.sh FOLDER
# FOLDER holds the built libpolar_sparsity.so and libpolar_sparsity.a (target/release).
# Installed files may be moved together as long as they keep their places to each other.
set -eu

built=${1:?usage: install.sh FOLDER}
here=$(cd "$(dirname "$0")/.." && pwd)
prefix=${PREFIX:-/usr/local}
libdir=${LIBDIR:-$prefix/lib}
includedir=$prefix/include
destdir=${DESTDIR:-}

case $prefix$libdir in
/*) ;;
*) echo "install.sh: PREFIX and LIBDIR must be absolute" >&2 && exit 2 ;;
esac

version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/Cargo.toml" | head -n 1)
soname=$(sed -n 's/^const SONAME: &str = "\(.*\)";/\1/p' "$here/build.rs")
major_minor=${version%.*}

# From the library folder to the headers, so that neither file names where it was installed.
lib_to_include=$(realpath -m --relative-to="$libdir" "$includedir")
pc_to_prefix=$(realpath -m --relative-to="$libdir/pkgconfig" "$prefix")

fill() { # template, target
    sed -e "s|@PREFIX@|\${pcfiledir}/$pc_to_prefix|" \
        -e "s|@LIBDIR@|\${pcfiledir}/..|" \
        -e "s|@INCLUDEDIR@|\${pcfiledir}/../$lib_to_include|" \
        -e "s|@LIB_TO_INCLUDE@|$lib_to_include|" \
        -e "s|@VERSION@|$version|" -e "s|@MAJOR_MINOR@|$major_minor|" -e "s|@SONAME@|$soname|" \
        "$here/include/$1.in" >"$2/$1"
    chmod 644 "$2/$1"
}

lib=$destdir$libdir
install -d "$destdir$includedir" "$lib/pkgconfig" "$lib/cmake/polar_sparsity"
install -m 644 "$here/include/polar_sparsity.h" "$here/include/polar_sparsity.hpp" "$destdir$includedir"
install -m 755 "$built/libpolar_sparsity.so" "$lib/libpolar_sparsity.so.$version"
ln -sf "libpolar_sparsity.so.$version" "$lib/$soname"
ln -sf "$soname" "$lib/libpolar_sparsity.so"
install -m 644 "$built/libpolar_sparsity.a" "$lib"
fill polar_sparsity.pc "$lib/pkgconfig"
fill polar_sparsity-config.cmake "$lib/cmake/polar_sparsity"
fill polar_sparsity-config-version.cmake "$lib/cmake/polar_sparsity"
