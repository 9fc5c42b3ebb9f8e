"""Packaging of apq_mmdet. torch, mmcv and mmdet are not installed from here: their versions are checked on import."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (ROOT / "apq_mmdet/__init__.py").read_text()).group(1)

setup(
    name="apq_mmdet",
    version=version,
    description="Post-training quantization of transformer detectors in MMDetection",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["apq_mmdet*"]), "apq_mmdet.recipes"],
    package_dir={"apq_mmdet.recipes": "configs/_base_/recipes"},  # where an installation without a checkout has them
    # the OpenMMLab stack is deliberately absent: forks with other distribution names must keep working
    install_requires=["numpy", "tqdm"],
    extras_require={"timm": ["timm>=1.0.31"], "dev": ["pytest", "ruff"]},
)
