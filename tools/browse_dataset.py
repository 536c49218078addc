"""Show what training does to images and their labels, as pictures.

Each picture is one training image: untouched on the left, then as the model would
get it, several times, with what is done to whole batches (mix-up, multi-scale). A
config with phases of augmentation gives a folder for each.

python tools/browse_dataset.py configs/dfine_hgnetv2_b4_coco.py --num 8
python tools/browse_dataset.py CONFIG --final --out-dir outputs/final_stage
python tools/browse_dataset.py configs/deim_hgnetv2_b4_coco.py --phase 2
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from mmengine.utils import ProgressBar
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import Dataset

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.apis.command_line import make_parser, run_tool
from mmbackbones.apis.config import is_segmentor, load_config, prepare

_MIN_HEIGHT = 320  # small inputs are enlarged, so that a picture can be read
_BATCH_SIZE = 8


class Phase(NamedTuple):
    """A part of the run with its own augmentation.

    Attributes:
        folder: below the output folder.
        pipeline: configs of its transforms.
        augments: class names of the batch augments that are on; None for all.
    """

    folder: str
    pipeline: Sequence[dict]
    augments: Sequence[str] | None


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument('--out-dir', default='outputs/browse', help='folder to write')
    parser.add_argument('--num', type=int, default=16, help='images to show')
    parser.add_argument('--repeats', type=int, default=3, help='draws of each image')
    parser.add_argument('--seed', type=int, default=0)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        '--final', action='store_true', help='the pipeline of the final epochs'
    )
    which.add_argument('--phase', type=int, help='one phase, from 1; default: all')
    return parser.parse_args()


def phases_of(cfg: Config) -> list[Phase]:
    """What a run of the config goes through, the final epochs last."""
    switch = cfg.default_hooks.get('stage_switch', {})
    if 'phases' not in switch:
        phases = [Phase('', cfg.train_dataloader.dataset.pipeline, None)]
    else:
        phases = [
            Phase(f'phase_{i}', phase.pipeline, phase.augments)
            for i, phase in enumerate(switch.phases, 1)
        ]
    if switch:
        folder = f'phase_{len(phases) + 1}' if 'phases' in switch else ''
        phases.append(Phase(folder, switch.pipeline, ()))
    return phases


def choose_phases(cfg: Config, *, final: bool, number: int | None) -> list[Phase]:
    """The phases that the command line asks for."""
    phases = phases_of(cfg)
    if final:
        if 'stage_switch' not in cfg.default_hooks:
            raise ValueError('--final: this config has no final epochs of their own')
        return phases[-1:]
    if number is not None:
        if not phases[0].folder or not 1 <= number <= len(phases):
            known = len(phases) if phases[0].folder else 'no'
            raise ValueError(f'--phase is {number}; this config has {known} phases')
        return phases[number - 1 : number]
    return phases if phases[0].folder else phases[:1]


def batches(
    data_set: Dataset, indices: Sequence[int], preprocessor: nn.Module, repeats: int
) -> Iterator[list[tuple[np.ndarray, BaseDataElement]]]:
    """Images `(H, W, 3)` RGB with samples, as the model gets them, `repeats` times."""
    from mmengine.dataset import pseudo_collate
    from mmengine.logging import MessageHub

    for iteration in range(repeats):
        MessageHub.get_current_instance().update_info('iter', iteration)
        data = preprocessor(
            pseudo_collate([data_set[index] for index in indices]), training=True
        )
        images = data['inputs'] * preprocessor.std + preprocessor.mean
        images = images.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        yield list(zip(images, data['data_samples'], strict=True))


def untouched(
    data_set: Dataset, indices: Sequence[int]
) -> list[tuple[np.ndarray, BaseDataElement]]:
    """Images `(H, W, 3)` RGB with samples, as the pipeline leaves them."""
    from mmdet.models.utils import samplelist_boxtype2tensor

    found = []
    for index in indices:
        data = data_set[index]
        samplelist_boxtype2tensor([data['data_samples']])
        image = data['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
        found.append((np.ascontiguousarray(image), data['data_samples']))
    return found


def draw(
    visualizer: Visualizer, image: np.ndarray, sample: BaseDataElement
) -> np.ndarray:
    """The image with its labels on it."""
    visualizer.add_datasample('browse', image, sample, draw_pred=False)
    return visualizer.get_image()


def write_row(tiles: Sequence[np.ndarray], path: Path) -> None:
    """Put pictures side by side, at the height of the tallest but the first."""
    height = max(_MIN_HEIGHT, *(tile.shape[0] for tile in tiles[1:]))
    row = [
        mmcv.imresize(t, (round(height * t.shape[1] / t.shape[0]), height))
        for t in tiles
    ]
    mmcv.imwrite(np.concatenate(row, axis=1)[..., ::-1], str(path))


def plain_pipeline(cfg: Config) -> list[dict]:
    """Transforms that only read."""
    if is_segmentor(cfg):
        from mmbackbones.apis.segmentation import PLAIN_PIPELINE

        return list(PLAIN_PIPELINE)
    from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs

    from mmbackbones.data.det_transforms import LoadImage

    return [
        dict(type=LoadImage),
        dict(type=LoadAnnotations, with_bbox=True),
        dict(type=PackDetInputs, meta_keys=('img_id', 'img_path')),
    ]


def main() -> None:
    """Write one picture an image and phase."""
    args = parse_args()
    from mmengine.dataset import Compose
    from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
    from mmengine.runner import set_random_seed

    from mmbackbones.engine.phases import enable_augments

    cfg = prepare(
        load_config(
            args.config,
            data_root=args.data_root,
            work_dir=args.work_dir,
            cfg_options=args.cfg_options,
        )
    )
    init_default_scope(cfg.default_scope)
    phases = choose_phases(cfg, final=args.final, number=args.phase)
    plain_cfg = cfg.train_dataloader.dataset.copy()
    plain_cfg.pipeline = plain_pipeline(cfg)
    plain = DATASETS.build(plain_cfg)
    augmented = DATASETS.build(cfg.train_dataloader.dataset)
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    augments = getattr(preprocessor, 'batch_augments', None) or ()
    augments = [a for a in augments if getattr(a, 'enabled', False)]
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, vis_backends=None))
    visualizer.dataset_meta = augmented.metainfo

    count = min(args.num, len(augmented))
    indices = np.random.default_rng(args.seed).permutation(len(augmented))[:count]
    progress = ProgressBar(count * len(phases))
    for phase in phases:
        set_random_seed(args.seed)
        augmented.pipeline = Compose(phase.pipeline)
        if phase.augments is not None:
            enable_augments(augments, phase.augments)
        out_dir = Path(args.out_dir) / phase.folder
        out_dir.mkdir(parents=True, exist_ok=True)
        for start in range(0, count, _BATCH_SIZE):
            chunk = indices[start : start + _BATCH_SIZE].tolist()
            originals = untouched(plain, chunk)
            if is_segmentor(cfg):
                repeats = (untouched(augmented, chunk) for _ in range(args.repeats))
            else:
                repeats = batches(augmented, chunk, preprocessor, args.repeats)
            columns = [[draw(visualizer, *tile) for tile in originals]]
            columns += [[draw(visualizer, *tile) for tile in row] for row in repeats]
            for original, tiles in zip(
                originals, zip(*columns, strict=True), strict=True
            ):
                stem = Path(original[1].img_path).stem
                write_row(tiles, out_dir / f'{stem}.jpg')
                progress.update()
    print(f'\n{count * len(phases)} pictures in {args.out_dir}')


if __name__ == '__main__':
    run_tool(main)
