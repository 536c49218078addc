"""Fold the official parameter names into tests/golden/dfine_param_names.json.

python tests/golden/make_dfine_param_names.py NAMES.json

NAMES.json maps N, S, M, L, X to the `named_parameters()` of the official models
(training form, COCO). Siblings with equal contents share one key: `0|1|2`.
"""

import json
import sys
from pathlib import Path


def fold(names: list[str]) -> dict:
    tree: dict = {}
    for name in names:
        node = tree
        for part in name.split('.'):
            node = node.setdefault(part, {})

    def merge(node: dict) -> dict | int:
        contents: dict[str, list[str]] = {}
        for part, child in node.items():
            contents.setdefault(json.dumps(merge(child)), []).append(part)
        merged = {'|'.join(parts): json.loads(c) for c, parts in contents.items()}
        return merged or 0

    return merge(tree)


if __name__ == '__main__':
    sizes = json.loads(Path(sys.argv[1]).read_text())
    folded = {size: fold(list(names)) for size, names in sizes.items()}
    target = Path(__file__).with_name('dfine_param_names.json')
    target.write_text(json.dumps(folded, separators=(',', ':')) + '\n')
