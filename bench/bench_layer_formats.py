"""Formats by layer against one format for all layers, of as many bytes, on a real model.

    python bench/bench_layer_formats.py --model FOLDER --books a.txt b.txt --json FILE

Each layer is measured by itself on the library's own text, as `paged-kv calibrate --budget` does,
and formats are chosen for the bytes that each uniform format takes. Both are then measured on books
that nothing was tuned on: Kullback-Leibler divergence from native. What was measured of a layer or
a book is kept in FILE.part; the same command goes on with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from quality_windows import book_windows
from report import Row, add_arguments, write_report
from training.train_demo_model import read_book

from paged_kv.blocks.geometry import IntArray
from paged_kv.cache.formats import NATIVE
from paged_kv.cache.layer_formats import CANDIDATES, LayerFormats, formats_name, resolve_formats
from paged_kv.engine.evaluate import Quality, compare_formats, token_windows
from paged_kv.engine.format_choice import Sensitivity, bytes_by_layer, measure_layer
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.evaluation import from_json, to_json
from paged_kv.entrypoints.kept_results import KeptResults
from paged_kv.entrypoints.progress import WorkBar
from paged_kv.models.attached_model import AttachedModel
from paged_kv.models.calibration import TEXT, Calibration, encode, usual_calibration
from paged_kv.models.huggingface import PagedModel
from paged_kv.models.loading import load_model, load_tokenizer

LENGTH = 1024
PER_STEP = 64  # tokens
UNIFORM = ("int3", "k4v2", "int4")  # that some mixture of the others can have the bytes of


def measure(
    model: AttachedModel, calibration: Calibration, windows: IntArray, kept: KeptResults
) -> Sensitivity:
    formats = resolve_formats(list(CANDIDATES)).of(len(CANDIDATES))
    rows = []
    with WorkBar("layers measured", len(model.layer_shapes)) as bar:
        for layer in range(len(model.layer_shapes)):
            key = f"layer {layer} | {windows.shape} {','.join(CANDIDATES)}"
            if key not in kept:
                found = measure_layer(
                    model, layer, windows, formats, calibration=calibration.layers
                )
                kept.keep(key, found.tolist())
            rows.append(kept[key])
            bar.advance()
    return Sensitivity(tuple(formats), np.array(rows), bytes_by_layer(model, formats))


def compare(
    model: AttachedModel,
    calibration: Calibration,
    chosen: dict[str, LayerFormats],
    windows: IntArray,
    book: str,
    kept: KeptResults,
) -> dict[str, Quality]:
    """Each case on windows of a book."""
    found = {}
    for name, kv_format in chosen.items():
        key = f"{book} | {windows.shape} {formats_name(kv_format.of(len(model.layer_shapes)))}"
        if key not in kept:
            formats = [LayerFormats(NATIVE), kv_format]
            pair = compare_formats(
                model,
                formats,
                windows,
                calibration=calibration.layers,
                tokens_per_step=PER_STEP,
            )
            kept.keep(key, to_json(pair[1]))
        found[name] = from_json(kept[key])
    return found


def rows_of(
    sensitivity: Sensitivity, mixed: dict[str, LayerFormats], found: dict[str, Quality], place: str
) -> list[Row]:
    rows = []
    names = [each.name for each in sensitivity.kv_formats]
    for name, layers in mixed.items():
        index = names.index(name)
        chosen = [names.index(each.name) for each in layers.of(len(sensitivity.divergences))]
        size = sensitivity.token_bytes[np.arange(len(chosen)), chosen].sum()
        uniform, mixture = found[name], found[f"mixed as {name}"]
        rows.append(
            Row(
                case=f"for the bytes of {name}, {place}",
                metric="KL from native",
                value=1000 * mixture.divergence,
                unit="mnat",
                baseline=name,
                baseline_value=1000 * uniform.divergence,
                ratio=uniform.divergence / mixture.divergence,
            )
        )
        rows.append(
            Row(
                case=f"for the bytes of {name}, {place}",
                metric="bytes of a token",
                value=float(size),
                unit="B",
                baseline=name,
                baseline_value=float(sensitivity.token_bytes[:, index].sum()),
                ratio=float(sensitivity.token_bytes[:, index].sum() / size),
            )
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL_FOLDER))
    parser.add_argument("--books", type=Path, nargs="+", default=[], help="plain text")
    parser.add_argument("--windows", type=int, default=2, help="of each book (2)")
    parser.add_argument("--threads", type=int, help="of the CPU")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    length = LENGTH // 2 if arguments.quick else LENGTH
    tokenizer = load_tokenizer(arguments.model)
    model = PagedModel(load_model(arguments.model, torch.float32))
    calibration = usual_calibration(model, tokenizer)
    kept = KeptResults(arguments.json)
    own_ids = encode(tokenizer, TEXT.read_text(encoding="utf-8"))
    own = token_windows(own_ids, length, None)[:1]
    sensitivity = measure(model, calibration, own, kept)
    names = [each.name for each in sensitivity.kv_formats]
    sizes = sensitivity.token_bytes.sum(0)
    mixed = {name: sensitivity.choose(sizes[names.index(name)])[0] for name in UNIFORM}
    num_layers = len(model.layer_shapes)
    for name, layers in mixed.items():
        print(f"for the bytes of {name}: {formats_name(layers.of(num_layers))}")
    cases = {name: resolve_formats(name) for name in UNIFORM}
    cases |= {f"mixed as {name}": layers for name, layers in mixed.items()}
    texts = {
        path.stem: book_windows(
            encode(tokenizer, read_book(path)),
            length,
            tokenizer.bos_token_id,
            tuning=False,
            count=arguments.windows,
        )
        for path in arguments.books
    }
    if not texts:
        texts["what follows"] = token_windows(own_ids[length:], length // 2, None)[:1]
    rows = []
    for name, windows in texts.items():
        found = compare(model, calibration, cases, windows, name, kept)
        rows += rows_of(sensitivity, mixed, found, name)
    write_report("layer_formats", rows, arguments.json)


if __name__ == "__main__":
    main()
