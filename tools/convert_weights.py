"""Rename weights from anywhere to ours, or ours to another's, and check them.

python tools/convert_weights.py PPHGNetV2_B4_ssld_stage1_pretrained.pdparams b4.pth
python tools/convert_weights.py hf://facebook/hiera-base-224-hf hiera_base.safetensors
python tools/convert_weights.py timm://convnextv2_atto.fcmae atto.pth --arch atto
python tools/convert_weights.py work_dirs/x/epoch_80.pth b4.pth --backbone
python tools/convert_weights.py b4.pth b4_timm.safetensors --to timm

Where the weights are from is told by their names, not by the file's name. A config
needs no converted file: init_cfg and load_from take all of these as they are.
"""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

import mmbackbones  # noqa: F401  (first: it registers backbones and loaders)
from mmbackbones.apis.command_line import run_tool
from mmbackbones.convert import SOURCES, from_ours, to_ours
from mmbackbones.convert.sources import first_names
from mmbackbones.engine.pretrained import check_fit
from mmbackbones.registry import MODELS

SUFFIXES = ('.pth', '.safetensors', '.pdparams')


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'source',
        help='.pth, .pt, .bin, .safetensors, .pdparams, a URL, hf://OWNER/NAME[/FILE] '
        'or timm://NAME; the latter are downloaded and kept',
    )
    parser.add_argument('out', help='file to write, .pth, .safetensors or .pdparams')
    makers = sorted({maker for source in SOURCES for maker in source.makers})
    parser.add_argument('--to', choices=makers, default='ours', help='whose names')
    parser.add_argument(
        '--arch', help='as in a config: the weights have to be those of this network'
    )
    parser.add_argument(
        '--backbone',
        action='store_true',
        help='take only the backbone of a whole model (names that start so)',
    )
    return parser.parse_args()


def build(family: str, arch: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """A backbone without memory; for video if the weights are."""
    cfg = dict(type=family, arch=arch)
    if 'pos_embed_temporal' in weights:
        cfg['num_frames'] = 2 * weights['pos_embed_temporal'].shape[1]
    with torch.device('meta'):
        return MODELS.build(cfg)


def fits(family: str, arch: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a network."""
    try:
        check_fit(build(family, arch, weights), weights)
    except ValueError:
        return False
    return True


def check_arch(family: str, arch: str | None, weights: Mapping[str, Tensor]) -> str:
    """The network that the weights are of, in words.

    Raises:
        ValueError: they are not of `arch`.
    """
    if family not in MODELS or not hasattr(MODELS.get(family), 'arch_settings'):
        if arch:
            raise ValueError(f'--arch {arch}: these weights are of a whole {family}')
        return family
    if arch:
        check_fit(build(family, arch, weights), weights)
        return f'{family} {arch!r}'
    known = MODELS.get(family).arch_settings
    found = [name for name in known if fits(family, name, weights)]
    return f'{family} {found[0]!r}' if found else f'{family} of none of {list(known)}'


def save(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write plain tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.pth':
        torch.save(dict(weights), path)
    elif path.suffix == '.pdparams':
        arrays = {name: value.numpy() for name, value in weights.items()}
        path.write_bytes(pickle.dumps(arrays, protocol=4))
    else:
        from safetensors.torch import save_file

        # It refuses views and tensors under two names.
        copies = {name: value.clone().contiguous() for name, value in weights.items()}
        save_file(copies, path, metadata={'format': 'pt'})


def main() -> None:
    """Convert, report, write."""
    args = parse_args()
    out = Path(args.out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f'out is {args.out!r}; it ends in one of {list(SUFFIXES)}')
    loaded = CheckpointLoader.load_checkpoint(args.source, map_location='cpu')
    weights, conversion = to_ours(loaded['state_dict'])
    if args.backbone:
        backbone = {n: v for n, v in weights.items() if n.startswith('backbone.')}
        print(f'{len(weights) - len(backbone)} tensors are not of the backbone')
        weights, conversion = to_ours(
            {name.removeprefix('backbone.'): v for name, v in backbone.items()}
        )
    if conversion is None:
        known = sorted({f'{s.family} ({", ".join(s.makers)})' for s in SOURCES})
        raise ValueError(
            f'these weights are of nobody known: {first_names(loaded["state_dict"])}. '
            f'Known are {", ".join(known)}; of a whole model, --backbone takes a known '
            'backbone'
        )
    print(conversion)
    network = check_arch(conversion.source.family, args.arch, weights)
    if args.to != 'ours':
        weights, conversion = from_ours(weights, args.to)
        print(conversion)
    save(weights, out)
    print(f'wrote {len(weights)} tensors of {network} to {out}')


if __name__ == '__main__':
    run_tool(main)
