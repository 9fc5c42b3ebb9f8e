"""The reproduction kit: float and quantized detectors measured on COCO beside their published numbers."""
