"""Quantize a detector of MMDetection after training; ``--help`` explains."""

import sys

from apq_mmdet.engine.command import main

if __name__ == "__main__":
    sys.exit(main())
