"""The cases: a Hugging Face config as real files spell it, plus what to ask of the model.

`style` "old" writes rope_theta / rope_scaling / torch_dtype, "new" writes rope_parameters / dtype
(transformers 5). `old` below is always in the old spelling; `config_text` rewrites it.
"""

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FORCED = 12  # teacher-forced decode steps after each prompt
GREEDY = 64
SPARSE_STEPS = 6


def opt(h, layers, heads, ffn, vocab):
    return {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": h, "num_hidden_layers": layers,
        "num_attention_heads": heads, "ffn_dim": ffn, "vocab_size": vocab, "max_position_embeddings": 160,
        "activation_function": "relu", "do_layer_norm_before": True, "word_embed_proj_dim": h,
        "_remove_final_layer_norm": False, "dropout": 0.1, "attention_dropout": 0.0, "init_std": 0.02,
        "layerdrop": 0.0, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "prefix": "</s>",
        "use_cache": True,
    }


def llama_like(family, h, layers, heads, kv, ffn, vocab, **more):
    arch = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    c = {
        "architectures": [arch + "ForCausalLM"], "model_type": family, "hidden_size": h, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": vocab,
        "max_position_embeddings": 256, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "attention_dropout": 0.0, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False, "use_cache": True,
    }
    c.update(more)
    return {k: v for k, v in c.items() if v is not DROP}


DROP = object()  # a key that the file leaves out
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
          "rope_type": "llama3"}

# name: dtype, style, prompts (token counts), config, and the optional keys
#   bites: config changes (in the old spelling) that must change the logits
#   shards: number of safetensors files; sparse: variants of the masked-sparse oracle
CASES = {
    "opt_f32": dict(
        dtype="F32", style="old", prompts=(5, 37, 90), old=opt(48, 3, 6, 107, 257),
        routers={"routers": "head"},
        sparse=[
            dict(name="attn50", attn=0.5), dict(name="attn70", attn=0.7), dict(name="mlp", mlp=True),
            dict(name="attn50_mlp", attn=0.5, mlp=True), dict(name="batch3_mlp", mlp=True, batch=True),
            dict(name="batch3_attn50_mlp", attn=0.5, mlp=True, batch=True),
        ],
    ),
    "opt_bf16": dict(dtype="BF16", style="new", prompts=(1, 16, 65), old=opt(64, 2, 4, 137, 263)),
    "opt_f16": dict(dtype="F16", style="old", prompts=(3, 12, 80), old=opt(64, 2, 2, 129, 256)),
    # the oldest spelling: no num_key_value_heads, no rope_theta
    "llama2_f32": dict(
        dtype="F32", style="old", prompts=(5, 23, 90),
        old=llama_like("llama", 32, 2, 4, DROP, 77, 259, rope_theta=DROP, rope_scaling=None, pretraining_tp=1,
                       max_position_embeddings=160),
        bites=[dict(rope_theta=500000.0)],
    ),
    "llama31_f32": dict(
        dtype="F32", style="new", prompts=(7, 24, 90),
        old=llama_like("llama", 64, 3, 8, 2, 48, 257, rope_theta=500.0, rope_scaling=LLAMA3, eos_token_id=[0, 2],
                       attention_bias=False, mlp_bias=False, head_dim=8),
        bites=[dict(rope_scaling=None), dict(rope_scaling=dict(LLAMA3, original_max_position_embeddings=8192)),
               dict(rope_scaling=dict(LLAMA3, high_freq_factor=2.0)), dict(rope_theta=10000.0)],
        routers={"routers": "kv_head", "routers_h": "head"},
        sparse=[dict(name="g50", attn=0.5), dict(name="g40", attn=0.4),
                dict(name="h50", attn=0.5, routers="routers_h")],
    ),
    "llama31_bf16": dict(
        dtype="BF16", style="old", prompts=(5, 17, 90),
        old=llama_like("llama", 64, 2, 8, 2, 75, 283, rope_theta=500.0, rope_scaling=LLAMA3, eos_token_id=[0, 2]),
        bites=[dict(rope_scaling=None)],
    ),
    "llama32_tied_f32": dict(
        dtype="F32", style="old", prompts=(2, 17, 48),
        old=llama_like("llama", 48, 2, 4, 2, 63, 271, tie_word_embeddings=True, rope_theta=500.0,
                       rope_scaling=dict(LLAMA3, factor=32.0, original_max_position_embeddings=32), head_dim=12),
        bites=[dict(rope_scaling=None), dict(rope_scaling=dict(LLAMA3, original_max_position_embeddings=32))],
    ),
    "llama_linear_f32": dict(
        dtype="F32", style="old", prompts=(5, 23, 70),
        old=llama_like("llama", 32, 2, 4, 4, 57, 256, rope_scaling={"type": "linear", "factor": 4.0}),
        bites=[dict(rope_scaling=None), dict(rope_scaling={"type": "linear", "factor": 2.0})],
    ),
    "llama_headdim_f32": dict(
        dtype="F32", style="new", prompts=(1, 25, 64),
        old=llama_like("llama", 40, 2, 5, 1, 47, 257, head_dim=24, rms_norm_eps=0.01, rope_theta=2000.0),
        bites=[dict(rms_norm_eps=1e-5), dict(rope_theta=10000.0)],
    ),
    "llama_bias_f32": dict(
        dtype="F32", style="old", prompts=(5, 20, 50),
        old=llama_like("llama", 32, 2, 4, 2, 60, 261, attention_bias=True, mlp_bias=True),
    ),
    "mistral_window_f32": dict(
        dtype="F32", style="old", prompts=(5, 37, 90),
        old=llama_like("mistral", 48, 2, 6, 2, 56, 256, sliding_window=24, head_dim=None, rope_theta=1000.0),
        bites=[dict(sliding_window=None), dict(sliding_window=23), dict(sliding_window=25)],
    ),
    "mistral_full_f32": dict(
        dtype="F32", style="new", prompts=(6, 20, 90),
        old=llama_like("mistral", 32, 2, 4, 2, 72, 267, sliding_window=None, head_dim=16, rope_theta=1000.0),
        bites=[dict(sliding_window=16)],
    ),
    "qwen2_f32": dict(
        dtype="F32", style="old", prompts=(5, 25, 90),
        old=llama_like("qwen2", 64, 3, 8, 4, 44, 258, use_sliding_window=False, sliding_window=None,
                       max_window_layers=3, rope_theta=1000.0, rms_norm_eps=1e-6, tie_word_embeddings=True),
        routers={"routers": "kv_head", "routers_h": "head"},
        sparse=[dict(name="g50", attn=0.5), dict(name="g80", attn=0.8),
                dict(name="h50", attn=0.5, routers="routers_h")],
    ),
    "qwen2_bf16": dict(
        dtype="BF16", style="new", prompts=(4, 15, 77),
        old=llama_like("qwen2", 48, 2, 6, 2, 75, 320, use_sliding_window=False,
                       sliding_window=None, max_window_layers=2, rope_theta=1000.0, rms_norm_eps=1e-6),
        more={"layer_types": ["full_attention", "full_attention"]},
    ),
    # a window that is named but not used
    "qwen2_nowindow_f32": dict(
        dtype="F32", style="old", prompts=(5, 16, 90),
        old=llama_like("qwen2", 32, 2, 4, 2, 64, 256, use_sliding_window=False, sliding_window=8,
                       max_window_layers=0, rope_theta=1000.0, rms_norm_eps=1e-6),
        bites=[dict(use_sliding_window=True)],
    ),
    "qwen3_f32": dict(
        dtype="F32", style="new", prompts=(5, 24, 90),
        old=llama_like("qwen3", 48, 2, 4, 2, 61, 269, head_dim=16, attention_bias=False, use_sliding_window=False,
                       sliding_window=None, max_window_layers=2, rope_theta=1000.0, rms_norm_eps=1e-6),
        more={"layer_types": ["full_attention", "full_attention"]},
    ),
    "qwen3_bf16": dict(
        dtype="BF16", style="old", prompts=(8, 19, 90),
        old=llama_like("qwen3", 64, 2, 4, 2, 72, 256, head_dim=64, attention_bias=False, use_sliding_window=False,
                       sliding_window=None, max_window_layers=2, rope_theta=1000.0, rms_norm_eps=1e-6,
                       tie_word_embeddings=True),
    ),
    "llama_sharded_f32": dict(
        dtype="F32", style="new", prompts=(5, 18, 40), shards=3,
        old=llama_like("llama", 32, 2, 4, 2, 64, 256),
    ),
    "llama_f16": dict(
        dtype="F16", style="new", prompts=(5, 16, 90),
        old=llama_like("llama", 64, 2, 2, 1, 65, 256, head_dim=128, rope_theta=500.0),
    ),
}


def config_for(case):
    """The config as the file spells it."""
    c = dict(case["old"], **case.get("more", {}))
    name = DTYPES[case["dtype"]]
    if case["style"] == "old":
        return dict(c, torch_dtype=name, transformers_version="4.46.0")
    scaling = c.pop("rope_scaling", None)
    theta = c.pop("rope_theta", None)
    if theta is not None:
        rope = dict(scaling or {"rope_type": "default"})
        if "type" in rope:
            rope["rope_type"] = rope.pop("type")
        c["rope_parameters"] = dict(rope, rope_theta=theta)
    return dict(c, dtype=name, transformers_version="5.17.0")
