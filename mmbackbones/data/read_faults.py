"""Unreadable images while training: tried again, replaced, counted, named.

A disk of a cluster fails for a second, a file is damaged while a run is in its third
epoch: neither should end the run, and neither should pass unseen.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.runner import Runner
from PIL import Image

from mmbackbones.data.coco_json import name_some
from mmbackbones.registry import HOOKS

__all__ = ['ReadFaultHook', 'ReplacesUnreadable', 'is_unreadable']

_KEY = 'read_faults'
_WAITS = (0.1, 1.0)  # seconds before a file is tried again
_REPLACEMENTS = 10
_CAUSES = (OSError, SyntaxError, Image.DecompressionBombError)


def is_unreadable(error: BaseException) -> bool:
    """Whether an error says that a file cannot be read.

    Our loaders raise a `ValueError` from the error of the system or the decoder. Any
    other `ValueError` is a mistake in data, config or code, and is not hidden.
    """
    return isinstance(error, _CAUSES) or isinstance(error.__cause__, _CAUSES)


class ReplacesUnreadable:
    """For a data set of mmengine: puts another sample where one cannot be read.

    In training only. A file is tried again after 0.1 and 1 second, then another
    sample is drawn. What was replaced travels to the main process as `read_faults`
    in the `metainfo` of the data sample, for `ReadFaultHook`.

    Comes before mmengine's class among the bases.
    """

    def prepare_data(self, idx: int) -> Any:
        """The sample, or another one.

        Raises:
            ValueError: ten other samples cannot be read either.
        """
        if self.test_mode:
            return super().prepare_data(idx)
        faults: dict[str, str] = {}  # one drawn twice counts once
        for _ in range(_REPLACEMENTS):
            try:
                data = self._read_patiently(idx)
            except Exception as error:
                if not is_unreadable(error):
                    raise
                faults[self._name_of(idx)] = str(error)
                idx = self._rand_another()
                continue
            if faults and data is not None:
                data['data_samples'].set_metainfo({_KEY: list(faults.items())})
            return data
        raise ValueError(
            f'{_REPLACEMENTS} samples in a row cannot be read, the storage seems to be '
            f'gone; the last error: {list(faults.values())[-1]}'
        )

    def _read_patiently(self, idx: int) -> Any:
        for wait in _WAITS:
            try:
                return super().prepare_data(idx)
            except Exception as error:
                if not is_unreadable(error):
                    raise
                time.sleep(wait)
        return super().prepare_data(idx)

    def _name_of(self, idx: int) -> str:
        return str(self.get_data_info(idx).get('img_path', f'sample {idx}'))


@HOOKS.register_module()
class ReadFaultHook(Hook):
    """Counts the files that a training set could not read, and names them.

    Each file is warned of when it first fails, all of them are named at the end of
    training. The run stops where they are more than a share of the training set,
    which is then not what it should be. One file is tolerated in any set.

    Fires before training iterations, on each rank for its own samples. The counts
    stand in the message hub, so that a resumed run goes on with them. Ranks add up
    theirs before a state is saved and after each epoch.

    Priority NORMAL: before a checkpoint is saved.

    Args:
        max_share: of the training set that may be unreadable.

    Raises:
        ValueError: `max_share` is not in [0, 1]; more files than that failed.
    """

    def __init__(self, max_share: float = 0.01) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f'max_share is {max_share}; give a share from 0 to 1')
        self.max_share = max_share
        self._shared: Counter[str] = Counter()  # of all ranks, the same on each
        self._own: Counter[str] = Counter()  # of this rank since then

    def before_train(self, runner: Runner) -> None:
        """Go on with the counts of a resumed run."""
        self._shared = Counter(runner.message_hub.runtime_info.get(_KEY, {}))
        self._own.clear()

    def before_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
    ) -> None:
        """Take up what the samples bring along."""
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else ()
        faults = [fault for sample in samples or () for fault in _faults_of(sample)]
        if faults:
            self._count(runner, faults)

    def before_saving(self, runner: Runner) -> None:
        """Share the counts, see `SafeCheckpointHook`."""
        self._share(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Share the counts."""
        self._share(runner)

    def after_train(self, runner: Runner) -> None:
        """Name all of them."""
        self._share(runner)
        if self._shared:
            runner.logger.warning(
                f'{len(self._shared)} images could not be read and were replaced '
                f'{self._shared.total()} times: {name_some(sorted(self._shared), 100)}'
            )

    def _share(self, runner: Runner) -> None:
        """Add up the counts of all ranks; each of them has to call it."""
        for own in all_gather_object(self._own):
            self._shared += own
        self._own = Counter()
        self._publish(runner)

    def _publish(self, runner: Runner) -> dict[str, int]:
        counts = dict(self._shared + self._own)
        runner.message_hub.update_info(_KEY, counts)
        return counts

    def _count(self, runner: Runner, faults: Sequence[tuple[str, str]]) -> None:
        for name, reason in faults:
            if name not in self._shared and name not in self._own:
                runner.logger.warning(f'Replaced by another sample: {reason}')
            self._own[name] += 1
        counts = self._publish(runner)
        size = len(runner.train_dataloader.dataset)
        if len(counts) > max(1, self.max_share * size):
            raise ValueError(
                f'{len(counts)} of {size} training images cannot be read, more than '
                f'default_hooks.read_faults.max_share = {self.max_share}: '
                f'{name_some(sorted(counts))}. The last error: {faults[-1][1]}'
            )


def _faults_of(sample: object) -> Sequence[tuple[str, str]]:
    return getattr(sample, 'metainfo', {}).get(_KEY, ())
