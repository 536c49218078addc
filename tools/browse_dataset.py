"""Show what the training pipeline does to images and their labels, as pictures.

Each picture is one training image: untouched on the left, then as the
augmentations would give it, several times.

python tools/browse_dataset.py configs/dfine_hgnetv2_b4_coco.py --num 8
python tools/browse_dataset.py CONFIG --final --out-dir outputs/final_stage
"""

import argparse
from pathlib import Path

import mmcv
import numpy as np
from mmengine.utils import ProgressBar

import mmbackbones  # noqa: F401  (first: it makes mmdet importable)
from mmbackbones.apis.command_line import make_parser, run_tool
from mmbackbones.apis.config import is_segmentor, load_config, prepare

_MIN_HEIGHT = 320  # small inputs are enlarged, so that a picture can be read


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument('--out-dir', default='outputs/browse', help='folder to write')
    parser.add_argument('--num', type=int, default=16, help='images to show')
    parser.add_argument('--repeats', type=int, default=3, help='draws of each image')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--final', action='store_true', help='the pipeline of the final epochs'
    )
    return parser.parse_args()


def main() -> None:
    """Write one picture an image."""
    args = parse_args()
    from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs
    from mmdet.models.utils import samplelist_boxtype2tensor
    from mmengine.registry import DATASETS, VISUALIZERS, init_default_scope
    from mmengine.runner import set_random_seed

    from mmbackbones.data.det_transforms import LoadImage

    cfg = prepare(
        load_config(
            args.config,
            data_root=args.data_root,
            work_dir=args.work_dir,
            cfg_options=args.cfg_options,
        )
    )
    init_default_scope(cfg.default_scope)
    augmented_cfg = cfg.train_dataloader.dataset
    if args.final:
        if 'stage_switch' not in cfg.default_hooks:
            raise ValueError('--final: this config has no final epochs of their own')
        augmented_cfg.pipeline = cfg.default_hooks.stage_switch.pipeline
    plain_cfg = augmented_cfg.copy()
    if is_segmentor(cfg):
        from mmbackbones.apis.segmentation import PLAIN_PIPELINE

        plain_cfg.pipeline = list(PLAIN_PIPELINE)
    else:
        plain_cfg.pipeline = [
            dict(type=LoadImage),
            dict(type=LoadAnnotations, with_bbox=True),
            dict(type=PackDetInputs, meta_keys=('img_id', 'img_path')),
        ]
    augmented, plain = DATASETS.build(augmented_cfg), DATASETS.build(plain_cfg)
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, vis_backends=None))
    visualizer.dataset_meta = augmented.metainfo
    set_random_seed(args.seed)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)

    def draw(sample: dict) -> np.ndarray:
        samplelist_boxtype2tensor([sample['data_samples']])
        image = sample['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
        visualizer.add_datasample(
            'browse',
            np.ascontiguousarray(image),
            sample['data_samples'],
            draw_pred=False,
        )
        return visualizer.get_image()

    count = min(args.num, len(augmented))
    progress = ProgressBar(count)
    for index in np.random.default_rng(args.seed).permutation(len(augmented))[:count]:
        original = plain[index]
        tiles = [draw(original)]
        tiles += [draw(augmented[index]) for _ in range(args.repeats)]
        height = max(_MIN_HEIGHT, *(tile.shape[0] for tile in tiles[1:]))
        row = [
            mmcv.imresize(t, (round(height * t.shape[1] / t.shape[0]), height))
            for t in tiles
        ]
        picture = np.concatenate(row, axis=1)
        name = Path(original['data_samples'].img_path).stem
        mmcv.imwrite(picture[..., ::-1], str(out_dir / f'{name}.jpg'))
        progress.update()
    print(f'\n{count} pictures in {out_dir}')


if __name__ == '__main__':
    run_tool(main)
