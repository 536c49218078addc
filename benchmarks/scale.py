"""How decoder and criterion grow with boxes, queries and image size, on the CPU.

D-FINE-L's decoder on random maps, its criterion, and the backward pass of both; a step
as far as these reach. One quantity varies at a time, each case in a fresh process.
Memory is what the process took at most above what it had before (Linux).

    python benchmarks/scale.py --out benchmarks
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

import mmbackbones.detectors  # noqa: F401
from mmbackbones.evaluation.benchmark import conditions
from mmbackbones.ops.predictions import BoxTargets

CONFIG = Path(__file__).resolve().parents[1] / 'configs' / 'dfine_hgnetv2_b4_coco.py'
STRIDES = (8, 16, 32)
# Boxes in an image, queries, pixels.
CASES = [(boxes, 300, 640) for boxes in (7, 100, 1000, 2000)]
CASES += [(7, 900, 640), (100, 900, 640), (7, 300, 320), (100, 300, 320)]


def build(num_queries: int) -> tuple[nn.Module, nn.Module]:
    """Decoder and criterion of D-FINE-L."""
    torch.manual_seed(0)
    model = Config.fromfile(CONFIG).model
    channels = (256,) * len(STRIDES)
    decoder = MODELS.build(
        dict(
            model.decoder,
            in_channels=channels,
            in_strides=STRIDES,
            num_queries=num_queries,
        )
    )
    return decoder.train(), MODELS.build(model.criterion)


def random_inputs(
    batch_size: int, boxes: int, pixels: int
) -> tuple[tuple[Tensor, ...], BoxTargets]:
    """Maps of the encoder, which take a gradient, and normalised boxes."""
    maps = tuple(
        torch.randn(batch_size, 256, pixels // s, pixels // s, requires_grad=True)
        for s in STRIDES
    )
    total = boxes * batch_size
    sides = 0.02 + 0.2 * torch.rand(total, 2)
    centres = sides / 2 + torch.rand(total, 2) * (1 - sides)
    labels = torch.randint(80, (total,))
    return maps, BoxTargets(
        labels, torch.cat((centres, sides), 1), (boxes,) * batch_size
    )


def memory_mib(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f'/proc/self/status has no {field}')


def measure(
    case: tuple[int, int, int], batch_size: int, repeats: int, threads: int
) -> dict:
    """Processor time and memory of one case, in a process of its own."""
    torch.set_num_threads(threads)
    init_default_scope('mmdet')
    boxes, num_queries, pixels = case
    decoder, criterion = build(num_queries)
    maps, targets = random_inputs(batch_size, boxes, pixels)
    before = memory_mib('VmRSS')
    parts: dict[str, list[float]] = dict(decoder=[], criterion=[], backward=[])
    for _ in range(repeats + 1):
        start = time.process_time()
        output = decoder(maps, targets)
        decoded = time.process_time()
        loss = sum(criterion(output, targets).values())
        judged = time.process_time()
        loss.backward()
        end = time.process_time()
        spans = (decoded - start, judged - decoded, end - judged)
        for name, span in zip(parts, spans, strict=True):
            parts[name].append(span * 1e3)
        num_denoising = output.denoising.logits.shape[2]
        del output, loss
    medians = {
        f'{name}_cpu_ms': round(statistics.median(values[1:]))
        for name, values in parts.items()
    }
    return dict(
        boxes_per_image=boxes,
        queries=num_queries,
        pixels=pixels,
        denoising_queries=num_denoising,
        **medians,
        whole_cpu_ms=sum(medians.values()),
        peak_memory_mib=round(memory_mib('VmHWM') - before),
    )


def table(rows: list[dict]) -> str:
    """A table in Markdown."""
    heads = [name.replace('_', ' ') for name in rows[0]]
    lines = [f'| {" | ".join(heads)} |', '|' + '---:|' * len(heads)]
    lines += [f'| {" | ".join(map(str, row.values()))} |' for row in rows]
    return '\n'.join(lines)


def main() -> None:
    """Measure all cases, print a table and write both."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=2)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', help='folder of the result files')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in CASES:
        with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as process:
            options = (args.batch_size, args.repeats, args.threads)
            rows.append(process.submit(measure, case, *options).result())
        print(json.dumps(rows[-1]), flush=True)
    result = dict(
        conditions=dict(
            conditions('cpu'),
            model='decoder and criterion of D-FINE-L, forward and backward',
            batch_size=args.batch_size,
            repeats=args.repeats,
            clock='processor time of the process, medians',
        ),
        rows=rows,
    )
    print(table(rows))
    if args.out:
        version = torch.__version__.split('+')[0]
        stem = f'scale_dfine_l_b{args.batch_size}_cpu{args.threads}_torch{version}'
        Path(args.out, f'{stem}.json').write_text(json.dumps(result, indent=2) + '\n')
        Path(args.out, f'{stem}.md').write_text(table(rows) + '\n')


if __name__ == '__main__':
    main()
