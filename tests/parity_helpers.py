"""Comparisons of our networks with official ones and with those of transformers.

`Network`s of the official code have an encoder and a decoder in a row; a `reader`
makes the official output our dataclass.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from dfine_helpers import named_tensors, randomise
from official_helpers import official_targets
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from mmbackbones.convert import from_ours, to_ours
from mmbackbones.layers.position import sincos_position_2d
from mmbackbones.ops.predictions import BoxTargets, DecoderOutput

Named = dict[str, Tensor]
Reader = Callable[[dict], DecoderOutput]

CLASS_EMBED = 'decoder.denoising_class_embed.weight'


class Network(nn.Module):
    """Encoder and decoder in a row."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, maps: list[Tensor], targets: object = None) -> object:
        return self.decoder(self.encoder(list(maps)), targets)


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


def assert_equal_tensors(ours: dict, theirs: dict, tolerance: float) -> None:
    """Error of each tensor, by its largest value where that is above 1."""
    # In evaluation the official code keeps distributions to itself.
    assert ours.keys() - theirs.keys() <= {'queries.corners', 'queries.ref_boxes'}
    errors = {
        name: (ours[name] - theirs[name]).abs().max().item()
        / max(1.0, theirs[name].abs().max().item())
        for name in theirs
    }
    print(f'largest error {max(errors.values()):.2e}')
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong


def assert_equal_gradients(ours: dict, theirs: dict) -> None:
    """Those that theirs has, by their own largest value, or 1e-4 of that of all."""
    theirs = {name: grad for name, grad in theirs.items() if grad is not None}
    assert len(theirs) > 50
    scale = max(grad.abs().max() for grad in theirs.values())
    errors = {
        name: ((ours[name] - g).abs().max() / g.abs().max().clamp(1e-4 * scale)).item()
        for name, g in theirs.items()
    }
    print(f'largest error of a gradient {max(errors.values()):.2e}')
    wrong = {name: error for name, error in errors.items() if not error <= 1e-5}
    assert not wrong, wrong


def compare_evaluation(
    ours: Network, theirs: Network, maps: list[Tensor], reader: Reader
) -> None:
    """Encoders on the maps, decoders on what the official encoder makes of them."""
    ours.eval()
    with torch.no_grad():
        fused = theirs.encoder(list(maps))
        assert_equal_tensors(
            dict(enumerate(ours.encoder(maps))), dict(enumerate(fused)), 1e-5
        )
        found = named_tensors(ours.decoder(fused))
        expected = named_tensors(reader(theirs.decoder(fused)))
    assert expected.keys() == {'queries.logits', 'queries.boxes'}
    assert_equal_tensors(found, expected, 1e-5)


def compare_rectangles(
    ours: Network, theirs: Network, maps: list[Tensor], reader: Reader
) -> None:
    """Equal where the official grid of positions is corrected, and only there."""
    ours, theirs = ours.double().eval(), read_rectangles(theirs).double()
    maps = [x.double() for x in maps]
    with torch.no_grad():
        found = named_tensors(ours(maps))
        transposed = reader(theirs(maps)).queries.boxes
        correct_grid(theirs.encoder)
        expected = named_tensors(reader(theirs(maps)))
    assert_equal_tensors(found, expected, 1e-6)
    assert (transposed - expected['queries.boxes']).abs().max() > 1e-3


def read_rectangles(theirs: nn.Module) -> nn.Module:
    """Anchors and positions of the maps that come in, as upstream does in training."""
    theirs.encoder.eval_spatial_size = theirs.decoder.eval_spatial_size = None
    return theirs


def correct_grid(encoder: nn.Module) -> None:
    """Positions of the official code by rows; they are right on squares only."""
    assert hasattr(encoder, 'build_2d_sincos_position_embedding')
    encoder.build_2d_sincos_position_embedding = lambda w, h, dim, temperature: (
        sincos_position_2d(h, w, dim, temperature)
    )


def train(net: nn.Module, run: Callable[[], DecoderOutput]) -> tuple[Named, dict]:
    """All tensors of an output, and gradients of all parameters for their sum.

    Args:
        net: whose parameters; without gradients so far.
        run: gives the output; the sum has weights, the same on every call.
    """
    torch.manual_seed(3)  # the same noise in the denoising queries
    output = named_tensors(run())
    generator = torch.Generator().manual_seed(4)
    sum(
        (output[name] * torch.randn(output[name].shape, generator=generator)).sum()
        for name in sorted(output)
    ).backward()
    return output, {name: p.grad for name, p in net.named_parameters()}


def compare_training(
    ours: Network,
    theirs: Network,
    maps: list[Tensor],
    truth: BoxTargets,
    reader: Reader,
) -> tuple[Named, dict, dict]:
    """Compares outputs in training; returns ours and the gradients, ours and theirs."""
    # Gradients through batch statistics cancel to little: float32 cannot tell.
    ours, theirs = ours.double().train(), theirs.double().train()
    maps = [x.double() for x in maps]
    found, mine = train(ours, lambda: ours(maps, truth))
    expected, official = train(
        theirs, lambda: reader(theirs(maps, official_targets(truth)))
    )
    assert found.keys() == expected.keys()
    assert_equal_tensors(found, expected, 1e-6)
    return found, mine, official


def untouched_by(truth: BoxTargets, mine: dict) -> set[str]:
    """Parameters to which the official code gives no gradient, of denoising.

    Without boxes it leaves out the embedding of classes, which stops distributed
    training; ours has a gradient of 0.
    """
    if len(truth.labels):
        return set()
    assert not mine[CLASS_EMBED].any()
    return {CLASS_EMBED}


def compare_losses(ours: dict, theirs: dict, leaves: Named) -> set[str]:
    """Losses that the official criterion has, and the gradients of all of them.

    Args:
        ours: ours by name; others than theirs are 0.
        theirs: official ones.
        leaves: the predictions behind them.

    Returns:
        Which leaves have a gradient from neither.
    """
    assert theirs.keys() <= ours.keys()
    assert not any(ours[name] for name in ours.keys() - theirs.keys())
    for name, loss in theirs.items():
        assert_close(
            ours[name], loss, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f'{n}: {m}'
        )
    grads = [
        torch.autograd.grad(
            sum(losses.values()), list(leaves.values()), allow_unused=True
        )
        for losses in (ours, theirs)
    ]
    unused = set()
    for name, mine, reference in zip(leaves, *grads, strict=True):
        assert (mine is None) == (reference is None), name
        if mine is None:
            unused.add(name)
            continue
        difference = (mine - reference).abs().max() / reference.abs().max()
        assert difference < 2e-5, f'{name}: {difference:.1e}'
    return unused


def load_converted(ours: nn.Module, theirs: nn.Module, family: str) -> nn.Module:
    """Gives ours the weights of transformers' through the key map; in double."""
    state, conversion = to_ours(theirs.state_dict())
    assert (conversion.source.family, conversion.dropped) == (family, {})
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) == {'decoder.anchors', 'decoder.valid_mask'}
    # Random networks of this depth amplify the rounding of float32.
    return ours.double().eval()


def compare_with_transformers(
    ours: nn.ModuleDict, theirs: nn.Module, images: Tensor
) -> None:
    """Evaluation of whole networks in double precision."""
    images = images.double()
    with torch.no_grad():
        found = ours.decoder(ours.encoder(ours.backbone(images))).queries
        expected = theirs(images)
    assert expected.logits.std() > 0.1
    assert_close(found.logits[0], expected.logits, atol=1e-5, rtol=1e-5)
    assert_close(found.boxes[0], expected.pred_boxes, atol=1e-5, rtol=1e-5)


def all_layers(
    ours: nn.ModuleDict, theirs: nn.Module, images: Tensor
) -> tuple[DecoderOutput, object]:
    """Outputs of all layers of both decoders, ours and transformers'."""
    images = images.double()
    # All layers are returned in training, but statistics must stay what they are.
    ours.decoder.training = theirs.model.decoder.training = True
    with torch.no_grad():
        output = ours.decoder(ours.encoder(ours.backbone(images)))
        return output, theirs.model(images)


def compare_distributions(output: DecoderOutput, expected: object) -> None:
    """`all_layers` of a decoder with distributions, D-FINE's or DEIMv2's."""
    found = output.queries
    parts = (1, len(found.logits))
    pre_logits, logits = expected.intermediate_logits.split(parts, 1)
    pre_boxes, boxes = expected.intermediate_reference_points.split(parts, 1)
    for mine, other in (
        (found.pre_logits[None], pre_logits),
        (found.logits, logits),
        (found.pre_boxes[None], pre_boxes),
        (found.boxes, boxes),
        (found.corners, expected.intermediate_predicted_corners),
        (output.enc_logits[None], expected.enc_topk_logits[:, None]),
        (output.enc_boxes[None], expected.enc_topk_bboxes[:, None]),
    ):
        assert_close(mine, other.transpose(0, 1), atol=1e-5, rtol=1e-5)


def compare_files(theirs: nn.Module, folder: Path) -> None:
    """A file of transformers is read, and written so that transformers reads it."""
    randomise(theirs)
    theirs.save_pretrained(folder)
    file = load_file(folder / 'model.safetensors')
    state, _ = to_ours(theirs.state_dict())
    assert_close(to_ours(file)[0], state, rtol=0, atol=0)
    back, conversion = from_ours(state, 'hf')
    assert conversion.dropped == {}
    # A file holds each tensor once, and not under its name of newer versions.
    twice = {name for name in back if name.startswith(('class_embed', 'bbox_embed'))}
    assert_close({n: back[n] for n in back.keys() - twice}, file, rtol=0, atol=0)
    again = type(theirs).from_pretrained(None, config=theirs.config, state_dict=back)
    assert_close(again.state_dict(), theirs.state_dict(), rtol=0, atol=0)
