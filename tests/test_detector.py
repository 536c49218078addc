"""D-FINE as an mmdet detector: wiring, losses, predictions, empty batches."""

import pytest
import torch
from helpers import data_sample, toy_detector_cfg
from mmengine.registry import MODELS

import mmbackbones.detectors  # noqa: F401
from mmbackbones.ops.predictions import DecoderOutput, QueryPredictions


@pytest.fixture
def detector() -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS.build(toy_detector_cfg())
    model.init_weights()
    return model


def test_channels_and_strides_follow_the_backbone(detector: torch.nn.Module) -> None:
    assert detector.backbone.out_channels == (24, 32, 40)
    assert detector.backbone.out_strides == (8, 16, 32)
    assert detector.encoder.out_channels == (32, 32, 32)
    maps = detector.extract_feat(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 8, 12), (32, 4, 6), (32, 2, 3)]


def test_stated_channels_must_fit() -> None:
    cfg = toy_detector_cfg(neck=dict(in_channels=(1, 2, 3)))
    with pytest.raises(ValueError, match=r'\(1, 2, 3\).*\(24, 32, 40\)'):
        MODELS.build(cfg)


def test_num_classes_must_be_known() -> None:
    with pytest.raises(ValueError, match='num_classes is not set'):
        MODELS.build(toy_detector_cfg(num_classes=None))


BOXES = [[4, 4, 30, 40], [20, 10, 60, 60]]


@pytest.mark.parametrize(
    'batch',
    [
        [([], []), ([], [])],
        [([], []), (BOXES, [0, 2])],
        [(BOXES, [0, 1]), (BOXES[:1], [2])],
        [(BOXES * 20, [0, 1] * 20), ([], [])],  # more boxes than queries
    ],
    ids=['no_boxes', 'one_empty', 'two', 'crowded'],
)
@pytest.mark.parametrize('input_hw', [(64, 64), (64, 96)])
def test_loss_is_finite_and_reaches_every_parameter(
    detector: torch.nn.Module, batch: list, input_hw: tuple[int, int]
) -> None:
    samples = [data_sample(boxes, labels, input_hw) for boxes, labels in batch]
    losses = detector.train().loss(torch.rand(2, 3, *input_hw), samples)
    assert torch.stack(list(losses.values())).isfinite().all()
    sum(losses.values()).backward()
    missing = [
        name
        for name, parameter in detector.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all())
    ]
    assert not missing


def test_every_batch_has_the_same_loss_terms(detector: torch.nn.Module) -> None:
    # Ranks with and without boxes must log the same keys.
    images = torch.rand(1, 3, 64, 64)
    empty = detector.loss(images, [data_sample()])
    filled = detector.loss(images, [data_sample(BOXES, [0, 1])])
    assert empty.keys() == filled.keys()


def test_predict_returns_boxes_of_the_original_image(
    detector: torch.nn.Module,
) -> None:
    detector.eval()
    samples = [data_sample(input_hw=(64, 96), original_hw=(128, 288)) for _ in range(2)]
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        results = detector.predict(images, samples)
        scaled = [sample.pred_instances.clone() for sample in results]
        raw = detector.predict(images, samples, rescale=False)
    for ours, input_frame in zip(scaled, raw, strict=True):
        assert len(ours) == 20
        assert (ours.scores[:-1] >= ours.scores[1:]).all()
        factor = torch.tensor([3.0, 2.0, 3.0, 2.0])  # 288 / 96, 128 / 64
        torch.testing.assert_close(
            ours.bboxes, input_frame.pred_instances.bboxes * factor
        )


def test_select_takes_the_best_query_class_pairs(detector: torch.nn.Module) -> None:
    logits = torch.full((1, 1, 3, 3), -9.0)
    logits[0, 0, 1, 2], logits[0, 0, 2, 0], logits[0, 0, 1, 0] = 3.0, 2.0, 1.0
    boxes = torch.tensor([[[[0.5, 0.5, 1, 1], [0.5, 0.5, 0.2, 0.4], [0, 0, 0.5, 0.5]]]])
    detector.max_per_img = 3
    output = DecoderOutput(QueryPredictions(logits, boxes))
    scores, labels, xyxy = detector.select(output, height=100, width=200)
    assert labels.tolist() == [[2, 0, 0]]
    # (0.5, 0.5, 0.2, 0.4) of 200 x 100: x 80..120, y 30..70; not clipped to the image.
    expected = [[80, 30, 120, 70], [-50, -25, 50, 25], [80, 30, 120, 70]]
    torch.testing.assert_close(xyxy[0], torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(scores[0], torch.tensor([3.0, 2.0, 1.0]).sigmoid())


def test_deploy_form_predicts_the_same(detector: torch.nn.Module) -> None:
    images = torch.rand(1, 3, 64, 64)
    detector.eval()
    with torch.no_grad():
        before = detector(images, mode='tensor').queries
        detector.switch_to_deploy()
        after = detector(images, mode='tensor').queries
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.boxes, before.boxes, rtol=1e-5, atol=1e-5)
