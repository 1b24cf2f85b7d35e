#!/usr/bin/env python3
"""What others need on this GPU for what `bench-gpu` times: one `{"kind":"rival"}` record a line.

    tools/rivals/gpu.py --results benches/results/h200.jsonl [--reference FOLDER] [part ...]

Run it right after `bench-gpu`, on the same machine: the read stream is taken from its record, and the
records are added to its file. Parts (none: all): attention, products, selective, steps, flashinfer (last:
its kernels are compiled first, for a minute or more).

Rivals: PyTorch's scaled_dot_product_attention on contiguous KV and cuBLAS through torch; FlashInfer's
paged decode if it can be imported (it compiles its kernels on first use); the Triton kernels of the
method's reference implementation if --reference names a copy of that repository; and a whole dense
decode step on torch: cuBLAS, SDPA, compiled norms, one CUDA graph. Each attention is checked against
SDPA in the same case before it is timed.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = "cuda"
HEAD = 128
PAGE = 16
ROTATION = 400 << 20  # inputs rotate over so many bytes, several times the L2


class Results:
    def __init__(self, path):
        self.path = path
        ceilings = [json.loads(line) for line in path.read_text().splitlines() if '"ceiling"' in line]
        if not ceilings:
            sys.exit(f"{path} has no ceiling record: run bench-gpu first")
        self.read_tbps = ceilings[-1]["read_tbps"]

    def add(self, **record):
        record = {"kind": "rival", **record}
        if "us" in record and "bytes" in record:
            record["tbps"] = round(record["bytes"] / record["us"] / 1e6, 4)
            record["read_tbps"] = self.read_tbps
        with self.path.open("a") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
        print("  ".join(f"{k}={v}" for k, v in record.items() if k != "kind"), flush=True)


def median(values):
    return sorted(values)[len(values) // 2]


def timed(copies, run):
    """Median microseconds of `run(i)` from replays of one graph, i counting over rotating inputs."""
    count = 4 if copies == 1 else max(copies, 20)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(3, count)):
            run(i % copies)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            run(i % copies)
    graph.replay()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return median(times)


def copies_of(size):
    return max(1, min(24, math.ceil(ROTATION / size)))


def lengths_of(batch, context, ragged):
    if not ragged:
        return [context] * batch
    draw = random.Random(7)
    raw = [math.exp(0.8 * draw.gauss(0, 1)) for _ in range(batch)]
    mean = sum(raw) / batch
    return [max(1, int(r / mean * context)) for r in raw]


def free():
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def near(got, want, what):
    error = ((got.float() - want.float()).norm() / want.float().norm()).item()
    if not error < 2e-2:
        raise RuntimeError(f"{what}: differs by {error:.3f} of the norm")


def sdpa(q, k, v):
    """q [B, heads, D], k and v [B, KV heads, S, D]: a group's queries as rows, so K and V are read once."""
    batch, kv_heads = k.shape[:2]
    return F.scaled_dot_product_attention(q.view(batch, kv_heads, -1, HEAD), k, v).reshape(q.shape)


def attention_case(results, flashinfer, reference, heads, kv_heads, batch, context, densities, ragged):
    lengths = lengths_of(batch, context, ragged)
    tokens = sum(lengths)
    needed = tokens * kv_heads * HEAD * 4
    case = dict(kernel="attention_decode", batch=batch, context=context, heads=heads, kv_heads=kv_heads,
                ragged=ragged)
    copies = copies_of(needed)
    if copies * needed * 1.1 + (2 << 30) > free():
        return
    q = torch.randn(batch, heads, HEAD, device=DEVICE, dtype=torch.bfloat16)
    if flashinfer:
        return paged(results, flashinfer, case, q, lengths, copies, needed)
    if not ragged:
        k, v = torch.randn(2, copies, batch, kv_heads, context, HEAD, device=DEVICE, dtype=torch.bfloat16)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                with sdpa_kernel(backend):
                    us = timed(copies, lambda i: sdpa(q, k[i], v[i]))
            except RuntimeError as error:
                print(f"sdpa {backend.name}: {str(error).splitlines()[0]}")
                continue
            results.add(rival="sdpa", backend=backend.name.lower(), **case, density=1.0, us=round(us, 3), bytes=needed)
        del k, v
    if reference:
        for density in densities:
            triton_kernels(results, reference, case, lengths, density)


def paged(results, flashinfer, case, q, lengths, copies, needed):
    pages = [math.ceil(n / PAGE) for n in lengths]
    total, kv_heads = sum(pages), case["kv_heads"]
    pool = torch.randn(copies, total, 2, kv_heads, PAGE, HEAD, device=DEVICE, dtype=torch.bfloat16)
    table = torch.randperm(total, device=DEVICE, dtype=torch.int32)
    first = torch.tensor([0] + [sum(pages[: i + 1]) for i in range(len(pages))], device=DEVICE, dtype=torch.int32)
    last = torch.tensor([(n - 1) % PAGE + 1 for n in lengths], device=DEVICE, dtype=torch.int32)
    for tensor_cores in (True, False):
        workspace = torch.empty(256 << 20, device=DEVICE, dtype=torch.uint8)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
        wrapper.plan(first, table, last, case["heads"], kv_heads, HEAD, PAGE,
                     q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        out = wrapper.run(q, pool[0])
        rows = pool[0][table[: pages[0]].long()]  # pages of sequence 0: [pages, K|V, heads, 16, D]
        k, v = (rows[:, j].transpose(0, 1).reshape(1, kv_heads, -1, HEAD)[:, :, : lengths[0]] for j in (0, 1))
        near(out[:1], sdpa(q[:1], k, v), "flashinfer")
        us = timed(copies, lambda i: wrapper.run(q, pool[i]))
        results.add(rival="flashinfer", tensor_cores=tensor_cores, **case, density=1.0, us=round(us, 3), bytes=needed)


def triton_kernels(results, reference, case, lengths, density):
    """fp16, contiguous [B, S, heads, D], its own layout; the same share of heads, random ones."""
    batch, kv_heads, longest = case["batch"], case["kv_heads"], max(lengths)
    keep = max(1, int(kv_heads * density))
    size = batch * longest * kv_heads * HEAD * 4
    if size + (2 << 30) > free():
        return
    copies = min(copies_of(size), max(1, int(0.6 * free()) // size))
    k, v = torch.randn(2, copies, batch, longest, kv_heads, HEAD, device=DEVICE, dtype=torch.float16)
    q = torch.randn(batch, 1, case["heads"], HEAD, device=DEVICE, dtype=torch.float16)
    chosen = torch.stack([torch.randperm(kv_heads, device=DEVICE)[:keep] for _ in range(batch)])
    chosen = chosen.sort(dim=1).values.int().contiguous() if density < 1 else None
    seqlens = torch.tensor(lengths, device=DEVICE, dtype=torch.int32)

    def run(i):
        return reference(q, k[i], v[i], cache_seqlens=seqlens, batch_head_idx=chosen)

    out = run(0)
    n = lengths[0]
    want = sdpa(q[:1, 0], k[0][:1, :n].transpose(1, 2), v[0][:1, :n].transpose(1, 2))
    group = case["heads"] // kv_heads
    heads = range(kv_heads) if chosen is None else chosen[0].tolist()
    rows = [h * group + j for h in heads for j in range(group)]
    near(out[:1, 0][:, rows], want[:, rows], "reference")
    us = timed(copies, run)
    bytes_read = sum(lengths) * keep * HEAD * 4
    results.add(rival="reference", **case, density=density, us=round(us, 3), bytes=bytes_read)


def attention(results, options):
    reference = None
    if options.reference:
        sys.path.insert(0, str(options.reference))
        from HybridTensor.triton.attn_interface import flash_attn_with_kvcache_triton as reference
    attention_cases(results, None, reference)


def flashinfer(results, _):
    try:
        import flashinfer as rival
    except ImportError as error:
        print(f"no FlashInfer: {error}")
        return
    attention_cases(results, rival, None)


def attention_cases(results, flashinfer, reference):
    for heads, kv_heads, densities in ((32, 8, (1.0, 0.625, 0.5)), (32, 32, (1.0, 0.5, 0.3))):
        for batch, context in ((1, 2048), (1, 32768), (8, 2048), (64, 2048), (64, 8192)):
            attention_case(results, flashinfer, reference, heads, kv_heads, batch, context, densities, False)
        for batch in (32, 64, 128):
            attention_case(results, flashinfer, None, heads, kv_heads, batch, 2048, densities, True)


def products(results, _):
    shapes = (("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336),
              ("head", 128256, 4096))
    for name, n, k in shapes:
        size = n * k * 2
        copies = copies_of(size)
        w = torch.randn(copies, n, k, device=DEVICE, dtype=torch.bfloat16) * 0.02
        for rows in (1, 8, 16, 32, 64, 128):
            x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
            us = timed(copies, lambda i: F.linear(x, w[i]))
            results.add(rival="cublas", kernel="linear", name=name, rows=rows, n=n, k=k, us=round(us, 3), bytes=size)


def selective(results, options):
    """Up and down products of the reference on listed neurons, OPT-6.7B, fp16."""
    if not options.reference:
        print("selective products: no --reference")
        return
    sys.path.insert(0, str(options.reference))
    from HybridTensor.triton.gather_gemm_col import gather_matmul_col
    from HybridTensor.triton.gather_gemm_row import gather_matmul_row

    d, ffn = 4096, 16384
    copies = copies_of(d * ffn * 2)
    up, down = torch.randn(2, copies, ffn, d, device=DEVICE, dtype=torch.float16) * 0.02
    for rows in (1, 8, 32, 64):
        for share in (0.1, 0.3, 0.5):
            kept = int(ffn * share / 8) * 8
            index = torch.randperm(ffn, device=DEVICE)[:kept].sort().values
            x = torch.randn(rows, d, device=DEVICE, dtype=torch.float16)
            z = torch.randn(rows, kept, device=DEVICE, dtype=torch.float16)
            # Its up product always applies ReLU.
            near(gather_matmul_col(x, up[0], index), (x @ up[0][index].T).relu(), "reference up")
            near(gather_matmul_row(z, down[0], index), z @ down[0][index], "reference down")
            case = dict(rows=rows, bytes=kept * d * 2)
            us = timed(copies, lambda i: gather_matmul_col(x, up[i], index))
            results.add(rival="reference", kernel="linear", name=f"up {share}", n=kept, k=d, us=round(us, 3), **case)
            us = timed(copies, lambda i: gather_matmul_row(z, down[i], index))
            results.add(rival="reference", kernel="linear_down", name=f"down {share}", n=d, k=kept, us=round(us, 3), **case)


# vocabulary, layers, hidden, heads, KV heads, MLP, gated
MODELS = {
    "opt-6.7b": (50272, 32, 4096, 32, 32, 16384, False),
    "llama-2-7b": (32000, 32, 4096, 32, 32, 11008, True),
    "llama-3.1-8b": (128256, 32, 4096, 32, 8, 14336, True),
}
STEPS = {
    "opt-6.7b": ((1, 1024), (8, 2048), (32, 2048), (64, 2048)),
    "llama-2-7b": ((1, 2048), (8, 2048), (64, 2048), (128, 1024)),
    "llama-3.1-8b": ((1, 1024), (8, 2048), (64, 2048), (64, 4096), (64, 8192), (128, 4096), (256, 2048)),
}


@torch.compile(dynamic=True)
def add_norm(residual, delta, weight):
    residual = residual + delta
    wide = residual.float()
    return residual, (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(residual.dtype) * weight


@torch.compile(dynamic=True)
def rotate(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@torch.compile(dynamic=True)
def gate(both):
    a, b = both.chunk(2, dim=-1)
    return F.silu(a) * b


class Decoder:
    """A dense decode step with random weights. OPT as well gets RMS norms and rotations here: they cost
    what its own cost, and a rival is not made slower by them."""

    def __init__(self, name):
        vocab, layers, d, heads, kv_heads, ffn, gated = MODELS[name]
        self.heads, self.kv_heads, self.layers, self.gated = heads, kv_heads, layers, gated

        def weight(n, k):
            return torch.empty(n, k, device=DEVICE, dtype=torch.bfloat16).normal_(0, 0.02)

        self.embed, self.head = weight(vocab, d), weight(vocab, d)
        self.qkv = [weight((heads + 2 * kv_heads) * HEAD, d) for _ in range(layers)]
        self.o = [weight(d, heads * HEAD) for _ in range(layers)]
        self.up = [weight(2 * ffn if gated else ffn, d) for _ in range(layers)]
        self.down = [weight(d, ffn) for _ in range(layers)]
        self.norm = torch.ones(d, device=DEVICE, dtype=torch.bfloat16)
        angle = torch.randn(HEAD // 2, device=DEVICE)
        self.cos, self.sin = angle.cos(), angle.sin()

    def cache(self, batch, context):
        shape = (self.layers, 2, batch, self.kv_heads, context, HEAD)
        need = math.prod(shape) * 2
        if need + (3 << 30) > free():
            return None
        kv = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16)
        for layer in kv:
            layer.normal_()
        return kv

    def step(self, tokens, kv):
        batch, context = tokens.shape[0], kv.shape[4]
        x = F.embedding(tokens, self.embed)
        x, h = add_norm(x, torch.zeros_like(x), self.norm)
        for layer in range(self.layers):
            qkv = F.linear(h, self.qkv[layer]).view(batch, -1, HEAD)
            turned = rotate(qkv[:, : self.heads + self.kv_heads], self.cos, self.sin)
            q, k = turned.split((self.heads, self.kv_heads), dim=1)
            v = qkv[:, self.heads + self.kv_heads :]
            kv[layer, 0, :, :, context - 1] = k
            kv[layer, 1, :, :, context - 1] = v
            a = sdpa(q.contiguous(), kv[layer, 0], kv[layer, 1])
            x, h = add_norm(x, F.linear(a.view(batch, -1), self.o[layer]), self.norm)
            m = F.linear(h, self.up[layer])
            m = gate(m) if self.gated else F.relu(m)
            x, h = add_norm(x, F.linear(m, self.down[layer]), self.norm)
        return F.linear(h, self.head).argmax(-1)


def steps(results, options):
    for name, cases in STEPS.items():
        if options.model and name not in options.model:
            continue
        decoder = Decoder(name)
        for batch, context in cases:
            kv = decoder.cache(batch, context)
            if kv is None:
                print(f"{name} {batch} x {context}: does not fit")
                continue
            tokens = torch.zeros(batch, device=DEVICE, dtype=torch.long)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                us = timed(1, lambda _: decoder.step(tokens, kv))
            results.add(rival="torch", model=name, batch=batch, context=context, dense_ms=round(us / 1e3, 4),
                        tokens_s=round(batch / us * 1e6, 1))
            del kv
        del decoder
        free()


PARTS = {"attention": attention, "products": products, "selective": selective, "steps": steps,
         "flashinfer": flashinfer}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--results", type=Path, required=True, help="bench-gpu's records; ours are added")
    parser.add_argument("--reference", type=Path, help="a copy of the reference implementation's repository")
    parser.add_argument("--model", action="append", help="only this one's steps; may be repeated")
    options = parser.parse_args()
    for name in set(options.part) - set(PARTS):
        parser.error(f"no part {name}")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    results = Results(options.results)
    start = time.time()
    failed = []
    with torch.inference_mode():
        for name in options.part or PARTS:
            try:
                PARTS[name](results, options)
            except Exception as error:  # one rival that cannot run must not lose the others' figures
                failed.append(f"{name}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
            free()
            print(f"-- {name}: {time.time() - start:.0f} s so far", flush=True)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
