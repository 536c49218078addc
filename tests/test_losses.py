"""Expected values are worked in the comments, from the formulas in the docstrings."""

import math

import pytest
import torch

from mmbackbones.losses.classification import (
    MatchabilityTerm,
    matchability_aware_loss,
    varifocal_loss,
)
from mmbackbones.losses.localization import (
    ddf_loss,
    ddf_weights,
    fgl_loss,
    fgl_targets,
    giou_loss,
    l1_loss,
)
from mmbackbones.ops.boxes import (
    cxcywh_to_ordered_xyxy,
    elementwise_giou,
    elementwise_iou,
)
from mmbackbones.ops.distribution import distance_to_box, weighting_function

INDEX = torch.int64


def empty_index(*shape):
    return torch.empty(*shape, dtype=INDEX)


def test_varifocal_without_matches():
    # p = 1/2 in all 2 * 3 entries: .75 * 1/4 * ln 2 each
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    loss = varifocal_loss(
        logits,
        empty_index(1, 0),
        empty_index(1, 0),
        torch.empty(1, 0),
        alpha=0.75,
        gamma=2.0,
    )
    torch.testing.assert_close(loss, torch.tensor([6 * 0.75 * 0.25 * math.log(2)]))
    # the weight has no gradient: .75 * 1/4 * (p - 0)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.full_like(logits, 0.75 * 0.25 * 0.5))


def test_varifocal_by_hand():
    # Two sets; the second has all logits 0 and query 1 matched to class 2 at .8:
    # five entries of .75 * 1/4 * ln 2 and one of .8 * BCE(1/2, .8) = .8 * ln 2.
    # The first matches query 0 to class 0, logit ln 3 (p = 3/4), quality .5:
    # .5 * -(.5 ln .75 + .5 ln .25), and the same five.
    logits = torch.zeros(2, 2, 3)
    logits[0, 0, 0] = math.log(3)
    quality = torch.tensor([[0.5], [0.8]], requires_grad=True)
    loss = varifocal_loss(
        logits.requires_grad_(),
        torch.tensor([[0], [1]]),
        torch.tensor([[0], [2]]),
        quality,
        alpha=0.75,
        gamma=2.0,
    )
    rest = 5 * 0.75 * 0.25 * math.log(2)
    first = -0.25 * (math.log(0.75) + math.log(0.25))
    torch.testing.assert_close(
        loss, torch.tensor([first + rest, 0.8 * math.log(2) + rest])
    )
    loss.sum().backward()
    assert quality.grad is None
    # q * (p - q) at the matched entry
    assert logits.grad[1, 1, 2].item() == pytest.approx(0.8 * (0.5 - 0.8))


def test_matchability_without_matches():
    # p = 1/2 in all 2 * 3 entries: (1/2)^1.5 * ln 2 each
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    loss = matchability_aware_loss(
        logits, empty_index(1, 0), empty_index(1, 0), torch.empty(1, 0), gamma=1.5
    )
    torch.testing.assert_close(loss, torch.tensor([6 * 0.5**1.5 * math.log(2)]))
    # the weight has no gradient: (1/2)^1.5 * (p - 0)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.full_like(logits, 0.5**2.5))


def test_matchability_by_hand():
    # Two sets of 2 queries and 3 classes. In the first, query 0 is matched to class
    # 0 with logit ln 3 (p = 3/4) and quality 1/4, whose target is (1/4)^1.5 = 1/8:
    # BCE = -(1/8 ln 3/4 + 7/8 ln 1/4), weight 1. In the second, all logits are 0;
    # query 1 is matched to class 2 at .64, target .64^1.5 = .512: BCE(1/2, .) = ln 2.
    # The five other entries of each: p^1.5 * BCE(1/2, 0) = (1/2)^1.5 ln 2.
    logits = torch.zeros(2, 2, 3)
    logits[0, 0, 0] = math.log(3)
    quality = torch.tensor([[0.25], [0.64]], requires_grad=True)
    loss = matchability_aware_loss(
        logits.requires_grad_(),
        torch.tensor([[0], [1]]),
        torch.tensor([[0], [2]]),
        quality,
        gamma=1.5,
    )
    rest = 5 * 0.5**1.5 * math.log(2)
    expected = [
        -(math.log(0.75) / 8 + 7 * math.log(0.25) / 8) + rest,
        math.log(2) + rest,
    ]
    torch.testing.assert_close(loss, torch.tensor(expected))
    loss.sum().backward()
    assert quality.grad is None
    # p - target at the matches
    torch.testing.assert_close(logits.grad[0, 0, 0], torch.tensor(0.75 - 0.125))
    torch.testing.assert_close(logits.grad[1, 1, 2], torch.tensor(0.5 - 0.512))
    torch.testing.assert_close(logits.grad[1, 0, 0], torch.tensor(0.5**2.5))


@pytest.mark.parametrize('quality', [0.0, 0.05])
def test_matchability_does_not_ignore_a_bad_match(quality):
    # A confident score on a box of no quality: varifocal loss weighs it by that
    # quality, so by 0; here its weight is 1, BCE(p, q^1.5).
    logits = torch.full((1, 1, 1), 2.0)
    index = torch.zeros(1, 1, dtype=INDEX)
    values = torch.tensor([[quality]])
    varifocal = varifocal_loss(logits, index, index, values, alpha=0.75, gamma=2.0)
    matchability = MatchabilityTerm()(logits, index, index, values)
    probability, target = torch.tensor(2.0).sigmoid(), quality**1.5
    expected = -(target * probability.log() + (1 - target) * (1 - probability).log())
    torch.testing.assert_close(matchability[0], expected)
    torch.testing.assert_close(
        varifocal[0],
        quality
        * -(quality * probability.log() + (1 - quality) * (1 - probability).log()),
    )
    assert matchability > 10 * varifocal


def test_l1_by_hand():
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    target_boxes = torch.tensor([[0.4, 0.5, 0.2, 0.5], [0.1, 0.1, 0.1, 0.1]])
    torch.testing.assert_close(l1_loss(boxes, target_boxes), torch.tensor([0.4]))
    assert l1_loss(boxes[:, :0], target_boxes[:0]).tolist() == [0]


@pytest.mark.parametrize(
    ('box', 'target', 'expected'),
    [
        ((0.5, 0.5, 0.2, 0.2), (0.5, 0.5, 0.2, 0.2), 0.0),
        # IoU .08 / .16, hull = union
        ((0.5, 0.5, 0.2, 0.4), (0.5, 0.5, 0.4, 0.4), 0.5),
        # apart: areas .04 + .04, hull .2 * .6 = .12: GIoU = -(.12 - .08) / .12
        ((0.3, 0.5, 0.2, 0.2), (0.7, 0.5, 0.2, 0.2), 4 / 3),
        # no area on either side: IoU 0, hull .4 * 0 = 0: GIoU 0
        ((0.3, 0.5, 0.0, 0.0), (0.7, 0.5, 0.0, 0.0), 1.0),
        # a negative size is none: hull of the target, GIoU = 0
        ((0.5, 0.5, -0.2, -0.2), (0.5, 0.5, 0.2, 0.2), 1.0),
    ],
)
def test_giou_by_hand(box, target, expected):
    box = torch.tensor([[box]], requires_grad=True)
    loss = giou_loss(box, torch.tensor([target]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert box.grad.isfinite().all()


def test_iou_of_ordered_corners():
    boxes = torch.tensor([[0.5, 0.5, -0.2, 0.4], [0.5, 0.5, 0.2, 0.4]])
    corners = cxcywh_to_ordered_xyxy(boxes)
    torch.testing.assert_close(corners[0], torch.tensor([0.5, 0.3, 0.5, 0.7]))
    torch.testing.assert_close(corners[1], torch.tensor([0.4, 0.3, 0.6, 0.7]))
    nothing = torch.zeros(1, 4)
    assert elementwise_iou(nothing, nothing).item() == 0
    assert elementwise_giou(corners[1], corners[1]).item() == pytest.approx(1)


@pytest.mark.parametrize('reg_scale', [4.0, 8.0])
def test_fgl_targets_give_the_box_again(reg_scale):
    torch.manual_seed(0)
    bins = weighting_function(32, 0.5, reg_scale)
    ref_boxes = torch.tensor([0.5, 0.5, 0.3, 0.2]).repeat(500, 1)
    # edges move by less than the reach of the bins, w * 2 u
    distances = (torch.rand(500, 4) - 0.5) * reg_scale
    boxes = distance_to_box(ref_boxes, distances, reg_scale)
    left, right_weight = fgl_targets(ref_boxes, boxes, bins, reg_scale)
    assert left.min() >= 0
    assert left.max() <= 31
    assert ((right_weight >= 0) & (right_weight <= 1)).all()
    found = bins[left] * (1 - right_weight) + bins[left + 1] * right_weight
    torch.testing.assert_close(found, distances, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ('scale', 'bin_index', 'weight'),
    [
        # Reference .1 wide, c = 4. A target s times as wide is off by
        # d = (s / 2) * 4 - 2 at every edge; W(1) = -2, W(31) = 2, W(32) = 4.
        (1.0, 16, 0.0),  # d = 0 = W(16)
        (0.0, 1, 0.0),  # d = -2 = W(1), as small as a box can be
        (2.5, 31, 0.5),  # d = 3, halfway between 2 and 4
        (9.0, 31, 1.0),  # d = 16, beyond the last bin
    ],
)
def test_fgl_target_by_hand(scale, bin_index, weight):
    bins = weighting_function(32, 0.5, 4.0)
    ref = torch.tensor([[0.5, 0.5, 0.125, 0.125]])
    target = torch.tensor([[0.5, 0.5, 0.125 * scale, 0.125 * scale]])
    left, right_weight = fgl_targets(ref, target, bins, 4.0)
    # bins are rounded: an edge on a bin may fall just before it
    position = left + right_weight
    torch.testing.assert_close(
        position, torch.full((1, 4), bin_index + weight), atol=1e-4, rtol=0
    )


def test_fgl_target_far_inside():
    # The target lies far left of the reference: its right edge is at d < W(0).
    bins = weighting_function(32, 0.5, 4.0)
    ref = torch.tensor([[0.9, 0.5, 0.1, 0.1]])
    target = torch.tensor([[0.1, 0.5, 0.1, 0.1]])
    left, right_weight = fgl_targets(ref, target, bins, 4.0)
    assert (left[0, 2].item(), right_weight[0, 2].item()) == (0, 0)
    assert (left[0, 0].item(), right_weight[0, 0].item()) == (31, 1)
    no_size = torch.tensor([[0.9, 0.5, 0.0, 0.0]])
    left, right_weight = fgl_targets(no_size, target, bins, 4.0)
    assert right_weight.isfinite().all()


def test_fgl_by_hand():
    # Three bins, all logits 0: every CE is ln 3, so an edge adds ln 3 * quality.
    # Second layer: bin 1 has logit ln 2, so probabilities 1/4 1/2 1/4; left bin 0,
    # right weight .25: .75 ln 4 + .25 ln 2.
    corners = torch.zeros(2, 1, 4, 3)
    corners[1, ..., 1] = math.log(2)
    left = torch.zeros(1, 4, dtype=INDEX)
    right_weight = torch.full((1, 4), 0.25)
    quality = torch.tensor([[0.5], [0.8]], requires_grad=True)
    loss = fgl_loss(corners, left, right_weight, quality)
    second = 4 * 0.8 * (0.75 * math.log(4) + 0.25 * math.log(2))
    torch.testing.assert_close(loss, torch.tensor([4 * 0.5 * math.log(3), second]))
    assert not loss.requires_grad
    nothing = fgl_loss(corners[:, :0], left[:0], right_weight[:0], quality[:, :0])
    assert nothing.tolist() == [0, 0]


def test_ddf_weights_by_hand():
    # Teacher's best logits 0, ln 3, 0 -> scores .5 .75 .5; query 1 is matched.
    # share .4: matched .4 / 1 * IoU, unmatched .6 / 2 * score
    teacher = torch.tensor([[0.0, -1.0], [math.log(3), 0.0], [-5.0, 0.0]])
    weights = ddf_weights(teacher, torch.tensor([1]), torch.tensor([[0.9], [0.1]]), 0.4)
    expected = torch.tensor([[0.15, 0.36, 0.15], [0.15, 0.04, 0.15]])
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(
    ('num_queries', 'query', 'share', 'expected'),
    [
        (0, [], 0.0, []),
        (2, [], 0.0, [0.25, 0.25]),  # .5 / 2: none matched
        (2, [1, 0], 1.0, [0.3, 0.2]),  # IoU / 2: all matched
    ],
)
def test_ddf_weights_of_one_side(num_queries, query, share, expected):
    quality = torch.tensor([[0.4, 0.6][: len(query)]])
    query = torch.tensor(query, dtype=INDEX)
    weights = ddf_weights(torch.zeros(num_queries, 3), query, quality, share)
    torch.testing.assert_close(weights, torch.tensor([expected]))


def test_ddf_by_hand():
    # Teacher logits (5 ln 3, 0), student (0, 0), T = 5: 3/4 1/4 against 1/2 1/2:
    # KL = .75 ln 1.5 + .25 ln .5 on each edge; * 25 * weight
    teacher = torch.zeros(1, 4, 2)
    teacher[..., 0] = 5 * math.log(3)
    student = torch.zeros(1, 1, 4, 2, requires_grad=True)
    teacher.requires_grad_()
    loss = ddf_loss(student, teacher, torch.tensor([[0.2]]))
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert loss.item() == pytest.approx(25 * 0.2 * divergence)
    # 25 * weight / 4 edges / T * (1/2 - 3/4)
    loss.sum().backward()
    assert teacher.grad is None
    assert student.grad[0, 0, 0, 0].item() == pytest.approx(25 * 0.2 / 4 / 5 * -0.25)


def test_ddf_of_student_equal_to_teacher_is_exactly_zero():
    torch.manual_seed(0)
    teacher = torch.randn(50, 4, 33)
    student = teacher[None].clone().requires_grad_()
    loss = ddf_loss(student, teacher, torch.ones(1, 50))
    assert loss.item() == 0
    loss.sum().backward()
    assert student.grad.abs().max() < 1e-6
