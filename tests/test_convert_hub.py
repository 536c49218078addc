"""Addresses of published weights; the hub itself is played here."""

import sys
from pathlib import Path

import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader

import mmbackbones  # noqa: F401  registers the loaders
from mmbackbones.convert.hub import fetch
from mmbackbones.engine import pretrained

hub = pytest.importorskip('huggingface_hub', reason='needs huggingface_hub')
PAGE = '---\nlibrary_name: x\nlicense: cc-by-nc-4.0\n---\n# license: not this\n'


@pytest.fixture
def files(tmp_path, monkeypatch) -> dict[str, bytes]:
    """`owner/name[@revision]/file` to content; only these exist."""
    known: dict[str, bytes] = {}

    def download(repo: str, filename: str, *, revision: str | None = None) -> str:
        key = f'{repo}@{revision}/{filename}' if revision else f'{repo}/{filename}'
        if key not in known:
            raise hub.errors.EntryNotFoundError(f'404: {key}')
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(known[key])
        return str(path)

    monkeypatch.setattr(hub, 'hf_hub_download', download)
    return known


@pytest.mark.parametrize(
    ('address', 'present', 'fetched'),
    [
        ('hf://a/b', ['a/b/model.safetensors'], 'a/b/model.safetensors'),
        ('hf://a/b', ['a/b/pytorch_model.bin'], 'a/b/pytorch_model.bin'),
        ('hf://a/b', ['a/b/pytorch_model.bin', 'a/b/model.safetensors'],
         'a/b/model.safetensors'),
        ('hf://a/b/x/y.pt', ['a/b/x/y.pt', 'a/b/model.safetensors'], 'a/b/x/y.pt'),
        ('hf://a/b@v1', ['a/b@v1/model.safetensors'], 'a/b@v1/model.safetensors'),
        ('timm://n.in1k', ['timm/n.in1k/model.safetensors'],
         'timm/n.in1k/model.safetensors'),
        ('timm://n@v1/w.bin', ['timm/n@v1/w.bin'], 'timm/n@v1/w.bin'),
    ],
)  # fmt: skip
def test_addresses_and_files(files, address, present, fetched, tmp_path):
    files.update(dict.fromkeys(present, b'x'))
    path, licence = fetch(address)
    assert path == tmp_path / fetched
    assert licence == 'unknown'


def test_the_licence_is_that_of_the_page(files):
    files.update({'a/b/model.safetensors': b'x', 'a/b/README.md': PAGE.encode()})
    assert fetch('hf://a/b')[1] == 'cc-by-nc-4.0'
    files['a/b/README.md'] += 'café'.encode('latin-1')
    assert fetch('hf://a/b')[1] == 'cc-by-nc-4.0'


@pytest.mark.parametrize(
    'address', ['hf://', 'hf://a', 'hf://a/', 'timm://', 'timm:///x', 'http://a/b']
)
def test_other_addresses_are_refused(files, address):
    with pytest.raises(ValueError, match='is no address of weights; it is hf://owner'):
        fetch(address)


def test_what_is_not_there_is_named(files):
    with pytest.raises(ValueError, match=r"holds none of \['model.safetensors', 'py"):
        fetch('hf://a/b')
    with pytest.raises(ValueError, match=r"holds none of \['x.pth'\]"):
        fetch('hf://a/b/x.pth')


def test_without_network_or_package_the_error_says_so(files, monkeypatch):
    def offline(*args, **kwargs):
        raise hub.errors.LocalEntryNotFoundError('no network, nothing kept')

    monkeypatch.setattr(hub, 'hf_hub_download', offline)
    with pytest.raises(ValueError, match='cannot be reached: no network'):
        fetch('hf://a/b')
    monkeypatch.setattr(hub, 'hf_hub_download', lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # our mistakes stay ours
        fetch('hf://a/b')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match='needs huggingface_hub: pip install'):
        fetch('timm://x')


def test_a_repository_that_does_not_exist_is_one_line(files, monkeypatch):
    def refuse(*args, **kwargs):
        raise hub.errors.HFValidationError('Repo id must use alphanumeric chars')

    monkeypatch.setattr(hub, 'hf_hub_download', refuse)
    with pytest.raises(ValueError, match=r"'hf://a/b' cannot be fetched: Repo id"):
        fetch('hf://a/b')


@pytest.mark.parametrize('address', ['hf://a/b/w.pth', 'timm://b/w.pth'])
def test_the_loader_takes_addresses_and_says_the_licence(
    files, address, tmp_path, monkeypatch
):
    torch.save({'layer.weight': torch.ones(2)}, tmp_path / 'w.pth')
    owner = 'a' if address.startswith('hf') else 'timm'
    files[f'{owner}/b/w.pth'] = Path(tmp_path / 'w.pth').read_bytes()
    files[f'{owner}/b/README.md'] = PAGE.encode()
    said: list[str] = []
    monkeypatch.setattr(pretrained, 'print_log', lambda text, _: said.append(text))
    loaded = CheckpointLoader.load_checkpoint(address, 'cpu')
    assert loaded['state_dict']['layer.weight'].tolist() == [1, 1]
    assert said[0].startswith(f'{address}: licence cc-by-nc-4.0; kept as ')
