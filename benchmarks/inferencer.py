"""Images per second of a folder: one by one, in batches, and with reading ahead.

All sides run in one process, in turns, on the same files; medians are reported.

- one by one: a call of `predict` per file;
- batches: one call, reading and resizing in turns with the model;
- ahead: the same, while threads read and resize the next images.

    python benchmarks/inferencer.py CONFIG CHECKPOINT photos/ --out benchmarks
    python benchmarks/inferencer.py model.onnx photos/ --batch-size 4
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch

from mmbackbones.apis.inferencer import Inferencer
from mmbackbones.inference.sources import find_images


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('config', help='config, its name, or an exported file')
    parser.add_argument('checkpoint', nargs='?')
    parser.add_argument('source', help='folder of images')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--threads', type=int, default=1, help='of PyTorch')
    parser.add_argument('--workers', type=int, default=2, help='that read ahead')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--out', help='folder of the result file')
    return parser.parse_intermixed_args()


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Time all sides, print a table and write the result."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    model = Inferencer(args.config, args.checkpoint, args.device)
    files = find_images(args.source)
    batch = dict(batch_size=args.batch_size)
    sides: dict[str, Callable[[], object]] = {
        'one by one': lambda: [model.predict(name) for name in files],
        'batches': lambda: model.predict(files, num_workers=0, **batch),
        'ahead': lambda: model.predict(files, num_workers=args.workers, **batch),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()  # warm-up
    for _ in range(args.rounds):
        for name, call in sides.items():
            times[name].append(seconds(call))
    medians = {name: statistics.median(found) for name, found in times.items()}
    result = dict(
        conditions=dict(
            model=Path(args.config).stem,
            runtime=model.backend.name,
            images=len(files),
            batch_size=args.batch_size,
            device=args.device,
            threads=args.threads,
            workers=args.workers,
            processors=os.cpu_count(),
            rounds=args.rounds,
            torch=torch.__version__,
            python=platform.python_version(),
        ),
        images_per_s={name: round(len(files) / t, 1) for name, t in medians.items()},
        times_one_by_one={
            name: round(medians['one by one'] / t, 2) for name, t in medians.items()
        },
        all_s={name: [round(t, 3) for t in found] for name, found in times.items()},
    )
    for name in sides:
        print(
            f'{name:12}{result["images_per_s"][name]:8} images/s'
            f'{result["times_one_by_one"][name]:8} times one by one'
        )
    if args.out:
        where = args.device.partition(':')[0]
        name = (
            f'inferencer_{Path(args.config).stem}_{model.backend.name}'
            f'_b{args.batch_size}_{where}{args.threads}_workers{args.workers}'
            f'_torch{torch.__version__.split("+")[0]}.json'
        )
        Path(args.out, name).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
