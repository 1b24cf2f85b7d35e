"""A safetensors writer and reader whose bytes depend on their input only.

The `safetensors` package writes the metadata in hash order, which differs from run to run.
"""

import json
import struct

import numpy as np

_TO_NP = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8", "U8": "u1", "BF16": "<u2"}
_SIZE = {k: np.dtype(v).itemsize for k, v in _TO_NP.items()}


def bf16_bits(a):
    """f32 array whose values are exact in bf16 -> its upper 16 bits."""
    bits = np.ascontiguousarray(a, dtype="<f4").view("<u4")
    assert not np.any(bits & 0xFFFF), "value not exact in bf16"
    return (bits >> 16).astype("<u2")


def write(path, tensors, metadata=None):
    """`tensors`: name -> (dtype name, array). BF16 arrays hold bits (uint16)."""
    header, blobs, at = {}, [], 0
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    for name in sorted(tensors, key=lambda n: (-_SIZE[tensors[n][0]], n)):  # wide types first: all stay aligned
        dtype, a = tensors[name]
        a = np.ascontiguousarray(a, dtype=_TO_NP[dtype])
        blob = a.tobytes()
        header[name] = {"dtype": dtype, "shape": list(a.shape), "data_offsets": [at, at + len(blob)]}
        at += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for blob in blobs:
            f.write(blob)


def read_raw(path):
    """-> (name -> (dtype name, shape, bytes), metadata)"""
    with open(path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(n))
        data = f.read()
    metadata = header.pop("__metadata__", {})
    out = {}
    for name, t in header.items():
        lo, hi = t["data_offsets"]
        out[name] = (t["dtype"], t["shape"], data[lo:hi])
    return out, metadata


def read(path):
    """-> (name -> array, metadata); BF16 comes back as f32."""
    raw, metadata = read_raw(path)
    out = {}
    for name, (dtype, shape, blob) in raw.items():
        a = np.frombuffer(blob, dtype=_TO_NP[dtype]).reshape(shape)
        if dtype == "BF16":
            a = (a.astype("<u4") << 16).view("<f4")
        out[name] = a
    return out, metadata


def fnv1a64(blob):
    h = 0xCBF29CE484222325
    for byte in blob:
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return format(h, "016x")
