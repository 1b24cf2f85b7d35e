// Package polar runs batched LLM decoding with Polar Sparsity: libpolar_sparsity for Go.
//
// One goroutine steps an Engine; any goroutine submits and cancels. Nothing here calls back into Go,
// and nothing needs a locked thread. Close what was opened, in any order; a second Close does nothing,
// and calls after Close return an error.
//
// The package finds the library by pkg-config. With the build tag polar_nopkgconfig it uses
// CGO_CFLAGS and CGO_LDFLAGS alone.
package polar

/*
#cgo !polar_nopkgconfig pkg-config: polar_sparsity
#include <stdlib.h>
#include "polar_sparsity.h"

// Progress of a load, in C memory: written by the loading thread, read by any goroutine.
typedef struct { uint64_t done, total; int32_t cancel; } polar_go_progress;

static int32_t polar_go_on_progress(void *user, uint64_t done, uint64_t total) {
  polar_go_progress *p = user;
  __atomic_store_n(&p->total, total, __ATOMIC_RELAXED);
  __atomic_store_n(&p->done, done, __ATOMIC_RELAXED);
  return __atomic_load_n(&p->cancel, __ATOMIC_RELAXED);
}

static polar_status polar_go_load(polar_context *ctx, const char *path, size_t len, const polar_load_options *o,
                                  polar_go_progress *p, polar_model **out, polar_error *err) {
  return polar_model_load(ctx, path, len, o, p ? polar_go_on_progress : NULL, p, out, err);
}
*/
import "C"

import (
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"
)

// Status is the outcome of a call, a POLAR_ constant of the header.
type Status int32

// What callers tell apart. Numbers below 100 are no errors.
const (
	OK          Status = C.POLAR_OK
	Pending     Status = C.POLAR_PENDING
	Idle        Status = C.POLAR_IDLE
	Truncated   Status = C.POLAR_TRUNCATED
	Invalid     Status = C.POLAR_E_INVALID
	ABI         Status = C.POLAR_E_ABI
	NotFound    Status = C.POLAR_E_NOT_FOUND
	Busy        Status = C.POLAR_E_BUSY
	Unsupported Status = C.POLAR_E_UNSUPPORTED
	Cancelled   Status = C.POLAR_E_CANCELLED
	QueueFull   Status = C.POLAR_E_QUEUE_FULL
	KVFull      Status = C.POLAR_E_KV_FULL
	Limit       Status = C.POLAR_E_LIMIT
	DeviceLost  Status = C.POLAR_E_DEVICE_LOST
	Panic       Status = C.POLAR_E_PANIC
)

// String is the constant's name in the header.
func (s Status) String() string { return C.GoString(C.polar_status_name(C.polar_status(s))) }

// Error is one failed call.
type Error struct {
	Status     Status
	OSCode     int32
	DeviceCode int32
	Message    string
}

func (e *Error) Error() string { return fmt.Sprintf("%v: %s", e.Status, e.Message) }

// Is makes errors.Is(err, &polar.Error{Status: polar.QueueFull}) compare statuses.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Status == e.Status
}

func newError() C.polar_error { return C.polar_error{struct_size: C.sizeof_polar_error} }

func check(s C.polar_status, e *C.polar_error) error {
	if s < 100 {
		return nil
	}
	return &Error{Status(s), int32(e.os_code), int32(e.device_code), C.GoString(&e.message[0])}
}

var errClosed = &Error{Status: Invalid, Message: "closed"}

// BuildInfo says how the library was built.
func BuildInfo() string { return C.GoString(C.polar_build_info()) }

// Version of the library: major, minor, patch.
func Version() (major, minor, patch uint32) {
	v := uint32(C.polar_version())
	return v >> 16, v >> 8 & 0xff, v & 0xff
}

func matches() bool {
	major, minor, _ := Version()
	release := major == C.POLAR_VERSION_MAJOR && minor == C.POLAR_VERSION_MINOR
	return C.polar_abi_version() == C.POLAR_ABI_VERSION && (C.POLAR_ABI_VERSION != 0 || release)
}

// chars is a copy of a Go string as C wants it; never NULL.
func chars(s string) (*C.char, C.size_t) {
	b := append([]byte(s), 0)
	return (*C.char)(unsafe.Pointer(&b[0])), C.size_t(len(s))
}

func pointer[T, U any](s []T) *U {
	if len(s) == 0 {
		return nil
	}
	return (*U)(unsafe.Pointer(&s[0]))
}

// Backend is a kind of device.
type Backend uint32

// Backends.
const (
	Auto Backend = C.POLAR_BACKEND_AUTO
	CPU  Backend = C.POLAR_BACKEND_CPU
	CUDA Backend = C.POLAR_BACKEND_CUDA
)

// ContextOptions: zero means the default.
type ContextOptions struct {
	Backend        Backend
	Threads        uint32
	LogLevel       uint32
	LogRingKiB     uint32
	MaxFileBytes   uint64
	MaxHeaderBytes uint64
	// UntimedProducts: a GPU takes cuBLASLt's first proposal for a matrix product, the same in every
	// process, instead of the fastest kernel it finds by timing.
	UntimedProducts bool
}

// Context has the devices and the log.
type Context struct {
	mu sync.RWMutex // read: use, write: Close
	c  *C.polar_context
}

// NewContext makes a context.
func NewContext(o ContextOptions) (*Context, error) {
	if !matches() {
		return nil, &Error{Status: ABI, Message: "libpolar_sparsity does not match the header"}
	}
	var co C.polar_context_options
	C.polar_context_options_init(&co, C.sizeof_polar_context_options)
	co.backend, co.threads = C.polar_backend(o.Backend), C.uint32_t(o.Threads)
	co.log_level, co.log_ring_kib = C.polar_log_level(o.LogLevel), C.uint32_t(o.LogRingKiB)
	co.max_file_bytes, co.max_header_bytes = C.uint64_t(o.MaxFileBytes), C.uint64_t(o.MaxHeaderBytes)
	if o.UntimedProducts {
		co.flags |= C.POLAR_CONTEXT_UNTIMED_PRODUCTS
	}
	ctx, er := new(Context), newError()
	return ctx, check(C.polar_context_create(&co, &ctx.c, &er), &er)
}

// Close frees the context; models and engines made from it live on.
func (x *Context) Close() {
	x.mu.Lock()
	defer x.mu.Unlock()
	C.polar_context_free(x.c)
	x.c = nil
}

// Device is one device; if it is not usable, Name says why.
type Device struct {
	Backend                 Backend
	Ordinal, Capability     uint32
	MemoryTotal, MemoryFree uint64
	Usable                  bool
	Name, UUID              string
}

// Devices lists the devices.
func (x *Context) Devices() ([]Device, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var n C.uint32_t
	er := newError()
	if err := check(C.polar_device_count(x.c, &n, &er), &er); err != nil {
		return nil, err
	}
	out := make([]Device, 0, n)
	for i := C.uint32_t(0); i < n; i++ {
		d := C.polar_device_info{struct_size: C.sizeof_polar_device_info}
		if err := check(C.polar_device_get(x.c, i, &d, &er), &er); err != nil {
			return nil, err
		}
		out = append(out, Device{
			Backend(d.backend), uint32(d.ordinal), uint32(d.compute_capability), uint64(d.memory_total),
			uint64(d.memory_free), d.usable == 1, C.GoString(&d.name[0]), C.GoString(&d.uuid[0]),
		})
	}
	return out, nil
}

// DrainLog takes the log lines kept so far, and says how many were lost in all. Call it from a ticker.
func (x *Context) DrainLog() (lines string, dropped uint64, err error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var n C.size_t
	var lost C.uint64_t
	er := newError()
	buf := make([]byte, 8192)
	for {
		s := C.polar_log_drain(x.c, pointer[byte, C.char](buf), C.size_t(len(buf)), &n, &lost, &er)
		if err := check(s, &er); err != nil || n == 0 {
			return lines, uint64(lost), err
		}
		lines += string(buf[:n])
	}
}

// LoadOptions: zero means the default.
type LoadOptions struct {
	Device            uint32
	Int8              bool // int8 weights with one scale per row
	CheckFinite       bool
	IgnoreFingerprint bool
}

func (o LoadOptions) c() C.polar_load_options {
	var co C.polar_load_options
	C.polar_load_options_init(&co, C.sizeof_polar_load_options)
	co.device = C.uint32_t(o.Device)
	if o.Int8 {
		co.weight_dtype = C.POLAR_DTYPE_I8
	}
	if o.CheckFinite {
		co.flags |= C.POLAR_LOAD_CHECK_FINITE
	}
	if o.IgnoreFingerprint {
		co.flags |= C.POLAR_LOAD_IGNORE_FINGERPRINT
	}
	return co
}

// Progress watches a load, and may cancel it, from another goroutine.
type Progress struct{ c *C.polar_go_progress }

// NewProgress makes one; Close frees it.
func NewProgress() *Progress {
	return &Progress{(*C.polar_go_progress)(C.calloc(1, C.sizeof_polar_go_progress))}
}

// Bytes that are loaded, and in all.
func (p *Progress) Bytes() (done, total uint64) {
	return atomic.LoadUint64((*uint64)(&p.c.done)), atomic.LoadUint64((*uint64)(&p.c.total))
}

// Cancel ends the load with Cancelled.
func (p *Progress) Cancel() { atomic.StoreInt32((*int32)(&p.c.cancel), 1) }

// Close frees the memory; not while a load uses it.
func (p *Progress) Close() {
	C.free(unsafe.Pointer(p.c))
	p.c = nil
}

// Model is immutable weights.
type Model struct {
	mu sync.RWMutex
	c  *C.polar_model
}

// LoadModel loads a Hugging Face folder; progress may be nil.
func (x *Context) LoadModel(path string, o LoadOptions, progress *Progress) (*Model, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var p *C.polar_go_progress
	if progress != nil {
		p = progress.c
	}
	text, n := chars(path)
	co, m, er := o.c(), new(Model), newError()
	if err := check(C.polar_go_load(x.c, text, n, &co, p, &m.c, &er), &er); err != nil {
		return nil, err
	}
	return m, nil
}

// Estimate is what a model and an engine would take on a device; sizes are bytes of its memory.
type Estimate struct {
	Fits                                            bool
	MaxBatch, MaxContext                            uint32
	WeightBytes, RouterBytes, ScratchBytes          uint64
	PageBytes, TokenBytes, KVPages                  uint64
	NeededBytes, FreeBytes, MaxKVPages, MaxContexts uint64
}

// Estimate says what a model, its routers (a path, or empty) and an engine would take before anything is
// loaded. What does not fit is no error.
func (x *Context) Estimate(path, routers string, o LoadOptions, eo EngineOptions) (Estimate, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	text, n := chars(path)
	rtext, rn := chars(routers)
	co, ceo, er := o.c(), eo.c(), newError()
	c := C.polar_estimate{struct_size: C.sizeof_polar_estimate}
	if err := check(C.polar_model_estimate(x.c, text, n, rtext, rn, &co, &ceo, &c, &er), &er); err != nil {
		return Estimate{}, err
	}
	return Estimate{
		c.fits == 1, uint32(c.max_batch), uint32(c.max_context),
		uint64(c.weight_bytes), uint64(c.router_bytes), uint64(c.scratch_bytes),
		uint64(c.page_bytes), uint64(c.token_bytes), uint64(c.kv_pages),
		uint64(c.needed_bytes), uint64(c.free_bytes), uint64(c.max_kv_pages), uint64(c.max_contexts),
	}, nil
}

// Close frees the model; engines made from it live on.
func (m *Model) Close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	C.polar_model_free(m.c)
	m.c = nil
}

// ModelInfo is what a model is.
type ModelInfo struct {
	VocabSize, Layers, Heads, KVHeads, HeadDim, HiddenSize, FFNSize, MaxPositions uint32
	BOS                                                                           int32 // -1: none
	EOS                                                                           []int32
	WeightBytes                                                                   uint64
	Family, DeviceName                                                            string
}

// Info describes the model.
func (m *Model) Info() (ModelInfo, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	c := C.polar_model_info{struct_size: C.sizeof_polar_model_info}
	er := newError()
	if err := check(C.polar_model_get_info(m.c, &c, &er), &er); err != nil {
		return ModelInfo{}, err
	}
	info := ModelInfo{
		uint32(c.vocab_size), uint32(c.num_layers), uint32(c.num_heads), uint32(c.num_kv_heads),
		uint32(c.head_dim), uint32(c.hidden_size), uint32(c.ffn_size), uint32(c.max_positions),
		int32(c.bos_token), nil, uint64(c.weight_bytes), C.GoString(&c.family[0]), C.GoString(&c.device_name[0]),
	}
	for i := 0; i < int(c.n_eos) && i < len(c.eos_tokens); i++ {
		info.EOS = append(info.EOS, int32(c.eos_tokens[i]))
	}
	return info, nil
}

// Routers is immutable router weights for one model.
type Routers struct {
	mu sync.RWMutex
	c  *C.polar_routers
}

// LoadRouters loads a router file made for the model.
func (m *Model) LoadRouters(path string, o LoadOptions) (*Routers, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	text, n := chars(path)
	co, r, er := o.c(), new(Routers), newError()
	if err := check(C.polar_routers_load(m.c, text, n, &co, &r.c, &er), &er); err != nil {
		return nil, err
	}
	return r, nil
}

// Close frees the routers; engines made with them live on.
func (r *Routers) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	C.polar_routers_free(r.c)
	r.c = nil
}

// Tokenizer turns text into tokens and back.
type Tokenizer struct {
	mu sync.RWMutex
	c  *C.polar_tokenizer
}

// LoadTokenizer loads tokenizer.json, or the one in a folder.
func (x *Context) LoadTokenizer(path string) (*Tokenizer, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	text, n := chars(path)
	t, er := new(Tokenizer), newError()
	if err := check(C.polar_tokenizer_load(x.c, text, n, &t.c, &er), &er); err != nil {
		return nil, err
	}
	return t, nil
}

// Encode turns text into tokens, with the special tokens that start or end a text.
func (t *Tokenizer) Encode(text string) ([]int32, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	c, size := chars(text)
	var n C.size_t
	er := newError()
	for tokens := make([]int32, len(text)+8); ; tokens = make([]int32, n) {
		s := C.polar_tokenizer_encode(t.c, c, size, 0, pointer[int32, C.int32_t](tokens), C.size_t(len(tokens)), &n, &er)
		if s != C.POLAR_TRUNCATED {
			return tokens[:n], check(s, &er)
		}
	}
}

// Decode turns tokens into text, without special tokens.
func (t *Tokenizer) Decode(tokens []int32) (string, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var n C.size_t
	er := newError()
	for buf := make([]byte, 8*len(tokens)+1); ; buf = make([]byte, n+1) {
		s := C.polar_tokenizer_decode(t.c, pointer[int32, C.int32_t](tokens), C.size_t(len(tokens)), 0,
			pointer[byte, C.char](buf), C.size_t(len(buf)), &n, &er)
		if s != C.POLAR_TRUNCATED {
			return string(buf[:n]), check(s, &er)
		}
	}
}

// Close frees the tokenizer.
func (t *Tokenizer) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	C.polar_tokenizer_free(t.c)
	t.c = nil
}
