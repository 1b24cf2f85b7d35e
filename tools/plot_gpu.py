#!/usr/bin/env python3
"""Plots of a GPU benchmark's records.

    tools/plot_gpu.py benches/results/h200.jsonl [rivals.jsonl ...] [--out FOLDER]

Draws two PNG files beside the first one, named after it: `-speedup` (Polar over dense, by batch and
context, with what the bytes allow and, where recorded, the roofline) and `-bandwidth` (each kernel
against the read-only stream of its process, rivals beside ours where the same case was timed). Needs
matplotlib.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CONTEXT_COLOURS = {1024: "#9ecae1", 2048: "#4292c6", 4096: "#08519c", 8192: "#08306b"}
SOURCES = {"polar": "#08519c", "sdpa": "#fdae6b", "flashinfer": "#e6550d", "reference": "#969696",
           "cublas": "#74c476"}


def read(paths):
    """All of the first file, and the rivals of the others: their own records are of another day."""
    records = []
    for path in paths:
        for line in path.read_text().splitlines():
            record = json.loads(line) if line.strip() else None
            if record and (path == paths[0] or record["kind"] == "rival"):
                records.append(record)
    return records


def title(records):
    run = next((r for r in records if r["kind"] == "run"), {})
    return f"{run.get('gpu', 'GPU')}, {run.get('date', '')}"


def speedup(records, path):
    """One panel per model: bars by batch and context, a mark where the bytes end, and where the roofline does."""
    models = defaultdict(dict)
    for r in records:
        if r["kind"] == "step":
            models[r["model"]][r["batch"], r["context"]] = r  # the last one counts
    if not models:
        return False
    figure, axes = plt.subplots(len(models), 1, figsize=(9, 2.3 * len(models)), squeeze=False)
    for axis, (name, points) in zip(axes[:, 0], models.items()):
        batches = sorted({b for b, _ in points})
        contexts = sorted({c for _, c in points})
        width = 0.8 / len(contexts)
        for j, context in enumerate(contexts):
            at = [i + (j - (len(contexts) - 1) / 2) * width for i, b in enumerate(batches) if (b, context) in points]
            rows = [points[b, context] for b in batches if (b, context) in points]
            colour = CONTEXT_COLOURS.get(context, "#333333")
            axis.bar(at, [r["speedup"] for r in rows], width * 0.92, color=colour, label=f"{context} tokens")
            # Under the bytes' mark: it shows where the two differ. Older records have none.
            roofs = [(x, r["roof_speedup"]) for x, r in zip(at, rows) if r.get("roof_speedup") is not None]
            axis.plot([x for x, _ in roofs], [y for _, y in roofs], "_", color="#31a354", markersize=9,
                      markeredgewidth=1.6, label="the roofline" if roofs and j == len(contexts) - 1 else None)
            axis.plot(at, [r["floor_speedup"] for r in rows], "_", color="#d94801", markersize=9,
                      markeredgewidth=1.6, label="what the bytes allow" if j == len(contexts) - 1 else None)
        density = next(iter(points.values()))["density"]
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set_title(f"{name}, attention density {density:g}", loc="left", fontsize=9)
        axis.set_xticks(range(len(batches)), [f"batch {b}" for b in batches], fontsize=8)
        axis.set_ylabel("dense / Polar time", fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=6.5, frameon=False, ncols=5, loc="upper left", bbox_to_anchor=(0.3, 1.18))
    figure.suptitle(f"Decode steps: {title(records)}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return True


def case(r):
    """A label of a kernel's case, the same for us and for a rival."""
    if r["kernel"] == "attention_decode":
        ragged = " ragged" if r.get("ragged") else ""
        density = "" if r.get("density", 1) == 1 else f" at {r['density']:g}"
        return f"{r['heads']}/{r['kv_heads']} {r['batch']}×{r['context']}{ragged}{density}"
    if "name" in r and "rows" in r:
        return f"{r['name']} {r['n']}×{r['k']}, {r['rows']} rows"
    return None


def family(r):
    kernel = r["kernel"]
    if kernel == "attention_decode":
        return "Decode attention"
    name = r.get("name", "")
    if kernel in ("linear", "linear_up", "linear_down") and name.split(" ")[0] in ("up", "down") and " " in name:
        return "Selective up and down products"
    if kernel in ("linear", "cublaslt"):
        return "Dense products and routers"
    return None


def bandwidth(records, path):
    """Bars per case: share of the read stream, ours and others'."""
    families = defaultdict(lambda: defaultdict(dict))
    for r in records:
        if r["kind"] == "kernel" or (r["kind"] == "rival" and "kernel" in r and "tbps" in r):
            group, label = family(r), case(r)
            if group is None or label is None or not r.get("tbps"):
                continue
            source = r.get("rival", "cublas" if r["kernel"] == "cublaslt" else "polar")
            share = r["tbps"] / r["read_tbps"]
            known = families[group][label].get(source, 0)
            families[group][label][source] = max(known, share)
    families = {g: {c: v for c, v in cases.items() if "polar" in v} for g, cases in families.items()}
    if not families:
        return False
    heights = [max(len(c), 3) for c in families.values()]
    figure, axes = plt.subplots(len(families), 1, figsize=(9, 0.21 * sum(heights) + 1.2 * len(heights)),
                                squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, (group, cases) in zip(axes[:, 0], families.items()):
        sources = [s for s in SOURCES if any(s in v for v in cases.values())]
        height = 0.84 / len(sources)
        for j, source in enumerate(sources):
            at = [i + (j - (len(sources) - 1) / 2) * height for i, v in enumerate(cases.values()) if source in v]
            axis.barh(at, [100 * v[source] for v in cases.values() if source in v], height * 0.95,
                      color=SOURCES[source], label=source)
        axis.set_yticks(range(len(cases)), cases, fontsize=6.5)
        axis.invert_yaxis()
        axis.set_ylim(len(cases) - 0.4, -0.6)
        axis.set_xlim(0, 105)
        axis.axvline(100, color="black", linewidth=0.6)
        axis.set_title(group, loc="left", fontsize=9)
        axis.set_xlabel("% of the read-only stream (bytes that must be read, once)", fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False, ncols=len(sources), loc="lower right", bbox_to_anchor=(1, 1))
    figure.suptitle(f"Bandwidth by kernel: {title(records)}", fontsize=10, y=0.999)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the PNG files; default: beside the records")
    arguments = parser.parse_args()
    records = read(arguments.records)
    folder = arguments.out or arguments.records[0].parent
    for name, draw in (("speedup", speedup), ("bandwidth", bandwidth)):
        path = folder / f"{arguments.records[0].stem}-{name}.png"
        print(path if draw(records, path) else f"no records for {path.name}")


if __name__ == "__main__":
    main()
