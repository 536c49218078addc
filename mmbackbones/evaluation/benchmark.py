"""Size, arithmetic and speed of a model, measured the same way everywhere.

FLOPs are those of `torch.utils.flop_counter`: two per multiply-add of convolutions,
matrix products and attention; nothing for activations, norms, sampling. D-FINE's
published figures are of calflops, which overlooks the products inside its attention:
7.165 GFLOPs there are 7.314 here (N, 640 px, deploy form), 91.03 are 91.60 (L).
"""

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median, quantiles

import torch
from mmengine.optim import OptimWrapper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    'SplitTime',
    'Timing',
    'conditions',
    'count_flops',
    'count_parameters',
    'format_table',
    'measure',
    'measure_stages',
    'training_stages',
]


@dataclass(frozen=True)
class Timing:
    """Wall time of repeated runs, in milliseconds.

    Attributes:
        median_ms: half of the runs took at most this long.
        q25_ms: a quarter did.
        q75_ms: three quarters did.
        min_ms: of the fastest.
        num_runs: how many were timed, warm-up excluded.
    """

    median_ms: float
    q25_ms: float
    q75_ms: float
    min_ms: float
    num_runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> 'Timing':
        """Summarise durations; at least one."""
        ms = [1e3 * s for s in seconds]
        low, _, high = quantiles(ms, n=4) if len(ms) > 1 else (ms[0],) * 3
        return cls(median(ms), max(low, min(ms)), min(high, max(ms)), min(ms), len(ms))


@dataclass(frozen=True)
class SplitTime:
    """Result of a stage of which parts are to be shown as stages of their own.

    Attributes:
        value: for the next stage.
        seconds: of the parts, by name.
    """

    value: object
    seconds: dict[str, float]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Number of elements: `total`, `trainable`, and by child module."""
    parameters = list(model.parameters())
    children = {
        name: sum(p.numel() for p in child.parameters())
        for name, child in model.named_children()
    }
    return dict(
        total=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        **{name: count for name, count in children.items() if count},
    )


def count_flops(forward: Callable[[], object]) -> int:
    """FLOPs of one call (see the head of this file), without gradients.

    Args:
        forward: runs the model once; model and input may be on the meta device.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


def conditions(device: torch.device | str) -> dict[str, str | int]:
    """What a number depends on besides the model: machine and versions."""
    device = torch.device(device)
    on_gpu = device.type == 'cuda'
    return dict(
        device=torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        num_threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def measure(
    run: Callable[[], object],
    *,
    device: torch.device | str,
    num_warmup: int = 10,
    num_runs: int = 50,
) -> Timing:
    """Latency of a call, waiting for the device before and after each.

    Args:
        run: the call; gradients are as the caller set them.
        device: that it computes on.
        num_warmup: runs before timing starts.
        num_runs: timed runs.

    Raises:
        ValueError: nothing to time.
    """
    return measure_stages(
        {'run': lambda _: run()},
        device=device,
        num_warmup=num_warmup,
        num_runs=num_runs,
    )['run']


def measure_stages(
    stages: Mapping[str, Callable],
    *,
    device: torch.device | str,
    num_warmup: int = 10,
    num_runs: int = 50,
) -> dict[str, Timing]:
    """Time consecutive stages of one piece of work, each with its own clock.

    The device is waited for between stages, so that none hides behind another; the
    sum is therefore an upper bound of the time without this measurement.

    Args:
        stages: by name, in order; each takes what the one before returned (the
            first None). A stage that returns a `SplitTime` passes its `value` on,
            and its `seconds` count as stages of their own, not as part of it.
        device: that they compute on.
        num_warmup: rounds before timing starts.
        num_runs: timed rounds.

    Returns:
        Timings by stage, those split off included, and `total`, the sum in each
        round.

    Raises:
        ValueError: `num_runs` below 1.
    """
    if num_runs < 1:
        raise ValueError(f'num_runs is {num_runs}; give 1 or more')
    device = torch.device(device)
    rounds = [_one_round(stages, device) for _ in range(num_warmup + num_runs)]
    timed = rounds[num_warmup:]
    seconds = {name: [one[name] for one in timed] for name in timed[0]}
    seconds['total'] = [sum(one.values()) for one in timed]
    return {name: Timing.of(values) for name, values in seconds.items()}


def _one_round(
    stages: Mapping[str, Callable], device: torch.device
) -> dict[str, float]:
    seconds: dict[str, float] = {}
    value = None
    _wait(device)
    for name, stage in stages.items():
        start = time.perf_counter()
        value = stage(value)
        _wait(device)
        seconds[name] = time.perf_counter() - start
        if isinstance(value, SplitTime):
            seconds[name] -= sum(value.seconds.values())
            seconds.update(value.seconds)
            value = value.value
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def training_stages(
    model: nn.Module,
    batches: Iterator[dict],
    optim_wrapper: OptimWrapper,
    *,
    ema: nn.Module | None = None,
) -> dict[str, Callable]:
    """The stages of a training step, for `measure_stages`.

    `data` (waiting for the loader), `preprocess` (to the device, batch augments),
    `forward`, `loss`, `backward`, `optimizer` (clipping, update, zeroing) and `ema`.

    Args:
        model: a detector or segmentor of OpenMMLab in training mode. With a child
            `criterion` the time within it is the stage `loss`; without, `forward`
            contains it.
        batches: of the training loader, never ending.
        optim_wrapper: of mmengine, with or without AMP.
        ema: average to be updated after each step, with `update_parameters`.
    """
    device = next(model.parameters()).device

    def forward(data: dict) -> SplitTime:
        with optim_wrapper.optim_context(model), _timed(model, 'criterion') as spent:
            losses = model(**data, mode='loss')
            loss, _ = model.parse_losses(losses)
            _wait(device)
        return SplitTime(loss, {'loss': sum(spent)} if spent else {})

    def backward(loss: torch.Tensor) -> None:
        optim_wrapper.backward(optim_wrapper.scale_loss(loss))

    def update(_: None) -> None:
        optim_wrapper.step()
        optim_wrapper.zero_grad()

    stages = dict(
        data=lambda _: next(batches),
        preprocess=lambda batch: model.data_preprocessor(batch, True),
        forward=forward,
        backward=backward,
        optimizer=update,
    )
    if ema is not None:
        stages['ema'] = lambda _: ema.update_parameters(model)
    return stages


@contextmanager
def _timed(model: nn.Module, name: str) -> Iterator[list[float]]:
    """Seconds of every call of a child module within the block."""
    child = getattr(model, name, None)
    spent: list[float] = []
    if not isinstance(child, nn.Module):
        yield spent
        return
    device = next(model.parameters()).device
    start = 0.0

    def before(*_: object) -> None:
        nonlocal start
        _wait(device)
        start = time.perf_counter()

    def after(*_: object) -> None:
        _wait(device)
        spent.append(time.perf_counter() - start)

    handles = (
        child.register_forward_pre_hook(before),
        child.register_forward_hook(after),
    )
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def format_table(timings: Mapping[str, Timing]) -> str:
    """Timings as text; shares where one of them is `total`."""
    whole = timings['total'].median_ms if 'total' in timings else None
    rows = [('', 'median ms', 'q25', 'q75', 'share')]
    for name, timing in timings.items():
        values = asdict(timing)
        numbers = [f'{values[key]:.2f}' for key in ('median_ms', 'q25_ms', 'q75_ms')]
        share = f'{timing.median_ms / whole:.0%}' if whole else ''
        rows.append((name, *numbers, share))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows
    ]
    return '\n'.join('  '.join(line).rstrip() for line in lines)
