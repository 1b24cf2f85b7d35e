"""What transformers says: logits, greedy tokens, and the same decode with heads and neurons masked out."""

import math

import numpy as np
import torch

from cases import GREEDY, SPARSE_STEPS


def ids(tokens):
    return torch.tensor([list(map(int, tokens))])


@torch.no_grad()
def prefill_and_forced(model, prompt, forced):
    """-> logits of the prompt [T, V], logits after each forced token [len(forced), V], through the KV cache."""
    out = model(ids(prompt), use_cache=True)
    pre, rows = out.logits[0].float().numpy(), []
    for t in forced:
        out = model(ids([t]), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1].float().numpy())
    return pre, np.stack(rows)


@torch.no_grad()
def full(model, tokens):
    return model(ids(tokens), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def greedy(model, prompt, give_up_below=0.0):
    """-> tokens, top1 - top2 margins; None as soon as a margin is below the bound."""
    out = model(ids(prompt), use_cache=True)
    tokens, margins = [], []
    while True:
        top = torch.topk(out.logits[0, -1].float(), 2)
        margin = float(top.values[0] - top.values[1])
        if margin < give_up_below:
            return None
        tokens.append(int(top.indices[0]))
        margins.append(margin)
        if len(tokens) == GREEDY:
            return tokens, np.array(margins, dtype=np.float32)
        out = model(ids([tokens[-1]]), past_key_values=out.past_key_values, use_cache=True)


def keep(density, units):
    return max(1, math.floor(density * units))


def top(scores, k):
    """Indices of the k largest, ties to the lower index, ascending."""
    return np.sort(np.argsort(-scores, kind="stable")[:k])


def margin_of(scores, k):
    """How far the selection is from being another one."""
    s = np.sort(scores)[::-1]
    if k >= len(s):
        return math.inf
    return float(s[k - 1] - s[k])


def table_row(table, batch):
    sizes = sorted(map(int, table))
    for b in sizes:
        if b >= batch:
            return table[str(b)]
    return None


class Sparse:
    """Hooks on a transformers model. While `on`, layers >= 1 keep the routers' heads and (OPT) every layer the
    routers' neurons; what is not selected is set to exact zero before the output projection."""

    def __init__(self, model, cfg, routers, attn_density=None, mlp_table=None):
        self.cfg, self.routers, self.density, self.table = cfg, routers, attn_density, mlp_table
        self.on, self.h, self.log, self.margin = False, {}, {}, {"attn": math.inf, "mlp": math.inf}
        base = model.model.decoder if hasattr(model.model, "decoder") else model.model
        self.handles = []
        for l, layer in enumerate(base.layers):
            is_opt = hasattr(layer, "self_attn_layer_norm")
            norm = layer.self_attn_layer_norm if is_opt else layer.input_layernorm
            out = layer.self_attn.out_proj if is_opt else layer.self_attn.o_proj
            self.handles.append(norm.register_forward_hook(self._keep_h(l)))
            self.handles.append(out.register_forward_pre_hook(self._attn(l)))
            if mlp_table:
                self.handles.append(layer.fc2.register_forward_pre_hook(self._mlp(l)))

    def close(self):
        for handle in self.handles:
            handle.remove()

    def _put(self, l, name, value):
        self.log.setdefault(f"layers.{l}.{name}", []).append(value)

    def _keep_h(self, l):
        def hook(_module, _args, out):
            self.h[l] = out
        return hook

    def _w(self, name):
        return torch.from_numpy(np.array(self.routers[name]))

    def _attn(self, l):
        heads = self.cfg["num_attention_heads"]
        groups = self.cfg.get("num_key_value_heads") or heads

        def hook(_module, args):
            if not self.on or self.density is None or l == 0:
                return None
            x = args[0]
            p = f"layers.{l}.attention_router."
            logits = torch.nn.functional.linear(self.h[l][:, -1], self._w(p + "weight"), self._w(p + "bias")).numpy()
            score = logits if logits.shape[1] == groups else logits.reshape(len(logits), groups, -1).max(-1)
            k = keep(self.density, groups)
            sel = np.stack([top(row, k) for row in score])
            self.margin["attn"] = min([self.margin["attn"]] + [margin_of(row, k) for row in score])
            mask = torch.zeros(len(sel), groups, dtype=torch.bool)
            mask[torch.arange(len(sel))[:, None], torch.from_numpy(sel)] = True
            mask = mask.repeat_interleave(x.shape[-1] // groups, dim=1)[:, None]
            self._put(l, "attn_logit", logits)
            self._put(l, "attn_sel", sel)
            return (torch.where(mask, x, torch.zeros_like(x)),)
        return hook

    def _mlp(self, l):
        def hook(_module, args):
            if not self.on:
                return None
            x = args[0]
            p = f"layers.{l}.mlp_router."
            logits = (self.h[l][:, -1] @ self._w(p + "down.weight").T @ self._w(p + "up.weight").T).numpy()
            score = np.maximum(logits, 0.0).sum(0)
            k = table_row(self.table, len(logits))[l]
            sel = top(score, k)
            m = margin_of(score, k)
            if m == 0.0 and np.sort(score)[::-1][k - 1] == 0.0:
                m = float(np.abs(logits).min())  # zeros fill up by index: what matters is which logits are positive
            self.margin["mlp"] = min(self.margin["mlp"], m)
            mask = torch.zeros(x.shape[-1], dtype=torch.bool)
            mask[torch.from_numpy(sel)] = True
            self._put(l, "mlp_logit", logits)
            self._put(l, "mlp_sel", sel)
            return (torch.where(mask, x, torch.zeros_like(x)),)
        return hook


@torch.no_grad()
def sparse_single(model, sparse, prompt, forced):
    """Dense prefill, sparse decode of one sequence -> logits [S, V] and the log, arrays [S, ...]."""
    sparse.on, sparse.log = False, {}
    out, rows = model(ids(prompt), use_cache=True), []
    sparse.on = True
    for t in forced[:SPARSE_STEPS]:
        out = model(ids([t]), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1].numpy())
    sparse.on = False
    log = {}
    for name, values in sparse.log.items():
        a = np.stack(values)
        log[name] = a[:, 0] if a.ndim == 3 else a
    return np.stack(rows), log


@torch.no_grad()
def sparse_batch(model, sparse, prompts, forced):
    """The same, all prompts in one left-padded batch -> logits [S, B, V]."""
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), 1)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for b, p in enumerate(prompts):
        tokens[b, longest - len(p):] = torch.tensor(list(map(int, p)))
        mask[b, longest - len(p):] = 1
    sparse.on, sparse.log = False, {}
    out, rows = model(tokens, attention_mask=mask, use_cache=True), []
    prefill = out.logits[:, -1].numpy()
    sparse.on = True
    for s in range(SPARSE_STEPS):
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=torch.long)], 1)
        step = torch.tensor([[int(f[s])] for f in forced])
        out = model(step, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[:, -1].numpy())
    sparse.on = False
    return prefill, np.stack(rows), {name: np.stack(v) for name, v in sparse.log.items()}
