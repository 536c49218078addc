"""RT-DETR's criterion: against both official ones, and tokens without classes.

Reference of those marked `parity`: a checkout of https://github.com/lyuwenyu/RT-DETR
at $MMB_REFERENCE_DIR/RT-DETR.
"""

from dataclasses import replace

import pytest
import torch
from dfine_helpers import targets
from rtdetr_helpers import official_modules
from torch import Tensor
from torch.testing import assert_close

from mmbackbones.losses import DETRCriterion, RTDETRCriterion
from mmbackbones.ops.predictions import (
    BoxTargets,
    DecoderOutput,
    DenoisingPairs,
    QueryPredictions,
)

NUM_CLASSES, NUM_QUERIES = 12, 40


@pytest.fixture(scope='module', params=['v1', 'v2'])
def official(request):
    with official_modules(request.param) as modules:
        matcher = modules.matcher.HungarianMatcher(
            dict(cost_class=2, cost_bbox=5, cost_giou=2),
            use_focal_loss=True,
            alpha=0.25,
            gamma=2.0,
        )
        cls = dict(v1='SetCriterion', v2='RTDETRCriterionv2')[request.param]
        criterion = getattr(modules.criterion, cls)(
            matcher=matcher,
            weight_dict=dict(loss_vfl=1, loss_bbox=5, loss_giou=2),
            losses=['vfl', 'boxes'],
            alpha=0.75,
            gamma=2.0,
            num_classes=NUM_CLASSES,
        )
        criterion.version = request.param
        yield criterion


def random_boxes(*shape: int) -> Tensor:
    size = torch.rand(*shape, 2) * 0.3 + 0.02
    return torch.cat((size / 2 + torch.rand(*shape, 2) * (1 - size), size), -1)


def random_output(
    sizes: tuple[int, ...], num_layers: int = 3, enc_classes: int = NUM_CLASSES
) -> DecoderOutput:
    """Predictions as of a decoder in training, with gradients to give."""
    torch.manual_seed(sum(sizes))

    def queries(num: int) -> QueryPredictions:
        shape = (num_layers, len(sizes), num)
        return QueryPredictions(
            (torch.randn(*shape, NUM_CLASSES) - 2).requires_grad_(),
            random_boxes(*shape).requires_grad_(),
        )

    denoising = pairs = None
    widest, groups = max(sizes), 2
    if widest:
        denoising = queries(2 * widest * groups)
        image, query, target, first = [], [], [], 0
        for i, size in enumerate(sizes):
            for group in range(groups):
                image += [i] * size
                query += [group * 2 * widest + k for k in range(size)]
                target += [first + k for k in range(size)]
            first += size
        pairs = DenoisingPairs(*map(torch.tensor, (image, query, target)), groups)
    return DecoderOutput(
        queries(NUM_QUERIES),
        denoising,
        pairs,
        (torch.randn(len(sizes), NUM_QUERIES, enc_classes) - 2).requires_grad_(),
        random_boxes(len(sizes), NUM_QUERIES).requires_grad_(),
    )


def leaves(output: DecoderOutput) -> list[Tensor]:
    parts = [output.queries, *([output.denoising] if output.denoising else [])]
    tensors = [t for part in parts for t in (part.logits, part.boxes)]
    return [*tensors, output.enc_logits, output.enc_boxes]


def official_losses(criterion, output: DecoderOutput, truth: BoxTargets) -> dict:
    def layers(queries: QueryPredictions) -> list[dict]:
        return [
            dict(pred_logits=logits, pred_boxes=boxes)
            for logits, boxes in zip(queries.logits, queries.boxes, strict=True)
        ]

    *aux, last = layers(output.queries)
    enc = dict(pred_logits=output.enc_logits, pred_boxes=output.enc_boxes)
    theirs = dict(last)
    if criterion.version == 'v1':
        theirs['aux_outputs'] = [*aux, enc]
    else:
        class_agnostic = output.enc_logits.shape[-1] == 1
        theirs |= dict(
            aux_outputs=aux,
            enc_aux_outputs=[enc],
            enc_meta=dict(class_agnostic=class_agnostic),
        )
    if output.denoising is not None:
        pairs = output.dn_pairs
        theirs['dn_aux_outputs'] = layers(output.denoising)
        theirs['dn_meta'] = dict(
            dn_positive_idx=[
                pairs.query[pairs.image == i] for i in range(len(truth.sizes))
            ],
            dn_num_group=pairs.num_groups,
        )
    labels, boxes = truth.labels.split(truth.sizes), truth.boxes.split(truth.sizes)
    losses = criterion(
        theirs,
        [dict(labels=a, boxes=b) for a, b in zip(labels, boxes, strict=True)],
    )
    return {  # v1 counts the encoder as one layer more
        name.replace(f'_aux_{len(aux)}', '_enc_0'): loss
        for name, loss in losses.items()
    }


@pytest.mark.parity
@pytest.mark.parametrize('num_layers', [1, 3, 6])
@pytest.mark.parametrize('sizes', [(5,), (3, 0, 9, 2), (0, 7, 1), (0, 0), (60, 3)])
def test_losses_and_gradients_equal_the_official_ones(official, sizes, num_layers):
    output = random_output(sizes, num_layers)
    truth = targets(*sizes, num_classes=NUM_CLASSES)
    compare(official, output, truth)


@pytest.mark.parity
def test_tokens_without_classes_equal_the_official_ones(official):
    if official.version == 'v1':
        pytest.skip('v1 always scores tokens by class')
    output = random_output((3, 2), enc_classes=1)
    truth = targets(3, 2)  # theirs matches by the class of the target: all are 0
    compare(official, output, replace(truth, labels=torch.zeros_like(truth.labels)))


def compare(official, output: DecoderOutput, truth: BoxTargets) -> None:
    losses = RTDETRCriterion()(output, truth)
    if output.denoising is None:  # ours has the same terms in every batch
        losses = {k: v for k, v in losses.items() if '_dn_' not in k}
    expected = official_losses(official, output, truth)
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        assert_close(losses[name], loss, rtol=1e-5, atol=1e-6, msg=name)
    mine, theirs = (
        torch.autograd.grad(sum(terms.values()), leaves(output))
        for terms in (losses, expected)
    )
    for found, wanted in zip(mine, theirs, strict=True):
        assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_tokens_without_classes_are_judged_as_one_class():
    truth = targets(3, 0, 2, num_classes=NUM_CLASSES)
    assert truth.labels.any()
    output = random_output(truth.sizes, enc_classes=1)
    losses = RTDETRCriterion()(output, truth)
    # Everything but the tokens: as if they were not there.
    others = replace(output, enc_logits=None, enc_boxes=None)
    expected = DETRCriterion()(others, truth)
    assert losses.keys() - expected.keys() == {
        f'loss_{name}_enc_0' for name in ('vfl', 'bbox', 'giou')
    }
    assert_close({k: losses[k] for k in expected}, expected)
    # The tokens: as the last layer of a detector of one class.
    tokens = QueryPredictions(output.enc_logits[None], output.enc_boxes[None])
    one_class = replace(truth, labels=torch.zeros_like(truth.labels))
    alone = DETRCriterion().eval()(DecoderOutput(tokens), one_class)
    assert_close({f'{k}_enc_0': v for k, v in alone.items()},
                 {k: v for k, v in losses.items() if 'enc' in k})  # fmt: skip


@pytest.mark.parametrize('enc_classes', [1, NUM_CLASSES])
def test_terms_are_the_same_without_boxes(enc_classes):
    terms = []
    for sizes in ((3, 2), (0, 0)):
        output = random_output(sizes, enc_classes=enc_classes)
        losses = RTDETRCriterion()(output, targets(*sizes, num_classes=NUM_CLASSES))
        assert all(loss.isfinite() for loss in losses.values())
        terms.append(losses.keys())
        total = sum(losses.values())
        for grad in torch.autograd.grad(total, leaves(output)):
            assert grad.isfinite().all()
    assert terms[0] == terms[1]
