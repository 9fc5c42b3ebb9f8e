"""Counting what one forward does: operations of matrix products, in the order of execution, and captured bytes.

Operations are those of Linear, Conv2d, ConvTranspose2d and attention products, two for each multiply-accumulate.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from apq_mmdet.calibration.blocks import BlockCall, bytes_of, hooked, tensors_of, watch_blocks
from apq_mmdet.layers.matmul import Product

# float class -> (module, its first input, its output) -> operations of one call; subclasses count alike
OPERATIONS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], int]] = {
    nn.Linear: lambda layer, x, y: 2 * y.numel() * layer.in_features,
    nn.Conv2d: lambda layer, x, y: 2 * y.numel() * layer.weight[0].numel(),
    # W: [in, out / groups, kH, kW]: it is the input's elements that meet a whole W[0]
    nn.ConvTranspose2d: lambda layer, x, y: 2 * x.numel() * layer.weight[0].numel(),
    Product: lambda layer, x, y: 2 * y.numel() * x.shape[-1],
}


@dataclass
class CountedCall:
    """One call of a block.

    Attributes:
        products: (module, operations) in the order of execution.
        captured: bytes of inputs and outputs.
        gradients: bytes of the outputs' gradients.
        call: what the block was given and gave, where that was asked for.
    """

    products: list[tuple[nn.Module, int]] = field(default_factory=list)
    captured: int = 0
    gradients: int = 0
    call: BlockCall | None = None

    @property
    def operations(self) -> int:
        """Of the whole call."""
        return sum(operations for _, operations in self.products)


@dataclass
class Count:
    """What one forward did.

    Attributes:
        operations: of the whole model.
        calls: of each block, by its name.
    """

    operations: int = 0
    calls: dict[str, list[CountedCall]] = field(default_factory=dict)


@contextlib.contextmanager
def counting(model: nn.Module, blocks: dict[str, nn.Module], keep: bool = False) -> Iterator[Count]:
    """Context in which the forwards of ``model`` are counted; blocks do not hold one another.

    Args:
        keep: whether to keep what blocks were given and gave.
    """
    count = Count()
    running: list[CountedCall] = []  # the call of the block that runs now, if one does

    def start(name: str) -> None:
        running.append(CountedCall())
        count.calls.setdefault(name, []).append(running[-1])

    def add(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        rule = next(rule for cls, rule in OPERATIONS.items() if isinstance(module, cls))
        operations = rule(module, tensors_of((args, kwargs))[0], output)
        count.operations += operations
        if running:
            running[-1].products.append((module, operations))

    def end(name: str, args: tuple, kwargs: dict, output: Any) -> None:
        call, outputs = running.pop(), tensors_of(output)
        call.captured, call.gradients = bytes_of((args, kwargs, outputs)), bytes_of(outputs)
        if keep:
            call.call = BlockCall(args, kwargs, outputs, None, image=0)

    products = [module for module in model.modules() if isinstance(module, tuple(OPERATIONS))]
    hooks = [module.register_forward_hook(add, with_kwargs=True) for module in products]
    hooks += [block.register_forward_pre_hook(lambda *_, name=name: start(name)) for name, block in blocks.items()]
    # hooks run in the order of registration: a block that is itself a layer is counted before it ends
    with hooked(hooks), watch_blocks(blocks, end):
        yield count


def suffix_operations(call: Sequence[tuple[nn.Module, int]], layer: nn.Module) -> int:
    """Operations that a new range of ``layer`` asks for: its own and those of modules that run after it has started.

    A module that runs before the layer and again after it counts with all of its executions, as a search makes them.

    Args:
        call: (module, operations) in the order of execution.
    """
    modules = [module for module, _ in call]
    if layer not in modules:
        return 0
    again = set(modules[modules.index(layer) :])
    return sum(operations for module, operations in call if module in again)
