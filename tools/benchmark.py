"""Measure a model: parameters, FLOPs, latency, and the parts of a training step.

python tools/benchmark.py configs/dfine_hgnetv2_b4_coco.py
python tools/benchmark.py CONFIG --batch-size 1 8 --size 640 1088 --device cuda
python tools/benchmark.py CONFIG --train-step --data-root data/coco --out step.json
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.apis.command_line import make_parser, run_tool
from mmbackbones.apis.config import load_config, prepare, set_amp
from mmbackbones.evaluation.benchmark import (
    conditions,
    count_flops,
    count_parameters,
    format_table,
    measure,
    measure_stages,
    training_stages,
)


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        '--size', nargs=2, type=int, default=(640, 640), metavar=('H', 'W')
    )
    parser.add_argument('--batch-size', nargs='+', type=int, default=[1])
    parser.add_argument('--device', help='cpu, cuda, cuda:1; a GPU if there is one')
    parser.add_argument('--warmup', type=int, default=10, help='rounds not counted')
    parser.add_argument('--runs', type=int, default=50, help='rounds counted')
    parser.add_argument(
        '--train-step',
        action='store_true',
        help='time the parts of a training step on real batches instead',
    )
    parser.add_argument(
        '--amp',
        action=argparse.BooleanOptionalAction,
        help="of the training step; by default the config's choice",
    )
    parser.add_argument('--out', help='write everything as json')
    return parser.parse_args()


def benchmark_inference(
    model: nn.Module, args: argparse.Namespace, device: torch.device
) -> dict:
    """Parameters, FLOPs and latency; the detector's deploy form where it has one."""
    result: dict = {'parameters': count_parameters(model)}
    model.eval()
    if hasattr(model, 'switch_to_deploy'):
        model.switch_to_deploy()
        result['parameters_deploy'] = count_parameters(model)['total']
    timings = {}
    for batch_size in args.batch_size:
        images = torch.rand(batch_size, 3, *args.size, device=device)
        with torch.no_grad():
            if 'gflops' not in result:
                flops = count_flops(lambda: model(images[:1], mode='tensor'))  # noqa: B023
                result['gflops'] = round(flops / 1e9, 3)
            timings[f'batch {batch_size}'] = measure(
                lambda: model(images, mode='tensor'),  # noqa: B023
                device=device,
                num_warmup=args.warmup,
                num_runs=args.runs,
            )
    for name, count in result['parameters'].items():
        print(f'parameters, {name:<10} {count:>12,}')
    if 'parameters_deploy' in result:
        print(f'parameters, deploy     {result["parameters_deploy"]:>12,}')
    print(f'GFLOPs (2 per multiply-add) {result["gflops"]}\n')
    print(format_table(timings))
    result['latency'] = {name: asdict(timing) for name, timing in timings.items()}
    return result


def benchmark_step(
    model: nn.Module, cfg: Config, args: argparse.Namespace, device: torch.device
) -> dict:
    """Data, preprocess, forward, loss, backward, optimiser and EMA."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.runner import Runner

    from mmbackbones.engine.ema import RampEMA

    loader = Runner.build_dataloader(cfg.train_dataloader)

    def endless() -> Iterator[dict]:
        while True:
            yield from loader

    model.init_weights()
    model.train()
    timings = measure_stages(
        training_stages(
            model,
            endless(),
            build_optim_wrapper(model, cfg.optim_wrapper),
            ema=RampEMA(copy.deepcopy(model)),
        ),
        device=device,
        num_warmup=args.warmup,
        num_runs=args.runs,
    )
    print(f'\none step of {cfg.train_dataloader.batch_size} images')
    print(format_table(timings))
    result = {name: asdict(timing) for name, timing in timings.items()}
    if device.type == 'cuda':
        result['peak_memory_gib'] = torch.cuda.max_memory_allocated(device) / 2**30
        print(f'peak memory {result["peak_memory_gib"]:.2f} GiB')
    return dict(batch_size=cfg.train_dataloader.batch_size, stages=result)


def main() -> None:
    """Measure, print, and write a json if asked."""
    args = parse_args()
    from mmengine.device import get_device
    from mmengine.registry import MODELS, init_default_scope

    cfg = load_config(
        args.config,
        data_root=args.data_root,
        work_dir=args.work_dir,
        cfg_options=args.cfg_options,
    )
    prepare(cfg, training=False)
    device = torch.device(args.device or get_device())
    if args.amp is not None:
        set_amp(cfg, args.amp)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).to(device)
    result = dict(config=args.config, size=list(args.size), **conditions(device))
    print(json.dumps(result))
    if args.train_step:
        result['training_step'] = benchmark_step(model, cfg, args, device)
    else:
        result |= benchmark_inference(model, args, device)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == '__main__':
    run_tool(main)
