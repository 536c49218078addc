"""Digests of the names and shapes under which others publish weights.

python tests/golden/make_foreign_keys.py FOLDER rewrites foreign_keys.json from
FOLDER/{hgnetv2,hiera,convnextv2}_keys.json, each {arch: {source: {name: shape}}} as
listed from the state dicts of the makers' own networks.
"""

import hashlib
import json
import sys
from pathlib import Path

FAMILIES = ('hgnetv2', 'hiera', 'convnextv2')


def main() -> None:
    """Every list but Hugging Face's, which the tests read from transformers."""
    digests = {}
    for family in FAMILIES:
        path = Path(sys.argv[1], f'{family}_keys.json')
        for arch, sources in json.loads(path.read_text()).items():
            for source, shapes in sources.items():
                if source.startswith('hf_'):
                    continue
                lines = sorted(f'{k} {v}' for k, v in shapes.items() if v is not None)
                digests[f'{family} {arch} {source}'] = {
                    'num_keys': len(lines),
                    'sha256': hashlib.sha256('\n'.join(lines).encode()).hexdigest(),
                }
    target = Path(__file__).with_name('foreign_keys.json')
    target.write_text(json.dumps(digests, indent=2) + '\n')


if __name__ == '__main__':
    main()
