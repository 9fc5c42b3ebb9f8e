"""Quantize an image classifier of timm after training; ``--help`` explains."""

import sys

from apq_mmdet.engine.classification_command import main

if __name__ == "__main__":
    sys.exit(main())
