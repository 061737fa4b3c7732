"""Time of module robust criticality with and without the prefix cache.

    python benchmarks/criticality.py --model resnet18 --images 32 --batch 16 --epochs 2

Each layer is measured both ways; the table gives CPU seconds (of this process: other work on the
machine disturbs them less than wall time; so meant for --device cpu), their ratio, and the ratio
that the layers' multiply-adds predict. Both ways give the same values (checked).
"""

import argparse
import datetime
import platform
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from robustft.methods.rift import module_robust_criticality
from robustft.models import build_model, part_of, parts, weight_layers

FORWARDS_PER_EPOCH = 2  # one for the step, one for the evaluation after the epoch


def multiply_adds(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """Return the multiply-adds of each weight layer for one image."""
    counts: dict[str, int] = {}
    hooks = []
    for name, layer in weight_layers(model).items():

        def count(module: nn.Module, _: object, output: Tensor, name: str = name) -> None:
            positions = output[0, 0].numel() if output.dim() == 4 else 1
            counts[name] = positions * module.weight.numel()

        hooks.append(layer.register_forward_hook(count))
    with torch.no_grad():
        model(inputs[:1])
    for hook in hooks:
        hook.remove()
    return counts


def predicted_ratio(model: nn.Module, counts: dict[str, int], *, epochs: int) -> float:
    """Return the work with the cache over the work without it, from multiply-adds alone.

    Per layer: forwards over everything or over the suffix, and one backward to the activations of
    what comes after the layer plus one to its weight; the cache also runs the prefix once.
    """
    names = list(counts)
    part = {name: part_of(model, name) for name in names}
    total = sum(counts.values())
    naive = cached = 0.0
    for index, name in enumerate(names):
        suffix = sum(counts[other] for other in names if part[other] >= part[name])
        backward = sum(counts[other] for other in names[index + 1 :]) + counts[name]
        naive += total + epochs * (FORWARDS_PER_EPOCH * total + backward)
        cached += total + epochs * (FORWARDS_PER_EPOCH * suffix + backward)
    return cached / naive


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, help="file for the table")
    options = parser.parse_args()

    torch.set_num_threads(1)
    shape = (3, 32, 32)
    model = build_model(
        options.model,
        num_classes=10,
        image_shape=shape,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2471, 0.2435, 0.2616),
    )
    model = model.to(options.device).eval()
    draw = torch.Generator().manual_seed(0)
    inputs = torch.rand(options.images, *shape, generator=draw).to(options.device)
    labels = (torch.arange(options.images) % 10).to(options.device)

    seconds: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for name in weight_layers(model):
        values = []
        for cache in (False, True):
            begin = time.process_time()
            found = module_robust_criticality(
                model,
                inputs,
                labels,
                layers=[name],
                num_epochs=options.epochs,
                batch_size=options.batch,
                prefix_cache=cache,
            )[name]
            values.append(found.value)
            seconds[cache][name] = time.process_time() - begin
        if abs(values[0] - values[1]) > 1e-4 * max(1.0, abs(values[0])):
            raise SystemExit(f"{name}: {values[0]} without, {values[1]} with the cache")

    part_names = [name for name, _ in parts(model)]
    lines = [
        f"# Criticality with and without the prefix cache, {options.device}, "
        f"{datetime.date.today().isoformat()}",
        "",
        f"{options.model}, fresh weights, {options.images} images of 32 px, batch {options.batch}, "
        f"{options.epochs} epochs, one thread, CPU time, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}; one run per cell.",
        "",
        "| layer | part | without (s) | with (s) | ratio |",
        "|---|---|---|---|---|",
    ]
    for name in seconds[True]:
        without, cached = seconds[False][name], seconds[True][name]
        lines.append(
            f"| {name} | {part_names[part_of(model, name)]} | {without:.2f} | {cached:.2f} "
            f"| {cached / without:.2f} |"
        )
    without, cached = (sum(seconds[cache].values()) for cache in (False, True))
    counts = multiply_adds(model, inputs)
    lines += [
        f"| **all {len(counts)}** | | **{without:.2f}** | **{cached:.2f}** "
        f"| **{cached / without:.2f}** |",
        "",
        "Predicted from multiply-adds: "
        f"{predicted_ratio(model, counts, epochs=options.epochs):.2f} at {options.epochs} epochs, "
        f"{predicted_ratio(model, counts, epochs=10):.2f} at 10 (each layer also needs one forward "
        "pass over the set before the first epoch, in two pieces with the cache).",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if options.write is not None:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
