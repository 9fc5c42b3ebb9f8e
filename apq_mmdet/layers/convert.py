"""Swap a model's layers by policy, and say of every layer what it became and why."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from apq_mmdet.errors import BadInputError
from apq_mmdet.layers.activation_checkpointing import disable_activation_checkpointing
from apq_mmdet.layers.base import LAYERS, quantized_layers, refuse_half_precision, to_quantized
from apq_mmdet.layers.matmul import Product
from apq_mmdet.layers.mlp_refit import make_replaceable, refittable_mlps, replaceable_mlps
from apq_mmdet.layers.output_compensation import install_output_compensation
from apq_mmdet.layers.state import install_state_hooks
from apq_mmdet.policy import Policy, QuantizerSpec
from apq_mmdet.quantizers import Quantizer
from apq_mmdet.registry import QUANTIZERS

# float module class -> function that gives its inline matrix products modules of their own
ATTENTION: dict[type[nn.Module], Callable[[nn.Module], None]] = {}

# why leaf modules with parameters that are no GEMM stay float; other classes get the general reason
FLOAT_REASONS = {
    "LayerNorm": "normalisation: no matrix product",
    "BatchNorm2d": "normalisation: no matrix product",
    "SyncBatchNorm": "normalisation: no matrix product",
    "GroupNorm": "normalisation: no matrix product",
    "ModulatedDeformConv2d": "samples at offsets inside of one compiled operator",
    "NormedLinear": "normalises its weight in every forward",
    "Scale": "one factor: no matrix product",
    "OutputCompensation": "correction of a block's output: works on float values",
    "Embedding": "table look-up: no matrix product",
    "MultiheadAttention": "learned or zero keys (add_bias_kv, add_zero_attn) have no modules",
    "NonDynamicallyQuantizableLinear": "its nn.MultiheadAttention uses the weight without calling it",
}

# other modules that compute something inline, and why it stays float
INLINE: dict[type[nn.Module], str] = {}

# module class -> those of its submodules that run in training only
TRAINING_ONLY: dict[type[nn.Module], Callable[[nn.Module], list[nn.Module]]] = {}


@dataclass(frozen=True)
class LayerRow:
    """One row of the layer table: a (layer, role) that is quantized, or a layer or role that stays float.

    ``bits`` is None and ``reason`` says why where it stays float; ``elements`` counts the weights of the layer.
    """

    layer: str
    kind: str
    role: str
    bits: int | None
    format: str
    granularity: str
    groups: int
    elements: int
    reason: str

    def to_dict(self) -> dict[str, object]:
        """Plain containers, for the report."""
        return asdict(self)


def build_quantizer(layer: nn.Module, role: str, spec: QuantizerSpec, name: str) -> Quantizer:
    """The quantizer of one role of a (still float) layer.

    Raises:
        BadInputError: the granularity makes no sense for this role or does not divide the axis, or the format of a
            weight is not linear, or a format is for other roles or kinds of layers.
    """
    # factors of the input channels move into the weights; nothing moves them into those of a transposed convolution
    if role == "weight" or (role == "input" and LAYERS[type(layer)].kind in ("Linear", "Conv2d")):
        allowed = ("tensor", "channel")
    else:
        allowed = ("tensor",) if role == "input" else ("tensor", "head")
    axis, size = LAYERS[type(layer)].role_axis(layer, role)
    whole = isinstance(spec.granularity, int) and not isinstance(spec.granularity, bool) and spec.granularity >= 1
    if whole and role == "weight" and size % spec.granularity == 0:
        groups = spec.granularity
    elif spec.granularity in allowed:
        # an input's channels share one scale: they are made even by factors that the weights take up
        groups = 1 if spec.granularity == "tensor" or role == "input" else size
    else:
        raise BadInputError(
            f"layer {name!r}: granularity {spec.granularity!r} does not fit role {role!r}, whose axis has size "
            f"{size}; allowed: {', '.join(allowed)}" + (" or a divisor of the size" if role == "weight" else "")
        )
    quantizer = QUANTIZERS.module_dict[spec.format]
    if role == "weight" and not quantizer.linear:
        raise BadInputError(
            f"layer {name!r}: format {spec.format!r} does not fit role 'weight', because weights are kept as affine "
            f"codes; use format 'affine'"
        )
    if quantizer.roles and role not in quantizer.roles:
        raise BadInputError(
            f"layer {name!r}: format {spec.format!r} quantizes {quantizer.source} and is for role "
            f"{' or '.join(map(repr, quantizer.roles))}, not for {role!r}; use format 'affine'"
        )
    kind = LAYERS[type(layer)].kind
    if quantizer.inputs_of and (role != "input" or kind not in quantizer.inputs_of):
        raise BadInputError(
            f"layer {name!r}: format {spec.format!r} is for inputs of {', '.join(quantizer.inputs_of)}, not for role "
            f"{role!r} of kind {kind}; use format 'affine'"
        )
    try:
        return quantizer(spec.bits, axis=axis, groups=groups, symmetric=spec.symmetric)
    except ValueError as error:
        raise BadInputError(f"layer {name!r}, role {role!r}: {error}") from error


def quantize_model(model: nn.Module, policy: Policy) -> list[LayerRow]:
    """Make ``model`` a quantized one in place; its quantizers still have to be calibrated or loaded.

    Args:
        model: any module. Scope 'backbone' is its ``backbone`` submodule, or all of it where it has none.
        policy: what to quantize.

    Returns:
        The layer table, also kept as ``model.quantization_table``.

    Raises:
        BadInputError: the model is quantized already, an override matches no layer, a granularity does not fit, no
            block can be compensated, no MLP can be refitted, layers share a weight, or weights are of half precision.
            No layer is quantized then; attention may have got modules of its own for projections and products, the
            same function up to rounding.
    """
    if next(quantized_layers(model), None) is not None:
        raise BadInputError(f"{type(model).__name__} holds quantized layers already: start from a float model")
    part = model.backbone if policy.scope == "backbone" and hasattr(model, "backbone") else model
    for module in list(part.modules()):
        if type(module) in ATTENTION:
            ATTENTION[type(module)](module)
    planned = _plan(model, part, policy)
    mlps = refittable_mlps(part, _to_quantize(planned)) if policy.mlp_refit else []
    _refuse_shared_parameters(model, planned, {layer for mlp in mlps for layer in (mlp.first, mlp.second)})
    disable_activation_checkpointing(model)
    if policy.output_compensation:
        install_output_compensation(part)
    make_replaceable(mlps)
    unused = _training_only(part)
    inside = set(part.modules()) - unused
    table: list[LayerRow] = []
    for name, module in list(model.named_modules()):
        if name in planned:
            table += planned[name].rows
            planned[name].apply()
        elif _is_leaf(module) or _inline_reason(module):
            reason = _float_reason(module) if module in inside else f"outside scope {policy.scope!r}"
            reason = "runs in training only" if module in unused else reason
            table.append(_float_row(name, module, "-", reason))
    device = _follow_devices(model)
    install_state_hooks(model, device)
    model.quantization_table = table
    return table


@dataclass(frozen=True)
class _PlannedLayer:
    """What a layer is going to be: its quantizers by role, whether its input is divided, its rows of the table."""

    layer: nn.Module
    quantizers: dict[str, Quantizer]
    divided: bool
    rows: list[LayerRow]

    def apply(self) -> None:
        if self.quantizers:
            to_quantized(self.layer, self.quantizers, self.divided)


def _plan(model: nn.Module, part: nn.Module, policy: Policy) -> dict[str, _PlannedLayer]:
    """All layers of the part that is quantized, by their names in the model; raises as ``quantize_model``."""
    inside = set(part.modules()) - _training_only(part)
    layers = {name: m for name, m in model.named_modules() if m in inside and type(m) in LAYERS and not _computed(m)}
    classes = {name: LAYERS[type(layer)] for name, layer in layers.items()}
    policy.check_overrides([(name, cls.kind, cls.roles) for name, cls in classes.items()])
    planned = {name: _plan_layer(name, layer, policy) for name, layer in layers.items()}
    refuse_half_precision((name, plan.layer) for name, plan in planned.items() if plan.quantizers)
    if not any(plan.quantizers for plan in planned.values()):
        raise BadInputError(f"scope {policy.scope!r} holds no layer that can be quantized")
    return planned


def _to_quantize(planned: dict[str, _PlannedLayer]) -> set[nn.Module]:
    return {plan.layer for plan in planned.values() if plan.quantizers}


def _computed(layer: nn.Module) -> bool:
    """Whether a layer's weight is made of other parameters in every forward, as by weight_norm or spectral_norm."""
    return hasattr(layer, "weight") and "weight" not in layer._parameters


def _follow_devices(model: nn.Module) -> torch.device:
    """Put quantizers where their layers are, those of products, which have no parameters, where the model begins."""
    beginning = next(model.parameters(), torch.empty(0)).device
    for _, layer in quantized_layers(model):
        parameter = next(layer.parameters(), None)
        layer.quantizers.to(beginning if parameter is None else parameter.device)
    return beginning


def _refuse_shared_parameters(model: nn.Module, planned: dict[str, _PlannedLayer], refitted: set[nn.Module]) -> None:
    """One weight of two modules can neither take up factors of one's input nor become codes of both.

    Nor can one bias make up for the errors of both, nor one MLP's refit be another's.
    """
    changed = {
        name for name, plan in planned.items() if plan.divided or "weight" in plan.quantizers or plan.layer in refitted
    }
    users: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            other = users.setdefault(parameter, name)
            if other != name and (quantized := [n for n in (other, name) if n in changed]):
                raise BadInputError(
                    f"layers {other!r} and {name!r} share one {part}, which cannot be quantized for both: leave them "
                    f"float, with overrides such as dict(pattern={quantized[-1]!r}, float=True)"
                )


def _training_only(model: nn.Module) -> set[nn.Module]:
    holders = [module for module in model.modules() if type(module) in TRAINING_ONLY]
    return {m for holder in holders for part in TRAINING_ONLY[type(holder)](holder) for m in part.modules()}


def _plan_layer(name: str, module: nn.Module, policy: Policy) -> _PlannedLayer:
    cls = LAYERS[type(module)]
    specs, reasons = policy.scheme(name, cls.kind, cls.roles)
    quantizers = {r: build_quantizer(module, r, s, name) for r, s in specs.items()}
    rows = []
    for role in cls.roles:
        if role not in specs:
            rows.append(_float_row(name, module, role, reasons[role]))
            continue
        spec, q = specs[role], quantizers[role]
        kind = f"{spec.format}, {'symmetric' if spec.symmetric else 'asymmetric'}"
        elements = _num_weights(module)
        rows.append(LayerRow(name, cls.kind, role, spec.bits, kind, str(spec.granularity), q.groups, elements, ""))
    return _PlannedLayer(module, quantizers, "input" in specs and specs["input"].granularity == "channel", rows)


def leave_float(model: nn.Module, names: list[str]) -> None:
    """Take the quantizers of these layers away again, and say so in the layer table."""
    for name in names:
        model.get_submodule(name).quantizers.clear()
        model.get_submodule(name).input_factors = model.get_submodule(name).input_centers = None
    for _, mlp, activation in replaceable_mlps(model):
        if not (mlp.first.quantizers and mlp.second.quantizers):  # there is nothing that a refit could help
            setattr(mlp.holder, mlp.activation, activation.original)
    table = getattr(model, "quantization_table", [])
    table[:] = [
        replace(row, bits=None, format="float32", granularity="-", groups=0, reason="no calibration data reached it")
        if row.layer in names and row.bits is not None
        else row
        for row in table
    ]


def _is_leaf(module: nn.Module) -> bool:
    if is_parametrized(module):  # has its own parameters in a child
        return True
    has_parameters = next(module.parameters(recurse=False), None) is not None
    known = type(module) in LAYERS or type(module) in ATTENTION
    return has_parameters and (known or next(module.children(), None) is None)


def _num_weights(module: nn.Module) -> int:
    own = [*module.named_parameters(recurse=False)]
    own += module.parametrizations.named_parameters() if is_parametrized(module) else []
    return sum(p.numel() for name, p in own if "bias" not in name)


def _float_reason(module: nn.Module) -> str:
    if (type(module) in LAYERS or is_parametrized(module)) and _computed(module):
        return "its weight is computed in every forward"
    name = type(module).__name__
    return _inline_reason(module) or FLOAT_REASONS.get(name, f"{name} has no quantized form")


def _inline_reason(module: nn.Module) -> str | None:
    """Why what a module computes inline stays float; None where it computes nothing of importance that way."""
    if type(module) in INLINE:
        return INLINE[type(module)]
    kinds = (cls for cls in ATTENTION if cls is not nn.TransformerEncoder)  # which multiplies nothing by itself
    base = next((cls.__name__ for cls in kinds if isinstance(module, cls) and type(module) is not cls), None)
    if base is None or any(isinstance(part, Product) for part in module.modules()):
        return None
    return f"a {base} of another class: its products have no modules"


def _float_row(name: str, module: nn.Module, role: str, reason: str) -> LayerRow:
    kind = LAYERS[type(module)].kind if type(module) in LAYERS else type(module).__name__
    return LayerRow(name, kind, role, None, "float32", "-", 0, _num_weights(module), reason)
