"""Random predictions for tests of criteria: those of `benchmarks/criterion.py`.

Shared with the benchmark, so that both see the same.
"""

import dataclasses
import importlib.util
from pathlib import Path

import torch

_path = Path(__file__).parents[1] / 'benchmarks' / 'criterion.py'
_spec = importlib.util.spec_from_file_location('criterion_benchmark', _path)
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)

SMALL = dict(num_layers=3, num_queries=20, num_classes=5, num_denoising=10)


def with_gradients(output):
    leaves = benchmark.leaves(output)
    for leaf in leaves.values():
        leaf.requires_grad_()
    return leaves


def map_tensors(output, convert):
    """The output with `convert` applied to every floating tensor."""

    def walk(value):
        if dataclasses.is_dataclass(value):
            return dataclasses.replace(
                value,
                **{f.name: walk(getattr(value, f.name)) for f in fields(value)},
            )
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return convert(value) if is_float else value

    fields = dataclasses.fields
    return walk(output)
