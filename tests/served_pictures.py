"""Pictures to upload, and a client of a server with small limits."""

import contextlib
from collections.abc import Iterator

import cv2
import numpy as np
from fastapi.testclient import TestClient
from inference_helpers import stub_inferencer
from serving_helpers import NAME

from mmbackbones.serving.app import create_app
from mmbackbones.serving.limits import Limits

SMALL = Limits(max_body_bytes=400_000, max_pixels=40_000, max_images=3)


def picture(height: int = 96, width: int = 96) -> np.ndarray:
    """RGB: a red rectangle x 10..40, y 20..50 and a green one, on black."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[20:50, 10:40] = (255, 0, 0)
    rgb[60:80, 50:90] = (0, 255, 0)
    return rgb


def encoded(rgb: np.ndarray, suffix: str = '.png') -> bytes:
    return cv2.imencode(suffix, rgb[..., ::-1])[1].tobytes()


@contextlib.contextmanager
def small_client() -> Iterator[TestClient]:
    """Of a stub for a model, with `SMALL` limits."""
    app = create_app(stub_inferencer().backend, name=NAME, limits=SMALL)
    with TestClient(app) as client:
        yield client
