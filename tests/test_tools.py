"""The tools as a user calls them, on a handful of drawn images."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
from torch.utils.data import DataLoader

from mmbackbones.apis.command_line import run_tool
from mmbackbones.data.synthetic import draw_detection_set

ROOT = Path(__file__).parent.parent
CONFIG = 'configs/dfine_demo.py'
# Four steps an epoch of a model of a few thousand parameters.
TINY = (
    'train_dataloader.batch_size=2',
    'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0',
    'test_dataloader.num_workers=0',
    'model.neck.hidden_dim=32',
    'model.decoder.hidden_dim=32',
    'model.decoder.num_layers=1',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.interval=1',
    'train_cfg.val_interval=1',
)


def tool(name: str, *arguments: object, ok: bool = True) -> str:
    """Run a tool in a process of its own; its whole output."""
    done = subprocess.run(
        [sys.executable, f'tools/{name}.py', *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        check=False,
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) is ok, output[-3000:]
    return output


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data set and a run of two epochs on it."""
    root = tmp_path_factory.mktemp('tools')
    draw_detection_set(root / 'data', num_train=8, num_val=4, image_size=96)
    tool('train', CONFIG, *arguments(root, 'train_cfg.max_epochs=2'))
    return root


def arguments(root: Path, *options: str, work_dir: str = 'run') -> list[object]:
    return [
        *('--data-root', root / 'data', '--work-dir', root / work_dir),
        *('--cfg-options', *TINY, *options),
    ]


def iterations(output: str) -> list[str]:
    """`[epoch][iteration/...` of the logged training lines."""
    return re.findall(r'Epoch\(train\)\s+(\[\d+\]\[\d+/\d+\])', output)


def test_train_writes_log_curves_and_checkpoints(folder: Path) -> None:
    run = folder / 'run'
    assert {'epoch_1.pth', 'epoch_2.pth', 'last_checkpoint'} <= {
        path.name for path in run.iterdir()
    }
    log = next(run.glob('*/*.log')).read_text()
    assert 'eta:' in log and 'dropped no boxes' in log
    assert 'bbox_mAP_50' in log and 'triangle' in log  # twelve numbers, per class
    (curves,) = run.glob('*/curves.png')
    assert cv2.imread(str(curves)).std() > 0


def test_a_killed_run_goes_on_where_it_was(folder: Path) -> None:
    command = [sys.executable, 'tools/train.py', CONFIG]
    command += arguments(folder, 'train_cfg.max_epochs=50', work_dir='killed')
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    with subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        for _ in range(600):
            if (folder / 'killed' / 'epoch_2.pth').exists():
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    last = (folder / 'killed' / 'last_checkpoint').read_text()
    done = int(re.search(r'epoch_(\d+)\.pth', last)[1])
    assert done >= 1
    output = tool(
        *('train', CONFIG),
        *arguments(folder, f'train_cfg.max_epochs={done + 1}', work_dir='killed'),
        *('--resume', 'auto'),
    )
    assert iterations(output) == [f'[{done + 1}][{i}/4]' for i in range(1, 5)]


def test_test_evaluates_a_checkpoint(folder: Path) -> None:
    output = tool(
        *('test', CONFIG, folder / 'run' / 'epoch_2.pth'),
        *('--out', folder / 'detections.json'),
        *('--show-dir', os.path.relpath(folder / 'shown', ROOT)),
        *arguments(folder),
    )
    numbers = re.findall(r'Average (?:Precision|Recall) .* = +(-?\d\.\d+)', output)
    assert len(numbers) == 12
    detections = json.loads((folder / 'detections.bbox.json').read_text())
    assert {d['image_id'] for d in detections} == {1, 2, 3, 4}
    assert {d['category_id'] for d in detections} <= {1, 2, 3, 4, 5}
    assert len(list((folder / 'shown').iterdir())) == 4


@pytest.mark.parametrize('source', ['folder', 'glob', 'file'])
def test_infer_writes_pictures_and_one_json(folder: Path, source: str) -> None:
    val = folder / 'data' / 'val'
    sources = dict(folder=val, glob=f'{val}/00000[01].jpg', file=val / '000003.jpg')
    out = folder / f'infer_{source}'
    tool(
        *('infer', CONFIG, folder / 'run' / 'epoch_2.pth', sources[source]),
        *('--out-dir', out, '--conf', 0.0, '--batch-size', 3),
        *arguments(folder),
    )
    names = {'folder': 4, 'glob': 2, 'file': 1}
    pictures = sorted(out.glob('*.jpg'))
    assert len(pictures) == names[source]
    detections = json.loads((out / 'detections.json').read_text())
    assert {d['file_name'] for d in detections} == {p.name for p in pictures}
    assert {d['category_name'] for d in detections} <= {
        'disc', 'ring', 'square', 'triangle', 'star'}  # fmt: skip
    assert {d['category_id'] for d in detections} <= {1, 2, 3, 4, 5}


def test_an_error_of_infer_has_a_line_of_its_own(folder: Path) -> None:
    broken = folder / 'broken.jpg'
    broken.write_text('no image')
    output = tool(
        *('infer', CONFIG, folder / 'run' / 'epoch_2.pth', broken),
        *('--out-dir', folder / 'none', *arguments(folder)),
        ok=False,
    )
    (line,) = [line for line in output.splitlines() if 'error: ' in line]
    assert line.startswith('error: image ') and line.endswith('recognised in it')


def test_browse_dataset_shows_each_image_and_its_draws(folder: Path) -> None:
    out = folder / 'browse'
    tool(
        *('browse_dataset', CONFIG, '--num', 2, '--repeats', 2, '--out-dir', out),
        *arguments(folder),
    )
    pictures = [cv2.imread(str(path)) for path in out.glob('*.jpg')]
    assert len(pictures) == 2
    assert all(p.shape[1] > 2 * p.shape[0] for p in pictures)


def test_browse_dataset_shows_the_phases_of_deim(folder: Path) -> None:
    out = folder / 'phases'
    command = ['browse_dataset', 'configs/deim_nano_hgnetv2_b0_coco.py']
    command += ['--num', 1, '--repeats', 1, '--out-dir', out]
    options = ['model.decoder.num_classes=None']
    for split in ('train', 'val'):
        dataset = f'{split}_dataloader.dataset'
        options.append(f'{dataset}.ann_file=annotations/instances_{split}.json')
        options.append(f'{dataset}.data_prefix.img={split}/')
    command += ['--data-root', folder / 'data', '--work-dir', folder / 'run']
    tool(*command, '--cfg-options', *options)
    shown = sorted(path.parent.name for path in out.rglob('*.jpg'))
    assert shown == ['phase_1', 'phase_2', 'phase_3', 'phase_4']
    message = tool(*command, '--phase', 5, '--cfg-options', *options, ok=False)
    assert '--phase is 5; this config has 4 phases' in message


def test_print_config_writes_a_config(tmp_path: Path) -> None:
    tool(
        *('print_config', 'dfine_demo', '--out', tmp_path / 'flat.py'),
        *('--cfg-options', 'train_cfg.max_epochs=7'),
    )
    output = tool('print_config', tmp_path / 'flat.py')
    assert 'max_epochs=7' in output


def test_benchmark_counts_and_times(folder: Path) -> None:
    out = folder / 'speed.json'
    tool(
        *('benchmark', CONFIG, '--size', 64, 96, '--batch-size', 1, 2),
        *('--warmup', 0, '--runs', 2, '--out', out, '--device', 'cpu'),
        *arguments(folder),
    )
    result = json.loads(out.read_text())
    assert result['parameters']['total'] > result['parameters_deploy'] > 0
    assert result['gflops'] > 0 and set(result['latency']) == {'batch 1', 'batch 2'}
    tool(
        *('benchmark', CONFIG, '--train-step', '--warmup', 0, '--runs', 2),
        *('--out', out, '--device', 'cpu', *arguments(folder)),
    )
    stages = json.loads(out.read_text())['training_step']['stages']
    assert {'data', 'forward', 'loss', 'backward', 'optimizer', 'ema'} <= set(stages)


@pytest.mark.parametrize(
    ('name', 'wrong', 'message'),
    [
        ('train', ['configs/none.py'], "config file 'configs/none.py' does not exist"),
        ('train', [CONFIG, '--data-root', 'nowhere'], 'nowhere'),
        (
            'train',
            [CONFIG, '--work-dir', '/proc/none'],
            "'/proc/none' cannot be written",
        ),
        ('test', [CONFIG, 'none.pth'], 'none.pth'),
        ('infer', [CONFIG, 'none.pth', 'no/*.jpg'], "no images in 'no/*.jpg'"),
        ('browse_dataset', ['configs/none.py'], 'does not exist'),
        ('test', [CONFIG, 'none.pth', '--data-root', 'nowhere'], "'none.pth' does not"),
        ('test', [CONFIG, 'none.onnx'], 'stands alone, as first argument'),
        ('export', [CONFIG, 'none.pth', '--evaluate'], "'none.pth' does not exist"),
        ('train', ['dfine_dmo'], 'similar ones are dfine_demo'),
        (
            'print_config',
            [CONFIG, '--cfg-options', 'trian_cfg.max_epochs=7'],
            "neither the config nor the Runner has 'trian_cfg'; did you mean 'train_",
        ),
    ],
)
def test_mistakes_end_with_one_line(
    folder: Path, name: str, wrong: list[str], message: str
) -> None:
    if name == 'test':
        wrong = [*wrong, *arguments(folder)]
    output = tool(name, *wrong, ok=False)
    assert message in output and 'Traceback' not in output


def test_an_error_from_a_worker_process_ends_with_its_own_line(
    capsys: pytest.CaptureFixture,
) -> None:
    def main() -> None:
        def load(_: object) -> None:
            raise ValueError('dog.jpg is truncated')

        list(DataLoader(range(2), num_workers=1, collate_fn=load))

    with pytest.raises(SystemExit, match='2'):
        run_tool(main)
    assert capsys.readouterr().err.startswith('error: dog.jpg is truncated\n(MMB_')


def test_help_shows_examples() -> None:
    for path in sorted((ROOT / 'tools').glob('*.py')):
        assert f'python tools/{path.name}' in tool(path.stem, '--help')


def test_mmdet_inferencer_works_with_our_config_and_checkpoint(folder: Path) -> None:
    from mmdet.apis import DetInferencer

    run = folder / 'run'
    inferencer = DetInferencer(
        str(run / 'dfine_demo.py'), str(run / 'epoch_2.pth'), device='cpu'
    )
    picture = folder / 'data' / 'val' / '000000.jpg'
    result = inferencer(str(picture), out_dir=str(folder / 'inferencer'))
    (prediction,) = result['predictions']
    assert len(prediction['bboxes']) == len(prediction['scores']) > 0
    assert inferencer.model.dataset_meta['classes'][0] == 'disc'
    assert (folder / 'inferencer' / 'vis' / picture.name).exists()
