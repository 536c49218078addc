"""Matching of detections, verdicts, and what the report says."""

import json

import numpy as np
import pytest

from mmbackbones.export.comparison import compare_outputs
from mmbackbones.export.report import Report, measure_latency


def detections(scores: list, boxes: list, labels: list) -> dict[str, np.ndarray]:
    """One image."""
    return dict(
        boxes=np.array([boxes], np.float32),
        scores=np.array([scores], np.float32),
        labels=np.array([labels], np.int64),
    )


BOXES = [[0, 0, 10, 10], [20, 20, 40, 50], [5, 5, 60, 60]]
WANTED = detections([0.9, 0.5, 0.1], BOXES, [1, 2, 2])


def compare(found: dict) -> object:
    return compare_outputs('detection', [(WANTED, found)], (64, 100))


def test_order_does_not_matter() -> None:
    found = {name: value[:, [2, 0, 1]] for name, value in WANTED.items()}
    result = compare(found)
    assert (result.score, result.box, result.num_unmatched) == (0, 0, 0)
    assert (result.num_images, result.num_detections) == (1, 3)
    assert not result.exceeds(1e-6)


def test_largest_differences_of_scores_and_boxes() -> None:
    boxes = [[0, 0, 10, 12], *BOXES[1:]]
    result = compare(detections([0.9, 0.5, 0.13], boxes, [1, 2, 2]))
    assert result.score == pytest.approx(0.03)
    assert result.box == pytest.approx(2 / 100)
    assert result.box_pixels == pytest.approx(2)
    assert result.exceeds(0.02) and not result.exceeds(0.031)


def test_another_label_is_another_detection() -> None:
    result = compare(detections([0.9, 0.5, 0.1], BOXES, [1, 3, 2]))
    assert result.num_unmatched == 2
    assert result.exceeds(1.0)


def test_the_end_of_the_list_may_differ() -> None:
    found = detections([0.9, 0.5, 0.1], [*BOXES[:2], [50, 0, 60, 10]], [1, 2, 0])
    result = compare(found)
    assert (result.num_detections, result.num_unmatched) == (2, 0)


@pytest.mark.parametrize('name', ['boxes', 'scores'])
def test_nan_is_no_agreement(name: str) -> None:
    found = {key: value.copy() for key, value in WANTED.items()}
    found[name][0, 0] = np.nan
    assert compare(found).exceeds(1e9)


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('task', ['segmentation', 'backbone'])
def test_features_that_are_not_finite_are_no_agreement(task: str, value: float) -> None:
    name = 'logits' if task == 'segmentation' else 'feat0'
    ours = {name: np.arange(8.0).reshape(1, 2, 2, 2)}
    theirs = {name: ours[name].copy()}
    assert not compare_outputs(task, [(ours, theirs)], (4, 4)).exceeds(0)
    theirs[name][0, 1, 1, 1] = value  # which leaves the label of its pixel
    assert compare_outputs(task, [(ours, theirs)], (4, 4)).exceeds(1e9)
    zeros = {name: np.zeros((1, 2, 2, 2))}
    assert not compare_outputs(task, [(zeros, zeros)], (4, 4)).exceeds(0)


def test_label_maps_and_features() -> None:
    ours = dict(labels=np.zeros((1, 4, 4), np.int64))
    theirs = dict(labels=np.eye(4, dtype=np.int64)[None])
    assert compare_outputs('segmentation', [(ours, theirs)], (4, 4)).pixels == 0.25
    ours, theirs = dict(feat0=np.full((1, 2), 4.0)), dict(feat0=np.full((1, 2), 4.2))
    found = compare_outputs('backbone', [(ours, theirs)], (4, 4))
    assert found.features == pytest.approx(0.05)


def test_report_is_saved_with_its_verdict(tmp_path) -> None:
    result = compare(detections([0.9, 0.5, 0.13], BOXES, [1, 2, 2]))
    file = str(tmp_path / 'm.onnx')
    report = Report(file, 'onnx', 'fp32', 'onnxruntime', 1e-3, result)
    assert not report.passed
    report.save()
    content = json.loads((tmp_path / 'm.onnx.report.json').read_text())
    assert content['passed'] is False
    assert content['differences']['score'] == pytest.approx(0.03)
    text = (tmp_path / 'm.onnx.report.txt').read_text()
    assert 'BEYOND the tolerance of 0.001' in text and 'scores 3.00e-02' in text
    report.tolerance = None
    assert report.passed
    result.score = float('nan')
    report.save()
    text = (tmp_path / 'm.onnx.report.json').read_text()
    strict = json.loads(text, parse_constant=pytest.fail)
    assert strict['differences']['score'] == 'nan'


def test_latency_runs_the_sides_in_turns() -> None:
    calls = []

    class Side:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, batch: np.ndarray) -> None:
            calls.append(self.name)

    sides = dict(a=Side('a'), b=Side('b'))
    found = measure_latency(sides, np.zeros(1), num_runs=3)
    assert calls == ['a', 'b'] * 5
    assert set(found) == {'a', 'b'}
