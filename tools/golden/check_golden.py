#!/usr/bin/env python3
"""Reads tests/data/golden with numpy alone and computes everything again in float64, from the files only.

A second implementation, written from the configs' meaning and not from transformers' code: it shows that the golden
numbers do not depend on one program's idea of the model, and how far f32 rounding carries them.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

import stfile

GOLDEN = Path(__file__).resolve().parent.parent.parent / "tests" / "data" / "golden"


class Model:
    def __init__(self, folder):
        c = json.loads((folder / "config.json").read_text())
        self.w, self.raw = {}, {}
        for file in sorted(folder.glob("model*.safetensors")):
            self.w.update(stfile.read(file)[0])
            self.raw.update(stfile.read_raw(file)[0])
        self.w = {k: v.astype(np.float64) for k, v in self.w.items()}
        self.opt = c["model_type"] == "opt"
        self.layers, self.heads = c["num_hidden_layers"], c["num_attention_heads"]
        self.groups = c.get("num_key_value_heads") or self.heads
        self.hd = c.get("head_dim") or c["hidden_size"] // self.heads
        self.eps = c.get("rms_norm_eps", 1e-5)
        self.window = c.get("sliding_window")
        if c["model_type"] in ("qwen2", "qwen3") and not c.get("use_sliding_window"):
            self.window = None
        self.tied = c.get("tie_word_embeddings", self.opt)
        self.config = c
        if not self.opt:
            self.freq = self.frequencies(c)

    def frequencies(self, c):
        rope = dict(c.get("rope_scaling") or {})
        rope.update(c.get("rope_parameters") or {})
        theta = rope.get("rope_theta", c.get("rope_theta", 10000.0))
        f = theta ** (-np.arange(0, self.hd, 2) / self.hd)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "linear":
            return f / rope["factor"]
        if kind == "llama3":
            turns = rope["original_max_position_embeddings"] * f / (2 * np.pi)
            lo, hi = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = np.clip((turns - lo) / (hi - lo), 0.0, 1.0)
            return smooth * f + (1 - smooth) * f / rope["factor"]
        assert kind == "default", kind
        return f

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def norm(self, x, name):
        if self.opt:
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
            return x * self.w[name + ".weight"] + self.w[name + ".bias"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name + ".weight"]

    def rope(self, x, at):
        angle = np.arange(at, at + len(x))[:, None, None] * self.freq
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def attend(self, l, h, cache):
        """Attention output before the output projection [T, heads, hd], all K and V kept."""
        stem = ("model.decoder" if self.opt else "model") + f".layers.{l}.self_attn."
        t, at = len(h), len(cache[l][0]) if l in cache else 0
        q = self.linear(h, stem + "q_proj").reshape(t, self.heads, self.hd)
        k = self.linear(h, stem + "k_proj").reshape(t, self.groups, self.hd)
        v = self.linear(h, stem + "v_proj").reshape(t, self.groups, self.hd)
        if stem + "q_norm.weight" in self.w:
            q, k = self.norm(q, stem + "q_norm"), self.norm(k, stem + "k_norm")
        if not self.opt:
            q, k = self.rope(q, at), self.rope(k, at)
        if at:
            k, v = np.concatenate([cache[l][0], k]), np.concatenate([cache[l][1], v])
        cache[l] = (k, v)
        per = self.heads // self.groups
        scores = np.einsum("thd,shd->hts", q, np.repeat(k, per, 1)) / math.sqrt(self.hd)
        i, j = np.arange(at, at + t)[:, None], np.arange(at + t)[None]
        seen = (j <= i) & (i - j < self.window if self.window else True)
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), np.repeat(v, per, 1))

    def step(self, batch, caches, sparse=None):
        """`batch`: one token list for each sequence. Layers outside, sequences inside, as the MLP rule couples them."""
        stem = "model.decoder." if self.opt else "model."
        xs = []
        for tokens, cache in zip(batch, caches):
            x = self.w[stem + "embed_tokens.weight"][tokens]
            if self.opt:
                at = len(cache[0][0]) if cache else 0
                x = x + self.w[stem + "embed_positions.weight"][2 + np.arange(at, at + len(tokens))]
            xs.append(x)
        for l in range(self.layers):
            p = f"{stem}layers.{l}."
            hs = [self.norm(x, p + ("self_attn_layer_norm" if self.opt else "input_layernorm")) for x in xs]
            neurons = sparse.neurons(l, [h[-1] for h in hs]) if sparse else None
            for b, h in enumerate(hs):
                o = self.attend(l, h, caches[b])
                if sparse:
                    keep = sparse.groups(l, h[-1], self.groups)
                    mask = np.zeros(self.groups, bool)
                    mask[keep] = True
                    o = np.where(np.repeat(mask, self.heads // self.groups)[None, :, None], o, 0.0)
                out = p + ("self_attn.out_proj" if self.opt else "self_attn.o_proj")
                x = xs[b] + self.linear(o.reshape(len(h), -1), out)
                y = self.norm(x, p + ("final_layer_norm" if self.opt else "post_attention_layernorm"))
                if self.opt:
                    z = np.maximum(self.linear(y, p + "fc1"), 0.0)
                    if neurons is not None:
                        chosen = np.zeros(z.shape[1], bool)
                        chosen[neurons] = True
                        z = np.where(chosen, z, 0.0)
                    xs[b] = x + self.linear(z, p + "fc2")
                else:
                    gate = self.linear(y, p + "mlp.gate_proj")
                    gate = gate / (1 + np.exp(-gate))
                    xs[b] = x + self.linear(gate * self.linear(y, p + "mlp.up_proj"), p + "mlp.down_proj")
        head = self.w[stem + "embed_tokens.weight" if self.tied else "lm_head.weight"]
        return [self.norm(x, stem + ("final_layer_norm" if self.opt else "norm")) @ head.T for x in xs]


class Selection:
    def __init__(self, folder, about):
        self.r, self.meta = stfile.read(folder / about["routers"])
        self.r = {k: v.astype(np.float64) for k, v in self.r.items()}
        self.density, self.mlp, self.log = about["attention_density"], about["mlp"], {}

    def note(self, name, value):
        self.log.setdefault(name, []).append(value)

    def groups(self, l, h, units):
        if self.density is None or l == 0:
            return np.arange(units)
        s = self.r[f"layers.{l}.attention_router.weight"] @ h + self.r[f"layers.{l}.attention_router.bias"]
        s = s.reshape(units, -1).max(1)
        k = max(1, math.floor(self.density * units))
        sel = np.array(sorted(sorted(range(units), key=lambda i: (-s[i], i))[:k]))
        self.note(f"layers.{l}.attn_sel", sel)
        return sel

    def neurons(self, l, hs):
        if not self.mlp:
            return None
        down, up = (self.r[f"layers.{l}.mlp_router.{part}.weight"] for part in ("down", "up"))
        total = sum(np.maximum(up @ (down @ h), 0) for h in hs)
        sel = np.array(sorted(sorted(range(len(total)), key=lambda i: (-total[i], i))[:self.mlp["k"][l]]))
        self.note(f"layers.{l}.mlp_sel", sel)
        return sel


def check_routers(folder, model):
    for path in sorted(folder.glob("routers*.safetensors")):
        _, meta = stfile.read_raw(path)
        base = json.loads(meta["base_model"])
        stem = "model.decoder." if model.opt else "model."
        for role, want in base["tensors"].items():
            name = stem + (role if role == "embed_tokens" else role.replace(".q_proj", ".self_attn.q_proj")) + ".weight"
            assert stfile.fnv1a64(model.raw[name][2][:4096]) == want, (path, role)
        assert base["head_dim"] == model.hd and base["num_kv_heads"] == model.groups


def check(folder):
    facts = json.loads((folder / "golden.json").read_text())
    g, _ = stfile.read(folder / "golden.safetensors")
    assert {k: list(v.shape) for k, v in g.items()} == facts["arrays"]
    m = Model(folder)
    check_routers(folder, m)
    worst, after_prompt = 0.0, []
    for i in range(len(facts["prompts"])):
        prompt, forced = g[f"p{i}.prompt"], g[f"p{i}.forced"]
        cache = {}
        pre = m.step([prompt], [cache])[0]
        after_prompt.append(dict(cache))
        dec = np.concatenate([m.step([[t]], [cache])[0] for t in forced])
        want = g[f"p{i}.prefill_logits_f32"]
        worst = max(worst, np.abs(pre[-len(want):] - want).max(), np.abs(dec - g[f"p{i}.decode_logits_f32"]).max())
        tokens = g[f"p{i}.greedy"]
        logits = m.step([np.concatenate([prompt, tokens[:-1]])], [{}])[0][len(prompt) - 1:]
        assert np.array_equal(logits.argmax(1), tokens), "greedy"
        top2 = np.sort(logits, axis=1)[:, -2:]
        assert np.abs(top2[:, 1] - top2[:, 0] - g[f"p{i}.greedy_margin"]).max() < 1e-3
    sparse_worst = 0.0
    for about in facts["sparse"]:
        n = len(facts["prompts"])
        for batch in [range(n)] if about["batched"] else [[i] for i in range(n)]:
            stem = f"sparse.{about['name']}." + ("" if about["batched"] else f"p{batch[0]}.")
            want = g[stem + "logits"]
            want = want.reshape(-1, len(batch), want.shape[-1])
            caches = [dict(after_prompt[i]) for i in batch]
            s = Selection(folder, about)
            for step in range(len(want)):
                out = m.step([[g[f"p{i}.forced"][step]] for i in batch], caches, s)
                sparse_worst = max(sparse_worst, max(np.abs(o[-1] - w).max() for o, w in zip(out, want[step])))
            for name, got in s.log.items():
                assert np.array_equal(np.stack(got).reshape(g[stem + name].shape), g[stem + name]), (stem, name)
    assert worst < 1e-3 and sparse_worst < 1e-3, (worst, sparse_worst)
    sparse = f", sparse {sparse_worst:.1e}" if facts["sparse"] else ""
    print(f"{folder.name:20} f32 logits within {worst:.1e} of f64{sparse}")


def main():
    names = sys.argv[1:] or sorted(p.parent.name for p in GOLDEN.glob("*/golden.json"))
    for name in names:
        check(GOLDEN / name)


if __name__ == "__main__":
    main()
