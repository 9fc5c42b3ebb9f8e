"""The calibration of a quantized model: observe, disturb, then search block by block."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from torch import Tensor, nn
from tqdm import tqdm

from apq_mmdet.calibration.blocks import partition, watch_blocks
from apq_mmdet.calibration.centers import center_inputs, centered_layers
from apq_mmdet.calibration.compensation import compensate, is_compensated
from apq_mmdet.calibration.distributed import gather, own_images, share_observed
from apq_mmdet.calibration.importance import CalibrationTask, FeatureTask, capture_gradients
from apq_mmdet.calibration.memory import release_freed
from apq_mmdet.calibration.mlp_refit import refit_mlps
from apq_mmdet.calibration.output_compensation import fit_output_compensation
from apq_mmdet.calibration.progress import Progress, SearchBar, steps_of
from apq_mmdet.calibration.quantized_inputs import QuantizedInputs
from apq_mmdet.calibration.recipe import Recipe, SearchConfig
from apq_mmdet.calibration.reconstruction import reconstruct, worth_reconstructing
from apq_mmdet.calibration.reports import BlockReport, BlockStates, CalibrationReport
from apq_mmdet.calibration.sampling import sampled_units
from apq_mmdet.calibration.search import search_block
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.calibration.transforms import equalize, rescalings_of
from apq_mmdet.calibration.units import UnitCalls, to_units, unit_module
from apq_mmdet.errors import BadInputError, CalibrationError, listed
from apq_mmdet.layers.base import float_only, quantized_layers, quantizers_of, refuse_half_precision
from apq_mmdet.layers.convert import leave_float
from apq_mmdet.layers.integer import float32_precision
from apq_mmdet.layers.mlp_refit import replaceable_mlps
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode

MEMORY_BUDGET = 4 * 2**30  # bytes
HELD = 8  # one part in so many of it holds captured tensors; the rest is for one image's backward pass and the search


def calibrate(
    model: nn.Module,
    samples: Sequence[Any],
    recipe: Recipe,
    task: CalibrationTask | None = None,
    states: BlockStates | None = None,
    seed: int = 0,
    capture_dir: str | Path | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> CalibrationReport:
    """Find the parameters of all quantizers of a model that ``quantize_model`` converted.

    In a distributed run every process calls this with the same arguments, works on its own images, and gets the same
    result, which is that of one process.

    Args:
        model: quantized model with its float weights loaded; evaluated in eval mode.
        samples: calibration samples in the form that the task takes; each is used as one image.
        recipe: what to search and how.
        task: runs the model and gives the distillation loss; by default the model is called on each sample.
        states: keeps finished blocks; those already kept are not searched again. Only that of the first process counts.
        seed: of everything that is drawn: samples, minibatches, what stays float in training.
        capture_dir: existing folder for captured activations, which are deleted in the end; None takes the system's
            temporary folder.
        memory_budget: bytes of memory that calibration may take above the model's own; what does not fit goes to
            ``capture_dir``.

    Raises:
        BadInputError: see ``check_model``.
        CalibrationError: no samples, a quantizer that saw no data, or NaN or infinite values, a zero or non-finite
            gradient, or inference mode where gradients are needed.

    Whatever is raised once it has begun, also by an interrupt, leaves a model whose quantizers are not calibrated; its
    weights may have changed, where the recipe changes weights.
    """
    if not len(samples):
        raise CalibrationError("no calibration samples")
    start = time.perf_counter()
    check_model(model, recipe)
    task = task or FeatureTask()
    blocks = partition(model)
    stages = [stage for stage in recipe.reconstruction if any(worth_reconstructing(b, stage) for b in blocks.values())]
    learns = bool(stages) or recipe.policy.mlp_refit
    if torch.is_inference_mode_enabled() and (learns or any(map(recipe.needs_gradients, blocks))):
        raise CalibrationError(
            "this recipe needs gradients, which torch.inference_mode() forbids: calibrate outside of it"
        )
    captures = CaptureStore(capture_dir, memory_budget // HELD)
    devices = (quantizer.scale.device for quantizer in quantizers_of(model))
    precision = float32_precision(next(devices, torch.device("cpu")))
    with evaluating(model), _all_or_nothing(model), precision, captures as store, torch.no_grad():
        for quantizer in quantizers_of(model):
            quantizer.use_observer(recipe.observer)
        float_pass(model, blocks if recipe.search else {}, samples, task, store)
        left_float = _handle_unseen(model, recipe.on_unseen)
        if recipe.search:
            _refuse_uncalled(blocks, store)
        refit = recipe.policy.mlp_refit
        model.weights_changed_by_calibration = refit or recipe.equalize > 0  # until both sides of a factor are changed
        _transform(model, blocks, store, recipe, seed)
        model.weights_changed_by_calibration = refit
        _take_observed_ranges(model)
        reports: list[BlockReport] = []
        if recipe.search is not None:
            weighed = {name: blocks[name] for name in _to_search(blocks, store) if recipe.needs_gradients(name)}
            if weighed:
                capture_gradients(model, weighed, samples, task, store, recipe.importance)
            model.weights_changed_by_calibration = recipe.changes_weights
            reports = _finish_blocks(model, blocks, samples, recipe, task, store, states, seed)
    return CalibrationReport(reports, left_float, time.perf_counter() - start)


def check_model(model: nn.Module, recipe: Recipe) -> None:
    """Find what makes the calibration of a quantized model impossible, without any data.

    Raises:
        BadInputError: a grid holds no factor that a format allows, a layer is part of two blocks, weights are of half
            precision, an earlier calibration has changed them, or an MLP that is to be refitted lies in no block.
    """
    _check_weights(model)
    _check_grids(model, recipe.search)
    blocks = partition(model)
    inside = [activation for block in blocks.values() for *_, activation in replaceable_mlps(block)]
    outside = [name for name, _, activation in replaceable_mlps(model) if activation not in inside]
    if outside:
        raise BadInputError(
            f"quant.mlp_refit: {listed(outside)} lie in no block of calibration, whose outputs they could be refitted "
            f"to; quantize this model without it"
        )


def _check_weights(model: nn.Module) -> None:
    if getattr(model, "weights_changed_by_calibration", False):
        raise BadInputError(
            "an earlier calibration of this model, finished, broken off, or of the quantized checkpoint that it has "
            "loaded, has changed its weights: build the model and load its float weights again"
        )
    refuse_half_precision(quantized_layers(model))


def _check_grids(model: nn.Module, search: SearchConfig | None) -> None:
    if search is None:
        return
    for name, layer in quantized_layers(model):
        for role, quantizer in layer.quantizers.items():
            if not search.candidates(layer.kind, role, quantizer):
                key = role if role in search.grids else layer.kind
                raise BadInputError(
                    f"quant.search.grids.{key} {search.grids[key]} holds no range factor of at least "
                    f"{quantizer.min_factor}, which the format of {name} ({role}) asks for"
                )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which all of a model's modules are in eval mode; each is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Context whose exceptions leave no quantizer that counts as calibrated."""
    try:
        yield
    except BaseException:
        for quantizer in quantizers_of(model):
            quantizer.reset()
        raise


@contextmanager
def _named(block: str) -> Iterator[None]:
    """Context whose errors say which block they are about; they name layers by their place inside of it."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"block {block!r}: {error}") from error


def float_pass(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    samples: Sequence[Any],
    task: CalibrationTask,
    store: CaptureStore,
) -> None:
    """Observe every activation range; record every block call and the teacher's outputs of each sample."""
    inputs = [q for _, layer in quantized_layers(model) for role, q in layer.quantizers.items() if role != "weight"]
    for image in tqdm(own_images(len(samples)), desc="float pass", unit="image", disable=not is_main_process()):

        def see(name: str, args: tuple, kwargs: dict, output: Any, image: int = image) -> None:
            store.add_call(name, image, args, kwargs, output)

        observing = quantizer_mode(inputs, QuantizerMode.OBSERVE)
        with float_only(model), observing, watch_blocks(blocks, see):
            teacher = task.teacher(model, samples[image])
        for quantizer in inputs:
            quantizer.observer.end_image()
        if blocks:
            store.put(("teacher", image), teacher)
        release_freed()
    for _, layer in quantized_layers(model):
        if "weight" in layer.quantizers:
            quantizer = layer.quantizers["weight"]
            quantizer.use_observer("minmax")  # weights are known, not sampled
            quantizer.observe(layer.weight)
    share_observed(inputs)


def _transform(model: nn.Module, blocks: dict[str, nn.Module], store: CaptureStore, recipe: Recipe, seed: int) -> None:
    """Refit MLPs, make the channels of every block more even, and find their centers.

    But for the refit, blocks keep their float function.
    """
    shared, strength = _shared_parameters(model), recipe.equalize
    for name in tqdm(store.order(), desc="transform", unit="block", disable=not is_main_process()):
        block = blocks[name]
        even = strength > 0 and bool(rescalings_of(block))
        centered = bool(centered_layers(block))
        refitted = bool(replaceable_mlps(block))
        if even or centered or refitted:
            calls, module = UnitCalls(store, (name, "whole")), unit_module(block)
            for call in store.inputs(name):
                calls.add(to_units(block, call))
            with _named(name):
                if refitted:
                    refit_mlps(block, module, calls, seed)
                if even:
                    equalize(block, module, calls, strength, shared)
                if centered:
                    center_inputs(block, module, calls, strength, recipe.compensation is not None)
            calls.drop()


def _shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that stand at several places of a model."""
    parts = (part for module in model.modules() for part in module._modules.values() if part is not None)
    places = Counter(parameter for part in parts for parameter in part._parameters.values() if parameter is not None)
    return {parameter for parameter, number in places.items() if number > 1}


def _handle_unseen(model: nn.Module, on_unseen: str) -> list[str]:
    """Refuse or leave float the layers whose activation quantizers saw no data; returns the names of the latter."""
    unseen = [
        (name, role)
        for name, layer in quantized_layers(model)
        for role, quantizer in layer.quantizers.items()
        if role != "weight" and quantizer.observed is None
    ]
    if unseen and on_unseen == "error":
        layers = listed([f"{name} ({role})" for name, role in unseen])
        raise CalibrationError(
            f"no calibration data reached {layers}. Use other or more calibration images, or set "
            f"quant.on_unseen='float' to leave such layers in float"
        )
    names = list(dict.fromkeys(name for name, _ in unseen))
    leave_float(model, names)
    return names


def _refuse_uncalled(blocks: dict[str, nn.Module], store: CaptureStore) -> None:
    called = store.order()
    for name, block in blocks.items():
        inputs = [q for _, layer in quantized_layers(block) for role, q in layer.quantizers.items() if role != "weight"]
        if name not in called and any(quantizer.observed is not None for quantizer in inputs):
            raise CalibrationError(
                f"layers of block {name!r} ran, but the block was never called: what uses its layers without it, or "
                f"calls another of its methods, cannot be calibrated. Leave them float with an override"
            )


def _to_search(blocks: dict[str, nn.Module], store: CaptureStore) -> list[str]:
    """The blocks that ran, in order; one may have been left float."""
    return [name for name in store.order() if quantizers_of(blocks[name])]


def _take_observed_ranges(model: nn.Module) -> None:
    for name, layer in quantized_layers(model):
        for role, quantizer in layer.quantizers.items():
            try:
                quantizer.set_range_factor(1.0)
            except CalibrationError as error:
                raise CalibrationError(f"{name} ({role}): {error}") from error


def _finish_blocks(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    samples: Sequence[Any],
    recipe: Recipe,
    task: CalibrationTask,
    store: CaptureStore,
    states: BlockStates | None,
    seed: int,
) -> list[BlockReport]:
    search = recipe.search
    order = _to_search(blocks, store)
    inputs = QuantizedInputs(model, blocks, samples, task, store) if search.block_input == "quantized" else None
    reports = []
    with SearchBar({name: _steps(blocks[name], recipe) for name in order}, is_main_process()) as bar:
        for position, name in enumerate(order):
            start = time.perf_counter()
            bar.begin(name)
            if inputs is not None:
                inputs.capture(name)
            kept = gather(states.load(name) if states is not None else None)[0]
            if kept is not None:
                _load_state(blocks[name], kept["state"])
                store.drop_calls(name, keep_inputs=inputs is not None)
                reports.append(BlockReport(name, **kept["report"], resumed=True))
                bar.skip()
            else:
                with _named(name):
                    done = _finish_one(blocks[name], name, store, recipe, bar, seed + position)
                done["seconds"] = time.perf_counter() - start
                if states is not None:
                    states.save(name, {"state": _state_of(blocks[name], recipe.changes_weights), "report": done})
                reports.append(BlockReport(name, **done, resumed=False))
            if inputs is not None:
                inputs.finish(name)
            release_freed()
            bar.finish()
    return reports


def _steps(block: nn.Module, recipe: Recipe) -> int:
    """What a block counts on the progress bar."""
    module = unit_module(block)
    stages = (stage for stage in recipe.reconstruction if worth_reconstructing(module, stage))
    learning = sum(steps_of(stage.iterations) for stage in stages)
    compensation = _compensated(module) if recipe.compensation is not None else 0
    return recipe.search.rounds * len(quantizers_of(block)) + compensation + learning


def _compensated(module: nn.Module) -> int:
    return sum(is_compensated(layer) for _, layer in quantized_layers(module))


def _finish_one(
    block: nn.Module, name: str, store: CaptureStore, recipe: Recipe, progress: Progress, seed: int
) -> dict[str, Any]:
    """Everything that a recipe does to one block; what its report says of it."""
    calls, module, search = UnitCalls(store, name), unit_module(block), recipe.search
    for call in store.take_calls(name, keep_inputs=search.block_input == "quantized"):
        calls.add(sampled_units(block, call, search, seed))
    if not sum(gather(len(calls))):
        raise CalibrationError("every calibration image gave it an empty input")
    factors = search_block(module, calls, search.for_block(name), progress)
    if recipe.compensation is not None:
        progress.stage("compensation", _compensated(module))
        compensate(module, calls, recipe.compensation)
    reconstructions = []
    for number, stage in enumerate(recipe.reconstruction):
        if worth_reconstructing(module, stage):
            progress.stage("reconstruction", steps_of(stage.iterations))
            told = partial(progress.left, what="iterations")
            reconstructions.append(reconstruct(module, calls, stage, seed + number, told))
    fit_output_compensation(block, module, calls)
    calls.drop()
    return {"factors": factors, "reconstructions": reconstructions}


def _state_of(block: nn.Module, whole: bool) -> dict[str, Tensor]:
    state = {key: value for key, value in block.state_dict().items() if isinstance(value, Tensor)}
    return {key: value.cpu().clone() for key, value in state.items() if whole or "quantizers." in key}


def _load_state(block: nn.Module, state: dict[str, Tensor]) -> None:
    own = {key: value for key, value in block.state_dict().items() if "quantizers." in key}
    kept = {key: value for key, value in state.items() if "quantizers." in key}
    if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in kept.items()}:
        raise CalibrationError("the kept state of a block does not fit the model: start again without --resume")
    if len(kept) == len(state):  # not by a loader, which asks a quantized model for all of its state
        for key, value in own.items():
            value.copy_(state[key])
    else:
        block.load_state_dict(state, strict=False)
