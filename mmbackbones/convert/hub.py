"""Files from the Hugging Face hub, fetched when they are asked for, and kept.

Nothing is sent but the request; `HF_HUB_OFFLINE=1` allows only what was kept.
"""

import re
from pathlib import Path

__all__ = ['SCHEMES', 'fetch']

SCHEMES = ('hf://', 'timm://')

_ADDRESS = re.compile(
    r'(?:hf://(?P<owner>[^/@]+)/|timm://)(?P<name>[^/@]+)(?:@(?P<revision>[^/]+))?'
    r'(?:/(?P<file>.+))?'
)
_USUAL_FILES = ('model.safetensors', 'pytorch_model.bin')


def fetch(address: str) -> tuple[Path, str]:
    """Download a file once.

    Args:
        address: `hf://owner/name` or `timm://name`, the latter an abbreviation of
            `hf://timm/name`; after the name may follow `@revision` and `/file`.
            Without a file it is `model.safetensors`, or else `pytorch_model.bin`.

    Returns:
        The kept file, and the licence that the model's page states, or `'unknown'`.

    Raises:
        ValueError: the address is of another form, huggingface_hub is not installed,
            or there is no such file.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(
            f'{address!r} is no address of weights; it is '
            'hf://owner/name[@revision][/file] or timm://name[@revision][/file]'
        )
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise ValueError(
            f'{address!r} needs huggingface_hub: pip install huggingface_hub'
        ) from error
    model = f'{match["owner"] or "timm"}/{match["name"]}'
    revision, file = match['revision'], match['file']
    for name in (file,) if file else _USUAL_FILES:
        try:
            path = hf_hub_download(model, name, revision=revision)
        except errors.LocalEntryNotFoundError as error:  # offline, and not kept
            raise ValueError(f'{address!r} cannot be reached: {error}') from error
        except errors.EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ValueError(f'{address!r} cannot be fetched: {error}') from error
        return Path(path), _licence(model, revision)
    raise ValueError(
        f'{address!r} holds none of {[file] if file else list(_USUAL_FILES)}; name '
        'the file after the model, as in hf://owner/name/file.pth'
    )


def _licence(model: str, revision: str | None) -> str:
    """What the model's page says; it is fetched and kept, too."""
    from huggingface_hub import errors, hf_hub_download

    try:
        page = Path(hf_hub_download(model, 'README.md', revision=revision))
    except (OSError, errors.EntryNotFoundError):
        return 'unknown'
    text = page.read_text(encoding='utf-8', errors='replace')
    stated = re.search(r'^license: *(\S.*)$', text, re.MULTILINE)
    return stated[1].strip() if stated else 'unknown'
