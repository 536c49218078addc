"""What a training step reads from the device: each read waits for all work before it.

On the CPU, tensors that come from the model or the batch count as the device's, and so
does what is computed from them; what `.cpu()` returns is the host's.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from helpers import data_sample, toy_detector_cfg
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import mmbackbones.detectors  # noqa: F401
from mmbackbones.engine.ema import RampEMA
from mmbackbones.engine.nan_guard import NanGuardHook
from mmbackbones.engine.param_groups import ParamGroupConstructor
from mmbackbones.engine.step_scalars import StepScalarsHook

# Operators whose result, or its shape, the host has to know.
READS = {
    '_local_scalar_dense',
    '_unique2',
    'equal',
    'is_nonzero',
    'masked_select',
    'nonzero',
    'unique_consecutive',
    'unique_dim',
}
CLIP = dict(max_norm=0.1, norm_type=2)


class HostReads(TorchDispatchMode):
    """Names of the operators that would wait for the device, in order."""

    def __init__(self, *on_device: Tensor) -> None:
        super().__init__()
        self.names: list[str] = []
        self._storages = {_storage(tensor) for tensor in on_device}

    def is_on_device(self, value: object) -> bool:
        return isinstance(value, Tensor) and _storage(value) in self._storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        on_device = any(map(self.is_on_device, leaves))
        name = func.__name__.split('.')[0]
        if on_device and (name in READS or _selects(name, leaves)):
            self.names.append(name)
        result = func(*args, **(kwargs or {}))
        if on_device:
            tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            self._storages.update(map(_storage, tensors))
        return result

    def read(self, tensor: Tensor) -> Tensor:
        """Stands in for `Tensor.cpu`."""
        if not self.is_on_device(tensor):
            return tensor
        self.names.append('cpu')
        with _disable_current_modes():
            return tensor.detach().clone()


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _selects(name: str, leaves: list) -> bool:
    """Indexing with a mask, whose sum is the size of the result."""
    masks = (torch.bool, torch.uint8)
    return name.startswith(('index', '_index_put', '_unsafe_index')) and any(
        isinstance(x, Tensor) and x.dtype in masks for x in leaves[1:]
    )


@pytest.fixture
def detector() -> nn.Module:
    torch.manual_seed(0)
    model = MODELS.build(toy_detector_cfg())
    model.init_weights()
    return model.train()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[MessageHub]:
    hub = MessageHub('host_reads')
    monkeypatch.setattr(MessageHub, 'get_current_instance', lambda: hub)
    return hub


def watch(monkeypatch: pytest.MonkeyPatch, *on_device: Tensor) -> HostReads:
    reads = HostReads(*on_device)
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda tensor: reads.read(tensor))
    return reads


@pytest.mark.parametrize(
    'read',
    [
        lambda x: x.sum().item(),
        lambda x: float((x * 2).sum()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), x.sum()),
        lambda x: torch.equal(x, x + 1),
        lambda x: bool((x > 0).any()),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_reads_are_seen(read, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3, requires_grad=True)
    with watch(monkeypatch, x) as reads:
        read(x)
    assert len(reads.names) >= 1


def test_reads_of_the_host_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3)
    with watch(monkeypatch, x) as reads:
        values = (x + 1).cpu()
        assert values.sum().item() > 3 and len(values.nonzero()) == 3
    assert reads.names == ['cpu']


@pytest.mark.parametrize(
    ('sizes', 'clip'),
    [((2, 1), CLIP), ((0, 3), CLIP), ((0, 0), CLIP), ((2, 1), None)],
)
def test_a_training_step_reads_three_times(
    detector: nn.Module,
    hub: MessageHub,
    sizes: tuple[int, ...],
    clip: dict | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The costs of the matching, the norm of the gradient, and all that is logged.

    With the hooks that see every step, as the runner calls them.
    """
    optim_wrapper = build_optim_wrapper(
        detector,
        dict(
            type='OptimWrapper',
            constructor=ParamGroupConstructor,
            optimizer=dict(type='AdamW', lr=1e-4, fused=True),
            clip_grad=clip,
            paramwise_cfg=dict(groups=[]),
        ),
    )
    runner = SimpleNamespace(
        model=detector, optim_wrapper=optim_wrapper, message_hub=hub, iter=0
    )
    ema, guard = RampEMA(detector), NanGuardHook()
    guard.before_train(runner)
    hooks = (StepScalarsHook(), guard)
    box = [4, 4, 30, 40]
    samples = [data_sample([box] * size, [0] * size) for size in sizes]
    images = [torch.randint(256, (3, 64, 64)).byte() for _ in sizes]

    def step() -> None:
        data = dict(inputs=images, data_samples=[sample.clone() for sample in samples])
        for hook in hooks:
            hook.before_train_iter(runner, 0, data)
        outputs = detector.train_step(data, optim_wrapper)
        for hook in hooks:
            hook.after_train_iter(runner, 0, data, outputs)
        ema.update_parameters(detector)

    step()
    on_device = [*detector.state_dict().values(), *images]
    for sample in samples:
        on_device += [sample.gt_instances.bboxes, sample.gt_instances.labels]
    with watch(monkeypatch, *on_device) as reads:
        step()
    assert len(reads.names) <= 3, reads.names
    assert reads.names.count('cpu') == 2
    logged = {name for name in hub.log_scalars if name.startswith('train/loss')}
    assert {'train/loss', 'train/loss_vfl', 'train/loss_giou_aux_0'} <= logged
    assert ('train/grad_norm' in hub.log_scalars) is (clip is not None)


def test_the_backward_pass_reads_nothing(detector: nn.Module) -> None:
    """Some formulas of autograd read, but not while a dispatch mode looks on."""

    def operators(loss: Tensor) -> set[str]:
        with torch.profiler.profile() as profile:
            loss.backward()
        return {event.name.removeprefix('aten::') for event in profile.events()}

    x = torch.rand(3, 2, requires_grad=True)
    assert operators(x.prod(-1).sum()) & {'item', *READS}
    sample = data_sample([[4, 4, 30, 40]] * 3, [0] * 3)
    losses = detector.loss(torch.rand(1, 3, 64, 64), [sample])
    assert not operators(sum(losses.values())) & {'item', *READS}
