"""Time of D-FINE's criterion, forward and backward, against the official one.

Both sides see the same random predictions, in turns; medians are reported. The
official repository is found as `D-FINE/` in the folder that MMB_REFERENCE_DIR
names; without it only ours is timed.

    MMB_REFERENCE_DIR=references python benchmarks/criterion.py --out benchmarks
    python benchmarks/criterion.py --batch-size 1 --boxes 2000 --repeats 5
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmbackbones.losses.dfine_criterion import DFINECriterion
from mmbackbones.ops.predictions import (
    BoxTargets,
    DecoderOutput,
    DenoisingPairs,
    QueryPredictions,
)

NUM_BINS = 33


def random_boxes(*shape: int) -> Tensor:
    """Random `(*shape, 4)` cxcywh boxes inside the unit square."""
    size = torch.rand(*shape, 2) * 0.3 + 0.02
    return torch.cat((size / 2 + torch.rand(*shape, 2) * (1 - size), size), dim=-1)


def random_queries(
    num_layers: int, num_images: int, num_queries: int, num_classes: int
) -> QueryPredictions:
    """Random predictions of the shapes that a D-FINE decoder gives."""
    shape = (num_layers, num_images, num_queries)
    return QueryPredictions(
        logits=torch.randn(*shape, num_classes) - 2,
        boxes=random_boxes(*shape),
        corners=torch.randn(*shape, 4 * NUM_BINS),
        ref_boxes=random_boxes(*shape[1:]),
        pre_logits=torch.randn(*shape[1:], num_classes) - 2,
        pre_boxes=random_boxes(*shape[1:]),
    )


def denoising_pairs(sizes: tuple[int, ...], num_groups: int) -> DenoisingPairs:
    """Pairs of the official layout: per group all positives, then all negatives."""
    widest = max(sizes)
    rows, first = [], 0
    for image, size in enumerate(sizes):
        for group in range(num_groups):
            rows += [
                (image, group * 2 * widest + box, first + box) for box in range(size)
            ]
        first += size
    image, query, target = torch.tensor(rows, dtype=torch.int64).unbind(1)
    return DenoisingPairs(image, query, target, num_groups)


def random_batch(
    sizes: tuple[int, ...],
    *,
    num_layers: int = 6,
    num_queries: int = 300,
    num_classes: int = 80,
    num_denoising: int = 100,
    seed: int = 0,
) -> tuple[DecoderOutput, BoxTargets]:
    """Random output of a decoder in training and its targets.

    Args:
        sizes: boxes of each image; without any there are no denoising queries.
        num_layers: of the decoder.
        num_queries: matching queries.
        num_classes: of the data set.
        num_denoising: denoising queries, as in the decoder.
        seed: of the numbers.
    """
    torch.manual_seed(seed)
    targets = BoxTargets(
        torch.randint(num_classes, (sum(sizes),)), random_boxes(sum(sizes)), sizes
    )
    shape = (num_layers, len(sizes))
    queries = random_queries(*shape, num_queries, num_classes)
    encoder = (
        torch.randn(len(sizes), num_queries, num_classes) - 2,
        random_boxes(len(sizes), num_queries),
    )
    denoising = pairs = None
    if sum(sizes):
        num_groups = max(1, num_denoising // max(sizes))
        num_tokens = 2 * max(sizes) * num_groups
        denoising = random_queries(*shape, num_tokens, num_classes)
        pairs = denoising_pairs(sizes, num_groups)
    return DecoderOutput(queries, denoising, pairs, *encoder), targets


def bring_together(output: DecoderOutput, spread: float) -> None:
    """Shrink the differences between layers in place, as training does.

    Args:
        output: of `random_batch`.
        spread: 1 leaves all as it is, 0 makes every layer equal to the last.
    """
    for queries in (output.queries, output.denoising):
        for name in ('logits', 'boxes', 'corners') if queries is not None else ():
            values = getattr(queries, name)
            values.lerp_(values[-1:].clone(), 1 - spread)


def leaves(output: DecoderOutput) -> dict[str, Tensor]:
    """Predictions that receive a gradient, by name."""
    found = {'enc_logits': output.enc_logits, 'enc_boxes': output.enc_boxes}
    for kind in ('queries', 'denoising'):
        queries = getattr(output, kind)
        for field in fields(queries) if queries is not None else ():
            if field.name != 'ref_boxes':
                found[f'{kind}.{field.name}'] = getattr(queries, field.name)
    return found


class OperatorCounter(TorchDispatchMode):
    """Counts dispatched operators, autograd's included."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count and run one operator."""
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Give the official files what they import besides torch, while they load."""

    def box_area(boxes: Tensor) -> Tensor:
        return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

    root = Path(os.environ['MMB_REFERENCE_DIR'], 'D-FINE', 'src')
    packages = {
        'official': root,
        'official.core': None,
        'official.misc': None,
        'official.misc.dist_utils': None,
        'official.zoo': root / 'zoo',
        'official.zoo.dfine': root / 'zoo' / 'dfine',
        'torchvision': None,
        'torchvision.ops': None,
        'torchvision.ops.boxes': None,
    }
    modules = {name: types.ModuleType(name) for name in packages}
    for name, path in packages.items():
        modules[name].__path__ = [] if path is None else [str(path)]
    modules['official.core'].register = lambda: lambda cls: cls
    dist_utils = modules['official.misc.dist_utils']
    dist_utils.get_world_size = lambda: 1
    dist_utils.is_dist_available_and_initialized = lambda: False
    modules['torchvision.ops.boxes'].box_area = box_area
    with mock.patch.dict(sys.modules, modules):
        yield


def official_criterion(num_classes: int = 80) -> nn.Module:
    """The official criterion with its published settings."""
    with _stand_ins():
        matcher = importlib.import_module('official.zoo.dfine.matcher')
        criterion = importlib.import_module('official.zoo.dfine.dfine_criterion')
    return criterion.DFINECriterion(
        matcher.HungarianMatcher(
            {'cost_class': 2, 'cost_bbox': 5, 'cost_giou': 2},
            use_focal_loss=True,
            alpha=0.25,
            gamma=2.0,
        ),
        {
            'loss_vfl': 1,
            'loss_bbox': 5,
            'loss_giou': 2,
            'loss_fgl': 0.15,
            'loss_ddf': 1.5,
        },
        ['vfl', 'boxes', 'local'],
        alpha=0.75,
        gamma=2.0,
        num_classes=num_classes,
        reg_max=NUM_BINS - 1,
    )


def official_inputs(
    output: DecoderOutput, targets: BoxTargets, reg_scale: float = 4.0
) -> tuple[dict, list[dict]]:
    """The same predictions and targets in the official form."""

    def layers(queries: QueryPredictions) -> list[dict]:
        return [
            {
                'pred_logits': queries.logits[i],
                'pred_boxes': queries.boxes[i],
                'pred_corners': queries.corners[i],
                'ref_points': queries.ref_boxes,
                'teacher_corners': queries.corners[-1],
                'teacher_logits': queries.logits[-1],
            }
            for i in range(len(queries.logits))
        ]

    def head(logits: Tensor, boxes: Tensor) -> dict:
        return {'pred_logits': logits, 'pred_boxes': boxes}

    queries = output.queries
    *aux, last = layers(queries)
    official = {key: value for key, value in last.items() if 'teacher' not in key}
    official |= {
        'up': torch.tensor([0.5]),
        'reg_scale': torch.tensor([reg_scale]),
        'aux_outputs': aux,
        'pre_outputs': head(queries.pre_logits, queries.pre_boxes),
        'enc_aux_outputs': [head(output.enc_logits, output.enc_boxes)],
        'enc_meta': {'class_agnostic': False},
    }
    if output.denoising is not None:
        pairs, dn = output.dn_pairs, output.denoising
        official |= {
            'dn_outputs': layers(dn),
            'dn_pre_outputs': head(dn.pre_logits, dn.pre_boxes),
            'dn_meta': {
                'dn_positive_idx': [
                    pairs.query[pairs.image == i] for i in range(len(targets.sizes))
                ],
                'dn_num_group': pairs.num_groups,
            },
        }
    per_image = zip(
        targets.labels.split(targets.sizes),
        targets.boxes.split(targets.sizes),
        strict=True,
    )
    return official, [{'labels': labels, 'boxes': boxes} for labels, boxes in per_image]


def official_losses(
    criterion: nn.Module,
    output: DecoderOutput,
    targets: BoxTargets,
    reg_scale: float = 4.0,
) -> dict[str, Tensor]:
    """Official loss terms; its sort, which leaves ties open, is made stable."""
    stable = functools.partial(torch.argsort, stable=True)
    with mock.patch('torch.argsort', stable):
        return criterion(*official_inputs(output, targets, reg_scale))


def measure(
    losses: Callable[[], dict[str, Tensor]], output: DecoderOutput
) -> tuple[float, float, float]:
    """Milliseconds of forward, of backward, and of the processor in both."""
    start_cpu = time.process_time()
    start = time.perf_counter()
    total = sum(losses().values())
    middle = time.perf_counter()
    torch.autograd.grad(total, list(leaves(output).values()), allow_unused=True)
    end = time.perf_counter()
    cpu = time.process_time() - start_cpu
    return (middle - start) * 1e3, (end - middle) * 1e3, cpu * 1e3


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--boxes', type=int, default=600, help='in the whole batch')
    parser.add_argument('--num-layers', type=int, default=6)
    parser.add_argument('--num-queries', type=int, default=300)
    parser.add_argument('--spread', type=float, default=1.0, help='between layers')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--out', help='folder of the result file')
    return parser.parse_args()


def main() -> None:
    """Time both sides, print a table and write the result."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    # uneven, as in real data: image i has a share that grows with i
    shares = torch.arange(1, args.batch_size + 1) / sum(range(1, args.batch_size + 1))
    ends = (shares.cumsum(0) * args.boxes).round().int().tolist()
    sizes = tuple(b - a for a, b in zip([0, *ends[:-1]], ends, strict=True))
    output, targets = random_batch(
        sizes, num_layers=args.num_layers, num_queries=args.num_queries
    )
    bring_together(output, args.spread)
    for tensor in leaves(output).values():
        tensor.requires_grad_()

    sides = {'ours': functools.partial(DFINECriterion(), output, targets)}
    if 'MMB_REFERENCE_DIR' in os.environ:
        sides['official'] = functools.partial(
            official_losses, official_criterion(), output, targets
        )
    result = {
        'conditions': {
            'batch_size': args.batch_size,
            'boxes': args.boxes,
            'layers': args.num_layers,
            'queries': args.num_queries,
            'spread': args.spread,
            'device': 'cpu',
            'threads': args.threads,
            'repeats': args.repeats,
            'torch': torch.__version__,
            'python': platform.python_version(),
        }
    }
    times = {name: [] for name in sides}
    for name, losses in sides.items():  # also the warm-up
        with OperatorCounter() as operators:
            terms = losses()
        result[name] = {
            'operators_forward': operators.count,
            'sum_of_losses': sum(terms.values()).item(),
        }
    for _ in range(args.repeats):
        for name, losses in sides.items():
            times[name].append(measure(losses, output))
    print(f'{"":10}{"forward":>12}{"backward":>12}{"both":>12}{"CPU":>12}{"ops":>8}')
    for name, rows in times.items():
        forward, backward, cpu = map(statistics.median, zip(*rows, strict=True))
        both = statistics.median(row[0] + row[1] for row in rows)
        result[name] |= {
            'forward_ms': round(forward, 1),
            'backward_ms': round(backward, 1),
            'both_ms': round(both, 1),
            'cpu_ms': round(cpu, 1),
            'all_both_ms': [round(row[0] + row[1], 1) for row in rows],
            'all_cpu_ms': [round(row[2], 1) for row in rows],
        }
        print(
            f'{name:10}{forward:9.1f} ms{backward:9.1f} ms{both:9.1f} ms{cpu:9.1f} ms'
            f'{result[name]["operators_forward"]:8}'
        )
    if 'official' in sides:
        for unit in ('both_ms', 'cpu_ms'):  # a busy host disturbs the former
            ratio = result['official'][unit] / result['ours'][unit]
            result[f'ratio_of_{unit}'] = round(ratio, 1)
            print(f'official / ours, {unit}: {ratio:.1f}')
    if args.out:
        name = (
            f'criterion_l{args.num_layers}_b{args.batch_size}_{args.boxes}boxes'
            f'_spread{args.spread:g}_cpu{args.threads}_torch{torch.__version__.split("+")[0]}.json'
        )
        Path(args.out, name).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
