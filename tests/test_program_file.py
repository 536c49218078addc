"""Programs of `torch.export` from anyone run nothing when they are opened."""

import contextlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inference_helpers import export_info
from torch import Tensor, nn

from mmbackbones.export.programs import export_program, save_program
from mmbackbones.inference.metadata import KEY, metadata_json
from mmbackbones.inference.program_file import load_program

Edit = Callable[[dict], None]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.conv(images).flatten(2)
        return maps.reshape(4 * len(images), -1)[: len(images)], maps.topk(2)[1]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / 'good.pt2'
    program = export_program(Toy().eval(), size_hw=(32, 32), dynamic_batch=True)
    save_program(program, path, export_info())
    return path


def rewritten(source: Path, name: str, edit: Callable[[bytes], bytes]) -> Path:
    """A copy with one file changed, or added where there was none."""
    copy = source.with_name('copy.pt2')
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(copy, 'w') as new:
        for member in old.namelist():
            content = old.read(member)
            new.writestr(member, edit(content) if member.endswith(name) else content)
        if not any(member.endswith(name) for member in old.namelist()):
            new.writestr(f'good/{name}', edit(b''))
    return copy


def with_description(source: Path, edit: Edit) -> Path:
    def change(content: bytes) -> bytes:
        description = json.loads(content)
        edit(description)
        return json.dumps(description).encode()

    return rewritten(source, 'models/model.json', change)


def first_node(description: dict) -> dict:
    return description['graph_module']['graph']['nodes'][0]


def test_what_we_write_is_read_whole(good: Path) -> None:
    extra = {KEY: ''}
    program = load_program(str(good), extra)
    assert extra[KEY] == metadata_json(export_info())
    images = torch.rand(3, 3, 32, 32)
    found, places = program.module()(images)
    assert found.shape == (3, 900)
    assert places.shape == (3, 4, 2)


def test_a_program_names_no_folder_of_who_wrote_it(good: Path) -> None:
    with zipfile.ZipFile(good) as archive:
        text = b''.join(map(archive.read, archive.namelist()))
    assert str(Path(__file__).parent).encode() not in text
    assert b'site-packages' not in text
    assert b'stack_trace' not in text


class _Touch:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_example_inputs_are_not_unpickled_freely(good: Path, tmp_path: Path) -> None:
    marker = tmp_path / 'ran'
    buffer = io.BytesIO()
    torch.save(((_Touch(marker),), {}), buffer)
    bad = rewritten(good, 'sample_inputs/model.pt', lambda _: buffer.getvalue())
    with pytest.raises(ValueError, match=r'PyTorch refuses .*copy\.pt2'):
        load_program(str(bad))
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.export.load(bad)  # PyTorch alone does what the file wants
    assert marker.exists()


def _in_sizes(code: str) -> Edit:
    def edit(description: dict) -> None:
        values = description['graph_module']['graph']['tensor_values']
        values['images']['sizes'][0]['as_expr']['expr_str'] = code

    return edit


def _in_target(code: str) -> Edit:
    return lambda description: first_node(description).update(target=code)


def _in_name(code: str) -> Edit:
    def edit(description: dict) -> None:
        graph = description['graph_module']['graph']
        graph['inputs'][0]['as_tensor']['name'] = code

    return edit


def _in_outputs(description: dict) -> None:
    signature = description['graph_module']['module_call_graph'][0]['signature']
    signature['out_spec'] = signature['out_spec'].replace('builtins.tuple', 'a.b', 1)


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (_in_sizes("__import__('os').system('true')"), 'it says'),
        (_in_sizes("Symbol('s0').__class__"), 'it says'),
        (_in_sizes('9**9**9**9'), 'it says'),
        (_in_target('torch.hub.os.system'), 'torch.hub.os.system'),
        (_in_target('torch.ops.aten.from_file.default'), 'from_file'),
        (_in_target('_operator.methodcaller'), 'methodcaller'),
        (_in_name('x=print(1)'), 'x=print'),
        (lambda found: found.update(guards_code=['print(1)']), 'guards to execute'),
        (_in_outputs, "'a.b'"),
    ],
)
def test_a_description_that_runs_something_is_refused(
    good: Path, edit: Edit, message: str
) -> None:
    bad = with_description(good, edit)
    with pytest.raises(ValueError, match=f'copy.pt2.*is refused.*{message}'):
        load_program(str(bad))


@pytest.mark.parametrize(
    'name', ['data/aotinductor/model/model.so', 'models/MODEL.json', '../outside']
)
def test_files_that_a_network_does_not_need_are_refused(good: Path, name: str) -> None:
    bad = rewritten(good, name, lambda _: b'{}')
    with pytest.raises(ValueError, match=r'is refused: (it has a file|two of its)'):
        load_program(str(bad))
