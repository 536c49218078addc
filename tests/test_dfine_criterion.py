import dataclasses
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from mmbackbones.losses import DFINECriterion, matching
from mmbackbones.ops.boxes import cxcywh_to_xyxy, elementwise_iou
from mmbackbones.ops.predictions import BoxTargets, DecoderOutput
from mmbackbones.registry import MODELS

# random predictions come from the benchmark, so that both see the same
_path = Path(__file__).parents[1] / 'benchmarks' / 'criterion.py'
_spec = importlib.util.spec_from_file_location('criterion_benchmark', _path)
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)

SMALL = dict(num_layers=3, num_queries=20, num_classes=5, num_denoising=10)


def with_gradients(output):
    leaves = benchmark.leaves(output)
    for leaf in leaves.values():
        leaf.requires_grad_()
    return leaves


def map_tensors(output, convert):
    """The output with `convert` applied to every floating tensor."""

    def walk(value):
        if dataclasses.is_dataclass(value):
            return dataclasses.replace(
                value,
                **{f.name: walk(getattr(value, f.name)) for f in fields(value)},
            )
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return convert(value) if is_float else value

    fields = dataclasses.fields
    return walk(output)


def expected_keys(num_layers):
    boxes = ['loss_vfl', 'loss_bbox', 'loss_giou']
    layer = [*boxes, 'loss_fgl']
    keys = set(layer)
    for i in range(num_layers - 1):
        keys |= {f'{name}_aux_{i}' for name in [*layer, 'loss_ddf']}
    for i in range(num_layers):
        keys |= {f'{name}_dn_{i}' for name in [*layer, 'loss_ddf']}
    return keys | {f'{n}{s}' for n in boxes for s in ('_pre', '_enc_0', '_dn_pre')}


@pytest.mark.parametrize(('num_layers', 'num_terms'), [(3, 38), (4, 48), (6, 68)])
@pytest.mark.parametrize('sizes', [(0, 0), (3, 0)])
def test_terms_are_the_published_ones(sizes, num_layers, num_terms):
    output, targets = benchmark.random_batch(
        sizes, **{**SMALL, 'num_layers': num_layers}
    )
    losses = DFINECriterion()(output, targets)
    assert set(losses) == expected_keys(num_layers)
    assert len(losses) == num_terms
    assert all(loss.shape == () for loss in losses.values())


@pytest.mark.parametrize(
    ('sizes', 'num_queries'),
    [
        ((0,), 20),
        ((0, 0, 0), 20),
        ((1,), 1),
        ((0, 3), 20),
        ((4, 0, 2, 0), 20),
        ((30, 2), 20),  # more boxes than queries
        ((6,), 6),  # every query is matched
    ],
)
def test_any_spread_of_boxes_gives_finite_losses_and_all_gradients(sizes, num_queries):
    output, targets = benchmark.random_batch(
        sizes, **{**SMALL, 'num_queries': num_queries}
    )
    leaves = with_gradients(output)
    losses = DFINECriterion()(output, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.isfinite().all(), name
    zero = {name for name, loss in losses.items() if loss == 0}
    if sum(sizes) == 0:
        # scores of unmatched queries and their distillation remain
        kept = {'loss_vfl', 'loss_vfl_aux_0', 'loss_vfl_aux_1', 'loss_vfl_pre'}
        kept |= {'loss_vfl_enc_0', 'loss_ddf_aux_0', 'loss_ddf_aux_1'}
        assert set(losses) - zero == kept
    else:
        # a pair without overlap has no distribution loss
        assert 'loss_ddf_dn_2' in zero
        assert all('fgl' in name or 'ddf' in name for name in zero)


def test_batch_of_nothing_normalises_by_one():
    output, targets = benchmark.random_batch((0,), **SMALL)
    loss = DFINECriterion()(output, targets)['loss_vfl']
    logits = output.queries.logits[-1]
    # alpha p^gamma * -ln(1 - p), summed
    expected = (0.75 * logits.sigmoid() ** 2 * -(-logits).sigmoid().log()).sum()
    torch.testing.assert_close(loss, expected)


def test_matched_layer_by_hand():
    # One image, one box, one query, one class, one layer, no further heads, not in
    # training. IoU = .5 (widths .2 and .4), logit 0 -> VFL = .5 * ln 2; L1 = .2 * 5;
    # GIoU = .5 * 2. FGL: all bins equal, 4 edges * ln 33 * IoU * .15
    output, _ = benchmark.random_batch((0,), num_layers=1, num_queries=1, num_classes=1)
    queries = dataclasses.replace(
        output.queries,
        logits=torch.zeros(1, 1, 1, 1),
        boxes=torch.tensor([0.5, 0.5, 0.2, 0.4]).view(1, 1, 1, 4),
        corners=torch.zeros(1, 1, 1, 132),
        pre_logits=None,
        pre_boxes=None,
    )
    targets = BoxTargets(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]), (1,))
    losses = DFINECriterion().eval()(DecoderOutput(queries), targets)
    expected = {
        'loss_vfl': 0.5 * torch.tensor(2.0).log(),
        'loss_bbox': torch.tensor(1.0),
        'loss_giou': torch.tensor(1.0),
        'loss_fgl': 0.15 * 4 * 0.5 * torch.tensor(33.0).log(),
    }
    assert set(losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)


def test_denoising_queries_are_judged_by_the_boxes_they_were_made_from():
    output, targets = benchmark.random_batch((3, 0, 2), **SMALL)
    pairs, boxes = output.dn_pairs, output.denoising.boxes
    assert pairs.num_groups == 3  # 10 // 3, so 15 pairs
    losses = DFINECriterion()(output, targets)
    for layer in range(3):
        found = boxes[layer, pairs.image, pairs.query]
        expected = 5 * (found - targets.boxes[pairs.target]).abs().sum() / 15
        torch.testing.assert_close(losses[f'loss_bbox_dn_{layer}'], expected)


def test_boxes_are_judged_by_the_union_and_scores_by_their_own_matches():
    output, targets = benchmark.random_batch((3, 0, 2), **SMALL)
    criterion = DFINECriterion()
    losses = criterion(output, targets)
    queries = output.queries
    heads = [
        (queries.pre_logits, queries.pre_boxes),
        (output.enc_logits, output.enc_boxes),
    ]
    own = criterion.matcher(
        torch.cat((queries.logits, *(logits[None] for logits, _ in heads))),
        torch.cat((queries.boxes, *(boxes[None] for _, boxes in heads))),
        targets,
    )
    union = matching.union_of_matches(own)
    assert len(union.query) > 5
    enc_boxes = output.enc_boxes.flatten(0, 1)
    difference = (enc_boxes[union.query] - targets.boxes[union.target]).abs().sum()
    expected = 5 * difference / len(union.query)
    torch.testing.assert_close(losses['loss_bbox_enc_0'], expected)
    enc_logits = output.enc_logits.flatten(0, 1)
    scores = torch.zeros_like(enc_logits)
    weights = 0.75 * enc_logits.sigmoid() ** 2
    for query, target in zip(own.query[-1], own.target[-1], strict=True):
        quality = elementwise_iou(
            cxcywh_to_xyxy(enc_boxes[query]), cxcywh_to_xyxy(targets.boxes[target])
        )
        scores[query, targets.labels[target]] = quality
        weights[query, targets.labels[target]] = quality
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        enc_logits, scores, weights, reduction='sum'
    )
    torch.testing.assert_close(losses['loss_vfl_enc_0'], expected / 5)


def test_equal_layers_have_equal_losses_and_nothing_to_distil():
    # as at initialisation, where all heads give the same
    output, targets = benchmark.random_batch((3, 1), **SMALL)
    benchmark.bring_together(output, 0)
    losses = DFINECriterion()(output, targets)
    assert all(loss == 0 for name, loss in losses.items() if 'ddf' in name)
    for name in ('loss_vfl', 'loss_bbox', 'loss_giou', 'loss_fgl'):
        torch.testing.assert_close(losses[f'{name}_aux_0'], losses[name])
        torch.testing.assert_close(losses[f'{name}_dn_0'], losses[f'{name}_dn_2'])


def test_two_calls_give_the_same_numbers():
    output, targets = benchmark.random_batch((3, 0, 5), **SMALL)
    other = benchmark.random_batch((1, 2, 2), **SMALL, seed=1)
    criterion = DFINECriterion()
    first = criterion(output, targets)
    criterion(*other)
    again = criterion(output, targets)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_weights_multiply_their_terms():
    output, targets = benchmark.random_batch((3, 2), **SMALL)
    once = DFINECriterion()(output, targets)
    defaults = dict(vfl=1.0, bbox=5.0, giou=2.0, fgl=0.15, ddf=1.5)
    for name, default in defaults.items():
        argument = 'class_weight' if name == 'vfl' else f'{name}_weight'
        twice = DFINECriterion(**{argument: 2 * default})(output, targets)
        for key, value in once.items():
            factor = 2 if key.startswith(f'loss_{name}') else 1
            torch.testing.assert_close(twice[key], factor * value)


def test_criterion_is_registered_and_adds_nothing_to_a_checkpoint():
    criterion = MODELS.build(dict(type='DFINECriterion', reg_scale=8.0))
    assert criterion.bins[-1] == 8
    assert not criterion.state_dict()
    assert not list(criterion.parameters())
    with pytest.raises(TypeError):
        DFINECriterion(weight_dict={})


def test_teacher_learns_nothing_from_its_students():
    output, targets = benchmark.random_batch((3,), **SMALL)
    leaves = with_gradients(output)
    DFINECriterion()(output, targets)['loss_ddf_aux_0'].backward()
    grad = leaves['queries.corners'].grad
    assert grad[0].abs().sum() > 0
    assert grad[1:].abs().sum() == 0
    assert leaves['queries.logits'].grad is None


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_judged_in_float32(dtype):
    output, targets = benchmark.random_batch((3, 2), **SMALL)
    half = map_tensors(output, lambda tensor: tensor.to(dtype))
    expected = DFINECriterion()(map_tensors(half, torch.Tensor.float), targets)
    with torch.autocast('cpu', torch.bfloat16):
        losses = DFINECriterion()(half, targets)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    'box',
    [(0.5, 0.5, 0.0, 0.0), (0.5, 0.5, -0.1, -0.3), (5.0, -4.0, 1e-9, 1e9)],
)
@pytest.mark.parametrize('of', ['predictions', 'targets', 'both'])
def test_degenerate_boxes_have_finite_losses_and_gradients(box, of):
    output, targets = benchmark.random_batch((3, 2), **SMALL)
    box = torch.tensor(box)
    if of != 'targets':
        for queries in (output.queries, output.denoising):
            queries.boxes[:, :, ::2] = box
            queries.ref_boxes[:, ::2] = box
            queries.pre_boxes[:, ::2] = box
    if of != 'predictions':
        targets.boxes[::2] = box
    leaves = with_gradients(output)
    losses = DFINECriterion()(output, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


@pytest.mark.parametrize('name', ['logits', 'boxes', 'corners'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_broken_predictions_neither_raise_nor_vanish(name, value):
    output, targets = benchmark.random_batch((3, 2), **SMALL)
    getattr(output.queries, name)[1] = value
    losses = DFINECriterion()(output, targets)
    assert not sum(losses.values()).isfinite()
    hit = {
        'logits': 'loss_vfl_aux_1',
        'boxes': 'loss_bbox_aux_1',
        'corners': 'loss_fgl_aux_1',
    }
    assert not losses[hit[name]].isfinite()
    assert losses['loss_bbox'].isfinite()  # the layers before and after are judged


# -- cost of a step ---------------------------------------------------------------


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


# -- several processes ------------------------------------------------------------

RANK_SIZES = ((3, 0, 5), (0, 0))  # the second rank has no boxes


def _run_rank(rank, port, folder):
    dist.init_process_group(
        'gloo', f'tcp://127.0.0.1:{port}', world_size=len(RANK_SIZES), rank=rank
    )
    batch = benchmark.random_batch(RANK_SIZES[rank], **SMALL, seed=rank)
    losses = DFINECriterion()(*batch)
    torch.save(losses, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_ranks_together_normalise_as_one_batch(tmp_path, monkeypatch):
    import socket

    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    mp.spawn(_run_rank, (port, str(tmp_path)), nprocs=len(RANK_SIZES))
    ranks = [torch.load(tmp_path / f'{rank}.pt') for rank in range(len(RANK_SIZES))]
    assert len({frozenset(losses) for losses in ranks}) == 1

    # one process with all images: sums add up, divided by the same number
    batches = [
        benchmark.random_batch(sizes, **SMALL, seed=rank)
        for rank, sizes in enumerate(RANK_SIZES)
    ]
    queries = [output.queries for output, _ in batches]
    joined = {
        field.name: torch.cat(
            [getattr(query, field.name) for query in queries],
            dim=1 if field.name in ('logits', 'boxes', 'corners') else 0,
        )
        for field in dataclasses.fields(queries[0])
    }
    output = DecoderOutput(
        type(queries[0])(**joined),
        enc_logits=torch.cat([output.enc_logits for output, _ in batches]),
        enc_boxes=torch.cat([output.enc_boxes for output, _ in batches]),
    )
    targets = BoxTargets(
        torch.cat([targets.labels for _, targets in batches]),
        torch.cat([targets.boxes for _, targets in batches]),
        sum(RANK_SIZES, ()),
    )
    together = DFINECriterion()(output, targets)
    for name, loss in together.items():
        if '_dn_' not in name and 'ddf' not in name:  # ddf averages per rank
            mean = sum(losses[name] for losses in ranks) / len(ranks)
            torch.testing.assert_close(mean, loss, msg=name)
