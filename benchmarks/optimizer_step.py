"""Clipping, AdamW and averaging of a training step against the official ones.

Both sides have a model of the same tensors with the same gradients and step in turns.
Official: `clip_grad_norm_`, AdamW as its configs build it, and its own `ModelEMA`, read
from the checkout `D-FINE/` in the folder that MMB_REFERENCE_DIR names; without it only
ours is timed. Ours: the optimiser wrapper of the config, in full precision, and
`RampEMA`; storing the norm for the log is part of it.

    MMB_REFERENCE_DIR=references python benchmarks/optimizer_step.py --out benchmarks
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmbackbones.detectors  # noqa: F401
from mmbackbones.engine.ema import RampEMA
from mmbackbones.evaluation.benchmark import conditions

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
SIZES = {'N': 'dfine_nano_hgnetv2_b0_coco.py', 'L': 'dfine_hgnetv2_b4_coco.py'}


def official_average(model: nn.Module) -> nn.Module:
    """The official `ModelEMA`, whose module imports two others of its repository."""
    modules = {name: types.ModuleType(name) for name in ('core', 'misc', 'optim')}
    modules['core'].register = lambda: lambda cls: cls
    modules['misc'].dist_utils = types.SimpleNamespace(de_parallel=lambda model: model)
    names = {f'official.{name}': module for name, module in modules.items()}
    names['official'] = types.ModuleType('official')
    for module in names.values():
        module.__path__ = []
    path = Path(os.environ['MMB_REFERENCE_DIR'], 'D-FINE', 'src', 'optim', 'ema.py')
    spec = importlib.util.spec_from_file_location('official.optim.ema', path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, names):
        spec.loader.exec_module(module)
    return module.ModelEMA(model, decay=0.9999, warmups=1000)


def build_wrapper(model: nn.Module, size: str) -> OptimWrapper:
    """Optimiser and wrapper of a config, in full precision."""
    cfg = Config.fromfile(CONFIGS / SIZES[size])
    options = dict(cfg.optim_wrapper, type=OptimWrapper)
    options.pop('loss_scale')
    return build_optim_wrapper(model, options)


def build(size: str) -> tuple[nn.Module, OptimWrapper]:
    """A model with gradients, and its optimiser wrapper."""
    torch.manual_seed(0)
    cfg = Config.fromfile(CONFIGS / SIZES[size])
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    wrapper = build_wrapper(model, size)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return model, wrapper


def our_step(size: str) -> dict[str, Callable]:
    """Parts of our step, by name."""
    model, wrapper = build(size)
    average = RampEMA(model)
    return dict(
        clip_and_update=wrapper.step, ema=lambda: average.update_parameters(model)
    )


def official_step(size: str) -> dict[str, Callable]:
    """Parts of the official step, by name."""
    model, wrapper = build(size)
    keys = ('params', 'lr', 'weight_decay')
    groups = [{k: group[k] for k in keys} for group in wrapper.param_groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    average = official_average(model)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    return dict(clip_and_update=step, ema=lambda: average.update(model))


def compare(size: str, repeats: int) -> dict:
    """Medians of processor time of both sides, in milliseconds."""
    sides = {'ours': our_step(size)}
    if 'MMB_REFERENCE_DIR' in os.environ:
        sides['official'] = official_step(size)
    times = {name: {part: [] for part in parts} for name, parts in sides.items()}
    for index in range(repeats + 3):  # the first three warm up
        for name, parts in sides.items():
            for part, run in parts.items():
                start = time.process_time()
                run()
                if index >= 3:
                    times[name][part].append((time.process_time() - start) * 1e3)
    result: dict = {}
    for name, parts in times.items():
        whole = [sum(values) for values in zip(*parts.values(), strict=True)]
        result[name] = {
            f'{part}_cpu_ms': round(statistics.median(values), 2)
            for part, values in dict(parts, whole=whole).items()
        }
    if 'official' in result:
        ratio = result['official']['whole_cpu_ms'] / result['ours']['whole_cpu_ms']
        result['official_over_ours'] = round(ratio, 2)
    return result


def main() -> None:
    """Compare, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--sizes', nargs='+', default=['N', 'L'], choices=SIZES)
    parser.add_argument('--repeats', type=int, default=31)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', help='folder of the result file')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    init_default_scope('mmdet')
    result = dict(
        conditions=dict(
            conditions('cpu'),
            repeats=args.repeats,
            clock='processor time of the process, sides in turns, medians',
        ),
        **{size: compare(size, args.repeats) for size in args.sizes},
    )
    print(json.dumps(result, indent=2))
    if args.out:
        version = torch.__version__.split('+')[0]
        sizes = ''.join(args.sizes).lower()
        name = f'optimizer_step_dfine_{sizes}_cpu{args.threads}_torch{version}.json'
        Path(args.out, name).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
