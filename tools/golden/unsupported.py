"""config.json files that a loader must refuse, each with words its message must hold."""

from cases import DROP, LLAMA3, llama_like, opt


def drop(config, *names):
    return {k: v for k, v in config.items() if k not in names}


def files():
    """name -> (config, substrings of the message, why)"""
    o = dict(opt(64, 2, 4, 128, 257), torch_dtype="float16")
    ll = dict(llama_like("llama", 64, 2, 4, 2, 96, 257), torch_dtype="bfloat16")
    q = dict(llama_like("qwen2", 64, 4, 4, 2, 96, 257), torch_dtype="bfloat16")
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    long = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64}
    new = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                               "original_max_position_embeddings": 64}, "dtype": "bfloat16"}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    return {
        "opt_post_norm": (dict(o, do_layer_norm_before=False), ["do_layer_norm_before"],
                          "OPT-350m: the norms come after attention and MLP"),
        "opt_projected_embeddings": (dict(o, word_embed_proj_dim=32), ["word_embed_proj_dim"],
                                     "embeddings narrower than the hidden size"),
        "opt_gelu": (dict(o, activation_function="gelu"), ["activation_function", "gelu"],
                     "Galactica-style OPT"),
        "llama_gelu": (dict(ll, hidden_act="gelu"), ["hidden_act", "gelu"], "activation the MLP does not know"),
        "rope_yarn": (dict(ll, rope_scaling=yarn), ["yarn"], "old spelling"),
        "rope_yarn_new_style": (dict(drop(ll, "rope_theta", "torch_dtype"), **new), ["yarn"],
                                "rope_parameters spelling"),
        "rope_dynamic": (dict(ll, rope_scaling={"type": "dynamic", "factor": 2.0}), ["dynamic"],
                         "RoPE base changes with the length"),
        "rope_longrope": (dict(ll, rope_scaling=long), ["longrope"], "Phi-3 style factors per dimension"),
        "rope_llama3_incomplete": (dict(ll, rope_scaling=drop(LLAMA3, "low_freq_factor")), ["low_freq_factor"],
                                   "a parameter of the scaling is missing"),
        "mixtral": (dict(ll, model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=8,
                         num_experts_per_tok=2), ["mixtral"], "mixture of experts"),
        "gemma2": (dict(ll, model_type="gemma2", architectures=["Gemma2ForCausalLM"], head_dim=16,
                        hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=50.0), ["gemma2"],
                   "a family we do not have"),
        "heads_not_divisible": (dict(ll, num_attention_heads=6, num_key_value_heads=4, head_dim=16),
                                ["num_key_value_heads"], "6 query heads over 4 KV heads"),
        "hidden_not_divisible": (dict(ll, hidden_size=66, num_key_value_heads=4), ["hidden_size"],
                                 "66 over 4 heads and no head_dim"),
        "quantized_gptq": (dict(ll, quantization_config=gptq), ["quantization_config"], "weights are not plain"),
        "qwen2_mixed_windows": (dict(q, use_sliding_window=True, sliding_window=16, max_window_layers=2),
                                ["sliding_window"], "layers 2 and 3 have a window, 0 and 1 have none"),
        "qwen3_mixed_layer_types": (
            dict(q, model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=16, use_sliding_window=True,
                 sliding_window=16, max_window_layers=2,
                 layer_types=["full_attention", "full_attention", "sliding_attention", "sliding_attention"]),
            ["sliding"], "the same, spelled out layer by layer"),
        "missing_hidden_size": (drop(ll, "hidden_size"), ["hidden_size"], "required field"),
        "missing_model_type": (drop(ll, "model_type"), ["model_type"], "required field"),
        "negative_layers": (dict(ll, num_hidden_layers=-2), ["num_hidden_layers"], "negative number"),
        "zero_heads": (dict(ll, num_attention_heads=0), ["num_attention_heads"], "division by zero if unchecked"),
        "huge_vocab": (dict(ll, vocab_size=18446744073709551615), ["vocab_size"], "overflow if unchecked"),
        "fractional_hidden_size": (dict(ll, hidden_size=64.5), ["hidden_size"], "not an integer"),
        "string_layers": (dict(ll, num_hidden_layers="2"), ["num_hidden_layers"], "a string where a number goes"),
        "nan_like_theta": (dict(ll, rope_theta=-1.0), ["rope_theta"], "a base that gives NaN frequencies"),
    }


def write(folder, dump):
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    expected = {}
    for name, (config, contains, why) in files().items():
        assert DROP not in config.values()
        dump(folder / f"{name}.json", config)
        expected[name] = {"contains": contains, "why": why}
    dump(folder / "expected.json", expected)
