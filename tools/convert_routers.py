#!/usr/bin/env python3
"""Convert routers of the Polar Sparsity reference code to one router file.

The reference code saves one PyTorch file per layer:

    attn_router_{layer}-{recall}-{precision}.pt          linear1.weight, linear1.bias
    mlp_router_{layer}-{recall}-{precision}-{active}.pt  fc1.weight, fc2.weight

and CSV tables `layer,batch_size,optimal_k` with the neurons to keep. With the
Hugging Face folder of the model they become a safetensors file that names the
model it belongs to.

    convert_routers.py --model opt-6.7b --attention routers/attn_classifier \\
        --mlp routers/mlp --mlp-k mlp_router_configs_bsize_*.csv \\
        --density 0.5 --output opt-6.7b-routers.safetensors

The attention routers may have one output per query head or one per KV head.
Layer 0 always runs dense attention; its attention router may be missing.
MLP routers are for models with a ReLU MLP (OPT), and need every layer.
"""

import argparse
import csv
import json
import pathlib
import re
import struct
import sys

VERSION = "1"
CREATOR = "convert_routers.py 1"
NUMBER = r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
# The reference names files with recall and precision; a plain attn_router_3.pt is fine too.
FILE_NAMES = {
    "attention": re.compile(rf"attn_router_(\d+)(?:-({NUMBER}|nan)-({NUMBER}|nan))?\.pt"),
    "mlp": re.compile(rf"mlp_router_(\d+)(?:-({NUMBER}|nan)-({NUMBER}|nan)-({NUMBER}|nan))?\.pt"),
}
WANTED_KEYS = {"attention": {"linear1.weight", "linear1.bias"}, "mlp": {"fc1.weight", "fc2.weight"}}


class ConvertError(Exception):
    pass


# --- the model ------------------------------------------------------------

FAMILIES = {
    "opt": {"ffn": "ffn_dim", "embed": ["model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
            "layer": ["model.decoder.layers.", "decoder.layers."]},
    "llama": {"ffn": "intermediate_size", "embed": ["model.embed_tokens.weight"], "layer": ["model.layers."]},
}
FAMILIES.update({name: FAMILIES["llama"] for name in ("mistral", "qwen2", "qwen3")})
ARCHITECTURES = {
    "OPTForCausalLM": "opt", "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
}


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConvertError(f"{path}: not JSON: {error}") from None


def model_facts(folder):
    """The numbers of config.json that a router depends on."""
    path = folder / "config.json"
    config = read_json(path)
    family = config.get("model_type")
    if family is None:
        family = next((ARCHITECTURES[a] for a in config.get("architectures") or [] if a in ARCHITECTURES), None)
    if family not in FAMILIES:
        raise ConvertError(f"{path}: model_type {family!r} is not one of {', '.join(FAMILIES)}")

    def number(*names, default=None):
        for name in names:
            value = config.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ConvertError(f"{path}: {name} is {value!r}, not a positive whole number")
                return value
        if default is None:
            raise ConvertError(f"{path}: {names[0]} is missing")
        return default

    hidden = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head")
    if config.get("head_dim") is None and hidden % heads:
        raise ConvertError(f"{path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    facts = {
        "model_type": family,
        "num_layers": number("num_hidden_layers", "n_layer"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": number("num_key_value_heads", "num_kv_heads", default=heads),
        "head_dim": number("head_dim", default=hidden // heads),
        "ffn_size": number(FAMILIES[family]["ffn"], default=4 * hidden if family == "opt" else None),
        "vocab_size": number("vocab_size"),
    }
    if heads % facts["num_kv_heads"]:
        raise ConvertError(f"{path}: {heads} query heads cannot share {facts['num_kv_heads']} KV heads")
    if family == "opt":
        facts["relu_mlp"] = config.get("activation_function", "relu") == "relu"
    else:
        facts["relu_mlp"] = config.get("hidden_act", "silu") == "relu"
    return facts


def checkpoint_files(folder):
    """The safetensors files of a model: one, or the shards of its index."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise ConvertError(f"{index}: no weight_map")
        return [folder / name for name in sorted(set(weights.values()))]
    raise ConvertError(f"{folder}: neither model.safetensors nor model.safetensors.index.json; "
                       "the fingerprint needs a safetensors checkpoint")


def read_header(path):
    """A safetensors header as ({tensor: entry}, where the data begins)."""
    try:
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= 100_000_000:
                raise ConvertError(f"{path}: not a safetensors file")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ConvertError(f"{path}: not a safetensors file") from None
    header.pop("__metadata__", None)
    return header, 8 + length


def fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def fingerprint(folder, facts):
    """The base_model entry: config numbers and hashes of the starts of a few tensors."""
    family = FAMILIES[facts["model_type"]]
    layers = facts["num_layers"]
    wanted = {"embed_tokens": family["embed"]}
    for layer in (0, layers // 2, layers - 1):
        wanted[f"layers.{layer}.q_proj"] = [f"{p}{layer}.self_attn.q_proj.weight" for p in family["layer"]]
    hashes = {}
    for path in checkpoint_files(folder):
        header, base = read_header(path)
        for role, names in wanted.items():
            for name in names:
                if name in header:
                    begin, end = header[name]["data_offsets"]
                    with path.open("rb") as file:
                        file.seek(base + begin)
                        hashes[role] = fnv1a(file.read(min(4096, end - begin)))
    for role, names in wanted.items():
        if role not in hashes:
            raise ConvertError(f"{folder}: no tensor {' or '.join(names)} in the checkpoint")
    numbers = {name: value for name, value in facts.items() if name != "relu_mlp"}
    return {**numbers, "tensors": {role: hashes[role] for role in wanted}}


# --- the reference's files ------------------------------------------------


def find_files(kind, places):
    """{layer: (path, figures in its name)} from folders and files."""
    paths = []
    for place in places:
        if place.is_dir():
            paths.extend(sorted(p for p in place.iterdir() if FILE_NAMES[kind].fullmatch(p.name)))
        elif place.is_file():
            paths.append(place)
        else:
            raise ConvertError(f"{place}: no such file or folder")
    if not paths:
        raise ConvertError(f"no {kind} router files ({FILE_NAMES[kind].pattern}) in {', '.join(map(str, places))}")
    found = {}
    for path in dict.fromkeys(p.resolve() for p in paths):
        match = FILE_NAMES[kind].fullmatch(path.name)
        if not match:
            raise ConvertError(f"{path}: the name does not say the layer (expected {FILE_NAMES[kind].pattern})")
        layer = int(match[1])
        figures = [float(v) if v and v != "nan" else None for v in match.groups()[1:]]
        found.setdefault(layer, []).append((path, figures))
    double = {layer: files for layer, files in found.items() if len(files) > 1}
    if double:
        lines = "".join(f"\n  layer {layer}: " + ", ".join(str(p) for p, _ in files) for layer, files in sorted(double.items()))
        raise ConvertError(f"several {kind} router files for one layer; keep one of each:{lines}")
    return {layer: files[0] for layer, files in sorted(found.items())}


def load_state(path, kind):
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise ConvertError(f"{path}: cannot be loaded: {error}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ConvertError(f"{path}: not a state dict")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if set(state) != WANTED_KEYS[kind]:
        hint = ""
        if kind == "attention" and "linear2.weight" in state:
            hint = "; two-layer attention routers are not supported"
        raise ConvertError(f"{path}: tensors {sorted(state)}, expected {sorted(WANTED_KEYS[kind])}{hint}")
    for name, value in state.items():
        if not value.is_floating_point():
            raise ConvertError(f"{path}: {name} has type {value.dtype}, expected floating point")
        if not torch.isfinite(value).all():
            raise ConvertError(f"{path}: {name} holds values that are not finite")
    return state


def expect_shape(path, name, tensor, allowed):
    if tuple(tensor.shape) not in allowed:
        shapes = " or ".join(str(list(s)) for s in dict.fromkeys(allowed))
        raise ConvertError(f"{path}: {name} has shape {list(tensor.shape)}, the model needs {shapes}")


def load_attention(places, facts):
    """(tensors, unit, recall from the file names by layer)"""
    hidden, heads, groups = facts["hidden_size"], facts["num_heads"], facts["num_kv_heads"]
    files = find_files("attention", places)
    check_layers("attention", files, facts, needed=range(1, facts["num_layers"]))
    tensors, recall, rows = {}, [None] * facts["num_layers"], {}
    for layer, (path, figures) in files.items():
        state = load_state(path, "attention")
        weight, bias = state["linear1.weight"], state["linear1.bias"]
        expect_shape(path, "linear1.weight", weight, [(heads, hidden), (groups, hidden)])
        expect_shape(path, "linear1.bias", bias, [(weight.shape[0],)])
        rows.setdefault(weight.shape[0], path)
        tensors[f"layers.{layer}.attention_router.weight"] = weight
        tensors[f"layers.{layer}.attention_router.bias"] = bias
        recall[layer] = figures[0]
    if len(rows) > 1:
        raise ConvertError("attention routers differ in their outputs: "
                           + ", ".join(f"{count} in {path}" for count, path in rows.items()))
    unit = "head" if heads in rows else "kv_head"
    return tensors, unit, recall


def load_mlp(places, facts):
    """(tensors, recall from the file names by layer)"""
    if not facts["relu_mlp"]:
        raise ConvertError("the model's MLP has no ReLU: MLP routers do not apply to it")
    hidden, neurons = facts["hidden_size"], facts["ffn_size"]
    files = find_files("mlp", places)
    check_layers("mlp", files, facts, needed=range(facts["num_layers"]))
    tensors, recall, ranks = {}, [None] * facts["num_layers"], {}
    for layer, (path, figures) in files.items():
        state = load_state(path, "mlp")
        down, up = state["fc1.weight"], state["fc2.weight"]
        if down.dim() != 2 or down.shape[1] != hidden:
            raise ConvertError(f"{path}: fc1.weight has shape {list(down.shape)}, the model needs [rank, {hidden}]")
        expect_shape(path, "fc2.weight", up, [(neurons, down.shape[0])])
        ranks.setdefault(down.shape[0], path)
        tensors[f"layers.{layer}.mlp_router.down.weight"] = down
        tensors[f"layers.{layer}.mlp_router.up.weight"] = up
        recall[layer] = figures[0]
    if len(ranks) > 1:
        raise ConvertError("MLP routers differ in rank: " + ", ".join(f"{r} in {p}" for r, p in ranks.items()))
    return tensors, recall


def check_layers(kind, files, facts, needed):
    layers = facts["num_layers"]
    beyond = [str(path) for layer, (path, _) in files.items() if layer >= layers]
    if beyond:
        raise ConvertError(f"the model has {layers} layers (0 to {layers - 1}), but there is {', '.join(beyond)}")
    missing = [str(layer) for layer in needed if layer not in files]
    if missing:
        raise ConvertError(f"no {kind} router for layer {', '.join(missing)}")


def read_tables(paths, facts):
    """{batch size: [k of layer 0, …]} from CSV tables."""
    layers, neurons = facts["num_layers"], facts["ffn_size"]
    found = {}
    for path in paths:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file, skipinitialspace=True))
        except OSError as error:
            raise ConvertError(f"{path}: {error.strerror}") from None
        if not rows:
            raise ConvertError(f"{path}: no rows")
        for line, row in enumerate(rows, start=2):
            try:
                layer, batch, k = (int(float(row[name])) for name in ("layer", "batch_size", "optimal_k"))
            except (KeyError, TypeError, ValueError):
                raise ConvertError(f"{path}:{line}: expected the columns layer,batch_size,optimal_k "
                                   f"with whole numbers, found {dict(row)}") from None
            if not 0 <= layer < layers:
                raise ConvertError(f"{path}:{line}: layer {layer}, the model has layers 0 to {layers - 1}")
            if batch < 1 or not 1 <= k <= neurons:
                raise ConvertError(f"{path}:{line}: batch_size {batch}, optimal_k {k}: need batch_size >= 1 "
                                   f"and optimal_k of 1 to {neurons}")
            earlier = found.setdefault(batch, {}).get(layer)
            if earlier is not None:
                raise ConvertError(f"layer {layer} at batch size {batch} is in {earlier[1]} and in {path}")
            found[batch][layer] = (k, path)
    tables = {}
    for batch, entries in sorted(found.items()):
        missing = [str(layer) for layer in range(layers) if layer not in entries]
        if missing:
            raise ConvertError(f"no optimal_k at batch size {batch} for layer {', '.join(missing)}")
        tables[batch] = [entries[layer][0] for layer in range(layers)]
    return tables


# --- the router file ------------------------------------------------------


def densities(text, layers):
    """One default density per layer from "0.5" or a list with one number per layer."""
    try:
        values = [float(part) for part in str(text).split(",")]
    except ValueError:
        raise ConvertError(f"--density {text}: not a number or a list of numbers") from None
    if len(values) == 1:
        values = [1.0] + values * (layers - 1)
    if len(values) != layers:
        raise ConvertError(f"--density has {len(values)} numbers, the model has {layers} layers")
    if any(not 0 < v <= 1 for v in values):
        raise ConvertError(f"--density {text}: each number must be over 0 and at most 1")
    if values[0] != 1.0:
        raise ConvertError("--density: layer 0 always runs dense, its number must be 1")
    return values


def write_router_file(path, model_folder, attention, unit, density, mlp=None, mlp_k=None, training=None,
                      attention_dtype="f32", mlp_dtype="bf16", creator=CREATOR):
    """Write a router file. `attention` and `mlp` hold tensors by their final names."""
    import torch
    from safetensors.torch import save_file

    types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    facts = model_facts(model_folder)
    tensors = {}
    for group, dtype in ((attention or {}, attention_dtype), (mlp or {}, mlp_dtype)):
        for name, tensor in group.items():
            tensors[name] = tensor.detach().to("cpu", types[dtype]).contiguous()
            if not torch.isfinite(tensors[name]).all():
                raise ConvertError(f"{name}: values too large for {dtype}")
    metadata = {"format": "polar-routers", "version": VERSION, "creator": creator,
                "base_model": json.dumps(fingerprint(model_folder, facts))}
    if attention:
        metadata["attention"] = json.dumps({"unit": unit, "density": density})
    if mlp:
        metadata["mlp"] = json.dumps({"k": {str(batch): row for batch, row in sorted(mlp_k.items())}})
    if training:
        metadata["training"] = json.dumps(training)
    save_file(tensors, str(path), metadata=metadata)
    return tensors, metadata


def convert(options):
    facts = model_facts(options.model)
    training = {}
    attention, unit, mlp, mlp_k = None, None, None, None
    if options.attention:
        attention, unit, recall = load_attention(options.attention, facts)
        if any(r is not None for r in recall):
            training["attention_recall_in_name"] = recall
    if options.mlp:
        mlp, recall = load_mlp(options.mlp, facts)
        if any(r is not None for r in recall):
            training["mlp_recall_in_name"] = recall
        if not options.mlp_k:
            raise ConvertError("--mlp needs the tables of neurons to keep: --mlp-k FILE.csv …")
        mlp_k = read_tables(options.mlp_k, facts)
    elif options.mlp_k:
        raise ConvertError("--mlp-k without --mlp")
    if not attention and not mlp:
        raise ConvertError("nothing to convert: give --attention, --mlp or both")
    if options.training:
        training.update(read_json(options.training))
    return write_router_file(
        options.output, options.model, attention, unit, densities(options.density, facts["num_layers"]), mlp, mlp_k,
        training, options.attention_dtype, options.mlp_dtype, options.creator)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, metavar="DIR",
        help="Hugging Face folder of the model: config.json and *.safetensors")
    add("--attention", type=pathlib.Path, nargs="+", metavar="PATH", help="attention routers: a folder, or the files")
    add("--mlp", type=pathlib.Path, nargs="+", metavar="PATH", help="MLP routers: a folder, or the files")
    add("--mlp-k", type=pathlib.Path, nargs="+", metavar="CSV", help="tables layer,batch_size,optimal_k")
    add("--density", default="0.5", metavar="D",
        help="default share of attention units kept in layers from 1 on, or one number per layer, "
             "separated by commas, the first 1 (default: 0.5)")
    add("--attention-dtype", choices=("f32", "f16", "bf16"), default="f32", help="default: f32")
    add("--mlp-dtype", "--dtype", choices=("f32", "f16", "bf16"), default="bf16", help="default: bf16")
    add("--training", type=pathlib.Path, metavar="JSON", help="facts about the training to store in the file")
    add("--creator", default=CREATOR, help=f"who made the file (default: {CREATOR})")
    add("--output", type=pathlib.Path, required=True, metavar="FILE", help="the router file to write (.safetensors)")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    try:
        tensors, metadata = convert(options)
    except ConvertError as error:
        print(f"convert_routers.py: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors.values())} bytes")
    for name in ("attention", "mlp"):
        if name in metadata:
            print(f"  {name}: {metadata[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
