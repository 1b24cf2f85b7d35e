package polar

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

func data(t *testing.T, name string) string {
	t.Helper()
	folder := os.Getenv("POLAR_TEST_DATA")
	if folder == "" {
		folder = filepath.Join("..", "..", "tests", "data", "golden")
	}
	return filepath.Join(folder, name)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newModel(t *testing.T) *Model {
	t.Helper()
	ctx, err := NewContext(ContextOptions{Backend: CPU, Threads: 2})
	must(t, err)
	defer ctx.Close() // the model keeps what it needs
	m, err := ctx.LoadModel(data(t, "opt_f32"), LoadOptions{}, nil)
	must(t, err)
	return m
}

func newEngine(t *testing.T, o EngineOptions) *Engine {
	t.Helper()
	m := newModel(t)
	defer m.Close()
	e, err := m.NewEngine(nil, o)
	must(t, err)
	t.Cleanup(e.Close)
	return e
}

func request(tag uint64, max uint32) Request {
	return Request{Tag: tag, Prompt: []int32{5, 6, 7, 8}, MaxNewTokens: max, IgnoreEOS: true}
}

// drain steps until nothing is left, and returns the tokens of each request.
func drain(t *testing.T, e *Engine) map[uint64][]int32 {
	t.Helper()
	out := map[uint64][]int32{}
	for {
		events, _, s, err := e.Step(Forever)
		must(t, err)
		for i := range events {
			if events[i].Flags&EventToken != 0 {
				out[events[i].Tag] = append(out[events[i].Tag], events[i].Token)
			}
		}
		if s == Idle {
			return out
		}
	}
}

func TestGenerate(t *testing.T) {
	m := newModel(t)
	defer m.Close()
	info, err := m.Info()
	must(t, err)
	if info.Family != "opt" || info.VocabSize == 0 || len(info.EOS) == 0 || info.DeviceName == "" {
		t.Fatalf("%+v", info)
	}
	r, err := m.LoadRouters(filepath.Join(data(t, "opt_f32"), "routers.safetensors"), LoadOptions{})
	must(t, err)
	e, err := m.NewEngine(r, EngineOptions{AttnDensity: 0.5})
	must(t, err)
	defer e.Close()
	r.Close()
	dense := request(1, 6)
	dense.AttnDensity, dense.MLPMode = 1, MLPDense
	_, err = e.Submit(request(0, 6), dense)
	must(t, err)
	density := map[uint64]float32{}
	for {
		events, _, s, err := e.Step(Forever)
		must(t, err)
		for _, ev := range events {
			if ev.Finished() {
				density[ev.Tag] = ev.AttnDensity
				if ev.Reason != FinishLength || ev.NGenerated != 6 {
					t.Errorf("%+v", ev)
				}
			}
		}
		if s == Idle {
			break
		}
	}
	if density[0] >= 1 || density[1] != 1 {
		t.Errorf("densities %v", density)
	}
}

func TestLogprobsAndHostSampling(t *testing.T) {
	e := newEngine(t, EngineOptions{})
	r := request(0, 4)
	r.Logprob, r.Logprobs = true, 5
	_, err := e.Submit(r)
	must(t, err)
	var want []int32
	for {
		events, top, s, err := e.Step(Forever)
		must(t, err)
		for _, ev := range events {
			if ev.Flags&EventToken == 0 {
				continue
			}
			if ev.NLogprobs != 5 || top[ev.FirstLogprob].Token != ev.Token {
				t.Errorf("%+v", ev)
			}
			want = append(want, ev.Token)
		}
		if s == Idle {
			break
		}
	}
	r = request(0, 4)
	r.HostSamples = true
	ids, err := e.Submit(r)
	must(t, err)
	for got := 0; got < len(want); {
		events, _, _, err := e.Step(Forever)
		must(t, err)
		for _, ev := range events {
			if ev.Flags&EventLogits == 0 {
				continue
			}
			logits, err := e.Logits(ids[0])
			must(t, err)
			best := 0
			for i := range logits {
				if logits[i] > logits[best] {
					best = i
				}
			}
			if int32(best) != want[got] {
				t.Fatalf("token %d: %d, want %d", got, best, want[got])
			}
			must(t, e.PushToken(ids[0], int32(best)))
			got++
		}
	}
	drain(t, e)
}

func TestHalves(t *testing.T) {
	e := newEngine(t, EngineOptions{})
	_, err := e.Submit(request(0, 5))
	must(t, err)
	n, s := 0, OK
	for s != Idle {
		must(t, e.Begin())
		for s = Pending; s == Pending; {
			var events []Event
			events, _, s, err = e.Finish(time.Millisecond)
			must(t, err)
			for i := range events {
				n += int(events[i].Flags & EventToken)
			}
		}
	}
	if n != 5 {
		t.Errorf("%d tokens", n)
	}
}

func TestEstimate(t *testing.T) {
	ctx, err := NewContext(ContextOptions{Backend: CPU, Threads: 2})
	must(t, err)
	defer ctx.Close()
	path := data(t, "opt_f32")
	e, err := ctx.Estimate(path, filepath.Join(path, "routers.safetensors"), LoadOptions{}, EngineOptions{MaxBatch: 3})
	must(t, err)
	m := newModel(t)
	defer m.Close()
	info, err := m.Info()
	must(t, err)
	if !e.Fits || e.WeightBytes != info.WeightBytes || e.MaxBatch != 3 || e.RouterBytes == 0 {
		t.Fatalf("%+v, the model takes %d bytes", e, info.WeightBytes)
	}
}

func TestErrors(t *testing.T) {
	ctx, err := NewContext(ContextOptions{Backend: CPU, LogLevel: 4})
	must(t, err)
	defer ctx.Close()
	if _, err := ctx.LoadModel("/nowhere", LoadOptions{}, nil); err == nil || err.(*Error).OSCode == 0 {
		t.Errorf("%v", err)
	}
	if _, err := ctx.LoadModel("", LoadOptions{}, nil); !errors.Is(err, &Error{Status: Invalid}) {
		t.Errorf("%v", err)
	}
	if _, err := ctx.LoadTokenizer("/nowhere"); err == nil {
		t.Error("a tokenizer from nowhere")
	}
	lines, _, err := ctx.DrainLog()
	must(t, err)
	if !strings.Contains(lines, "/nowhere") {
		t.Errorf("log: %q", lines)
	}
	devices, err := ctx.Devices()
	must(t, err)
	if len(devices) == 0 || devices[0].Name == "" {
		t.Errorf("%+v", devices)
	}
	progress := NewProgress()
	defer progress.Close()
	progress.Cancel()
	if _, err := ctx.LoadModel(data(t, "opt_f32"), LoadOptions{}, progress); !errors.Is(err, &Error{Status: Cancelled}) {
		t.Errorf("%v", err)
	}
	e := newEngine(t, EngineOptions{MaxQueue: 1, MaxBatch: 1})
	if _, err := e.Submit(request(0, 1), request(1, 1)); !errors.Is(err, &Error{Status: QueueFull}) {
		t.Errorf("%v", err)
	}
	if _, err := e.Submit(Request{MaxNewTokens: 1}); !errors.Is(err, &Error{Status: Invalid}) {
		t.Errorf("%v", err)
	}
	must(t, e.Cancel(12345))
	if err := e.PushToken(12345, 1); !errors.Is(err, &Error{Status: NotFound}) {
		t.Errorf("%v", err)
	}
	e.Close()
	e.Close()
	if _, err := e.Submit(request(0, 1)); !errors.Is(err, &Error{Status: Invalid}) {
		t.Errorf("%v", err)
	}
}

// Many goroutines submit and cancel while one steps; each request ends once, though goroutines move
// between threads.
func TestConcurrent(t *testing.T) {
	const clients, rounds = 16, 10
	e := newEngine(t, EngineOptions{MaxBatch: 8, MaxQueue: 16})
	var wg sync.WaitGroup
	done := make(chan struct{})
	for c := uint64(0); c < clients; c++ {
		wg.Add(1)
		go func(c uint64) {
			defer wg.Done()
			for i := uint64(0); i < rounds; i++ {
				ids, err := e.Submit(request(c*rounds+i, 1+uint32(i%4)))
				for errors.Is(err, &Error{Status: QueueFull}) {
					runtime.Gosched()
					ids, err = e.Submit(request(c*rounds+i, 1+uint32(i%4)))
				}
				if err != nil {
					t.Error(err)
					return
				}
				if i%3 == 0 {
					if err := e.Cancel(ids...); err != nil {
						t.Error(err)
					}
				}
				if _, err := e.Stats(); err != nil {
					t.Error(err)
				}
			}
		}(c)
	}
	go func() { wg.Wait(); close(done) }()
	finished := map[uint64]int{}
	for closed, idle := false, false; !closed || !idle; {
		select {
		case <-done:
			closed = true
		default:
		}
		events, _, s, err := e.Step(Forever)
		must(t, err)
		for i := range events {
			if events[i].Finished() {
				finished[events[i].Tag]++
			}
		}
		idle = s == Idle
	}
	for tag := uint64(0); tag < clients*rounds; tag++ {
		if finished[tag] != 1 {
			t.Errorf("request %d finished %d times", tag, finished[tag])
		}
	}
}

// Close waits for calls in flight; later ones are refused.
func TestCloseRacesWithSubmit(t *testing.T) {
	m := newModel(t)
	defer m.Close()
	for i := 0; i < 20; i++ {
		e, err := m.NewEngine(nil, EngineOptions{})
		must(t, err)
		var wg sync.WaitGroup
		for c := 0; c < 4; c++ {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for {
					if _, err := e.Submit(request(0, 1)); errors.Is(err, &Error{Status: Invalid}) {
						return
					}
					if _, _, _, err := e.Step(0); errors.Is(err, &Error{Status: Invalid}) {
						return
					}
				}
			}()
		}
		time.Sleep(time.Millisecond)
		e.Close()
		wg.Wait()
	}
}

func TestVersions(t *testing.T) {
	if !matches() || !strings.HasPrefix(BuildInfo(), "polar-sparsity ") || Busy.String() != "POLAR_E_BUSY" {
		t.Error(BuildInfo(), Busy)
	}
}
