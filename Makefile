# make          build the library, release
# make demo     text from the small trained models, dense and with Polar Sparsity
#               ARGS="--model DIR --routers FILE --prompt TEXT" for your own
#               DEVICE=cuda for the first GPU, with CUDA=1
# make test     everything CI runs
# make install  PREFIX=/usr/local LIBDIR=$(PREFIX)/lib DESTDIR=
# make lint     formatting and clippy
# make bench    speed of this machine: benches/results/cpu.jsonl; RIVAL= without llama.cpp,
#               TORCH=1 with PyTorch too (4.9 GB)
# make bench-gpu  kernels and steps on a GPU: benches/results/<gpu>.jsonl; ARGS= names parts
# make quality  perplexity of the trained models by density: fixtures/quality.md
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
DEVICE ?=
# CUDA=1 builds the CUDA backend; nvcc is fetched from PyPI into target/ where there is none. On by
# itself where nvcc is on the PATH; CUDA= leaves it out.
CUDA ?= $(if $(shell command -v nvcc),1)
FEATURES := $(if $(CUDA),--features cuda)

TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/release
EXAMPLES := $(TARGET)/examples-c

.PHONY: build demo examples test test-rust test-go lint install bench bench-gpu quality header clean

build:
	$(if $(CUDA),@command -v nvcc >/dev/null || tools/cuda_toolchain.sh)
	$(CARGO) build --release --locked $(FEATURES)
	ln -sf libpolar_sparsity.so $(RELEASE)/libpolar_sparsity.so.0
	$(if $(CUDA),@$(KERNEL_TABLE))

# Registers, shared memory and spills of the kernels, when they are not as at the last build.
KERNEL_TABLE = from=$$(ls -t $(RELEASE)/build/polar-sparsity-*/out/kernels.txt | head -n 1) && \
  { [ -z "$$from" ] || cmp -s "$$from" $(RELEASE)/kernels.txt || { cp "$$from" $(RELEASE)/kernels.txt && cat "$$from"; }; } && \
  echo "figures of the kernels: $(RELEASE)/kernels.txt"

demo: examples
	$(EXAMPLES)/generate $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

examples: build $(EXAMPLES)/generate $(EXAMPLES)/batch $(EXAMPLES)/async $(EXAMPLES)/server \
  $(EXAMPLES)/operators

LINK = -L$(RELEASE) -lpolar_sparsity -Wl,-rpath,'$$ORIGIN/../release' -ldl -lm

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

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings

install: $(RELEASE)/libpolar_sparsity.so
	PREFIX="$(PREFIX)" LIBDIR="$(LIBDIR)" DESTDIR="$(DESTDIR)" tools/install.sh $(RELEASE)

$(RELEASE)/libpolar_sparsity.so:
	$(MAKE) build

# Rivals are fetched from PyPI once, into target/rivals; RIVAL= leaves llama.cpp out, TORCH=1 adds
# PyTorch.
RIVAL ?= 1
TORCH ?=
RIVALS := $(TARGET)/rivals
bench:
	$(CARGO) build --release --locked --no-default-features --bench cpu
	@if [ -n "$(RIVAL)" ]; then \
	  tools/rivals/llama_cpp.sh $(RIVALS) && \
	  $(RIVALS)/venv/bin/python tools/rivals/make_gguf.py $(RIVALS)/gguf; \
	fi
	$(if $(TORCH),tools/rivals/torch.sh $(RIVALS))
	$(CARGO) bench --locked --no-default-features --bench cpu -- --out $(CURDIR)/benches/results/cpu.jsonl \
	  $(if $(RIVAL),--rival $(abspath $(RIVALS))/llama.cpp-build/bin/llama-bench --gguf $(abspath $(RIVALS))/gguf) \
	  $(if $(TORCH),--torch $(abspath $(RIVALS))/torch-venv/bin/python)

# Kernels and whole steps on the first GPU: benches/results/h200.jsonl, or as the GPU is called.
# ARGS="attention steps llama-3.1-8b --append" for parts.
bench-gpu:
	@command -v nvcc >/dev/null || tools/cuda_toolchain.sh
	$(CARGO) bench --locked --features cuda --bench gpu -- --results $(CURDIR)/benches/results $(ARGS)

# Perplexity of the trained fixtures by density and kind of selection.
quality:
	$(CARGO) run --release --locked --example quality >$(TARGET)/quality.md
	$(CARGO) run --release --locked --example quality -- --weight-dtype int8 --brief >>$(TARGET)/quality.md
	mv $(TARGET)/quality.md fixtures/quality.md
	cat fixtures/quality.md

header:
	POLAR_WRITE_HEADER=1 $(CARGO) test --locked --test header
	POLAR_WRITE_HEADER=1 $(CARGO) test --locked --test abi

clean:
	$(CARGO) clean
