"""A learning rate that stays flat for half of a run and falls while it is tidied up.

RTMDet: An Empirical Study of Designing Real-Time Object Detectors, arXiv 2212.07784
(flat-cosine); DEIM, arXiv 2412.04234.
Upstream: https://github.com/Intellindust-AI-Lab/DEIM engine/optim/lr_scheduler.py
(Apache-2.0).
Departs from the source:
- iteration t runs with the rate of t (upstream's with that of t - 1, and its very
  first with a small constant);
- a warm-up of 0 iterations is none (upstream divides by zero), one longer than the
  flat part is cut;
- turning points move with the length of the run.
"""

import math
from typing import Any

from mmengine.optim.scheduler.param_scheduler import _ParamScheduler

from mmbackbones.registry import PARAM_SCHEDULERS

__all__ = ['FlatCosineLR']


@PARAM_SCHEDULERS.register_module()
class FlatCosineLR(_ParamScheduler):
    """Warm-up, flat, half a cosine, flat again; set for each iteration.

    With b the rate of a parameter group, of iteration t it is

        b * (t / warmup)^2                       t < warmup
        b                                        up to flat_until
        b * (gamma + (1 - gamma) * (1 + cos(pi * s)) / 2)
                                                 s the share of the way between
        b * gamma                                from constant_from on

    `flat_until` and `constant_from` are epochs of a run of `of_epochs`, as published;
    a run of another length turns at the same shares of its own.

    Args:
        *args: as mmengine's schedulers: the optimiser; the runner gives it.
        flat_until: epoch that the cosine begins at.
        constant_from: epoch that it ends at.
        of_epochs: length of the run that those two are stated for.
        gamma: rate at the end over that in the flat part; 1 for no cosine.
        warmup: iterations; not scaled with the run.
        end: iterations of the whole run; the runner gives it.
        by_epoch: False, so that the runner gives iterations.
        **kwargs: as mmengine's schedulers.

    Raises:
        ValueError: the turning points are not in order; `gamma` or `warmup` is
            negative; `by_epoch` is not False.
    """

    def __init__(
        self,
        *args: Any,
        flat_until: float,
        constant_from: float,
        of_epochs: float,
        gamma: float = 0.5,
        warmup: int = 2000,
        end: int,
        by_epoch: bool = True,
        **kwargs: Any,
    ) -> None:
        if not 0 <= flat_until <= constant_from <= of_epochs or of_epochs <= 0:
            raise ValueError(
                f'flat_until is {flat_until}, constant_from {constant_from} and '
                f'of_epochs {of_epochs}; they must not fall in this order'
            )
        if gamma < 0 or warmup < 0:
            raise ValueError(
                f'gamma is {gamma} and warmup {warmup}; neither may be negative'
            )
        if by_epoch:
            raise ValueError(
                'FlatCosineLR is set for each iteration; state by_epoch=False, or '
                f'its end, {end}, is taken for iterations'
            )
        self.gamma = gamma
        self.flat_until = end * flat_until / of_epochs  # iterations from here on
        self.constant_from = end * constant_from / of_epochs
        self.warmup = min(warmup, self.flat_until)
        super().__init__(
            *args, **{'param_name': 'lr', **kwargs}, end=end, by_epoch=by_epoch
        )

    def factor(self, iteration: int) -> float:
        """Of the base rate."""
        if iteration < self.warmup:
            return (iteration / self.warmup) ** 2
        if iteration <= self.flat_until:
            return 1.0
        if iteration >= self.constant_from:
            return self.gamma
        way = (iteration - self.flat_until) / (self.constant_from - self.flat_until)
        return self.gamma + (1 - self.gamma) * (1 + math.cos(math.pi * way)) / 2

    def _get_value(self) -> list[float]:
        factor = self.factor(self.last_step)
        return [base * factor for base in self.base_values]
