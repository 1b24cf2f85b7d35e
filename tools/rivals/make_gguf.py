#!/usr/bin/env python3
"""Random-weight GGUF models of real shapes, for timing llama.cpp beside us.

    python make_gguf.py DIR [NAME...]      names: llama-3.2-1b qwen2.5-0.5b

Needs numpy and gguf (tools/rivals/llama_cpp.sh makes a venv with both). The values are random bf16,
as in our own benchmark; the tokenizer is none.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

# vocab, layers, hidden, heads, kv heads, head size, ffn, context, rope theta
SHAPES = {
    "llama-3.2-1b": ("llama", 128256, 16, 2048, 32, 8, 64, 8192, 131072, 500000.0),
    "qwen2.5-0.5b": ("qwen2", 151936, 24, 896, 14, 2, 64, 4864, 32768, 1000000.0),
}


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or SHAPES:
        path = out / f"{name}-bf16.gguf"
        if not path.exists():
            write(path, *SHAPES[name])
        print(path)


def write(path, arch, vocab, layers, hidden, heads, kv_heads, head_dim, ffn, context, theta):
    rng = np.random.default_rng(1)
    w = gguf.GGUFWriter(path, arch)
    w.add_context_length(context)
    w.add_embedding_length(hidden)
    w.add_block_count(layers)
    w.add_feed_forward_length(ffn)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_rope_dimension_count(head_dim)
    w.add_rope_freq_base(theta)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(vocab)
    w.add_tokenizer_model("none")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)

    def matrix(name, *shape):
        # bf16 = the upper half of an f32: uniform in +-0.035, written as raw bytes.
        x = (rng.random(shape, dtype=np.float32) - 0.5) * 0.07
        bits = (x.view(np.uint32) >> 16).astype(np.uint16)
        w.add_tensor(name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    def vector(name, n, value):
        w.add_tensor(name, np.full(n, value, dtype=np.float32))

    q, kv = heads * head_dim, kv_heads * head_dim
    matrix("token_embd.weight", vocab, hidden)
    vector("output_norm.weight", hidden, 1.0)
    for i in range(layers):
        b = f"blk.{i}."
        vector(b + "attn_norm.weight", hidden, 1.0)
        vector(b + "ffn_norm.weight", hidden, 1.0)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            matrix(f"{b}attn_{part}.weight", rows, hidden)
            if arch == "qwen2":
                vector(f"{b}attn_{part}.bias", rows, 0.01)
        matrix(b + "attn_output.weight", hidden, q)
        matrix(b + "ffn_gate.weight", ffn, hidden)
        matrix(b + "ffn_up.weight", ffn, hidden)
        matrix(b + "ffn_down.weight", hidden, ffn)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    main()
