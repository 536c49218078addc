"""What a step of D-FINE's criterion costs: operators, memory, waits for the device."""

import dataclasses
import warnings

import pytest
import torch
from criterion_helpers import SMALL, benchmark, map_tensors, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from mmbackbones.losses import DFINECriterion, matching
from mmbackbones.ops.predictions import BoxTargets


class LargestTensor(TorchDispatchMode):
    """Elements of the largest and of all results of operators."""

    largest = 0
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                # strided views of a small storage are not large
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, size)
                self.total += size
        return result


def count_operators(sizes):
    output, targets = benchmark.random_batch(sizes)
    criterion = DFINECriterion()
    with benchmark.OperatorCounter() as operators:
        criterion(output, targets)
    return operators.count


def test_operator_count_does_not_grow_with_batch_or_boxes():
    # D-FINE-L: 6 layers, 300 queries; 56, 62, 220 and 608 boxes
    counts = [
        count_operators(sizes)
        for sizes in ((7,) * 8, (40, 22), (7,) * 31 + (3,), (19,) * 32)
    ]
    assert max(counts) < 1600
    assert max(counts) <= 1.1 * min(counts)


def test_two_thousand_boxes_in_one_image_take_bounded_memory():
    # D-FINE-L: 8 sets of 300 queries, 7 of two denoising queries a box. The largest
    # tensor has 8 coordinates of 1.5 M costs (48 MiB); all costs are 8 * 2000 * 300 =
    # 4.8 M, the denoising corners 6 * 4000 * 132 = 3.2 M. Every box against every
    # other would be 4 M once and 16 M then: twice the boxes, at most twice the work.
    traces = []
    for num_boxes in (2000, 4000):
        output, targets = benchmark.random_batch((num_boxes,))
        leaves = with_gradients(output)
        with LargestTensor() as trace:
            losses = DFINECriterion()(output, targets)
            torch.autograd.grad(sum(losses.values()), list(leaves.values()))
        assert all(loss.isfinite() for loss in losses.values())
        traces.append(trace)
    assert all(trace.largest <= 8 * 3 * 2**19 for trace in traces)
    assert traces[1].total <= 2.1 * traces[0].total


@pytest.mark.parametrize(
    'doubled',
    [dict(sizes=(40,) * 4), dict(sizes=(20,) * 8), dict(num_queries=600)],
    ids=['boxes', 'images', 'queries'],
)
def test_twice_as_many_are_at_most_twice_the_work(doubled):
    # No term has boxes x boxes, or the boxes of one image and queries of another:
    # that would be four times as much. Denoising queries are two a box in any group.
    traces = []
    for options in ({}, doubled):
        options = dict(sizes=(20,) * 4, num_layers=3) | options
        output, targets = benchmark.random_batch(**options)
        leaves = with_gradients(output)
        with LargestTensor() as trace:
            losses = DFINECriterion()(output, targets)
            torch.autograd.grad(sum(losses.values()), list(leaves.values()))
        traces.append(trace)
    assert traces[1].total <= 2.1 * traces[0].total
    assert traces[1].largest <= 2.1 * traces[0].largest


@pytest.fixture
def host_reads(monkeypatch):
    """Tensors on `meta` have no values, so any unplanned read from them raises."""
    reads = []

    def read(tensor):
        reads.append(tensor)
        return torch.rand(tensor.shape)

    monkeypatch.setattr(torch.Tensor, 'cpu', read)
    return reads


@pytest.mark.parametrize(
    'read',
    [
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x + 1),
        lambda x: x.numpy(),
        lambda x: bool((x > 0).any()),
    ],
)
def test_a_read_from_meta_raises(read):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        read(torch.ones(3, device='meta'))


@pytest.mark.parametrize('sizes', [(0, 0), (3, 0, 25)])
def test_a_step_reads_from_the_device_once_and_writes_twice(
    sizes, host_reads, monkeypatch
):
    writes = []
    to_device = matching.indices_to_device

    def count_writes(*args):
        writes.append(args)
        return to_device(*args)

    monkeypatch.setattr(matching, 'indices_to_device', count_writes)
    monkeypatch.setattr(
        'mmbackbones.losses.detr_criterion.indices_to_device', count_writes
    )
    output, targets = benchmark.random_batch(sizes, **SMALL)
    output = map_tensors(output, lambda tensor: tensor.to('meta'))
    if output.dn_pairs is not None:
        pairs = output.dn_pairs
        pairs = dataclasses.replace(
            pairs,
            **{
                name: getattr(pairs, name).to('meta')
                for name in ('image', 'query', 'target')
            },
        )
        output = dataclasses.replace(output, dn_pairs=pairs)
    targets = BoxTargets(
        targets.labels.to('meta'), targets.boxes.to('meta'), targets.sizes
    )
    leaves = with_gradients(output)
    # `forward` without its autocast region, which torch has not for meta
    losses = DFINECriterion().to('meta')._losses(output, targets)
    sum(losses.values()).backward()
    assert len(host_reads) == 1
    assert len(writes) == 2
    assert all(leaf.grad is not None for leaf in leaves.values())


READS = ('item', '_local_scalar_dense', 'is_nonzero', 'nonzero', 'equal')


def read_operators(step):
    """Operators in a forward and backward on the CPU that would wait on a GPU."""
    with torch.profiler.profile() as profile:
        step().backward()
    names = {event.name.removeprefix('aten::') for event in profile.events()}
    return names.intersection(READS)


def test_no_operator_of_a_step_reads_a_value():
    # `prod` looks for zeros in its backward, which meta tensors do not show
    x = torch.rand(3, 2, requires_grad=True)
    assert read_operators(lambda: x.prod(-1).sum())
    assert read_operators(lambda: x[x > 0.1].sum())
    output, targets = benchmark.random_batch((3, 0, 25), **SMALL)
    with_gradients(output)
    criterion = DFINECriterion()
    assert not read_operators(lambda: sum(criterion(output, targets).values()))


@pytest.mark.gpu
def test_a_step_on_cuda_waits_once():
    output, targets = benchmark.random_batch((3, 0, 25), **SMALL)
    expected = DFINECriterion()(output, targets)
    output = map_tensors(output, lambda tensor: tensor.cuda())
    pairs = {
        name: getattr(output.dn_pairs, name).cuda()
        for name in ('image', 'query', 'target')
    }
    output = dataclasses.replace(
        output, dn_pairs=dataclasses.replace(output.dn_pairs, **pairs)
    )
    targets = BoxTargets(targets.labels.cuda(), targets.boxes.cuda(), targets.sizes)
    with_gradients(output)
    criterion = DFINECriterion().cuda()
    sum(criterion(output, targets).values()).backward()  # allocations, libraries
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        losses = criterion(output, targets)
        sum(losses.values()).backward()
        torch.cuda.set_sync_debug_mode('default')
    assert sum('synchroniz' in str(w.message) for w in caught) <= 1
    for name, loss in losses.items():
        torch.testing.assert_close(loss.cpu(), expected[name], rtol=1e-4, atol=1e-6)
