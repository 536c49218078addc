"""The twelve COCO numbers, against pycocotools, and what may be wrong with input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import mmbackbones  # noqa: F401
from mmbackbones.evaluation.coco import FastCocoMetric

NAMES = ['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l', 'AR@1', 'AR@10',
         'AR@100', 'AR_s@100', 'AR_m@100', 'AR_l@100']  # fmt: skip
# Ids with gaps and not in order; names differ from ids.
CATEGORIES = [dict(id=7, name='cat'), dict(id=2, name='dog'), dict(id=90, name='bird')]
META = dict(classes=('dog', 'cat', 'bird'), category_ids=(2, 7, 90))


def make_ground_truth(num_images: int = 12, boxes: int = 15, seed: int = 0) -> dict:
    """Boxes of all sizes, crowds among them; the last two images are empty."""
    random = np.random.default_rng(seed)
    annotations = []
    for image in range(num_images - 2):
        for _ in range(boxes):
            size = random.choice([10, 50, 200]) * random.uniform(0.5, 1.5, 2)
            x, y = random.uniform(0, 400, 2)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=100 + image,
                    category_id=int(random.choice([2, 7])),
                    bbox=[float(x), float(y), float(size[0]), float(size[1])],
                    area=float(size.prod() * random.uniform(0.4, 1)),
                    iscrowd=int(random.random() < 0.1),
                )
            )
    images = [dict(id=100 + i, width=640, height=640) for i in range(num_images)]
    return dict(images=images, annotations=annotations, categories=CATEGORIES)


def sample(image_id: int, boxes: list, scores: list, labels: list, **extra) -> dict:
    return dict(
        img_id=image_id,
        ori_shape=(640, 640),
        pred_instances=dict(
            bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            scores=torch.tensor(scores, dtype=torch.float32),
            labels=torch.tensor(labels, dtype=torch.int64),
        ),
        **extra,
    )


def noisy_predictions(ground_truth: dict, copies: int, seed: int = 1) -> list[dict]:
    """Jittered ground truth, and over 100 guesses per image and class."""
    random = np.random.default_rng(seed)
    label_of = {category: i for i, category in enumerate(META['category_ids'])}
    samples = []
    for image in ground_truth['images']:
        boxes, labels = [], []
        for annotation in ground_truth['annotations']:
            if annotation['image_id'] == image['id']:
                x, y, w, h = annotation['bbox']
                for _ in range(copies):
                    jitter = random.normal(0, 0.1, 4) * [w, h, w, h]
                    boxes.append(np.array([x, y, x + w, y + h]) + jitter)
                    labels.append(label_of[annotation['category_id']])
        for _ in range(20 * copies):
            corner = random.uniform(0, 500, 2)
            boxes.append([*corner, *(corner + random.uniform(1, 200, 2))])
            labels.append(int(random.integers(3)))
        scores = random.random(len(boxes)).tolist()
        samples.append(sample(image['id'], np.array(boxes).tolist(), scores, labels))
    return samples


def run(metric: FastCocoMetric, samples: list, meta: dict = META) -> dict:
    metric.dataset_meta = meta
    for one in samples:
        metric.process({}, [one])
    return metric.evaluate(len(samples))


def by_pycocotools(ann_file: Path, results: list) -> np.ndarray:
    truth = COCO(str(ann_file))
    evaluation = COCOeval(truth, truth.loadRes(results), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def write(path: Path, content: dict) -> str:
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the metric logs, whatever logger the other tests have left behind."""
    lines: list[str] = []

    class Log:
        info = warning = staticmethod(lines.append)
        debug = staticmethod(lambda text: None)

    monkeypatch.setattr(MMLogger, 'get_current_instance', classmethod(lambda c: Log))
    return lines


@pytest.mark.parametrize(('copies', 'seed'), [(1, 0), (5, 1), (9, 2)])
def test_equals_pycocotools(
    tmp_path: Path, log: list[str], copies: int, seed: int
) -> None:
    ground_truth = make_ground_truth(seed=seed)
    ann_file = write(tmp_path / 'truth.json', ground_truth)
    metric = FastCocoMetric(ann_file, outfile_prefix=str(tmp_path / 'out'))
    values = run(metric, noisy_predictions(ground_truth, copies))
    assert list(values) == [f'coco/bbox_{name}' for name in NAMES]
    results = json.loads((tmp_path / 'out.bbox.json').read_text())
    assert {result['category_id'] for result in results} == {2, 7, 90}
    expected = by_pycocotools(tmp_path / 'truth.json', results)
    np.testing.assert_allclose(list(values.values()), expected, rtol=0, atol=1e-9)
    assert 0.05 < values['coco/bbox_mAP'] < 0.95
    # A second validation with the same metric object.
    again = run(metric, noisy_predictions(ground_truth, copies))
    assert again == values


def test_perfect_predictions_and_the_printed_tables(
    tmp_path: Path, log: list[str]
) -> None:
    boxes = [[10, 10, 20, 20], [100, 100, 150, 150], [200, 200, 400, 400]]
    ground_truth = dict(
        images=[dict(id=1, width=640, height=640)],
        categories=CATEGORIES,
        # No area, no iscrowd, ids from 0: written by hand.
        annotations=[
            dict(id=i, image_id=1, category_id=c, bbox=[x, y, x2 - x, y2 - y])
            for i, (c, (x, y, x2, y2)) in enumerate(zip((2, 2, 7), boxes, strict=True))
        ],
    )
    metric = FastCocoMetric(write(tmp_path / 'truth.json', ground_truth))
    values = run(metric, [sample(1, boxes, [0.9, 0.8, 0.7], [0, 0, 1])])
    # One detection an image finds one of two dogs and the cat: (1/2 + 1) / 2.
    assert values.pop('coco/bbox_AR@1') == 0.75
    assert all(value == pytest.approx(1) for value in values.values())
    twelve, table = log
    lines = twelve.splitlines()[1:]
    assert len(lines) == 12 and all(line.endswith('1.000') for line in lines[:6])
    assert 'IoU=0.50:0.95 | area=   all | maxDets=100' in lines[0]
    rows = [line.split() for line in table.splitlines()[2:]]
    assert rows == [
        ['dog', '2', '1.000', '1.000', '1.000', '1.000', '1.000', '-'],
        ['cat', '1', '1.000', '1.000', '1.000', '-', '-', '1.000'],
        ['bird', '0', '-', '-', '-', '-', '-', '-'],
    ]


def test_no_detections_give_zeros_and_a_message(tmp_path: Path, log: list[str]) -> None:
    ground_truth = make_ground_truth()
    metric = FastCocoMetric(write(tmp_path / 'truth.json', ground_truth))
    samples = [sample(image['id'], [], [], []) for image in ground_truth['images']]
    values = run(metric, samples)
    assert set(values.values()) == {0.0}
    assert log[0] == 'no detections at all on 12 images'


def test_no_ground_truth_gives_minus_one_and_a_message(
    tmp_path: Path, log: list[str]
) -> None:
    ground_truth = make_ground_truth()
    predictions = noisy_predictions(ground_truth, 1)
    del ground_truth['annotations']
    metric = FastCocoMetric(write(tmp_path / 'truth.json', ground_truth))
    values = run(metric, predictions)
    assert set(values.values()) == {-1.0}
    assert 'no boxes' in log[0]


def test_broken_detections_are_counted_and_left_out(
    tmp_path: Path, log: list[str]
) -> None:
    ground_truth = make_ground_truth()
    ann_file = write(tmp_path / 'truth.json', ground_truth)
    predictions = noisy_predictions(ground_truth, 1)
    expected = run(FastCocoMetric(ann_file), predictions)
    for one in predictions:
        instances = one['pred_instances']
        broken = torch.tensor(
            [[float('nan'), 0, 1, 1], [0, 0, float('inf'), 1], [0] * 4]
        )
        instances['bboxes'] = torch.cat([broken, instances['bboxes']])
        scores = torch.tensor([1.0, 1.0, float('nan')])
        instances['scores'] = torch.cat([scores, instances['scores']])
        labels = torch.zeros(3, dtype=torch.int64)
        instances['labels'] = torch.cat([labels, instances['labels']])
    log.clear()
    assert run(FastCocoMetric(ann_file), predictions) == expected
    assert log[0].startswith('36 detections with NaN')


def test_labels_that_are_category_ids(tmp_path: Path, log: list[str]) -> None:
    """The published Objects365 heads: a row for every id, row 0 without category."""
    meta = dict(
        classes=('unused 0', 'cat', 'unused 2', 'dog'), category_ids=(0, 1, 2, 3)
    )
    ground_truth = dict(
        images=[dict(id=1, width=9, height=9)],
        categories=[dict(id=3, name='dog'), dict(id=1, name='cat')],
        annotations=[dict(image_id=1, category_id=3, bbox=[0, 0, 9, 9])],
    )
    metric = FastCocoMetric(
        write(tmp_path / 'truth.json', ground_truth),
        outfile_prefix=str(tmp_path / 'out'),
        format_only=True,
    )
    box = [0, 0, 9, 9]
    values = run(metric, [sample(1, [box, box], [0.5, 0.9], [3, 0])], meta)
    assert values == {}
    (result,) = json.loads((tmp_path / 'out.bbox.json').read_text())
    assert result == dict(
        image_id=1, category_id=3, bbox=[0.0, 0.0, 9.0, 9.0], score=0.5
    )


def test_data_sets_of_mmdet_count_categories_in_file_order(
    tmp_path: Path, log: list[str]
) -> None:
    ground_truth = make_ground_truth()
    metric = FastCocoMetric(
        write(tmp_path / 'truth.json', ground_truth),
        outfile_prefix=str(tmp_path / 'out'),
    )
    run(metric, [sample(100, [[0, 0, 1, 1]], [0.5], [0])], dict(classes=('dog', 'cat')))
    (result,) = json.loads((tmp_path / 'out.bbox.json').read_text())
    assert result['category_id'] == 7
    assert any('evaluated on 1 of the 12 images' in line for line in log)


def test_ground_truth_from_the_samples(log: list[str]) -> None:
    instances = [
        dict(bbox=[0, 0, 50, 50], bbox_label=1, ignore_flag=0),
        dict(bbox=[100, 100, 200, 200], bbox_label=0, ignore_flag=1),  # crowd
    ]
    samples = [
        sample(5, [[0, 0, 50, 50]], [0.9], [1], instances=instances),
        sample(6, [], [], [], instances=[]),
    ]
    values = run(FastCocoMetric(), samples)
    assert values['coco/bbox_mAP'] == pytest.approx(1)
    with pytest.raises(ValueError, match='ann_file is not set'):
        run(FastCocoMetric(), [sample(5, [], [], [])])


def test_input_that_does_not_belong_together(tmp_path: Path, log: list[str]) -> None:
    ann_file = write(tmp_path / 'truth.json', make_ground_truth())
    box = [[0, 0, 1, 1]]
    with pytest.raises(ValueError, match='label 3, but the data set has 3 classes'):
        run(FastCocoMetric(ann_file), [sample(100, box, [0.5], [3])])
    with pytest.raises(ValueError, match='does not list, among them id 5'):
        run(FastCocoMetric(ann_file), [sample(5, box, [0.5], [0])])
    meta = dict(classes=('dog', 'fish'), category_ids=(2, 3))
    with pytest.raises(ValueError, match=r"lacks 1 categories.*'fish' \(3\)"):
        run(FastCocoMetric(ann_file), [sample(100, box, [0.5], [0])], meta)
    with pytest.raises(ValueError, match='outfile_prefix'):
        FastCocoMetric(ann_file, format_only=True)
