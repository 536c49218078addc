"""Golden files: digests of all names and shapes of a state dict."""

import hashlib
import json
import os
from pathlib import Path

from torch import nn

GOLDEN = Path(__file__).parent / 'golden'


def assert_golden_names(file: str, entry: str, network: nn.Module) -> None:
    """Names, shapes and the number of parameters are those on record.

    Args:
        file: in the folder of golden files; `ACCEPT_GOLDEN=1` rewrites it.
        entry: in that file.
        network: may be on meta.
    """
    state = network.state_dict()
    lines = sorted(f'{name} {list(value.shape)}' for name, value in state.items())
    found = {
        'num_keys': len(lines),
        'num_params': sum(p.numel() for p in network.parameters()),
        'sha256': hashlib.sha256('\n'.join(lines).encode()).hexdigest(),
    }
    path = GOLDEN / file
    golden = json.loads(path.read_text()) if path.exists() else {}
    if os.environ.get('ACCEPT_GOLDEN') == '1':
        golden[entry] = found
        path.write_text(json.dumps(golden, indent=2) + '\n')
    assert found == golden[entry]
