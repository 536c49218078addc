"""Packaging: what the package needs, as ranges.

The exact set that was tested is in `requirements/constraints.txt`. torchvision is
not needed. `mmcv-lite` has no compiled part; a compiled `mmcv` of the same version
(>= 2.0.1, < 2.2), installed over it, is used where it is found.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r"^__version__ = '(.+)'$", (HERE / 'mmbackbones/__init__.py').read_text(), re.M
)[1]

REQUIRED = [
    'torch>=2.4',
    'mmengine>=0.10.4,<0.11',
    'mmcv-lite>=2.0.1,<2.2',  # mmdet 3.3 and mmsegmentation 1.2 set the upper bound
    'mmdet>=3.3,<3.4',
    'mmsegmentation>=1.2,<1.3',
    'ftfy',  # mmsegmentation imports it and `regex`, but does not require them
    'regex',
    'numpy>=1.24',
    'scipy>=1.10',
    'opencv-python>=4.8',
    'pillow>=10',
    'matplotlib>=3.7',
    'pycocotools>=2.0.7',
    'faster-coco-eval>=1.6.5',
    'safetensors>=0.4',
]
EXPORT = ['onnx>=1.16', 'onnxscript>=0.1', 'onnxruntime>=1.18']
SERVE = [
    'fastapi>=0.110',
    'uvicorn>=0.29',
    'python-multipart>=0.0.9',
    'prometheus-client>=0.20',
]
EXTRAS = {
    'executorch': ['executorch>=1.5'],
    'export': [*EXPORT, 'openvino>=2024.3', 'nncf>=2.14'],
    'hub': ['huggingface_hub>=0.24'],  # hf:// and timm:// addresses of weights
    'predict': ['supervision>=0.25', 'pandas>=2'],  # forms of results
    'serve': SERVE,
    'dev': [
        *EXPORT,
        *SERVE,
        'httpx>=0.27',
        'huggingface_hub>=0.24',
        'pytest>=8',
        'pytest-xdist>=3.5',
        'ruff>=0.14',
        'transformers>=4.52,<6',  # parity with its models; not imported by the package
        'tritonclient[http]>=2.45',  # a client of the server
    ],
}

setup(
    name='mmbackbones',
    version=VERSION,
    description='Real-time detection and segmentation in the OpenMMLab stack',
    license='Apache-2.0',
    packages=find_packages(include=['mmbackbones', 'mmbackbones.*']),
    package_data={'mmbackbones.serving': ['page.html']},
    python_requires='>=3.11',
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
