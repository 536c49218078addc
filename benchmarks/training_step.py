"""A whole training step on the CPU against the official one: forward to average.

Both sides have the same weights at the start, the same images and boxes, and step in
turns, in full precision, without multi-scale. Ours takes 8-bit images and makes them
float; the official side gets them as its loader hands them on. Operators are counted
in one further step. The official repository is found through MMB_REFERENCE_DIR.

    MMB_REFERENCE_DIR=references python benchmarks/training_step.py --sizes N L
"""

import argparse
import gc
import json
import math
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from criterion import OperatorCounter, official_criterion
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from official_dfine import build_official, build_ours
from optimizer_step import build_wrapper, official_average
from torch import Tensor, nn

from mmbackbones.engine.ema import RampEMA
from mmbackbones.evaluation.benchmark import conditions
from mmbackbones.ops.boxes import xyxy_to_cxcywh


def random_batch(
    batch_size: int, pixels: int, boxes_per_image: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """8-bit images `(N, 3, H, W)`, labels and xyxy boxes in pixels of each."""
    torch.manual_seed(0)
    images = torch.randint(256, (batch_size, 3, pixels, pixels)).byte()
    labels = [torch.randint(80, (boxes_per_image,)) for _ in range(batch_size)]
    corners = [torch.rand(boxes_per_image, 2) * 0.6 for _ in range(batch_size)]
    boxes = [
        torch.cat((corner, corner + 0.05 + 0.3 * torch.rand(corner.shape)), 1) * pixels
        for corner in corners
    ]
    return images, labels, boxes


def our_step(
    model: nn.Module,
    size: str,
    images: Tensor,
    labels: list[Tensor],
    boxes: list[Tensor],
) -> Callable[[], float]:
    """A step of ours, which returns the loss."""
    model.train()
    for augment in model.data_preprocessor.batch_augments or ():
        augment.enabled = False
    wrapper = build_wrapper(model, size)
    average = RampEMA(model)
    shape = tuple(images.shape[-2:])

    def sample(image_labels: Tensor, image_boxes: Tensor) -> DetDataSample:
        found = DetDataSample(metainfo=dict(img_shape=shape, scale_factor=(1.0, 1.0)))
        found.gt_instances = InstanceData(
            labels=image_labels, bboxes=image_boxes.clone()
        )
        return found

    def step() -> float:
        samples = [sample(*pair) for pair in zip(labels, boxes, strict=True)]
        data = dict(inputs=list(images), data_samples=samples)
        outputs = model.train_step(data, wrapper)
        average.update_parameters(model)
        return outputs['loss'].item()

    return step


def official_step(
    model: nn.Module,
    size: str,
    images: Tensor,
    labels: list[Tensor],
    boxes: list[Tensor],
) -> Callable[[], float]:
    """A step as the official train loop makes it, which returns the loss."""
    model.train()
    criterion = official_criterion().train()
    groups = [
        {k: group[k] for k in ('params', 'lr', 'weight_decay')}
        for group in build_wrapper(model, size).param_groups
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    average = official_average(model)
    inputs = images.flip(1).float() / 255  # ours turns BGR around
    targets = [
        dict(labels=image_labels, boxes=xyxy_to_cxcywh(image_boxes) / images.shape[-1])
        for image_labels, image_boxes in zip(labels, boxes, strict=True)
    ]

    def step() -> float:
        losses = criterion(model(inputs, targets=targets), targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        average.update(model)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f'the official loss is {value}')
        return value

    return step


def compare(size: str, args: argparse.Namespace) -> dict:
    """Medians of processor and wall time of both sides, in milliseconds."""
    ours = build_ours(size)
    batch = random_batch(args.batch_size, args.pixels, args.boxes)
    official = build_official(size, ours)
    steps = dict(
        ours=our_step(ours, size, *batch),
        official=official_step(official, size, *batch),
    )
    result: dict = {}
    for name, step in steps.items():  # also the warm-up
        with OperatorCounter() as operators:
            loss = step()
        result[name] = dict(operators=operators.count, first_loss=round(loss, 4))
    cpu, wall = ({name: [] for name in steps} for _ in range(2))
    for _ in range(args.repeats):
        for name, step in steps.items():
            gc.collect()
            begin, begin_cpu = time.perf_counter(), time.process_time()
            step()
            cpu[name].append((time.process_time() - begin_cpu) * 1e3)
            wall[name].append((time.perf_counter() - begin) * 1e3)
    for name in steps:
        result[name] |= dict(
            cpu_ms=round(statistics.median(cpu[name])),
            wall_ms=round(statistics.median(wall[name])),
            all_cpu_ms=[round(value) for value in cpu[name]],
        )
    ratio = result['ours']['cpu_ms'] / result['official']['cpu_ms']
    result['ours_over_official_cpu'] = round(ratio, 3)
    return result


def main() -> None:
    """Compare, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--sizes', nargs='+', default=['N', 'L'], choices=('N', 'L'))
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--pixels', type=int, default=640)
    parser.add_argument('--boxes', type=int, default=7, help='in each image')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', help='folder of the result file')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for size in args.sizes:
        result = dict(
            conditions=dict(
                conditions('cpu'),
                batch_size=args.batch_size,
                pixels=args.pixels,
                boxes_per_image=args.boxes,
                repeats=args.repeats,
                clock='processor time of the process, sides in turns, medians',
            ),
            **compare(size, args),
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result['peak_memory_of_both_mib'] = peak // 2**10
        print(json.dumps({size: result}, indent=2))
        if args.out:
            version = torch.__version__.split('+')[0]
            name = (
                f'training_step_dfine_{size.lower()}_b{args.batch_size}_{args.pixels}px'
                f'_cpu{args.threads}_torch{version}.json'
            )
            Path(args.out, name).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
