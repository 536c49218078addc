"""A COCO annotation file: reading it, checking it, its categories by label.

Microsoft COCO: Common Objects in Context, arXiv 1405.0312.
"""

import json
import mmap
import re
from collections import Counter
from collections.abc import Sequence

__all__ = ['category_table', 'name_some', 'read_categories', 'read_coco_json']


def name_some(items: Sequence, limit: int = 5) -> str:
    """The first few items as text, and how many more there are."""
    shown = ', '.join(str(item) for item in items[:limit])
    return shown + (f', and {len(items) - limit} more' if len(items) > limit else '')


def read_coco_json(ann_file: str, *, need_annotations: bool = True) -> dict:
    """Parse a COCO annotation file and check its shape.

    Args:
        ann_file: path of the json.
        need_annotations: False lets the list of annotations be absent, as in the
            files of test sets.

    Returns:
        Its content; `images`, `annotations` and `categories` are lists of dicts
        with the keys that a detection set needs.

    Raises:
        ValueError: not json, truncated, or not COCO-shaped; the text names the file
            and what is missing.
    """
    try:
        with open(ann_file, encoding='utf-8-sig') as file:
            coco = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f'annotation file {ann_file!r} is not valid json, perhaps truncated: '
            f'{error}'
        ) from error
    if isinstance(coco, dict) and not need_annotations:
        coco.setdefault('annotations', [])
    needed = dict(
        images=('id', 'file_name', 'width', 'height'),
        annotations=('image_id', 'category_id', 'bbox'),
        categories=('id', 'name'),
    )
    for section, keys in needed.items():
        entries = coco.get(section) if isinstance(coco, dict) else None
        if not isinstance(entries, list):
            raise ValueError(
                f'annotation file {ann_file!r} is not in COCO format: it needs a list '
                f'{section!r} at the top level'
            )
        for index, entry in enumerate(entries):
            missing = [
                key for key in keys if not isinstance(entry, dict) or key not in entry
            ]
            if missing:
                raise ValueError(
                    f'annotation file {ann_file!r} is not in COCO format: '
                    f'{section}[{index}] lacks {", ".join(missing)}'
                )
    return coco


def read_categories(ann_file: str) -> list[dict]:
    """The `categories` of an annotation file, mostly without parsing the rest.

    That of COCO's training set takes ten seconds and gigabytes to parse; every tool
    needs its classes.

    Raises:
        ValueError: as `read_coco_json`.
    """
    with open(ann_file, 'rb') as file:
        if file.seek(0, 2):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for match in re.finditer(rb'"categories"\s*:\s*(?=\[)', data):
                    found = _parse_list(data[match.end() : match.end() + (1 << 20)])
                    if found and all('id' in x and 'name' in x for x in found):
                        return found
    return read_coco_json(ann_file, need_annotations=False)['categories']


def _parse_list(data: bytes) -> list[dict] | None:
    """The list of objects that `data` starts with, or None."""
    try:
        found, _ = json.JSONDecoder().raw_decode(data.decode('utf-8', 'ignore'))
    except json.JSONDecodeError:
        return None
    return found if all(isinstance(entry, dict) for entry in found) else None


def category_table(
    categories: Sequence[dict],
    ann_file: str,
    *,
    classes: Sequence[str] | None = None,
    label_from_category_id: bool = False,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names and category ids, both by label.

    Args:
        categories: the list of a COCO json; ids need not be contiguous.
        ann_file: for the error texts.
        classes: names to use, in this order; None takes all, by rising id.
        label_from_category_id: the label *is* the id; ids that the file does not
            list become classes called `unused <id>`.

    Raises:
        ValueError: no categories, ids or names twice, or `classes` that the file
            does not list.
    """
    for key, kinds in (('id', (int, str)), ('name', (str, int))):
        strange = [x[key] for x in categories if type(x[key]) not in kinds]
        if strange or len({type(x['id']) for x in categories}) > 1:
            raise ValueError(
                f'annotation file {ann_file!r} has categories of the {key} '
                f'{name_some(strange or [x["id"] for x in categories])}; ids are '
                'integers and names texts'
            )
        count = Counter(category[key] for category in categories)
        twice = [value for value, times in count.items() if times > 1]
        if twice:
            raise ValueError(
                f'annotation file {ann_file!r} lists the category {key} '
                f'{name_some(twice)} more than once'
            )
    if not categories:
        raise ValueError(f'annotation file {ann_file!r} lists no categories')
    names = {category['id']: category['name'] for category in categories}
    if label_from_category_id:
        if any(type(i) is not int or i < 0 for i in names):
            raise ValueError(
                f'annotation file {ann_file!r} has the category ids '
                f'{name_some(list(names))}; label_from_category_id takes integers '
                'from 0 on'
            )
        ids = tuple(range(max(names) + 1))
        found = tuple(names.get(i, f'unused {i}') for i in ids)
        if classes is not None and tuple(classes) != found:
            raise ValueError(
                'metainfo.classes cannot be chosen with label_from_category_id; the '
                f'ids of {ann_file!r} give {len(found)} classes, metainfo has '
                f'{len(classes)}: leave it out'
            )
        return found, ids
    if classes is None:
        ids = tuple(sorted(names))
        return tuple(names[i] for i in ids), ids
    by_name = {name: i for i, name in names.items()}
    unknown = [name for name in classes if name not in by_name]
    if unknown:
        raise ValueError(
            f'metainfo.classes names {name_some(unknown)}, which {ann_file!r} does not '
            f'list; it has {name_some(list(by_name), 10)}'
        )
    return tuple(classes), tuple(by_name[name] for name in classes)
