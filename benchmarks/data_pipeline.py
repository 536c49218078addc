"""Processor time of the training pipeline, file to batch, on one core.

Three sides read the same JPEGs in turns: `ours`, the pipeline of the configs;
`plain`, the plain one to compare with; `official`, data set, transforms and collation
of the official repository, which MMB_REFERENCE_DIR names; it needs torchvision.

Ours and plain end with a list of uint8 images, as a worker hands them on; the batch is
put together, made float and resized on the device, which `device_ms` times on the CPU.

    MMB_REFERENCE_DIR=references python benchmarks/data_pipeline.py \
        --data-root data/coco --out benchmarks
"""

import argparse
import importlib
import json
import os
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.data.coco import CocoDetection
from mmbackbones.evaluation.benchmark import conditions

CONFIG = Path(__file__).resolve().parents[1] / 'configs' / 'dfine_hgnetv2_b4_coco.py'
BATCH_SIZE = 8


def official(data_root: str) -> Callable[[Sequence[int]], object]:
    """Reading of a batch by the official data set, transforms and collation.

    torchvision's transforms are Python. Where its compiled part does not load beside
    this torch, two of its operators have to be declared for the rest to be imported.
    """
    declared = torch.library.Library('torchvision', 'FRAGMENT')
    if not hasattr(torch.ops.torchvision, 'nms'):
        for name in ('nms', 'qnms'):
            declared.define(f'{name}(Tensor a, Tensor b, float c) -> Tensor')
    flops = types.ModuleType('calflops')  # which is not asked for flops here
    flops.calculate_flops = None
    sys.path.insert(0, str(Path(os.environ['MMB_REFERENCE_DIR'], 'D-FINE')))
    with mock.patch.dict(sys.modules, {'calflops': flops}):
        data = importlib.import_module('src.data')
        transforms = importlib.import_module('src.data.transforms')
    recipe = yaml.safe_load(
        Path(sys.path[0], 'configs/dfine/include/dataloader.yml').read_text()
    )['train_dataloader']
    data_set = data.CocoDetection(
        f'{data_root}/train2017',
        f'{data_root}/annotations/instances_train2017.json',
        transforms.Compose(**recipe['dataset']['transforms']),
        return_masks=False,
        remap_mscoco_category=True,
    )
    data_set.set_epoch(0)
    recipe['collate_fn'].pop('type')
    collate = data.BatchImageCollateFunction(**recipe['collate_fn'])
    return lambda indices: collate([data_set[i] for i in indices])


def cpu_ms(run: Callable[[], object]) -> float:
    """Processor time of a call in this process, milliseconds."""
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3


def through(
    pipeline: Compose, data_set: CocoDetection
) -> Callable[[Sequence[int]], dict]:
    """Reading of a batch by a pipeline."""
    return lambda indices: pseudo_collate(
        [pipeline(data_set.get_data_info(i)) for i in indices]
    )


def measure(
    sides: dict[str, Callable], num_images: int, rounds: int
) -> dict[str, dict]:
    """Milliseconds an image of each side; every round reads all images once a side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        for name, read in sides.items():
            random.seed(index)
            np.random.seed(index)  # noqa: NPY002 (mmdet's flip draws from it)
            torch.manual_seed(index)
            spent = 0.0
            for start in range(0, num_images, BATCH_SIZE):
                indices = range(start, min(start + BATCH_SIZE, num_images))
                spent += cpu_ms(lambda: read(indices))  # noqa: B023
            if index:  # the first is the warm-up
                times[name].append(spent / num_images)
    return {
        name: dict(
            cpu_ms_per_image=round(statistics.median(values), 2),
            images_per_s=round(1e3 / statistics.median(values)),
            all_cpu_ms=[round(value, 2) for value in values],
        )
        for name, values in times.items()
    }


def device_ms(cfg: Config, batch: dict) -> float:
    """What is left for the device, per image, here on the CPU; median of sizes."""
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    hub = MessageHub.get_current_instance()
    times = []
    for iteration in range(15):
        hub.update_info('iter', iteration)
        copies = dict(
            inputs=batch['inputs'],
            data_samples=[sample.clone() for sample in batch['data_samples']],
        )
        times.append(cpu_ms(lambda: preprocessor(copies, True)))  # noqa: B023
    return round(statistics.median(times) / BATCH_SIZE, 2)


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data-root', required=True, help='folder of a COCO set')
    parser.add_argument('--images', type=int, default=200)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--out', help='folder of the result file')
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    init_default_scope('mmdet')
    cfg = Config.fromfile(CONFIG)
    data_set = CocoDetection(
        data_root=args.data_root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        pipeline=[],
        indices=args.images,
    )
    ours = through(Compose(cfg.train_pipeline), data_set)
    plain = through(Compose(cfg.plain_train_pipeline), data_set)
    sides = dict(ours=ours, plain=plain)
    if 'MMB_REFERENCE_DIR' in os.environ:
        sides['official'] = official(args.data_root)
    result = dict(
        conditions=dict(
            conditions('cpu'),
            images=len(data_set),
            size=640,
            batch_size=BATCH_SIZE,
            rounds=args.rounds,
            clock='processor time of the process, rounds interleaved, medians',
        ),
        **measure(sides, len(data_set), args.rounds),
    )
    batch = ours(range(BATCH_SIZE))
    result['device_ms_per_image'] = device_ms(cfg, batch)
    for name in sorted(set(sides) - {'ours'}):
        ratio = result[name]['cpu_ms_per_image'] / result['ours']['cpu_ms_per_image']
        result[f'{name}_over_ours'] = round(ratio, 2)
    print(json.dumps(result, indent=2))
    if args.out:
        version = torch.__version__.split('+')[0]
        name = f'data_pipeline_640px_{len(data_set)}images_cpu1_torch{version}.json'
        Path(args.out, name).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
