"""Processor time of the training pipeline, file to batch, on one core.

Three sides read the same JPEGs in turns: `ours`, the pipeline of the configs;
`plain`, the plain one to compare with; `stand_in`, which does with Pillow and torch
what torchvision's transforms, as D-FINE composes them, do: decode, distort in five
passes, pad, search a crop one trial after the other, cut, resize with antialiasing,
convert to float, resize the batch to a drawn size. It is not the original code, which
needs torchvision; it decodes once and handles boxes only where the crop needs them, so
that it is rather too fast.

Ours and plain end with a list of uint8 images, as a worker hands them on; the batch is
put together, made float and resized on the device, which `device_ms` times on the CPU.

    python benchmarks/data_pipeline.py --data-root data/coco --out benchmarks
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional as F

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.data.batch_augments import multi_scale_sizes
from mmbackbones.data.coco import CocoDetection
from mmbackbones.evaluation.benchmark import conditions

CONFIG = Path(__file__).resolve().parents[1] / 'configs' / 'dfine_hgnetv2_b4_coco.py'
BATCH_SIZE = 8


def distort(image: Image.Image) -> Image.Image:
    """Brightness, contrast, saturation, hue and order of channels."""
    enhance = [
        (ImageEnhance.Brightness, (0.875, 1.125)),
        (ImageEnhance.Contrast, (0.5, 1.5)),
        (ImageEnhance.Color, (0.5, 1.5)),
    ]
    for kind, limits in enhance:
        if random.random() < 0.5:
            image = kind(image).enhance(random.uniform(*limits))
    if random.random() < 0.5:
        hue, saturation, value = image.convert('HSV').split()
        turned = np.asarray(hue) + np.uint8(
            round(random.uniform(-0.05, 0.05) * 255) % 256
        )
        image = Image.merge('HSV', (Image.fromarray(turned), saturation, value))
        image = image.convert('RGB')
    if random.random() < 0.5:
        image = Image.merge('RGB', random.sample(image.split(), 3))
    return image


def zoom_out(image: Image.Image, boxes: Tensor) -> tuple[Image.Image, Tensor]:
    """Pad at random sides."""
    if random.random() < 0.5:
        return image, boxes
    ratio = random.uniform(1, 4)
    width, height = (int(side * ratio) for side in image.size)
    left = int((width - image.width) * random.random())
    top = int((height - image.height) * random.random())
    right, bottom = width - image.width - left, height - image.height - top
    padded = ImageOps.expand(image, (left, top, right, bottom))
    return padded, boxes + torch.tensor([left, top] * 2)


def iou_crop(image: Image.Image, boxes: Tensor) -> Image.Image:
    """Search a crop and cut it out."""
    if random.random() < 0.2 or not len(boxes):
        return image
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while True:
        least = random.choice((0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0))
        if least >= 1:
            return image
        for _ in range(40):
            share = 0.3 + 0.7 * torch.rand(2)
            width, height = int(image.width * share[0]), int(image.height * share[1])
            if not 0.5 <= width / height <= 2:
                continue
            place = torch.rand(2)
            left = int((image.width - width) * place[0])
            top = int((image.height - height) * place[1])
            crop = torch.tensor([left, top, left + width, top + height])
            inside = ((crop[:2] < centres) & (centres < crop[2:])).all(1)
            if not inside.any():
                continue
            sides = torch.minimum(crop[2:], boxes[:, 2:])
            sides = (sides - torch.maximum(crop[:2], boxes[:, :2])).clamp(min=0)
            shared = sides.prod(1)
            iou = shared / (areas + width * height - shared)
            if iou[inside].max() >= least:
                return image.crop(crop.tolist())


def stand_in(infos: Sequence[dict]) -> Tensor:
    """A batch `(N, 3, H, W)` in [0, 1], by one pass an operation."""
    images = []
    for info in infos:
        with Image.open(info['img_path']) as file:
            image = file.convert('RGB')
        boxes = torch.tensor([box['bbox'] for box in info['instances']]).reshape(-1, 4)
        image, boxes = zoom_out(distort(image), boxes)
        image = iou_crop(image, boxes)
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        image = image.resize((640, 640), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        images.append(pixels.contiguous().float() / 255)
    size = random.choice(multi_scale_sizes((640, 640), 4))
    return F.interpolate(torch.stack(images), size=size)


def cpu_ms(run: Callable[[], object]) -> float:
    """Processor time of a call in this process, milliseconds."""
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3


def through(pipeline: Compose) -> Callable[[Sequence[dict]], dict]:
    """Reading of a batch by a pipeline."""
    return lambda infos: pseudo_collate([pipeline(info) for info in infos])


def measure(
    sides: dict[str, Callable], data_set: CocoDetection, rounds: int
) -> dict[str, dict]:
    """Milliseconds an image of each side; every round reads all images once a side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        for name, read in sides.items():
            random.seed(index)
            np.random.seed(index)  # noqa: NPY002 (mmdet's flip draws from it)
            torch.manual_seed(index)
            spent = 0.0
            for start in range(0, len(data_set), BATCH_SIZE):
                stop = min(start + BATCH_SIZE, len(data_set))
                infos = [data_set.get_data_info(i) for i in range(start, stop)]
                spent += cpu_ms(lambda: read(infos))  # noqa: B023
            if index:  # the first is the warm-up
                times[name].append(spent / len(data_set))
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
    ours = through(Compose(cfg.train_pipeline))
    sides = dict(
        ours=ours, plain=through(Compose(cfg.plain_train_pipeline)), stand_in=stand_in
    )
    result = dict(
        conditions=dict(
            conditions('cpu'),
            images=len(data_set),
            size=640,
            batch_size=BATCH_SIZE,
            rounds=args.rounds,
            clock='processor time of the process, rounds interleaved, medians',
            stand_in='Pillow and torch in the passes of torchvision, not its code',
        ),
        **measure(sides, data_set, args.rounds),
    )
    batch = ours([data_set.get_data_info(i) for i in range(BATCH_SIZE)])
    result['device_ms_per_image'] = device_ms(cfg, batch)
    for name in ('stand_in', 'plain'):
        ratio = result[name]['cpu_ms_per_image'] / result['ours']['cpu_ms_per_image']
        result[f'{name}_over_ours'] = round(ratio, 2)
    print(json.dumps(result, indent=2))
    if args.out:
        version = torch.__version__.split('+')[0]
        name = f'data_pipeline_640px_{len(data_set)}images_cpu1_torch{version}.json'
        Path(args.out, name).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
