"""The operator level on torch tensors: selective attention over a paged KV cache and a selective MLP, each
checked against torch in float32, then captured into a torch CUDA graph and checked again with lengths that
were not known when it was recorded.

    python3 examples-python/operators.py [path of libpolar_sparsity.so]

Needs torch with a GPU and nothing else: ctypes, `tensor.data_ptr()` and torch's current stream. Exits 0 if
all agrees, 1 if not, 77 if there is no GPU to show it on.
"""

import ctypes as C
import math
import os
import sys

POLAR_DTYPE_F16, POLAR_DTYPE_BF16 = 2, 3
PAGE = 16


def give_up(why):
    print(f"operators.py: {why}; nothing to show")
    sys.exit(77)


# ---- the part of polar_sparsity.h this needs ----------------------------------------------------


class Error(C.Structure):
    _fields_ = [("struct_size", C.c_uint32), ("code", C.c_int32), ("os_code", C.c_int32),
                ("device_code", C.c_int32), ("message", C.c_char * 240)]


class Op(C.Structure):
    """A struct of the header: its size set, everything else zero but what is given by name."""

    def __init__(self, **fields):
        super().__init__(struct_size=C.sizeof(self), **fields)


def op(name, words, numbers="", addresses=""):
    """Fields in the header's order: 32-bit words, 64-bit numbers, addresses."""
    kinds = {"scale": C.c_float}
    fields = [("struct_size", C.c_uint32)] + [(w, kinds.get(w, C.c_uint32)) for w in words.split()]
    fields += [(n, C.c_uint64) for n in (numbers + " " + addresses).split()]
    fields += [("workspace", C.c_uint64), ("workspace_bytes", C.c_uint64)]
    return type(name, (Op,), {"_fields_": fields, "symbol": name})


Attention = op(
    "polar_op_attention",
    "dtype num_sequences num_heads num_kv_heads head_dim max_pages block_table_stride window scale flags reserved",
    "q_stride page_stride head_stride",
    "q kv block_table seq_lens keep selected out lse")
HeadSelection = op(
    "polar_op_head_selection",
    "dtype num_sequences num_kv_heads router_rows hidden_size group_width reserved",
    addresses="x weight bias logits keep selected attention_out nan_count")
NeuronSelection = op(
    "polar_op_neuron_selection",
    "dtype num_rows num_neurons keep hidden_size rank reserved",
    addresses="x router_down router_up logits active_rows index nan_count")
Mlp = op(
    "polar_op_mlp",
    "dtype num_rows hidden_size num_neurons keep",
    addresses="x up up_bias down down_bias index out")


class Library:
    def __init__(self, path):
        self.c = C.CDLL(path)
        self.c.polar_status_name.restype = C.c_char_p
        self.handle = C.c_void_p()
        error = Error(struct_size=C.sizeof(Error))
        status = self.c.polar_op_library_create(C.byref(self.handle), C.byref(error))
        if status in (104, 400):  # POLAR_E_UNSUPPORTED, POLAR_E_NO_DRIVER
            give_up(error.message.decode())
        self.check(status, error)

    def check(self, status, error):
        if status >= 100:
            name = self.c.polar_status_name(status).decode()
            raise RuntimeError(f"{name}: {error.message.decode()}")

    def call(self, name, operator, last):
        error = Error(struct_size=C.sizeof(Error))
        self.check(getattr(self.c, name)(self.handle, C.byref(operator), last, C.byref(error)), error)

    def prepare(self, operator):
        """Gives an operator its workspace."""
        size = C.c_uint64()
        self.call(operator.symbol + "_workspace", operator, C.byref(size))
        room = torch.empty(size.value, dtype=torch.uint8, device="cuda")
        operator.workspace, operator.workspace_bytes = room.data_ptr(), size.value
        operator.room = room  # keeps it alive
        return operator

    def start(self, operator, what="run"):
        stream = C.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.call(f"{operator.symbol}_{what}", operator, stream)

    def close(self):
        self.c.polar_op_library_free(self.handle)


# ---- checks ---------------------------------------------------------------------------------------

failures = 0


def check(what, error, allowed):
    global failures
    good = error <= allowed  # NaN is not
    print(f"  {what:<44} {error:.1e}, allowed {allowed:.0e}{'' if good else '   WRONG'}")
    failures += not good


def relative(got, wanted):
    return ((got.float() - wanted).norm() / wanted.norm()).item()


# ---- attention ------------------------------------------------------------------------------------


class AttentionCase:
    """A batch of sequences whose pages lie in random order in a pool that holds two layers."""

    def __init__(self, polar, dtype, batch, heads, kv_heads, head_dim, max_tokens, hidden):
        self.polar, self.dtype = polar, dtype
        self.batch, self.heads, self.kv_heads, self.head_dim = batch, heads, kv_heads, head_dim
        random = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)
        self.max_pages = math.ceil(max_tokens / PAGE)
        pages = batch * self.max_pages
        # [page][layer][kv_head][K|V][16][head_dim]; this is layer 1.
        self.pool = random(pages, 2, kv_heads, 2, PAGE, head_dim)
        self.layer = self.pool[:, 1]
        self.table = torch.randperm(pages, device="cuda").to(torch.int32).view(batch, self.max_pages)
        # q lies in a fused QKV output.
        self.qkv = random(batch, (heads + 2 * kv_heads) * head_dim)
        self.q = self.qkv[:, :heads * head_dim]
        self.x, self.router = random(batch, hidden), random(kv_heads, hidden)
        integers = lambda *shape: torch.zeros(*shape, dtype=torch.int32, device="cuda")
        self.lengths, self.keep = integers(batch), integers(batch)
        self.selected = torch.zeros(batch, kv_heads, dtype=torch.int16, device="cuda")
        self.out = torch.full((batch, heads, head_dim), float("nan"), device="cuda", dtype=dtype)
        self.lse = torch.full((batch, heads), float("nan"), device="cuda")
        code = POLAR_DTYPE_BF16 if dtype == torch.bfloat16 else POLAR_DTYPE_F16
        self.select = polar.prepare(HeadSelection(
            dtype=code, num_sequences=batch, num_kv_heads=kv_heads, router_rows=kv_heads, hidden_size=hidden,
            x=self.x.data_ptr(), weight=self.router.data_ptr(), keep=self.keep.data_ptr(),
            selected=self.selected.data_ptr()))
        self.attend = polar.prepare(Attention(
            dtype=code, num_sequences=batch, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
            max_pages=self.max_pages, q_stride=self.q.stride(0), page_stride=self.layer.stride(0),
            q=self.q.data_ptr(), kv=self.layer.data_ptr(), block_table=self.table.data_ptr(),
            seq_lens=self.lengths.data_ptr(), keep=self.keep.data_ptr(), selected=self.selected.data_ptr(),
            out=self.out.data_ptr(), lse=self.lse.data_ptr()))

    def set(self, lengths, keep):
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.keep.copy_(torch.tensor(keep, dtype=torch.int32))

    def run(self):
        self.polar.start(self.attend, "plan")
        self.polar.start(self.select)
        self.polar.start(self.attend)

    def check(self, what):
        """Against scaled_dot_product_attention in float32 on the gathered pages."""
        scores = self.x.float() @ self.router.float().T
        group = self.heads // self.kv_heads
        got, wanted, rest, left, log_error = [], [], 0.0, 0.0, 0.0
        for b, (length, keep) in enumerate(zip(self.lengths.tolist(), self.keep.tolist())):
            kept = sorted(self.selected[b, :keep].tolist())
            if kept:
                others = [h for h in range(self.kv_heads) if h not in kept]
                lowest = scores[b, kept].min().item()
                left = max([left] + [scores[b, h].item() - lowest for h in others])
            if len(set(kept)) != keep:
                left = float("nan")
            mine = torch.zeros(self.kv_heads, dtype=torch.bool, device="cuda")
            mine[kept] = length > 0
            mine = mine.repeat_interleave(group)
            rest += self.out[b, ~mine].float().abs().sum().item()
            if not mine.any():
                continue
            pages = self.layer[self.table[b, :math.ceil(length / PAGE)].long()].float()
            k, v = (pages[:, :, i].transpose(0, 1).flatten(1, 2)[:, :length] for i in range(2))
            k, v = (t.repeat_interleave(group, 0)[mine] for t in (k, v))
            q = self.q[b].view(self.heads, 1, self.head_dim).float()[mine]
            wanted.append(torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])
            got.append(self.out[b, mine])
            logs = (q @ k.transpose(1, 2) / math.sqrt(self.head_dim)).logsumexp(-1)[:, 0]
            log_error = max(log_error, (self.lse[b, mine] - logs).abs().max().item())
        print(what)
        check("heads: better one left out by", left, 1e-2)
        check("attention: relative error", relative(torch.cat(got), torch.cat(wanted)), 5e-3)
        check("attention: log of the sum", log_error, 2e-3)
        check("attention: what is left out", rest, 0)


# ---- MLP ------------------------------------------------------------------------------------------


class MlpCase:
    def __init__(self, polar, dtype, rows, hidden, neurons, rank, keep):
        self.polar, self.neurons, self.count = polar, neurons, keep
        random = lambda scale, *shape: (torch.randn(*shape, device="cuda") * scale).to(dtype)
        self.x = random(1, rows, hidden)
        self.router_down, self.router_up = random(0.05, rank, hidden), random(0.1, neurons, rank)
        self.up, self.up_bias = random(0.02, neurons, hidden), random(0.1, neurons)
        self.down, self.down_bias = random(0.02, neurons, hidden), random(0.1, hidden)
        self.index = torch.zeros(-(-keep // 8) * 8, dtype=torch.int32, device="cuda")
        self.active = torch.full((1,), rows, dtype=torch.int32, device="cuda")
        self.out = torch.empty(rows, hidden, device="cuda", dtype=dtype)
        code = POLAR_DTYPE_BF16 if dtype == torch.bfloat16 else POLAR_DTYPE_F16
        self.select = polar.prepare(NeuronSelection(
            dtype=code, num_rows=rows, num_neurons=neurons, keep=keep, hidden_size=hidden, rank=rank,
            x=self.x.data_ptr(), router_down=self.router_down.data_ptr(), router_up=self.router_up.data_ptr(),
            active_rows=self.active.data_ptr(), index=self.index.data_ptr()))
        shape = dict(dtype=code, num_rows=rows, hidden_size=hidden, num_neurons=neurons, x=self.x.data_ptr(),
                     up=self.up.data_ptr(), up_bias=self.up_bias.data_ptr(), down=self.down.data_ptr(),
                     down_bias=self.down_bias.data_ptr(), out=self.out.data_ptr())
        self.some = polar.prepare(Mlp(keep=keep, index=self.index.data_ptr(), **shape))
        self.all = polar.prepare(Mlp(**shape))

    def run(self):
        self.polar.start(self.select)
        self.polar.start(self.some)

    def wanted(self, kept):
        y = (self.x.float() @ self.up[kept].float().T + self.up_bias[kept].float()).relu()
        return y @ self.down[kept].float() + self.down_bias.float()

    def check(self, what):
        print(what)
        rows = self.active.item()
        kept = self.index[:self.count].long()
        scores = (self.x[:rows].float() @ self.router_down.float().T @ self.router_up.float().T).relu().sum(0)
        others = torch.ones(self.neurons, dtype=torch.bool, device="cuda")
        others[kept] = False
        left = (scores[others].max() - scores[kept].min()) / scores.max()
        check("neurons: list out of order", (kept[1:] <= kept[:-1]).sum().item(), 0)
        check("neurons: better one left out by", left.item(), 1e-2)
        check("mlp: relative error", relative(self.out, self.wanted(kept)), 1e-2)

    def check_dense(self):
        self.polar.start(self.all)
        everything = torch.arange(self.neurons, device="cuda")
        check("mlp, all neurons: relative error", relative(self.out, self.wanted(everything)), 1e-2)


def captured(run):
    """What `run` launches as a graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    path = sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "../target/release/libpolar_sparsity.so")
    torch.manual_seed(7)
    torch.zeros(1, device="cuda")  # torch makes its context current
    polar = Library(path)

    for dtype, heads, kv_heads, head_dim in [(torch.bfloat16, 32, 8, 128), (torch.float16, 32, 32, 64),
                                             (torch.bfloat16, 28, 4, 128), (torch.bfloat16, 40, 40, 80)]:
        case = AttentionCase(polar, dtype, 6, heads, kv_heads, head_dim, 4096, 1024)
        name = f"attention, {str(dtype)[6:]}, {heads} heads, {kv_heads} KV heads, head size {head_dim}"
        half = max(1, kv_heads // 2)
        case.set([1, 4096, 17, 1000, 0, 2048], [half, 1, kv_heads, half, 2, kv_heads - 1])
        case.run()
        case.check(name)
        # The same launches as a graph; lengths and counts change behind its back.
        graph = captured(case.run)
        case.set([333, 16, 4095, 1, 800, 15], [1, half, half, 2, kv_heads, 0])
        graph.replay()
        case.check(name + ", as a graph")

    for dtype, rows in [(torch.bfloat16, 1), (torch.float16, 8), (torch.bfloat16, 33)]:
        case = MlpCase(polar, dtype, rows, 1024, 4096, 128, 411)
        case.run()
        case.check(f"mlp, {str(dtype)[6:]}, {rows} rows")
        case.check_dense()
        graph = captured(case.run)
        case.x.normal_()
        case.active.fill_(max(1, rows - 3))
        graph.replay()
        case.check("as a graph, with padding rows")

    torch.cuda.synchronize()
    del graph
    polar.close()
    print(f"{torch.cuda.get_device_name()}: {'WRONG' if failures else 'all agree'}")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        import torch
    except ImportError:
        give_up("torch is not installed")
    if not torch.cuda.is_available():
        give_up("torch sees no GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    sys.exit(main())
