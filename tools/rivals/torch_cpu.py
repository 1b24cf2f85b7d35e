#!/usr/bin/env python3
"""Times a decoder of real shapes in PyTorch on the CPU, as a rival for `make bench TORCH=1`.

    python torch_cpu.py NAME THREADS BATCH      BATCH 0: prefill of 512 tokens

Random bf16 weights, eager mode, torch's own fused attention, a KV cache written in place: what a
careful user gets without a compiler. Prints one line of JSON, {"tokens_s": ...}.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F

# vocab, layers, hidden, heads, kv heads, head size, ffn, bias of q, k and v
SHAPES = {
    "llama-3.2-1b": (128256, 16, 2048, 32, 8, 64, 8192, False),
    "qwen2.5-0.5b": (151936, 24, 896, 14, 2, 64, 4864, True),
}
CONTEXT, STEPS, PROMPT = 32, 32, 512


def weight(*shape):
    return ((torch.rand(shape) - 0.5) * 0.07).to(torch.bfloat16)


class Model:
    def __init__(self, name, batch, room):
        vocab, layers, hidden, self.heads, self.kv_heads, self.d, ffn, bias = SHAPES[name]
        q, kv = self.heads * self.d, self.kv_heads * self.d
        self.embed = weight(vocab, hidden)
        self.norm = torch.ones(hidden, dtype=torch.bfloat16)
        self.layers = [
            {
                "qkv": weight(q + 2 * kv, hidden),
                "bias": weight(q + 2 * kv) if bias else None,
                "o": weight(hidden, q),
                "gate_up": weight(2 * ffn, hidden),
                "down": weight(hidden, ffn),
                "k": torch.zeros(batch, self.kv_heads, room, self.d, dtype=torch.bfloat16),
                "v": torch.zeros(batch, self.kv_heads, room, self.d, dtype=torch.bfloat16),
            }
            for _ in range(layers)
        ]
        angle = torch.arange(room)[:, None] / 10000.0 ** (torch.arange(self.d // 2) * 2 / self.d)
        self.cos = torch.cat([angle.cos()] * 2, -1).to(torch.bfloat16)
        self.sin = torch.cat([angle.sin()] * 2, -1).to(torch.bfloat16)

    def turn(self, x, at, n):
        a, b = x.chunk(2, -1)
        return x * self.cos[at : at + n] + torch.cat((-b, a), -1) * self.sin[at : at + n]

    def step(self, tokens, at):
        """Tokens [batch, n] at positions at.. of every sequence; the next tokens."""
        batch, n = tokens.shape
        x = self.embed[tokens]
        for w in self.layers:
            h = F.rms_norm(x, self.norm.shape, self.norm, 1e-5)
            qkv = F.linear(h, w["qkv"], w["bias"]).view(batch, n, -1, self.d).transpose(1, 2)
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
            w["k"][:, :, at : at + n] = self.turn(k, at, n)
            w["v"][:, :, at : at + n] = v
            seen = [w[name][:, :, : at + n] for name in "kv"]
            out = F.scaled_dot_product_attention(
                self.turn(q, at, n), *seen, is_causal=n > 1, enable_gqa=self.heads != self.kv_heads
            )
            x = x + F.linear(out.transpose(1, 2).reshape(batch, n, -1), w["o"])
            gate, up = F.linear(F.rms_norm(x, self.norm.shape, self.norm, 1e-5), w["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w["down"])
        last = F.rms_norm(x[:, -1], self.norm.shape, self.norm, 1e-5)
        return F.linear(last, self.embed).argmax(-1, keepdim=True)


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    name, threads, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    with torch.inference_mode():
        if batch == 0:
            model = Model(name, 1, PROMPT)
            tokens = torch.randint(0, 1000, (1, PROMPT))
            model.step(tokens, 0)
            start = time.perf_counter()
            for _ in range(2):
                model.step(tokens, 0)
            done = 2 * PROMPT
        else:
            model = Model(name, batch, CONTEXT + STEPS + 2)
            tokens = model.step(torch.randint(0, 1000, (batch, CONTEXT)), 0)
            tokens = model.step(tokens, CONTEXT)
            start = time.perf_counter()
            for i in range(STEPS):
                tokens = model.step(tokens, CONTEXT + 1 + i)
            done = STEPS * batch
        seconds = time.perf_counter() - start
    print(json.dumps({"tokens_s": done / seconds, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
