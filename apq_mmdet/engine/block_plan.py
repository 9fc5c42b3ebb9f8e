"""What the calibration of one block takes: candidates, and operations of its search and of what is fitted after it.

Operations are those of matrix products, see counting.py, in units of float32: one of float64 counts twice.
"""

from dataclasses import dataclass

from torch import nn

from apq_mmdet.calibration.compensation import CompensationConfig, is_compensated
from apq_mmdet.calibration.mlp_refit import refit_operations
from apq_mmdet.calibration.recipe import Recipe, SearchConfig
from apq_mmdet.calibration.reconstruction import ReconstructionConfig, worth_reconstructing
from apq_mmdet.calibration.sampling import sampled_units
from apq_mmdet.calibration.units import to_units
from apq_mmdet.calibration.weight_errors import in_closed_form
from apq_mmdet.engine.counting import CountedCall, suffix_operations
from apq_mmdet.layers.base import QuantizedLayer, quantized_layers, quantizers_of

BACKWARD = 3  # a forward and its backward, in forwards
FLOAT64 = 2
SUMS = 2  # [K, K] matrices of which every token is a part, where a weight's errors have a closed form


@dataclass(frozen=True)
class JudgedCall:
    """What the search and what is fitted after it see of a call.

    Attributes:
        products: (module, operations) in the order of execution.
        units: number of parts that can be judged apart; 1 where the call has none.
        separable: whether it can be taken apart.
    """

    products: list[tuple[nn.Module, int]]
    units: int
    separable: bool

    @property
    def operations(self) -> int:
        """Of the whole call."""
        return sum(operations for _, operations in self.products)


@dataclass(frozen=True)
class BlockPlan:
    """What the calibration of one block takes.

    Attributes:
        layers: number of its layers that hold quantizers.
        ranges: number of quantizers to search.
        ranked: candidates that are judged at the output of their layer, all quantizers and rounds.
        judged: candidates that are judged at the output of the block, all quantizers and rounds.
        operations: of one float forward on the image.
        search_operations: of the search on the image, or on the sample of it that the search asks for; an upper bound.
        fit_operations: of the sums of compensation, and of what reconstruction does with all units, on the image.
        fixed_operations: of the closed forms of search and compensation and the training steps of reconstruction,
            however many images there are.
        captured_bytes: inputs, outputs and, where something weighs errors by them, gradients on the image.
        reached: whether the image reached the block.
    """

    name: str
    layers: int
    ranges: int
    ranked: int
    judged: int
    operations: int
    search_operations: int
    fit_operations: int
    fixed_operations: int
    captured_bytes: int
    reached: bool


def plan_block(name: str, block: nn.Module, calls: list[CountedCall], recipe: Recipe) -> BlockPlan:
    """Plan one block from its calls in a float forward of one image, which were kept where there is a search."""
    search = None if recipe.search is None else recipe.search.for_block(name)
    layers = [layer for _, layer in quantized_layers(block) if layer.quantizers]
    judged_calls = [] if search is None else [_judged(block, call, search) for call in calls]
    ranked = judged = search_operations = fixed_operations = 0
    if search is not None:
        for layer in layers:
            suffix = sum(suffix_operations(call.products, layer) for call in judged_calls)
            for role, quantizer in layer.quantizers.items():
                at_layer, at_block = _candidates(len(search.candidates(layer.kind, role, quantizer)), search)
                ranked += search.rounds * at_layer
                judged += search.rounds * at_block
                own = _layer_operations(layer, judged_calls)
                if in_closed_form(search, layer, role, at_layer):
                    matrix = 2 * layer.weight.numel() * layer.depth  # [N, K] times [K, K]
                    fixed_operations += search.rounds * at_layer * matrix
                    search_operations += search.rounds * SUMS * own * layer.depth // len(layer.weight)
                else:
                    search_operations += search.rounds * (at_layer * own + at_block * suffix)
    operations = sum(call.operations for call in calls)
    stages = [stage for stage in recipe.reconstruction if worth_reconstructing(block, stage)]
    fit_operations = 2 * len(stages) * sum(call.operations for call in judged_calls)  # the objective before and after
    fixed_operations += sum(_learning(judged_calls, stage) for stage in stages)
    fixed_operations += refit_operations(block)
    if recipe.compensation is not None:
        sums, closed_forms = _compensation(layers, judged_calls, recipe.compensation)
        fit_operations, fixed_operations = fit_operations + sums, fixed_operations + closed_forms
    return BlockPlan(
        name=name,
        layers=len(layers),
        ranges=len(quantizers_of(block)),
        ranked=ranked,
        judged=judged,
        operations=operations,
        search_operations=search_operations,
        fit_operations=fit_operations,
        fixed_operations=fixed_operations,
        captured_bytes=0 if search is None else _captured_bytes(calls, recipe.needs_gradients(name)),
        reached=bool(calls),
    )


def _judged(block: nn.Module, call: CountedCall, search: SearchConfig) -> JudgedCall:
    """What is left of a call by samples, where the search asks for them."""
    sample = whole = to_units(block, call.call)
    if search.windows or search.rows or search.tokens:
        sample = sampled_units(block, call.call, search, seed=0)
    share = sample.elements / max(whole.elements, 1)
    products = [(module, round(operations * share)) for module, operations in call.products]
    return JudgedCall(products=products, units=len(sample.targets), separable=sample.separable)


def _captured_bytes(calls: list[CountedCall], gradients: bool) -> int:
    return sum(call.captured + gradients * call.gradients for call in calls)


def _layer_operations(layer: QuantizedLayer, calls: list[JudgedCall]) -> int:
    return sum(operations for call in calls for module, operations in call.products if module is layer)


def _candidates(number: int, search: SearchConfig) -> tuple[int, int]:
    """How many of ``number`` candidates are judged at the output of their layer, and how many at that of the block."""
    if search.metric == "module":
        return number, 0
    return (number, search.shortlist) if 0 < search.shortlist < number else (0, number)


def _compensation(layers: list[QuantizedLayer], calls: list[JudgedCall], config: CompensationConfig) -> tuple[int, int]:
    """Of the sums over tokens on the image, and of the closed forms behind them.

    For each layer [N, K] the float and the quantized block run, at most to their ends, and every token adds to two
    [K, K] matrices; behind them each range that is tried takes a product of [N, K] and [K, K] in float32, the
    regression and the spread rounding one in float64, and triangular factors and inverses about K^3
    multiply-accumulates.
    """
    block = sum(call.operations for call in calls)
    runs = 1 + (BACKWARD if config.weighted else 1)
    sums = closed_forms = 0
    for layer in filter(is_compensated, layers):
        if own := _layer_operations(layer, calls):
            tokens, square = own // (2 * layer.weight.numel()), layer.depth**2
            sums += runs * block + FLOAT64 * 2 * tokens * 2 * square
            rows = config.ranges + FLOAT64 * (config.activations + config.rounding)
            closed_forms += 2 * square * (rows * len(layer.weight) + FLOAT64 * layer.depth)
    return sums, closed_forms


def _learning(calls: list[JudgedCall], config: ReconstructionConfig) -> int:
    """Steps on ``batch`` units of calls that can be taken apart, and on one whole call of those that cannot."""
    units = sum(call.units for call in calls)
    drawn = sum(call.operations * (config.batch if call.separable else call.units) for call in calls)
    return config.iterations * BACKWARD * drawn // max(units, 1)  # calls are drawn by their number of units
