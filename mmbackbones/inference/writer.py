"""A folder of results: pictures, one COCO json, maps of ids, files per image."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmbackbones.inference.results import Detections, LabelMap, Result

__all__ = ['FORMATS', 'ResultWriter']

FORMATS = {'coco': '.json', 'labelme': '.json', 'yolo': '.txt', 'csv': '.csv'}
"""Forms besides pictures and maps; 'coco' is one file, the others one per image."""


class ResultWriter:
    """Writes results as they come.

    Detections: `<out_dir>/<name>` is the image with boxes, `detections.json` holds the
    COCO results of all. Segmentation: `pictures/<name>` is the image coloured,
    `id_maps/<stem>.png` the ids of the label maps that were trained on (8 or 16 bits).
    Of other formats `<format>/<stem>.<suffix>`.

    Args:
        out_dir: folder; it is made.
        task: 'detection' or 'segmentation'.
        pictures: False writes no images with boxes or colours.
        formats: of `FORMATS`.

    Raises:
        ValueError: an unknown format, or YOLO's for segmentation.
    """

    def __init__(
        self,
        out_dir: str | Path,
        task: str,
        *,
        pictures: bool = True,
        formats: Sequence[str] = ('coco',),
    ) -> None:
        kind = Detections if task == 'detection' else LabelMap
        known = [name for name in FORMATS if name in kind.FORMATS]
        wrong = [name for name in formats if name not in known]
        if wrong:
            raise ValueError(
                f'format {wrong[0]!r} is none of {task}; choose from {", ".join(known)}'
            )
        self.out_dir = Path(out_dir)
        self._is_detection = task == 'detection'
        self._pictures = pictures
        self._formats = formats
        self._coco: list[dict] = []
        self.out_dir.mkdir(parents=True, exist_ok=True)

    def check_names(self, names: Sequence[str]) -> None:
        """Make sure that no image's file would replace another's.

        Raises:
            ValueError: names occur twice, within or without their suffixes.
        """
        per_stem = not self._is_detection or {*self._formats} - {'coco'}
        if per_stem:
            names = [Path(name).stem for name in names]
        elif not self._pictures:
            return
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(
                f'{len(twice)} names occur several times, in several folders or with '
                f'several suffixes, but have one file each: {twice[0]!r} is one; '
                'rename them, or predict on them one after the other'
            )

    def check_sources(self, paths: Sequence[str]) -> None:
        """Make sure that no image that is read would be written over.

        Raises:
            ValueError: one would, with its path.
        """
        for path in map(Path, paths):
            targets = [self._picture(path.name)] if self._pictures else []
            if not self._is_detection:
                targets.append(self._id_map(path.name))
            if path.resolve() in (target.resolve() for target in targets):
                raise ValueError(
                    f'the results would be written over the image {str(path)!r}; '
                    f'choose another folder than {str(self.out_dir)!r}'
                )

    def _picture(self, name: str) -> Path:
        return self.out_dir / ('' if self._is_detection else 'pictures') / name

    def _id_map(self, name: str) -> Path:
        return self.out_dir / 'id_maps' / f'{Path(name).stem}.png'

    def write(self, result: Result) -> None:
        """Write what belongs to one image; the COCO json comes with `finish`."""
        stem = Path(result.name).stem
        if not self._is_detection:
            result.save(self._id_map(result.name), format='id_map')
        if self._pictures:
            result.save(self._picture(result.name), format='picture')
        for name in self._formats:
            if name == 'coco':
                self._coco += result.to_coco()
            else:
                path = self.out_dir / name / (stem + FORMATS[name])
                result.save(path, format=name)

    def finish(self) -> None:
        """Write the COCO json of all results."""
        if 'coco' in self._formats:
            name = 'detections' if self._is_detection else 'segments'
            (self.out_dir / f'{name}.json').write_text(json.dumps(self._coco))
