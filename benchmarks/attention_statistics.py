"""What an unsigned uniform quantizer of attention maps loses: values and attention mass below half of its step.

    python benchmarks/attention_statistics.py DIR/config.py DIR/quantized.pth IMAGE... [--bits 4] [--factor 0.9]

DIR is the output of tools/quantize_det.py (at 8 bits, so that the maps are nearly the float ones).
"""

import argparse

import torch
from mmdet.apis import inference_detector, init_detector
from torch import Tensor, nn

from apq_mmdet.layers import quantized_layers


def parse_args() -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--factor", type=float, default=0.9, help="range as a share of the maximum (MPQ's least: 0.9)")
    return parser.parse_args()


def main() -> None:
    """Print a line for each layer of attention."""
    args = parse_args()
    model = init_detector(args.config, args.checkpoint, device="cpu")
    maps: dict[str, list[Tensor]] = {}
    for name, layer in quantized_layers(model):
        if "attention" in layer.quantizers:

            def keep(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                maps.setdefault(name, []).append(inputs[0].movedim(1, 0).flatten(1))  # [H, windows * N * N]

            layer.quantizers["attention"].register_forward_pre_hook(keep)
    for image in args.images:
        inference_detector(model, image)
    print("layer, median over heads of the largest value, share of values lost, share of attention mass lost")
    for name, parts in maps.items():
        attention = torch.cat(parts, 1)  # [H, n]
        largest = attention.amax(1, keepdim=True)
        lost = attention < args.factor * largest / (2**args.bits - 1) / 2
        values, mass = lost.float().mean(), (attention * lost).sum() / attention.sum()
        print(f"{name}  {float(largest.median()):.2f}  {float(values):.3f}  {float(mass):.3f}")


if __name__ == "__main__":
    main()
