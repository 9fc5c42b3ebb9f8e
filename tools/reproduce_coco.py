"""Measure the project's COCO detectors, float and quantized, beside their published AP; ``--help`` explains."""

import sys

from apq_mmdet.reproduction.command import main

if __name__ == "__main__":
    sys.exit(main())
