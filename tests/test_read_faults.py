"""Images that become unreadable in training: replaced, counted, named, or too many."""

import gc
import json
import os
from functools import partial
from pathlib import Path

import pytest
from killed_runs import RANKS, NoisyModel, in_ranks, noisy_runner
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs
from mmengine.dataset import DefaultSampler, pseudo_collate
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader
from toy_runner import ToyModel, ToyPreprocessor

from mmbackbones.data import read_faults
from mmbackbones.data.coco import CocoDetection
from mmbackbones.data.det_transforms import LoadImage
from mmbackbones.data.read_faults import ReadFaultHook, is_unreadable
from mmbackbones.data.synthetic import draw_detection_set

PIPELINE = [
    dict(type=LoadImage),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=PackDetInputs, meta_keys=('img_path',)),
]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_faults, '_WAITS', (0.0, 0.0))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A set of 8 drawn images."""
    draw_detection_set(tmp_path / 'data', num_train=8, num_val=2, image_size=64)
    return tmp_path / 'data'


def dataset_cfg(root: Path, **kwargs: object) -> dict:
    cfg = dict(
        type=CocoDetection,
        data_root=str(root),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        pipeline=PIPELINE,
    )
    return {**cfg, **kwargs}


def dataset(root: Path, **kwargs: object) -> CocoDetection:
    cfg = dataset_cfg(root, **kwargs)
    return cfg.pop('type')(**cfg)


def image(root: Path, number: int) -> Path:
    return sorted((root / 'train').iterdir())[number]


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


class MeanPreprocessor(ToyPreprocessor):
    def forward(self, data: dict, training: bool = False) -> dict:
        data['inputs'] = [x.float().mean((1, 2)) / 255 for x in data['inputs']]
        data = dict(inputs=data['inputs'])
        return super().forward(data, training)


class MeanModel(ToyModel):
    def __init__(self) -> None:
        super().__init__()
        self.data_preprocessor = MeanPreprocessor()


def image_runner(root: Path, work_dir: Path, at=None, **kwargs: object) -> Runner:
    loader = dict(
        batch_size=2,
        num_workers=kwargs.pop('num_workers', 0),
        sampler=dict(type=DefaultSampler, shuffle=True),
        collate_fn=dict(type='pseudo_collate'),
        dataset=dataset_cfg(root),
    )
    return noisy_runner(
        work_dir,
        at=at or (lambda event, runner: None),
        model=MeanModel(),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=5),
        val_dataloader=None,
        val_evaluator=None,
        val_cfg=None,
        hooks=dict(
            read_faults=dict(type=ReadFaultHook, **kwargs),
            stage_switch=None,
        ),
    )


@pytest.mark.parametrize('fault', ['truncated', 'removed', 'empty', 'text'])
def test_another_sample_takes_its_place(root: Path, fault: str) -> None:
    data, path = dataset(root), image(root, 3)
    if fault == 'removed':
        path.unlink()
    else:
        path.write_bytes(
            dict(truncated=path.read_bytes()[:200], empty=b'', text=b'moved')[fault]
        )
    sample = data[3]['data_samples']
    ((name, reason),) = sample.read_faults
    assert name == str(path) and 'cannot be read' in reason
    assert sample.img_path != str(path)
    assert 'read_faults' not in data[2]['data_samples']


def test_a_fault_that_passes_is_none(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, get, calls = dataset(root), LocalBackend.get, []

    def flaky(self: LocalBackend, path: str) -> bytes:
        calls.append(path)
        if len(calls) < 3:
            raise OSError('stale file handle')
        return get(self, path)

    monkeypatch.setattr(LocalBackend, 'get', flaky)
    sample = data[3]['data_samples']
    assert sample.img_path == str(image(root, 3)) and len(calls) == 3
    assert 'read_faults' not in sample


def test_storage_that_is_gone_is_an_error(root: Path) -> None:
    data = dataset(root)
    for path in (root / 'train').iterdir():
        path.unlink()
    with pytest.raises(ValueError, match='10 samples in a row cannot be read'):
        data[0]


def test_evaluation_and_other_mistakes_stay_errors(root: Path) -> None:
    data = dataset(root, test_mode=True)
    damage(image(root, 3))
    with pytest.raises(ValueError, match='cannot be read'):
        data[3]
    ann_file = root / 'annotations' / 'instances_train.json'
    content = json.loads(ann_file.read_text())
    content['images'][2]['width'] += 1
    ann_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='annotation file says'):
        dataset(root)[2]
    assert not is_unreadable(ValueError('another'))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_fault_in_the_third_epoch_is_counted_and_named(
    root: Path, tmp_path: Path, num_workers: int
) -> None:
    path = image(root, 5)

    def at(event: str, runner: Runner) -> None:
        if event == 'before' and runner.epoch == 2 and path.stat().st_size > 50:
            damage(path)

    runner = image_runner(root, tmp_path / 'run', at, num_workers=num_workers)
    warnings: list[str] = []
    runner.logger.warning = lambda text, *args: warnings.append(text)
    runner.train()
    assert runner.iter == 20
    counts = runner.message_hub.get_info('read_faults')
    assert set(counts) == {str(path)} and 2 <= counts[str(path)] <= 3
    assert sum('Replaced by another sample' in text for text in warnings) == 1
    assert '1 images could not be read' in warnings[-1] and path.name in warnings[-1]


def test_too_many_end_the_run(root: Path, tmp_path: Path) -> None:
    for number in (1, 4, 6):
        damage(image(root, number))
    with pytest.raises(ValueError, match=r'[23] of 8 training images cannot be read'):
        image_runner(root, tmp_path / 'run').train()
    runner = image_runner(root, tmp_path / 'more', max_share=0.4)
    runner.train()
    assert len(runner.message_hub.get_info('read_faults')) == 3


class InputsPreprocessor(ToyPreprocessor):
    def forward(self, data: dict, training: bool = False) -> dict:
        return super().forward(dict(inputs=data['inputs']), training)


class InputsModel(NoisyModel):
    def __init__(self) -> None:
        super().__init__()
        self.data_preprocessor = InputsPreprocessor()


class Faulty(Hook):
    """Reports files as a data set does: their names by rank and iteration."""

    priority = 'VERY_HIGH'

    def __init__(self, faults: dict[tuple[int, int], str]) -> None:
        self.faults = faults

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        name = self.faults.get((runner.rank, runner.iter))
        sample = BaseDataElement()
        if name:
            sample.set_metainfo(dict(read_faults=[(name, f'{name} is gone')]))
        data_batch['data_samples'] = [sample]


# By number of ranks: names by rank and iteration.
FAULTS = {
    1: {(0, 1): 'a', (0, 3): 'b', (0, 6): 'a'},
    2: {(0, 0): 'a', (1, 0): 'b', (1, 2): 'b', (0, 4): 'c', (1, 5): 'd'},
}


@pytest.mark.parametrize('num_ranks', [1, 2])
def test_counts_of_all_ranks_survive_a_resume(tmp_path: Path, num_ranks: int) -> None:
    """Resumed from a state after 3 iterations, and after an epoch, which ends at 4."""

    def work(rank: int, stop: int) -> None:
        def at(event: str, runner: Runner) -> None:
            if runner.iter == stop:
                raise SystemExit(9)

        faults = dict(type=ReadFaultHook, max_share=1.0)
        runner = noisy_runner(
            tmp_path,
            at=at,
            model=InputsModel(),
            resume=True,
            hooks=dict(read_faults=faults, stage_switch=None),
            **(RANKS if num_ranks > 1 else {}),
        )
        runner.register_hook(Faulty(FAULTS[num_ranks]))
        said: list[str] = []
        runner.logger.warning = lambda text, *args: said.append(text)
        runner.train()
        (tmp_path / f'said_{rank}').write_text(said[-1])

    for stop in (3, 5):
        codes = in_ranks(partial(work, stop=stop), num_ranks)
        assert codes == [9] * num_ranks
    assert in_ranks(partial(work, stop=-1), num_ranks) == [0] * num_ranks
    times, names = len(FAULTS[num_ranks]), sorted(set(FAULTS[num_ranks].values()))
    for rank in range(num_ranks):
        text = (tmp_path / f'said_{rank}').read_text()
        assert f'replaced {times} times: {", ".join(names)}' in text


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r'max_share is 1\.5'):
        ReadFaultHook(max_share=1.5)


def process_state(pid: int) -> tuple[int, int]:
    """Open files, and memory of its own in kB."""
    rollup = Path(f'/proc/{pid}/smaps_rollup').read_text()
    own = sum(
        int(line.split()[1])
        for line in rollup.splitlines()
        if line.startswith(('Private_Clean', 'Private_Dirty'))
    )
    return len(os.listdir(f'/proc/{pid}/fd')), own


@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='needs Linux')
@pytest.mark.parametrize(
    'persistent', [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_twenty_epochs_leak_nothing(tmp_path: Path, persistent: bool) -> None:
    """From epoch 8 on: an image kept for each sample would be 9 MB in each worker."""
    draw_detection_set(tmp_path / 'large', num_train=8, num_val=1, image_size=256)
    root = tmp_path / 'large'
    damage(image(root, 5))  # the path of faults must not leak either
    data = dataset(root)
    gc.freeze()  # else workers copy what they inherit, page by page
    loader = DataLoader(
        data,
        batch_size=2,
        num_workers=2,
        persistent_workers=persistent,
        collate_fn=pseudo_collate,
    )
    states = []
    for _ in range(20):
        for _batch in loader:
            pass
        gc.collect()
        pids = [os.getpid()]
        if persistent:
            pids += [worker.pid for worker in loader._iterator._workers]
        states.append([process_state(pid) for pid in pids])
    gc.unfreeze()
    for early, late in zip(states[7], states[-1], strict=True):
        assert late[0] <= early[0]
        assert late[1] < early[1] + 4000
    loader._iterator = None
