"""The average: its formula, what it covers, and mmengine's hook around it."""

import importlib.util
import math
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from official_helpers import checkout
from torch import nn
from toy_runner import ToyModel, toy_runner

import mmbackbones  # noqa: F401
from mmbackbones.engine.ema import RampEMA, RampEMAHook
from mmbackbones.engine.safe_runner import SafeRunner


class Net(nn.Module):
    """Every kind of state entry: shared, frozen, integer, boolean, transient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.alias = self.conv.bias  # one tensor under two names
        self.frozen = nn.Parameter(torch.tensor([0.5]), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor([4]), requires_grad=False)  # int64
        self.register_buffer('mask', torch.tensor([True, False]))
        self.register_buffer('transient', torch.zeros(2), persistent=False)


def train_a_little(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator)
        net.norm(torch.randn(4, 3, 2, 2, generator=generator))
        net.transient += 1


@pytest.mark.parametrize('warmup_iters', [0, 3, 1000])
@pytest.mark.parametrize('momentum', [1e-4, 0.3])
def test_equals_the_loop_over_tensors(momentum: float, warmup_iters: int) -> None:
    torch.manual_seed(0)
    net = Net()
    ema = RampEMA(net, momentum, warmup_iters)
    expected = {k: v.clone().double() for k, v in net.state_dict().items()}
    for t in range(1, 6):
        train_a_little(net, t)
        ema.update_parameters(net)
        decay = 1 - momentum
        if warmup_iters:
            decay *= 1 - math.exp(-t / warmup_iters)
        for key, value in net.state_dict().items():
            if value.dtype.is_floating_point:
                expected[key] = decay * expected[key] + (1 - decay) * value
    for key, value in ema.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
    assert ema.steps == 5
    # Left as they were when the copy was made.
    assert ema.module.norm.num_batches_tracked == 0
    assert net.norm.num_batches_tracked == 5
    assert ema.module.transient.eq(0).all()
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_first_update_is_an_average_not_a_copy() -> None:
    ema = RampEMA(Net(), momentum=1e-4, warmup_iters=0)
    assert ema.momentum_at(1) == 1e-4
    # 1 - 0.9999 * (1 - exp(-1 / 1000)) = 1 - 0.9999 * 0.00099950017
    ramped = RampEMA(Net(), momentum=1e-4, warmup_iters=1000)
    assert ramped.momentum_at(1) == pytest.approx(0.99900060, abs=1e-8)
    assert ramped.momentum_at(10**6) == pytest.approx(1e-4)


def test_follows_a_module_whose_tensors_were_replaced() -> None:
    net = Net()
    ema = RampEMA(net, momentum=0.5, warmup_iters=0)
    ema.update_parameters(net)
    net.load_state_dict(deepcopy(net.state_dict()), assign=True)
    with torch.no_grad():
        net.conv.weight.fill_(1)
        net.norm.running_mean = torch.ones(3)
    before = ema.module.conv.weight.clone()
    ema.update_parameters(net)
    torch.testing.assert_close(ema.module.conv.weight, (before + 1) / 2)
    torch.testing.assert_close(ema.module.norm.running_mean, torch.full((3,), 0.5))


def test_follows_a_module_whose_memory_layout_changed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2), nn.Conv2d(4, 5, 2))
    ema = RampEMA(net, momentum=0.5, warmup_iters=0)
    ema.update_parameters(net)
    net.to(memory_format=torch.channels_last)
    assert net[0].weight.stride() != ema.module[0].weight.stride()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    halfway = deepcopy(ema.module)
    ema.update_parameters(net)
    for old, new, source in zip(
        halfway.parameters(), ema.module.parameters(), net.parameters(), strict=True
    ):
        torch.testing.assert_close(new, (old + source) / 2)


def test_unwraps_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MASTER_ADDR', 'localhost')
    monkeypatch.setenv('MASTER_PORT', '29541')
    torch.distributed.init_process_group('gloo', rank=0, world_size=1)
    try:
        net = nn.Linear(2, 2)
        ema = RampEMA(net, momentum=0.5, warmup_iters=0)
        nn.init.ones_(net.weight)
        before = ema.module.weight.clone()
        ema.update_parameters(nn.parallel.DistributedDataParallel(net))
        torch.testing.assert_close(ema.module.weight, (before + 1) / 2)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(momentum=0), 'momentum is 0'),
        (dict(momentum=1.0), 'momentum is 1.0'),
        (dict(warmup_iters=-1), 'warmup_iters is -1'),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RampEMA(Net(), **kwargs)


class LateInit(ToyModel):
    """Gets its weights in `init_weights`, after the hook made its copy."""

    def init_weights(self) -> None:
        nn.init.constant_(self.weight, 3.0)


def ema_of(runner: Runner) -> RampEMA:
    hook = next(hook for hook in runner.hooks if isinstance(hook, RampEMAHook))
    return hook.ema_model


def run(work_dir: Path, model: BaseModel | None = None, **kwargs: object) -> Runner:
    hooks = dict(
        ema=dict(type=RampEMAHook, momentum=0.2, warmup_iters=0),
        checkpoint=dict(type=CheckpointHook, interval=1),
    )
    runner = toy_runner(work_dir, hooks, model=model or ToyModel(), **kwargs)
    runner.train()
    return runner


def test_hook_starts_from_the_initialised_weights(tmp_path: Path) -> None:
    runner = run(
        tmp_path,
        LateInit(),
        max_epochs=1,
        scores=[0.1],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
    )
    torch.testing.assert_close(ema_of(runner).module.weight, torch.full((2,), 3.0))


def test_hook_validates_and_saves_the_average_and_resumes(tmp_path: Path) -> None:
    whole = run(tmp_path / 'whole', max_epochs=3, scores=[0.1, 0.2, 0.3])
    validated = whole.val_evaluator.metrics[0].weights
    run(tmp_path / 'parts', max_epochs=2, scores=[0.1, 0.2])
    parts = run(tmp_path / 'parts', max_epochs=3, scores=[0.3], resume=True)
    assert ema_of(parts).steps == ema_of(whole).steps == 6
    torch.testing.assert_close(
        ema_of(parts).state_dict(), ema_of(whole).state_dict(), rtol=0, atol=0
    )
    torch.testing.assert_close(parts.model.weight, whole.model.weight, rtol=0, atol=0)
    torch.testing.assert_close(validated[-1], ema_of(whole).module.weight)
    saved = torch.load(tmp_path / 'parts' / 'epoch_3.pth', weights_only=False)
    torch.testing.assert_close(
        saved['state_dict']['weight'], ema_of(whole).module.weight
    )
    torch.testing.assert_close(
        saved['ema_state_dict']['module.weight'], whole.model.weight.detach()
    )


def test_accumulated_gradients_move_it_once_a_step(tmp_path: Path) -> None:
    """Three epochs of two iterations, which are one step; resumed after two."""

    class Notes(Hook):
        def after_train_epoch(self, runner: Runner) -> None:
            weights.append(runner.model.weight.detach().clone())

    weights: list[torch.Tensor] = []
    optimizer = dict(type='AdamW', lr=0.05)
    options = dict(
        optim_wrapper=dict(optimizer=optimizer, accumulative_counts=2),
        custom_hooks=[Notes()],
        runner_class=SafeRunner,
    )
    run(tmp_path, max_epochs=2, **options)
    average = ema_of(run(tmp_path, max_epochs=3, resume=True, **options))
    assert average.steps == len(weights) == 3
    expected = torch.tensor([1.0, -1.0])
    for weight in weights:
        expected = 0.8 * expected + 0.2 * weight
    torch.testing.assert_close(average.module.weight, expected)


@pytest.mark.parametrize(
    ('momentum', 'warmup_iters', 'share'),
    [(0.01, 0, '94%'), (0.3, 0, None), (0.01, 1000, None)],
)
def test_a_run_too_short_for_its_average_is_told_so(
    tmp_path: Path, momentum: float, warmup_iters: int, share: str | None
) -> None:
    """Three epochs of two iterations: `0.99**6` of the start is left."""
    ema = dict(type=RampEMAHook, momentum=momentum, warmup_iters=warmup_iters)
    runner = toy_runner(tmp_path, dict(ema=ema), model=ToyModel(), max_epochs=3)
    runner.train()
    (log,) = tmp_path.glob('*/*.log')
    told = 'will still be' in log.read_text()
    assert told == (share is not None)
    if share is not None:
        assert f'will still be {share} of what training starts from' in log.read_text()


def test_the_share_of_the_start_is_that_of_the_updates() -> None:
    class One(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(value))

    for warmup_iters in (0, 4):
        average = RampEMA(One(1.0), momentum=0.1, warmup_iters=warmup_iters)
        for _ in range(5):
            average.update_parameters(One(0.0))
        share = average.share_of_start(5)
        assert average.module.weight.item() == pytest.approx(share, rel=1e-5)


def load_official() -> type:
    source = (checkout('D-FINE', 'src', 'optim') / 'ema.py').read_text()
    # Its relative imports pull in the whole framework; it uses two names of it.
    for line in ('from ..core import register', 'from ..misc import dist_utils'):
        assert line in source
        source = source.replace(line, '')
    spec = importlib.util.spec_from_loader('official_ema', loader=None)
    module = importlib.util.module_from_spec(spec)
    module.register = lambda: lambda cls: cls
    module.dist_utils = SimpleNamespace(de_parallel=lambda model: model)
    exec(source, module.__dict__)
    return module.ModelEMA


@pytest.mark.parity
@pytest.mark.parametrize('warmup_iters', [0, 1000])
def test_equals_the_official_average(warmup_iters: int) -> None:
    official_class = load_official()
    torch.manual_seed(0)
    net = Net()
    ours = RampEMA(net, momentum=1e-4, warmup_iters=warmup_iters)
    official = official_class(net, decay=0.9999, warmups=warmup_iters)
    for t in range(1, 51):
        train_a_little(net, t)
        ours.update_parameters(net)
        official.update(net)
    assert official.updates == ours.steps == 50
    expected = official.module.state_dict()
    # The official loop averages a tensor with two names twice a step.
    for key in ('alias', 'conv.bias'):
        expected.pop(key)
    actual = {k: v for k, v in ours.module.state_dict().items() if k in expected}
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
