"""Latency of our exported D-FINE against the official exporter's graph, on the CPU.

Both files hold the same random weights, are run by the same runtime with the same
settings, and take turns; in several sessions, since where a session's memory lies
makes a difference of some percent. The official graph is made as its
tools/deployment/export_onnx.py makes it (opset 16, dynamic batch, constants folded,
by the TorchScript exporter that the script was written for), and simplified where
onnxsim is installed. The official repository is found through MMB_REFERENCE_DIR.

`ratio_of_products_alone` says what is left to win: the time of our graph if its
multiplications ran as fast as one large matrix product and all else took no time,
over the official graph's time.

    MMB_REFERENCE_DIR=references python benchmarks/export_latency.py --out benchmarks
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from official_dfine import build_pair
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmbackbones.export.description import describe
from mmbackbones.export.graph import build_graph
from mmbackbones.export.onnx_file import save_onnx
from mmbackbones.export.programs import export_program
from mmbackbones.layers.fold import fold_for_inference, pad_channels


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--sizes', nargs='+', default=['N', 'L'], choices=('N', 'L'))
    parser.add_argument('--pixels', type=int, default=640)
    parser.add_argument('--repeats', type=int, default=9, help='of each session')
    parser.add_argument('--sessions', type=int, default=5)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--keep', help='folder for the files (a temporary one)')
    parser.add_argument('--out', help='folder of the result file')
    return parser.parse_args()


def write_ours(model: nn.Module, path: Path, pixels: int) -> float:
    """Our file: a fixed batch of 1. Returns its billions of multiplications."""
    graph = build_graph(
        pad_channels(fold_for_inference(copy.deepcopy(model), channels_last=False))
    )
    info = describe(
        'detection',
        input_size_hw=(pixels, pixels),
        dynamic_batch=False,
        mean=(0, 0, 0),
        std=(255, 255, 255),
        licence='none',
        dataset_meta=dict(classes=[str(i) for i in range(80)]),
    )
    program = export_program(graph, size_hw=(pixels, pixels))
    save_onnx(program, path, info, graph.output_names)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        graph(torch.rand(1, 3, pixels, pixels))
    return counter.get_total_flops() / 2e9


def write_official(official: nn.Module, path: Path, pixels: int) -> bool:
    """The official file; returns whether it was simplified."""
    example = torch.rand(2, 3, pixels, pixels), torch.tensor([[pixels, pixels]])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        torch.onnx.export(
            official,
            example,
            str(path),
            dynamo=False,
            input_names=['images', 'orig_target_sizes'],
            output_names=['labels', 'boxes', 'scores'],
            dynamic_axes={'images': {0: 'N'}, 'orig_target_sizes': {0: 'N'}},
            opset_version=16,
            do_constant_folding=True,
        )
    try:
        import onnxsim
    except ModuleNotFoundError:
        return False
    import onnx

    shapes = {'images': [1, 3, pixels, pixels], 'orig_target_sizes': [1, 2]}
    simplified, _ = onnxsim.simplify(str(path), test_input_shapes=shapes)
    onnx.save(simplified, str(path))
    return True


class OnnxSide:
    """A file in ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider']
        )
        self.names = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, feed: dict) -> dict:
        """Outputs by name."""
        return dict(zip(self.outputs, self._session.run(None, feed), strict=True))


class OpenVinoSide:
    """A file in OpenVINO, in single precision."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        options = {
            'INFERENCE_PRECISION_HINT': 'f32',
            'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_NUM_THREADS': threads,
        }
        core = openvino.Core()
        model = core.read_model(str(path))
        # A batch of 1 on both sides: only ours states it in the file.
        shapes = {
            value.get_any_name(): [1, *list(value.get_partial_shape())[1:]]
            for value in model.inputs
        }
        model.reshape(shapes)
        self._request = core.compile_model(model, 'CPU', options)
        self.names = list(shapes)

    def __call__(self, feed: dict) -> dict:
        """Outputs by name."""
        found = self._request(feed)
        return {output.get_any_name(): value for output, value in found.items()}


def product_rate() -> float:
    """Billions of multiplications a second in a product of large matrices."""
    a, b = torch.rand(2, 1024, 1024)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 1024**3 / min(times) / 1e9


RUNTIMES = {'onnxruntime': OnnxSide, 'openvino': OpenVinoSide}


def compare(runtime: str, files: dict[str, Path], args: argparse.Namespace) -> dict:
    """Medians of both files in one interleaved run, in milliseconds."""
    generator = np.random.default_rng(0)
    shape = (1, 3, args.pixels, args.pixels)
    inputs = dict(
        images=generator.random(shape, dtype=np.float32),
        orig_target_sizes=np.array([[args.pixels, args.pixels]], np.int64),
    )
    wall, cpu = ({name: [] for name in files} for _ in range(2))
    for _ in range(args.sessions):
        sides = {
            name: RUNTIMES[runtime](path, args.threads) for name, path in files.items()
        }
        feeds = {
            name: {key: inputs[key] for key in side.names}
            for name, side in sides.items()
        }
        for i in range(args.repeats + 2):  # the first two warm up
            for name, side in sides.items():
                start, start_cpu = time.perf_counter(), time.process_time()
                side(feeds[name])
                if i > 1:
                    wall[name].append(1e3 * (time.perf_counter() - start))
                    cpu[name].append(1e3 * (time.process_time() - start_cpu))
    scores = [np.sort(side(feeds[name])['scores']) for name, side in sides.items()]
    result: dict = dict(
        largest_difference_of_scores=float(np.abs(scores[0] - scores[1]).max())
    )
    for unit, times in (('wall_ms', wall), ('cpu_ms', cpu)):
        for name in sides:
            result[f'{name}_{unit}'] = round(statistics.median(times[name]), 1)
        ratio = result[f'ours_{unit}'] / result[f'official_{unit}']
        result[f'ratio_of_{unit}'] = round(ratio, 3)
    return result


def main() -> None:
    """Write both files of each size, time them, print and write."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    versions = {name: __import__(name).__version__ for name in RUNTIMES}
    result: dict = dict(
        conditions=dict(
            pixels=args.pixels,
            batch_size=1,
            device=platform.machine(),
            threads=args.threads,
            repeats=args.repeats,
            sessions=args.sessions,
            torch=torch.__version__,
            **versions,
        )
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        for size in args.sizes:
            files = {
                side: folder / f'{side}_{size}.onnx' for side in ('ours', 'official')
            }
            ours, official = build_pair(size)
            products = write_ours(ours, files['ours'], args.pixels)
            simplified = write_official(official, files['official'], args.pixels)
            result['conditions']['official_simplified'] = simplified
            result[size] = {name: compare(name, files, args) for name in RUNTIMES}
            least = 1e3 * products / product_rate()
            for times in result[size].values():
                ratio = least / times['official_wall_ms']
                times['ratio_of_products_alone'] = round(ratio, 3)
            print(size, json.dumps(result[size], indent=1), flush=True)
    if args.out:
        name = f'export_latency_{args.pixels}px_cpu{args.threads}.json'
        Path(args.out, name).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
