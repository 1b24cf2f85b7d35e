# make          build the library, release
# make demo     text from the small trained models, dense and with Polar Sparsity
#               ARGS="--model DIR --routers FILE --prompt TEXT" for your own
# make test     everything CI runs
# make install  PREFIX=/usr/local LIBDIR=$(PREFIX)/lib DESTDIR=
# make bench    speed of this machine
# make header   write include/polar_sparsity.h and the ABI lists anew
# make clean

PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
DESTDIR ?=
CARGO ?= cargo
GO ?= go
CC ?= cc
CXX ?= c++
CFLAGS ?= -O2
CXXFLAGS ?= -O2
ARGS ?=

TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/release
EXAMPLES := $(TARGET)/examples-c

.PHONY: build demo examples test test-rust test-go install bench header clean

build:
	$(CARGO) build --release --locked
	ln -sf libpolar_sparsity.so $(RELEASE)/libpolar_sparsity.so.0

demo: examples
	$(EXAMPLES)/generate $(ARGS)

examples: build $(EXAMPLES)/generate $(EXAMPLES)/batch $(EXAMPLES)/async $(EXAMPLES)/server

LINK = -L$(RELEASE) -lpolar_sparsity -Wl,-rpath,'$$ORIGIN/../release'

$(EXAMPLES)/%: examples-c/%.c include/polar_sparsity.h | build
	mkdir -p $(EXAMPLES)
	$(CC) -std=c99 -Wall -Wextra $(CFLAGS) -Iinclude $< -o $@ $(LINK)

$(EXAMPLES)/%: examples-c/%.cpp include/polar_sparsity.h include/polar_sparsity.hpp | build
	mkdir -p $(EXAMPLES)
	$(CXX) -std=c++17 -Wall -Wextra -pthread $(CXXFLAGS) -Iinclude $< -o $@ $(LINK)

test: test-rust test-go

test-rust:
	$(CARGO) test --locked

# Links to the library that the Rust tests just built.
test-go:
	@if command -v $(GO) >/dev/null; then \
	  GO="$(GO)" tools/test-go.sh $(TARGET)/debug/deps; \
	else \
	  echo "Go tests skipped: no go on the PATH"; \
	fi

install: $(RELEASE)/libpolar_sparsity.so
	PREFIX="$(PREFIX)" LIBDIR="$(LIBDIR)" DESTDIR="$(DESTDIR)" tools/install.sh $(RELEASE)

$(RELEASE)/libpolar_sparsity.so:
	$(MAKE) build

bench:
	$(CARGO) bench --locked

header:
	POLAR_WRITE_HEADER=1 $(CARGO) test --locked --test header --test abi

clean:
	$(CARGO) clean
