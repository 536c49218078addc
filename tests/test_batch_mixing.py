"""Mix-up and copy-blend: pixels and boxes, draws by iteration, and what they skip."""

from collections.abc import Iterator

import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData

from mmbackbones.data import CopyBlend, MixUp, batch_mixing


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[MessageHub]:
    """A message hub of this test's own, made the current one."""
    hub = MessageHub('batch_mixing_test')
    monkeypatch.setattr(MessageHub, 'get_current_instance', lambda: hub)
    return hub


def sample(boxes: list, labels: list) -> DetDataSample:
    found = DetDataSample()
    found.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
    )
    return found


def batch(num_images: int, size: int = 32) -> tuple[torch.Tensor, list[DetDataSample]]:
    """Image i is grey i, and has i boxes of class i, 4 i px wide."""
    inputs = torch.arange(float(num_images))[:, None, None, None]
    inputs = inputs.expand(-1, 3, size, size).clone()
    samples = [sample([[0, 0, 4 * i, 4 * i]] * i, [i] * i) for i in range(num_images)]
    return inputs, samples


def labels_of(samples: list[DetDataSample]) -> list[list[int]]:
    return [found.gt_instances.labels.tolist() for found in samples]


def test_mix_up_adds_the_image_before_with_its_boxes() -> None:
    inputs, samples = MixUp(prob=1.0, ratio_range=(0.75, 0.75))(*batch(3))
    # 3/4 of the own grey and 1/4 of that before; the first has the last before it.
    expected = [0.75 * 0 + 0.25 * 2, 0.75 * 1 + 0.25 * 0, 0.75 * 2 + 0.25 * 1]
    torch.testing.assert_close(inputs.amax((1, 2, 3)), torch.tensor(expected))
    torch.testing.assert_close(inputs.amin((1, 2, 3)), torch.tensor(expected))
    assert labels_of(samples) == [[2, 2], [1], [2, 2, 1]]
    assert samples[2].gt_instances.bboxes[:, 2].tolist() == [8, 8, 4]
    assert samples[0].metainfo['mixup'] == 0.75


@pytest.mark.parametrize('boxes', [[[], []], [[[1, 2, 3, 4]], []]])
def test_mix_up_of_images_without_boxes(boxes: list) -> None:
    samples = [sample(b, [1] * len(b)) for b in boxes]
    _, samples = MixUp(prob=1.0)(torch.zeros(2, 3, 8, 8), samples)
    counts = {len(found.gt_instances) for found in samples}
    assert counts == {sum(map(len, boxes))}


def test_probability_and_range_of_the_ratio(hub: MessageHub) -> None:
    ratios = []
    for iteration in range(3000):
        hub.update_info('iter', iteration)
        _, samples = MixUp(prob=0.3)(*batch(2, size=1))
        if 'mixup' in samples[0].metainfo:
            ratios.append(samples[0].metainfo['mixup'])
    assert len(ratios) / 3000 == pytest.approx(0.3, abs=0.03)
    assert 0.45 <= min(ratios) < 0.4505 and 0.5495 < max(ratios) <= 0.55


@pytest.mark.parametrize('kind', [MixUp, CopyBlend])
def test_draws_follow_from_seed_iteration_and_rank(
    kind: type, hub: MessageHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(iterations: range, seed: int = 0) -> list[list[float]]:
        found = []
        for iteration in iterations:
            hub.update_info('iter', iteration)
            torch.manual_seed(len(iterations))  # global state does not matter
            inputs, samples = kind(seed=seed)(*batch(4))
            boxes = [b for s in samples for b in s.gt_instances.bboxes.sum(1).tolist()]
            found.append([inputs.sum().item(), *boxes])
        return found

    whole = run(range(40))
    assert run(range(20, 40)) == whole[20:]  # resumed
    assert run(range(40), seed=1) != whole
    monkeypatch.setattr(batch_mixing, 'get_rank', lambda: 1)
    assert run(range(40)) != whole


@pytest.mark.parametrize('kind', [MixUp, CopyBlend])
def test_off_or_improbable_nothing_happens(kind: type) -> None:
    for augment in (kind(prob=1.0), kind(prob=0.0)):
        augment.enabled = augment.prob == 0
        inputs, samples = batch(3)
        before = labels_of(samples)
        found, samples = augment(inputs, samples)
        assert found is inputs and labels_of(samples) == before


def test_an_image_alone_is_not_mixed_with_itself() -> None:
    inputs, samples = batch(2)
    found, samples = MixUp(prob=1.0)(inputs[1:], samples[1:])
    assert labels_of(samples) == [[1]]
    assert torch.equal(found, inputs[1:])


def test_copy_blend_leaves_a_mixed_batch_alone() -> None:
    inputs, samples = MixUp(prob=1.0)(*batch(3))
    before = labels_of(samples)
    found, samples = CopyBlend(prob=1.0, min_area=1)(inputs, samples)
    assert found is inputs and labels_of(samples) == before


@pytest.mark.parametrize('size_hw', [(32, 32), (24, 40)])
def test_copy_blend_puts_the_object_where_its_box_says(
    size_hw: tuple[int, int], hub: MessageHub
) -> None:
    """One object of brightness 1 in black surroundings, blended at one half."""
    height, width = size_hw
    augment = CopyBlend(
        prob=1.0, num_objects=1, ratio_range=(0.5, 0.5), expand=(0.0, 0.0)
    )
    places = set()
    for iteration in range(60):
        hub.update_info('iter', iteration)
        inputs = torch.zeros(2, 3, height, width)
        inputs[0, :, 3:15, 5:21] = 1
        samples = [sample([[5, 3, 21, 15]], [7]), sample([], [])]
        found, samples = augment(inputs, samples)
        boxes = samples[1].gt_instances.bboxes
        assert samples[1].gt_instances.labels.tolist() == [7]
        x1, y1, x2, y2 = boxes[0].int().tolist()
        assert (x2 - x1, y2 - y1) == (16, 12)
        expected = torch.zeros(3, height, width)
        expected[:, y1:y2, x1:x2] = 0.5
        torch.testing.assert_close(found[1], expected)
        assert len(samples[0].gt_instances) == 2
        assert inputs[0].max() == 1 and inputs[1].max() == 0  # patches are not mixed
        places.add((x1, y1))
    assert len(places) > 50
    assert min(x for x, _ in places) >= 0 and min(y for _, y in places) >= 0


def test_surroundings_come_along_but_are_not_in_the_box(hub: MessageHub) -> None:
    augment = CopyBlend(
        prob=1.0, num_objects=1, ratio_range=(0.5, 0.5), expand=(0.25, 0.25)
    )
    for iteration in range(40):
        hub.update_info('iter', iteration)
        inputs = torch.ones(2, 1, 64, 64)
        inputs[1] = 0
        samples = [sample([[20, 2, 36, 18]], [7]), sample([], [])]
        found, samples = augment(inputs, samples)
        x1, y1, x2, y2 = samples[1].gt_instances.bboxes[0].int().tolist()
        rows, columns = found[1, 0].nonzero(as_tuple=True)
        # A quarter of 16 px on each side, as far as both images reach: above, the
        # object has 2 px only.
        assert columns.min() == max(x1 - 4, 0) and columns.max() == min(x2 + 4, 64) - 1
        assert rows.min() == max(y1 - 2, 0) and rows.max() == min(y2 + 4, 64) - 1


def test_objects_are_as_many_and_as_large_as_asked() -> None:
    # Areas 16, 64 (twice), 144 (three times).
    for least, many, added in [(1, 3, 3), (100, 3, 3), (100, 9, 3), (1, 9, 6)]:
        _, samples = CopyBlend(prob=1.0, min_area=least, num_objects=many)(*batch(4))
        for i, labels in enumerate(labels_of(samples)):
            assert len(labels) == i + added
            assert least == 1 or set(labels[i:]) == {3}
    inputs, samples = batch(4)
    found, samples = CopyBlend(prob=1.0, min_area=145)(inputs, samples)
    assert found is inputs and labels_of(samples) == [[], [1], [2, 2], [3, 3, 3]]


@pytest.mark.parametrize('box', [[-5, -5, 12, 12], [20, 20, 50, 50], [0, 0, 32, 32]])
def test_objects_at_and_beyond_the_border(box: list, hub: MessageHub) -> None:
    for iteration in range(20):
        hub.update_info('iter', iteration)
        samples = [sample([box], [1]), sample([], [])]
        _, samples = CopyBlend(prob=1.0)(torch.rand(2, 3, 32, 32), samples)
        boxes = samples[1].gt_instances.bboxes
        assert len(boxes) == 1
        assert (boxes >= 0).all() and (boxes <= 32).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize('kind', [MixUp, CopyBlend])
def test_bad_values_and_masks_are_named(kind: type) -> None:
    with pytest.raises(ValueError, match=r'prob is 1\.5'):
        kind(prob=1.5)
    inputs, samples = batch(2)
    for found in samples:
        found.gt_instances.masks = torch.zeros(len(found.gt_instances), 4, 4)
    with pytest.raises(ValueError, match='masks'):
        kind(prob=1.0)(inputs, samples)


def test_they_work_in_the_data_preprocessor_in_training_only() -> None:
    preprocessor = DetDataPreprocessor(
        mean=(0, 0, 0),
        std=(255, 255, 255),
        batch_augments=[
            dict(type='MixUp', prob=1.0),
            dict(type='CopyBlend', prob=1.0, min_area=1),
            dict(type='MultiScaleResize', base_size_repeat=1),
        ],
    )
    for training in (True, False):
        _, samples = batch(3)
        images = [torch.full((3, 32, 32), 80 * i, dtype=torch.uint8) for i in range(3)]
        data = dict(inputs=images, data_samples=samples)
        done = preprocessor(data, training=training)
        expected = [[2, 2], [1], [2, 2, 1]] if training else [[], [1], [2, 2]]
        assert labels_of(done['data_samples']) == expected
        assert done['inputs'].max() <= 1
