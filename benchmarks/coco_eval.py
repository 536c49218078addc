"""COCO box evaluation against pycocotools: time, and the same twelve numbers.

Random boxes of all sizes in as many images and classes as val2017 has, and detections
around them. Ours starts from arrays, as the model gives them; pycocotools from the list
of results that it needs, which is made before its time starts. Both read and index the
file of ground truth within their time.

    python benchmarks/coco_eval.py --out benchmarks
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import MMLogger
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.evaluation import coco
from mmbackbones.evaluation.benchmark import conditions

NUM_CLASSES = 80


def ground_truth(num_images: int, boxes_per_image: float) -> dict:
    """A COCO file; one box in a hundred is a crowd."""
    rng = np.random.default_rng(0)
    annotations = []
    for image, count in enumerate(rng.poisson(boxes_per_image, num_images)):
        for _ in range(count):
            side = rng.choice([15, 60, 200]) * rng.uniform(0.5, 1.5, 2)
            x, y = rng.uniform(0, 400, 2)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image,
                    category_id=int(rng.integers(NUM_CLASSES)),
                    bbox=[float(x), float(y), float(side[0]), float(side[1])],
                    area=float(side.prod()),
                    iscrowd=int(rng.random() < 0.01),
                )
            )
    return dict(
        images=[dict(id=i, width=640, height=640) for i in range(num_images)],
        categories=[dict(id=i, name=str(i)) for i in range(NUM_CLASSES)],
        annotations=annotations,
    )


def predictions(truth: dict, per_image: int) -> list[dict]:
    """Arrays of each image: near its boxes first, the rest anywhere."""
    rng = np.random.default_rng(1)
    boxes: list[list] = [[] for _ in truth['images']]
    for annotation in truth['annotations']:
        x, y, w, h = annotation['bbox']
        box = np.array([x, y, x + w, y + h]) + rng.normal(0, 0.08, 4) * [w, h, w, h]
        boxes[annotation['image_id']].append((*box, annotation['category_id']))
    found = []
    for image, near in enumerate(boxes):
        rest = per_image - len(near[:per_image])
        corners = rng.uniform(0, 500, (rest, 2))
        others = np.hstack((corners, corners + rng.uniform(2, 200, (rest, 2))))
        classes = rng.integers(NUM_CLASSES, size=(rest, 1))
        rows = np.vstack(
            (np.reshape(near[:per_image], (-1, 5)), [*np.hstack((others, classes))])
        )
        found.append(
            dict(
                img_id=image,
                bboxes=rows[:, :4].astype(np.float32),
                scores=rng.random(per_image).astype(np.float32),
                labels=rows[:, 4].astype(np.int64),
            )
        )
    return found


def result_list(found: list[dict]) -> list[dict]:
    """COCO's list of results."""
    results = []
    for image in found:
        boxes = image['bboxes'].astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        columns = (boxes.tolist(), image['scores'].tolist(), image['labels'].tolist())
        results += [
            dict(image_id=image['img_id'], category_id=label, bbox=box, score=score)
            for box, score, label in zip(*columns, strict=True)
        ]
    return results


def ours(path: Path, found: list[dict]) -> tuple[list[float], float]:
    """The twelve numbers and processor seconds, from the file of ground truth on."""
    start = time.process_time()
    metric = coco.FastCocoMetric(str(path), classwise=False)
    metric.dataset_meta = dict(
        classes=tuple(map(str, range(NUM_CLASSES))),
        category_ids=tuple(range(NUM_CLASSES)),
    )
    numbers = metric.compute_metrics([(None, image) for image in found])
    return list(numbers.values()), time.process_time() - start


def reference(path: Path, results: list[dict]) -> tuple[list[float], float]:
    """As `ours`, by pycocotools."""
    start = time.process_time()
    with contextlib.redirect_stdout(None):
        api = COCO(str(path))
        evaluation = COCOeval(api, api.loadRes(results), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist(), time.process_time() - start


def main() -> None:
    """Compare, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--images', type=int, default=5000)
    parser.add_argument('--detections', type=int, default=100, help='in each image')
    parser.add_argument('--boxes', type=float, default=7.36, help='in each image')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--out', default='.', help='folder of the result file')
    args = parser.parse_args()
    MMLogger.get_instance('benchmark', log_level='ERROR')
    truth = ground_truth(args.images, args.boxes)
    found = predictions(truth, args.detections)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'ground_truth.json')
        path.write_text(json.dumps(truth))
        our_times, their_times = [], []
        for _ in range(args.rounds):
            our_numbers, seconds = ours(path, found)
            our_times.append(seconds)
            their_numbers, seconds = reference(path, result_list(found))
            their_times.append(seconds)
    our_s, their_s = statistics.median(our_times), statistics.median(their_times)
    difference = np.abs(np.subtract(our_numbers, their_numbers)).max()
    result = dict(
        conditions=dict(
            conditions('cpu'),
            images=args.images,
            detections=args.detections,
            boxes=len(truth['annotations']),
            classes=NUM_CLASSES,
            clock=f'processor time, median of {args.rounds} rounds',
        ),
        ours_cpu_s=round(our_s, 2),
        pycocotools_cpu_s=round(their_s, 2),
        pycocotools_over_ours=round(their_s / our_s, 2),
        largest_difference=float(difference),
        numbers=[round(value, 4) for value in our_numbers],
    )
    print(json.dumps(result, indent=2))
    name = f'coco_eval_{args.images}images_{args.detections}detections_cpu1.json'
    Path(args.out, name).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    torch.set_num_threads(1)
    main()
