package polar

// #include "polar_sparsity.h"
import "C"

import (
	"math"
	"sync"
	"time"
	"unsafe"
)

// MLPMode is how a request's MLP runs while it decodes.
type MLPMode uint32

// MLP modes.
const (
	MLPDefault        MLPMode = C.POLAR_MLP_DEFAULT
	MLPDense          MLPMode = C.POLAR_MLP_DENSE
	MLPReference      MLPMode = C.POLAR_MLP_REFERENCE
	MLPBatchInvariant MLPMode = C.POLAR_MLP_BATCH_INVARIANT
)

// EngineOptions: zero means the default.
type EngineOptions struct {
	MaxBatch, MaxQueue, StepTokens, MaxContext uint32
	KVBytes                                    uint64
	AttnDensity, MLPDensity, MLPDenseAbove     float32
	MLPMode                                    MLPMode
}

func (o EngineOptions) c() C.polar_engine_options {
	var co C.polar_engine_options
	C.polar_engine_options_init(&co, C.sizeof_polar_engine_options)
	co.max_batch, co.max_queue = C.uint32_t(o.MaxBatch), C.uint32_t(o.MaxQueue)
	co.step_tokens, co.max_context = C.uint32_t(o.StepTokens), C.uint32_t(o.MaxContext)
	co.kv_bytes = C.uint64_t(o.KVBytes)
	co.attn_density, co.mlp_density = C.float(o.AttnDensity), C.float(o.MLPDensity)
	co.mlp_dense_above, co.mlp_mode = C.float(o.MLPDenseAbove), C.polar_mlp_mode(o.MLPMode)
	return co
}

// Seq names a request that was accepted; a stale one is an error, never another's data.
type Seq uint64

// Request is one request; zero means greedy and the engine's defaults.
type Request struct {
	Tag                                                  uint64
	Prompt, Stop                                         []int32
	MaxNewTokens, Priority                               uint32
	IgnoreEOS, HostSamples, Logprob                      bool
	Logprobs                                             uint32 // alternatives wanted per token, up to 20
	Temperature, TopP, MinP                              float32
	TopK                                                 uint32
	RepetitionPenalty, PresencePenalty, FrequencyPenalty float32
	Seed                                                 uint64
	AttnDensity                                          float32
	MLPMode                                              MLPMode
}

// Event flags.
const (
	EventToken     uint32 = C.POLAR_EVENT_TOKEN
	EventFinished  uint32 = C.POLAR_EVENT_FINISHED
	EventPreempted uint32 = C.POLAR_EVENT_PREEMPTED
	EventLogits    uint32 = C.POLAR_EVENT_LOGITS
)

// Reasons of a finish.
const (
	FinishNone      uint32 = C.POLAR_FINISH_NONE
	FinishStop      uint32 = C.POLAR_FINISH_STOP
	FinishLength    uint32 = C.POLAR_FINISH_LENGTH
	FinishCancelled uint32 = C.POLAR_FINISH_CANCELLED
	FinishError     uint32 = C.POLAR_FINISH_ERROR
)

// Event has the layout of polar_event.
type Event struct {
	Seq                     Seq
	Tag                     uint64
	Token                   int32 // -1: none
	Logprob                 float32
	Flags, Reason           uint32
	Status                  Status
	NLogprobs, FirstLogprob uint32
	NGenerated              uint32
	AttnDensity, MLPDensity float32
	_                       [2]uint32
}

// Finished says whether this is the request's last event.
func (e *Event) Finished() bool { return e.Flags&EventFinished != 0 }

// Logprob has the layout of polar_logprob.
type Logprob struct {
	Token   int32
	Logprob float32
}

// The layouts are asserted here: a difference does not compile.
var (
	_ [0]struct{} = [C.sizeof_polar_event - unsafe.Sizeof(Event{})]struct{}{}
	_ [0]struct{} = [C.sizeof_polar_logprob - unsafe.Sizeof(Logprob{})]struct{}{}
)

// Forever waits for as long as it takes.
const Forever = time.Duration(math.MaxInt64)

const eventRoom = 64

// Engine is a scheduler, a KV cache and one model.
type Engine struct {
	mu sync.RWMutex // read: use, write: Close
	c  *C.polar_engine

	// One goroutine at a time drives; its scratch is in here, so that a step allocates nothing.
	driving sync.Mutex
	events  [eventRoom]Event
	top     [eventRoom * C.POLAR_MAX_LOGPROBS]Logprob
	n, nTop C.size_t
	er      C.polar_error
}

// NewEngine makes an engine; routers may be nil.
func (m *Model) NewEngine(r *Routers, o EngineOptions) (*Engine, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var routers *C.polar_routers
	if r != nil {
		r.mu.RLock()
		defer r.mu.RUnlock()
		if r.c == nil {
			return nil, errClosed
		}
		routers = r.c
	}
	co, e, er := o.c(), new(Engine), newError()
	if err := check(C.polar_engine_create(m.c, routers, &co, &e.c, &er), &er); err != nil {
		return nil, err
	}
	return e, nil
}

// Submit queues all of the requests or none. Any goroutine.
func (e *Engine) Submit(requests ...Request) ([]Seq, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	var tokens []int32
	reqs := make([]C.polar_request, len(requests))
	for i := range requests {
		reqs[i] = requests[i].c(len(tokens))
		tokens = append(append(tokens, requests[i].Prompt...), requests[i].Stop...)
	}
	ids, er := make([]Seq, len(requests)), newError()
	s := C.polar_engine_submit(e.c, pointer[C.polar_request, C.polar_request](reqs), C.size_t(len(reqs)),
		pointer[int32, C.int32_t](tokens), C.size_t(len(tokens)), pointer[Seq, C.polar_seq](ids), &er)
	return ids, check(s, &er)
}

// c is the request with its prompt at first, and its stop tokens behind that.
func (r *Request) c(first int) C.polar_request {
	c := C.polar_request{
		user_tag: C.uint64_t(r.Tag), random_seed: C.uint64_t(r.Seed),
		first_token: C.uint32_t(first), n_tokens: C.uint32_t(len(r.Prompt)),
		first_stop: C.uint32_t(first + len(r.Prompt)), n_stop: C.uint32_t(len(r.Stop)),
		max_new_tokens: C.uint32_t(r.MaxNewTokens), priority: C.uint32_t(r.Priority),
		n_logprobs: C.uint32_t(r.Logprobs), temperature: C.float(r.Temperature), top_p: C.float(r.TopP),
		min_p: C.float(r.MinP), top_k: C.uint32_t(r.TopK), repetition_penalty: C.float(r.RepetitionPenalty),
		presence_penalty: C.float(r.PresencePenalty), frequency_penalty: C.float(r.FrequencyPenalty),
		attn_density: C.float(r.AttnDensity), mlp_mode: C.polar_mlp_mode(r.MLPMode),
	}
	for _, f := range []struct {
		set bool
		bit C.polar_request_flags
	}{
		{r.IgnoreEOS, C.POLAR_REQUEST_IGNORE_EOS},
		{r.HostSamples, C.POLAR_REQUEST_HOST_SAMPLES},
		{r.Logprob, C.POLAR_REQUEST_LOGPROB},
	} {
		if f.set {
			c.flags |= f.bit
		}
	}
	return c
}

// Cancel ends requests at the next step; unknown and finished ids are ignored. Any goroutine.
func (e *Engine) Cancel(ids ...Seq) error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	er := newError()
	return check(C.polar_engine_cancel(e.c, pointer[Seq, C.polar_seq](ids), C.size_t(len(ids)), &er), &er)
}

// PushToken gives a request whose host samples its next token. Any goroutine.
func (e *Engine) PushToken(id Seq, token int32) error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	er := newError()
	return check(C.polar_engine_push_token(e.c, C.polar_seq(id), C.int32_t(token), &er), &er)
}

// Logits of a request whose host samples, after its EventLogits. The stepping goroutine.
func (e *Engine) Logits(id Seq) ([]float32, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	var n C.size_t
	er := newError()
	for out := []float32(nil); ; out = make([]float32, n) {
		s := C.polar_engine_logits(e.c, C.polar_seq(id), pointer[float32, C.float](out), C.size_t(len(out)), &n, &er)
		if s != C.POLAR_TRUNCATED {
			return out, check(s, &er)
		}
	}
}

// Step runs one step. The slices are good until the next Step or Finish; an event's alternatives are
// top[FirstLogprob:][:NLogprobs]. Status Idle: nothing is left to do. Pending: timeout passed. Events
// may come with an error too.
func (e *Engine) Step(timeout time.Duration) (events []Event, top []Logprob, s Status, err error) {
	return e.collect(timeout, false)
}

// Begin starts a step without waiting for it.
func (e *Engine) Begin() error {
	e.mu.RLock()
	defer e.mu.RUnlock()
	er := newError()
	return check(C.polar_engine_begin(e.c, &er), &er)
}

// Finish waits for the step that Begin started; otherwise like Step.
func (e *Engine) Finish(timeout time.Duration) (events []Event, top []Logprob, s Status, err error) {
	return e.collect(timeout, true)
}

func (e *Engine) collect(timeout time.Duration, finish bool) ([]Event, []Logprob, Status, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if !e.driving.TryLock() {
		return nil, nil, Busy, &Error{Status: Busy, Message: "another goroutine is inside Step"}
	}
	defer e.driving.Unlock()
	ns := C.uint64_t(math.MaxUint64)
	if timeout <= 0 {
		ns = 0
	} else if timeout != Forever {
		ns = C.uint64_t(timeout.Nanoseconds())
	}
	e.n, e.nTop, e.er.struct_size = 0, 0, C.sizeof_polar_error
	ev, top := (*C.polar_event)(unsafe.Pointer(&e.events)), (*C.polar_logprob)(unsafe.Pointer(&e.top))
	var s C.polar_status
	if finish {
		s = C.polar_engine_finish(e.c, ns, ev, eventRoom, &e.n, top, C.size_t(len(e.top)), &e.nTop, &e.er)
	} else {
		s = C.polar_engine_step(e.c, ns, ev, eventRoom, &e.n, top, C.size_t(len(e.top)), &e.nTop, &e.er)
	}
	return e.events[:e.n], e.top[:e.nTop], Status(s), check(s, &e.er)
}

// Stats are the counters of polar_stats.
type Stats struct {
	Health                                      uint32
	Steps, TokensIn, TokensOut                  uint64
	RequestsAccepted, RequestsFinished          uint64
	AdmissionRefusals, Preemptions              uint64
	Waiting, Running, KVPagesTotal, KVPagesFree uint64
	AttnUnitsRun, AttnUnitsTotal                uint64
	MLPUnitsRun, MLPUnitsTotal                  uint64
	KVBytesRead, KVBytesDense, NaNScores        uint64
	StepLast, StepMax, StepTotal                time.Duration
	LogLinesDropped                             uint64
}

// Stats reads the counters. Any goroutine.
func (e *Engine) Stats() (Stats, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	c := C.polar_stats{struct_size: C.sizeof_polar_stats}
	er := newError()
	if err := check(C.polar_engine_stats(e.c, &c, &er), &er); err != nil {
		return Stats{}, err
	}
	return Stats{
		uint32(c.health), uint64(c.steps), uint64(c.tokens_in), uint64(c.tokens_out),
		uint64(c.requests_accepted), uint64(c.requests_finished), uint64(c.admission_refusals),
		uint64(c.preemptions), uint64(c.waiting), uint64(c.running), uint64(c.kv_pages_total),
		uint64(c.kv_pages_free), uint64(c.attn_units_run), uint64(c.attn_units_total),
		uint64(c.mlp_units_run), uint64(c.mlp_units_total), uint64(c.kv_bytes_read), uint64(c.kv_bytes_dense),
		uint64(c.nan_scores), time.Duration(c.step_ns_last), time.Duration(c.step_ns_max),
		time.Duration(c.step_ns_total), uint64(c.log_lines_dropped),
	}, nil
}

// Close frees the engine and ends everything in it. It waits for calls in flight.
func (e *Engine) Close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	C.polar_engine_free(e.c)
	e.c = nil
}
