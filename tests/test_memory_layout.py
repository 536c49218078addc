"""Training with maps channels last in memory, as `loss` orders them."""

import torch
from helpers import data_sample, toy_detector_cfg
from mmengine.registry import MODELS
from torch import Tensor

import mmbackbones.detectors  # noqa: F401


def test_losses_and_gradients_equal_those_of_the_plain_layout() -> None:
    torch.manual_seed(0)
    detector = MODELS.build(toy_detector_cfg())
    detector.init_weights()
    detector.train()
    images = torch.rand(2, 3, 64, 96)
    samples = [
        data_sample([[4, 4, 30, 40], [50, 10, 90, 60]], [0, 1]),
        data_sample([[20, 8, 44, 33]], [0]),
    ]
    seen: list[bool] = []
    detector.backbone.register_forward_hook(
        lambda module, args, maps: seen.extend(
            x.is_contiguous(memory_format=torch.channels_last) for x in maps
        )
    )

    def gradients(losses: dict[str, Tensor]) -> dict[str, Tensor]:
        detector.zero_grad()
        sum(losses.values()).backward()
        grads = {name: p.grad for name, p in detector.named_parameters()}
        return {name: grad for name, grad in grads.items() if grad is not None}

    torch.manual_seed(1)  # of the denoising queries
    ordered = detector.loss(images, samples)
    assert seen and all(seen)
    ordered_grads = gradients(ordered)
    seen.clear()
    torch.manual_seed(1)
    targets = detector._targets(images, samples)
    output = detector.decoder(detector.extract_feat(images), targets)
    plain = detector.criterion(output, targets)
    assert seen and not any(seen)
    plain_grads = gradients(plain)
    # Sums in another order; many terms of a gradient cancel out.
    torch.testing.assert_close(ordered, plain, rtol=1e-5, atol=1e-6)
    assert ordered_grads.keys() == plain_grads.keys()
    for name, grad in plain_grads.items():
        error = (ordered_grads[name] - grad).abs().max()
        assert error <= 1e-3 * grad.abs().max() + 1e-6, name
    assert any('backbone' in name and grad.any() for name, grad in plain_grads.items())
