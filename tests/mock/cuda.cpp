// A CUDA driver without a GPU, for tests of what surrounds the kernels: contexts, streams, graphs, errors.
// Built by tests/cuda_mock.rs into libcuda.so.1, which the library then finds instead of NVIDIA's. Kernels
// run on the host executor. Strict where a driver is: a launch needs the context its module was loaded
// in, and nothing may be allocated, loaded or waited for while a stream records.
//
// Its clock advances by what work says it takes (cuda.h); a kernel takes a millisecond.
//
// Environment: MOCK_DEVICES (1), MOCK_VERSION (13000), MOCK_CAPABILITY (90), MOCK_MEMORY (bytes, 1 GiB),
// MOCK_FAIL ("name n code": the n-th call of that function answers with that code), MOCK_KERNELS (0: the
// image has none for this device), MOCK_EDGES (1: when the process ends, standard output gets how many early edges were
// recorded). -DWITHOUT_VERSION and -DWITHOUT_FUNC_LOAD leave a function out.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>
#include "../../cuda/host/executor.h"
#include "../../cuda/params.h"
#include "cuda.h"

extern "C" int polar_host_launch(const char*, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, const void*);

namespace {

using mock::Work;
struct Context { int device; };
// `into`: the stream that began the recording which takes this one's work; itself, or by an event.
struct Stream { Context* context; Stream* into = nullptr; std::vector<Work> work; };
struct Event { Stream* into; double at; };
struct Module { Context* context; };
struct Function { Module* module; std::string name; bool loaded; };

constexpr int OK = 0, INVALID_VALUE = 1, NO_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101;
constexpr int INVALID_CONTEXT = 201, NO_BINARY = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, CAPTURE = 900;

std::recursive_mutex lock;
thread_local std::vector<Context*> current;
Context* primary = nullptr;
int primary_users = 0;
bool initialised = false;
Stream* recording = nullptr;
std::map<uint64_t, size_t> memory;
std::map<Context*, int> contexts;
std::set<Stream*> streams;
size_t used = 0;
double now = 0;  // microseconds

long setting(const char* name, long otherwise) {
    const char* text = getenv(name);
    return text ? atol(text) : otherwise;
}

// The code that this call of `name` must fail with.
int planned(const char* name) {
    static std::map<std::string, long> calls;
    char wanted[64];
    long n = 0;
    int code = 0;
    const char* text = getenv("MOCK_FAIL");
    if (!text || sscanf(text, "%63s %ld %d", wanted, &n, &code) != 3 || strcmp(wanted, name)) return OK;
    return ++calls[name] >= n ? code : OK;
}

Context* top() { return current.empty() ? nullptr : current.back(); }

}  // namespace

int mock::enqueue(void* stream, Work work) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    Stream* s = (Stream*)stream;
    if (!top()) return INVALID_CONTEXT;
    if (s && s->context != top()) return INVALID_CONTEXT;
    if (s && s->into) {
        s->into->work.push_back(work);
        return OK;
    }
    return work();
}
using mock::enqueue;

void mock::pass(double microseconds) { now += microseconds; }

#define CALL(name, ...)                                        \
    extern "C" int name(__VA_ARGS__) {                         \
        std::lock_guard<std::recursive_mutex> guard(lock);     \
        if (int code = planned(#name)) return code;            \
        if (!initialised && strcmp(#name, "cuInit") && strcmp(#name, "cuGetErrorName")) return NOT_INITIALIZED;
#define END return OK; }
// What a recording stream forbids to its process.
#define NOT_WHILE_RECORDING if (recording) return CAPTURE

CALL(cuInit, unsigned) if (!setting("MOCK_DEVICES", 1)) return NO_DEVICE; initialised = true; END
#ifndef WITHOUT_VERSION
CALL(cuDriverGetVersion, int* version) *version = (int)setting("MOCK_VERSION", 13000); END
#endif
CALL(cuDeviceGetCount, int* n) *n = (int)setting("MOCK_DEVICES", 1); END
CALL(cuDeviceGet, int* device, int i) if (i >= setting("MOCK_DEVICES", 1)) return INVALID_DEVICE; *device = i; END
CALL(cuDeviceGetName, char* name, int n, int) snprintf(name, (size_t)n, "Mock GPU"); END
CALL(cuDeviceTotalMem_v2, size_t* bytes, int) *bytes = (size_t)setting("MOCK_MEMORY", 1 << 30); END
CALL(cuDeviceGetUuid_v2, unsigned char* uuid, int) for (int i = 0; i < 16; i++) uuid[i] = (unsigned char)i; END
CALL(cuDeviceGetAttribute, int* value, int which, int)
    const int capability = (int)setting("MOCK_CAPABILITY", 90);
    switch (which) {
        case 16: *value = 3; break;                 // multiprocessors
        case 75: *value = capability / 10; break;
        case 76: *value = capability % 10; break;
        case 97: *value = 227 * 1024; break;        // shared memory of a block
        default: *value = 0;
    }
END
CALL(cuGetErrorName, int code, const char** name)
    *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 100 ? "CUDA_ERROR_NO_DEVICE"
          : code == 999 ? "CUDA_ERROR_UNKNOWN" : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : code == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : "CUDA_ERROR_MOCK";
END

CALL(cuDevicePrimaryCtxRetain, Context** out, int)
    if (!primary) contexts[primary = new Context{0}] = 1;
    primary_users++;
    *out = primary;
END
CALL(cuDevicePrimaryCtxRelease_v2, int) if (primary_users-- <= 0) return INVALID_CONTEXT; END
CALL(cuCtxCreate_v2, Context** out, unsigned, int device)
    contexts[*out = new Context{device}] = 1;
    current.push_back(*out);
END
CALL(cuCtxDestroy_v2, Context* c)
    if (!contexts.erase(c)) return INVALID_CONTEXT;
    if (top() == c) current.pop_back();
END
CALL(cuCtxPushCurrent_v2, Context* c) if (!contexts.count(c)) return INVALID_CONTEXT; current.push_back(c); END
CALL(cuCtxPopCurrent_v2, Context** c) if (!top()) return INVALID_CONTEXT; *c = top(); current.pop_back(); END
CALL(cuCtxSetCurrent, Context* c)
    if (!current.empty()) current.pop_back();
    if (c) current.push_back(c);
END
CALL(cuCtxGetCurrent, Context** c) *c = top(); END
CALL(cuCtxGetDevice, int* device) if (!top()) return INVALID_CONTEXT; *device = top()->device; END

CALL(cuModuleLoadData, Module** out, const void* image)
    NOT_WHILE_RECORDING;
    if (!top()) return INVALID_CONTEXT;
    if (!image) return INVALID_VALUE;
    if (!setting("MOCK_KERNELS", 1)) return NO_BINARY;
    *out = new Module{top()};
END
CALL(cuModuleUnload, Module* m) if (m->context != top()) return INVALID_CONTEXT; delete m; END
CALL(cuModuleGetFunction, Function** out, Module* m, const char* name) *out = new Function{m, name, false}; END
CALL(cuFuncSetAttribute, Function*, int, int) NOT_WHILE_RECORDING; END
#ifndef WITHOUT_FUNC_LOAD
CALL(cuFuncLoad, Function* f) NOT_WHILE_RECORDING; f->loaded = true; END
#endif

struct Attribute { int id; char pad[4]; union { unsigned cluster[3]; char value[64]; }; };
struct Config { unsigned x, y, z, threads, ty, tz, shared; void* stream; const Attribute* attributes; unsigned count; };
CALL(cuLaunchKernelEx, const Config* c, Function* f, void** arguments, void**)
    if (f->module->context != top() || !f->loaded) return INVALID_HANDLE;
    if (!c->x || !c->y || c->threads > 1024 || c->shared > 227 * 1024) return INVALID_VALUE;
    // The driver copies as many bytes as the kernel's parameters have; none of ours have more than these.
    std::vector<unsigned char> parameters(sizeof(DecodeParams));
    const unsigned char* from = (const unsigned char*)arguments[0];
    for (size_t i = 0; i < parameters.size(); i++) parameters[i] = ((const volatile unsigned char*)from)[i];
    const Config config = *c;
    unsigned cluster = 1;
    for (unsigned i = 0; i < config.count; i++)
        if (config.attributes[i].id == 4) cluster = config.attributes[i].cluster[0];  // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    const std::string name = f->name;
    return enqueue(config.stream, [=] {
        mock::pass(1000);
        return polar_host_launch(name.c_str(), config.x, config.y, config.threads, config.shared, cluster, 0, parameters.data()) == 0 ? OK : NOT_FOUND;
    });
}

CALL(cuMemAlloc_v2, uint64_t* at, size_t bytes)
    NOT_WHILE_RECORDING;
    if (!top()) return INVALID_CONTEXT;
    if (used + bytes > (size_t)setting("MOCK_MEMORY", 1 << 30)) return NO_MEMORY;
    void* p = aligned_alloc(512, (bytes + 511) / 512 * 512);
    if (!p) return NO_MEMORY;
    memset(p, 0xff, bytes);
    used += bytes;
    memory[*at = (uint64_t)p] = bytes;
END
CALL(cuMemFree_v2, uint64_t at)
    NOT_WHILE_RECORDING;
    auto found = memory.find(at);
    if (found == memory.end()) return INVALID_VALUE;
    used -= found->second;
    memory.erase(found);
    free((void*)at);
END
CALL(cuMemGetInfo_v2, size_t* available, size_t* total)
    *total = (size_t)setting("MOCK_MEMORY", 1 << 30);
    *available = *total - used;
END
CALL(cuMemcpyHtoD_v2, uint64_t to, const void* from, size_t n) NOT_WHILE_RECORDING; memcpy((void*)to, from, n); END
CALL(cuMemcpyDtoH_v2, void* to, uint64_t from, size_t n) NOT_WHILE_RECORDING; memcpy(to, (void*)from, n); END
CALL(cuMemcpyHtoDAsync_v2, uint64_t to, const void* from, size_t n, void* s)
    return enqueue(s, [=] { memcpy((void*)to, from, n); return OK; });
}
CALL(cuMemcpyDtoHAsync_v2, void* to, uint64_t from, size_t n, void* s)
    return enqueue(s, [=] { memcpy(to, (void*)from, n); return OK; });
}
CALL(cuMemsetD8Async, uint64_t at, unsigned char v, size_t n, void* s)
    return enqueue(s, [=] { memset((void*)at, v, n); return OK; });
}

CALL(cuMemHostAlloc, void** at, size_t bytes, unsigned)
    NOT_WHILE_RECORDING;
    if (!(*at = aligned_alloc(512, (bytes + 511) / 512 * 512))) return NO_MEMORY;
END
CALL(cuMemFreeHost, void* at) NOT_WHILE_RECORDING; free(at); END

CALL(cuCtxGetStreamPriorityRange, int* least, int* greatest) *least = 0; *greatest = -1; END
CALL(cuStreamCreate, Stream** out, unsigned) if (!top()) return INVALID_CONTEXT; streams.insert(*out = new Stream{top()}); END
extern "C" int cuStreamCreateWithPriority(Stream** out, unsigned flags, int) { return cuStreamCreate(out, flags); }
CALL(cuStreamDestroy_v2, Stream* s) streams.erase(s); delete s; END
CALL(cuStreamSynchronize, Stream*) NOT_WHILE_RECORDING; END
CALL(cuStreamQuery, Stream*) NOT_WHILE_RECORDING; END
CALL(cuStreamBeginCapture_v2, Stream* s, int) if (recording) return CAPTURE; recording = s->into = s; s->work.clear(); END
CALL(cuStreamEndCapture, Stream* s, std::vector<Work>** graph)
    if (s->into != s) return CAPTURE;
    *graph = new std::vector<Work>(s->work);
    for (Stream* each : streams) each->into = nullptr;
    recording = nullptr;
END
CALL(cuEventCreate, Event** out, unsigned) *out = new Event{nullptr, 0}; END
CALL(cuEventDestroy_v2, Event* e) delete e; END
CALL(cuEventRecord, Event* e, Stream* s) *e = Event{s ? s->into : nullptr, now}; END
CALL(cuEventSynchronize, Event*) NOT_WHILE_RECORDING; END
CALL(cuEventElapsedTime_v2, float* ms, Event* from, Event* to) *ms = (float)(to->at - from->at) / 1000; END
CALL(cuStreamWaitEvent, Stream* s, Event* e, unsigned) if (e->into) s->into = e->into; END
// A stream's work has no nodes here: one stands for what it recorded last.
CALL(cuStreamGetCaptureInfo_v3, Stream* s, int* status, uint64_t* id, void** graph, void*** nodes, void** edges, size_t* count)
    static void* last = nullptr;
    *status = s && s->into ? 1 : 0;
    *id = 1;
    *graph = *edges = nullptr;
    *nodes = &last;
    *count = *status;
END
CALL(cuStreamUpdateCaptureDependencies_v2, Stream* s, void**, void*, size_t, unsigned)
    static struct Edges {
        unsigned recorded;
        ~Edges() { if (setting("MOCK_EDGES", 0)) printf("%u early edges\n", recorded), fflush(stdout); }
    } edges;
    if (!s || !s->into) return CAPTURE;
    edges.recorded++;
END
CALL(cuGraphInstantiateWithFlags, std::vector<Work>** exec, std::vector<Work>* graph, unsigned long long) *exec = new std::vector<Work>(*graph); END
CALL(cuGraphLaunch, std::vector<Work>* exec, void* stream)
    for (const Work& work : *exec)
        if (int code = enqueue(stream, work)) return code;
END
CALL(cuGraphUpload, std::vector<Work>*, void*) END
CALL(cuGraphExecDestroy, std::vector<Work>* exec) delete exec; END
CALL(cuGraphDestroy, std::vector<Work>* graph) delete graph; END
