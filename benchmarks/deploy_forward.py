"""Latency of D-FINE's deploy form in PyTorch against the official `deploy()`.

Both sides have the same weights and see the same image, in turns. Ours is folded by
`fold_for_inference` and its convolutions are fused by `fuse_for_cpu`. The
official repository is found through MMB_REFERENCE_DIR.

    MMB_REFERENCE_DIR=references python benchmarks/deploy_forward.py --out benchmarks
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from official_dfine import build_pair
from torch import nn

from mmbackbones.layers.cpu_conv import fuse_for_cpu
from mmbackbones.layers.fold import fold_for_inference


class WithPostprocessing(nn.Module):
    """Ours with the selection of detections, which the official model ends with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> tuple:
        """Scores, labels and boxes."""
        output = self.model(images, mode='tensor')
        return self.model.select(output, *images.shape[-2:])


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--sizes', nargs='+', default=['N', 'L'], choices=('N', 'L'))
    parser.add_argument('--pixels', type=int, default=640)
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', help='folder of the result file')
    return parser.parse_args()


@torch.inference_mode()
def compare(size: str, pixels: int, repeats: int) -> dict:
    """Medians of wall and processor time of both sides, in milliseconds."""
    ours, official = build_pair(size)
    images = torch.rand(1, 3, pixels, pixels)
    sizes = torch.tensor([[pixels, pixels]])
    ours = fuse_for_cpu(fold_for_inference(ours))
    sides = dict(ours=WithPostprocessing(ours).eval(), official=official)
    scores = [sides['ours'](images, sizes)[0], sides['official'](images, sizes)[2]]
    difference = (scores[0] - scores[1]).abs().max().item()
    wall, cpu = ({name: [] for name in sides} for _ in range(2))
    for i in range(repeats + 2):  # the first two warm up
        for name, side in sides.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            side(images, sizes)
            if i > 1:
                wall[name].append(1e3 * (time.perf_counter() - start))
                cpu[name].append(1e3 * (time.process_time() - start_cpu))
    result: dict = dict(largest_difference_of_scores=difference)
    for unit, times in (('wall_ms', wall), ('cpu_ms', cpu)):
        for name in sides:
            result[f'{name}_{unit}'] = round(statistics.median(times[name]), 1)
        ratio = result[f'ours_{unit}'] / result[f'official_{unit}']
        result[f'ratio_of_{unit}'] = round(ratio, 3)
    return result


def main() -> None:
    """Time, print and write."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    result = dict(
        conditions=dict(
            pixels=args.pixels,
            batch_size=1,
            device=platform.machine(),
            threads=args.threads,
            repeats=args.repeats,
            torch=torch.__version__,
            python=platform.python_version(),
        )
    )
    for size in args.sizes:
        result[size] = compare(size, args.pixels, args.repeats)
        print(size, json.dumps(result[size]))
    if args.out:
        version = torch.__version__.split('+')[0]
        name = f'deploy_forward_{args.pixels}px_cpu{args.threads}_torch{version}.json'
        Path(args.out, name).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
