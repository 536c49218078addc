"""Multi-scale training: its sizes, their draw, and what moves with the image."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from toy_runner import ToyPreprocessor, toy_runner

from mmbackbones.data.batch_augments import MultiScaleResize, multi_scale_sizes


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[MessageHub]:
    """A message hub of this test's own, made the current one."""
    hub = MessageHub('multi_scale_test')
    monkeypatch.setattr(MessageHub, 'get_current_instance', lambda: hub)
    return hub


def data_sample(boxes: list, height: int, width: int) -> DetDataSample:
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(height, width),
            pad_shape=(height, width),
            batch_input_shape=(height, width),
            scale_factor=(2.0, 2.0),
        )
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.zeros(len(boxes), dtype=torch.int64),
    )
    return sample


# Repeats of the base, probability of it and mean area over its area, as published.
@pytest.mark.parametrize(
    ('repeat', 'probability', 'mean_area'),
    [
        (3, 0.231, 1.021),
        (4, 0.286, 1.020),
        (6, 0.375, 1.017),
        (10, 0.5, 1.014),
        (20, 0.667, 1.009),
    ],
)
def test_sizes_at_640_are_the_published_ones(
    repeat: int, probability: float, mean_area: float
) -> None:
    sizes = multi_scale_sizes((640, 640), repeat)
    assert len(sizes) == 10 + repeat
    assert all(height == width for height, width in sizes)
    others = sorted({height for height, _ in sizes} - {640})
    assert others == [480, 512, 544, 576, 608, 672, 704, 736, 768, 800]
    assert sizes.count((640, 640)) / len(sizes) == pytest.approx(probability, abs=5e-4)
    areas = [height * width / 640**2 for height, width in sizes]
    assert np.mean(areas) == pytest.approx(mean_area, abs=5e-4)


@pytest.mark.parametrize('base_hw', [(32, 32), (64, 96), (480, 640), (640, 384)])
def test_sizes_keep_the_ratio_and_fit_the_strides(base_hw: tuple[int, int]) -> None:
    sizes = multi_scale_sizes(base_hw, 2)
    assert sizes.count(base_hw) >= 2
    for height, width in sizes:
        assert height % 32 == width % 32 == 0
        assert height > 0 and width > 0
        # The shorter side is at most 16 px from where the ratio wants it.
        scale = max(height, width) / max(base_hw)
        assert abs(min(height, width) - min(base_hw) * scale) <= 16
        assert 0.75 - 32 / max(base_hw) < scale <= 1.25


@pytest.mark.parametrize('base_size', [600, (640, 100), 0])
def test_a_base_that_the_strides_do_not_divide_is_refused(base_size: int) -> None:
    with pytest.raises(ValueError, match='multiples of 32'):
        MultiScaleResize(base_size=base_size)


def test_a_negative_repeat_is_refused() -> None:
    with pytest.raises(ValueError, match='base_size_repeat is -1'):
        MultiScaleResize(base_size_repeat=-1)


def test_the_size_is_a_function_of_seed_and_iteration() -> None:
    def sizes(seed: int, iterations: range) -> list[tuple[int, int]]:
        augment = MultiScaleResize(640, seed=seed)
        torch.manual_seed(len(iterations))  # global state does not matter
        return [augment.size_at(i, (640, 640)) for i in iterations]

    run = sizes(0, range(200))
    assert sizes(0, range(100, 200)) == run[100:]  # resumed
    assert sizes(1, range(200)) != run
    assert len(set(run)) == 11


def test_sizes_are_drawn_evenly() -> None:
    augment = MultiScaleResize(640, base_size_repeat=4)
    num = 7000
    counts = Counter(augment.size_at(i, (640, 640))[0] for i in range(num))
    for side in range(480, 801, 32):
        share = (4 if side == 640 else 1) / 14
        sigma = (share * (1 - share) / num) ** 0.5
        assert counts[side] / num == pytest.approx(share, abs=5 * sigma)


@pytest.mark.parametrize('input_hw', [(128, 128), (128, 192)])
def test_boxes_and_metadata_move_with_the_image(
    input_hw: tuple[int, int], hub: MessageHub
) -> None:
    """A bright rectangle is found again where its box is: nearest, so to a pixel."""
    height, width = input_hw
    augment = MultiScaleResize()
    seen = set()
    for iteration in range(20):
        hub.update_info('iter', iteration)
        inputs = torch.zeros(2, 3, height, width)
        inputs[0, :, 31:90, 20:77] = 1
        samples = [data_sample([[20, 31, 77, 90]], height, width)]
        samples.append(data_sample([], height, width))
        inputs, samples = augment(inputs, samples)
        new_hw = augment.size_at(iteration, input_hw)
        assert inputs.shape == (2, 3, *new_hw)
        rows, columns = inputs[0, 0].nonzero(as_tuple=True)
        found = torch.stack(
            (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        )
        boxes = samples[0].gt_instances.bboxes
        torch.testing.assert_close(found.float(), boxes[0], atol=1, rtol=0)
        assert samples[1].gt_instances.bboxes.shape == (0, 4)
        for sample in samples:
            assert sample.img_shape == sample.pad_shape == new_hw
            assert sample.batch_input_shape == new_hw
            expected = (2 * new_hw[1] / width, 2 * new_hw[0] / height)
            assert sample.scale_factor == pytest.approx(expected)
        seen.add(new_hw)
    assert len(seen) > 1


def test_padded_images_keep_their_share(hub: MessageHub) -> None:
    augment = MultiScaleResize(128, base_size_repeat=0)
    sample = data_sample([], 96, 64)
    augment(torch.zeros(1, 3, 128, 128), [sample])
    side = augment.size_at(0, (128, 128))[0]
    assert side != 128
    assert sample.img_shape == (round(96 * side / 128), round(64 * side / 128))


@pytest.mark.parametrize('off', ['stopped', 'no repeat'])
def test_switched_off_it_does_nothing(off: str, hub: MessageHub) -> None:
    augment = MultiScaleResize(64, base_size_repeat=None if off == 'no repeat' else 0)
    if off == 'stopped':
        assert augment.enabled
        augment.enabled = False
    inputs = torch.rand(1, 3, 64, 64)
    for iteration in range(5):
        hub.update_info('iter', iteration)
        assert augment(inputs, [data_sample([[1, 2, 3, 4]], 64, 64)])[0] is inputs


def test_masks_are_refused(hub: MessageHub) -> None:
    sample = data_sample([[1, 2, 3, 4]], 64, 64)
    sample.gt_instances.masks = torch.zeros(1, 64, 64)
    with pytest.raises(ValueError, match='masks'):
        MultiScaleResize(64, base_size_repeat=0)(torch.zeros(1, 3, 64, 64), [sample])


def test_it_works_in_the_data_preprocessor_in_training_only(hub: MessageHub) -> None:
    preprocessor = DetDataPreprocessor(
        mean=(0, 0, 0),
        std=(255, 255, 255),
        bgr_to_rgb=True,
        batch_augments=[dict(type='MultiScaleResize', base_size_repeat=0)],
    )
    for training in (True, False):
        sample = data_sample([[0, 0, 32, 64]], 64, 64)
        image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
        data = dict(inputs=[image], data_samples=[sample])
        inputs = preprocessor(data, training=training)['inputs']
        assert (tuple(inputs.shape[-2:]) != (64, 64)) is training
        assert inputs.max() <= 1


def test_sizes_under_a_runner_are_those_of_its_iterations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps an epoch; a resumed run goes on in the same sequence."""
    augment = MultiScaleResize()
    seen = []

    def forward(self: ToyPreprocessor, data: dict, training: bool = False) -> dict:
        if training:
            seen.append(tuple(augment(torch.zeros(1, 1, 128, 128), [])[0].shape[-2:]))
        return original(self, data, training)

    original = ToyPreprocessor.forward
    monkeypatch.setattr(ToyPreprocessor, 'forward', forward)
    checkpoints = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    toy_runner(tmp_path, checkpoints, max_epochs=3).train()
    expected = [augment.size_at(i, (128, 128)) for i in range(10)]
    assert seen == expected[:6]
    assert len(set(expected)) > 1
    toy_runner(tmp_path, checkpoints, max_epochs=5, resume=True).train()
    assert seen == expected
