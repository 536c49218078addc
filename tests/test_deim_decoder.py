"""DEIM in the detector: every parameter learns, empty batches, deploy form."""

import pytest
import torch
from helpers import data_sample, toy_detector_cfg
from mmengine.registry import MODELS
from torch import nn

import mmbackbones.detectors  # noqa: F401
from mmbackbones.losses.matching import ScoreIoUMatcher

MAL = dict(type='MatchabilityTerm')


@pytest.fixture(params=['dfine', 'rtdetrv2'])
def detector(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    cfg = toy_detector_cfg()
    if request.param == 'dfine':
        cfg.decoder.type = 'DEIMDecoder'
        cfg.criterion.classification = MAL
    else:
        cfg.decoder.type = 'DEIMRTDETRv2Decoder'
        cfg.criterion = dict(type='DETRCriterion', classification=MAL)
    model = MODELS.build(cfg)
    model.init_weights()
    return model


BOXES = [[4, 4, 30, 40], [20, 10, 60, 60]]


@pytest.mark.parametrize('matcher', ['Hungarian', 'ScoreIoU'])
@pytest.mark.parametrize(
    'batch',
    [
        [([], []), ([], [])],
        [([], []), (BOXES, [0, 2])],
        [(BOXES * 20, [0, 1] * 20), ([], [])],  # more boxes than queries
    ],
    ids=['no_boxes', 'one_empty', 'crowded'],
)
def test_loss_is_finite_and_reaches_every_parameter(
    detector: nn.Module, batch: list, matcher: str
) -> None:
    if matcher == 'ScoreIoU':
        detector.criterion.matcher = ScoreIoUMatcher()
    samples = [data_sample(boxes, labels) for boxes, labels in batch]
    losses = detector.train().loss(torch.rand(2, 3, 64, 64), samples)
    assert torch.stack(list(losses.values())).isfinite().all()
    assert 'loss_mal' in losses and 'loss_vfl' not in losses
    sum(losses.values()).backward()
    missing = [
        name
        for name, parameter in detector.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all())
    ]
    assert not missing


def test_every_batch_has_the_same_loss_terms(detector: nn.Module) -> None:
    images = torch.rand(1, 3, 64, 64)
    empty = detector.train().loss(images, [data_sample()])
    filled = detector.loss(images, [data_sample(BOXES, [0, 1])])
    assert empty.keys() == filled.keys()


def test_activations_are_silu_throughout_the_decoder(detector: nn.Module) -> None:
    kinds = {type(module) for module in detector.decoder.modules()}
    assert nn.SiLU in kinds and nn.ReLU not in kinds


def test_deploy_form_predicts_the_same(detector: nn.Module) -> None:
    images = torch.rand(1, 3, 64, 64)
    detector.eval()
    with torch.no_grad():
        before = detector(images, mode='tensor').queries
        detector.switch_to_deploy()
        after = detector(images, mode='tensor').queries
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.boxes, before.boxes, rtol=1e-5, atol=1e-5)
