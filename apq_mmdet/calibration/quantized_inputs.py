"""Block inputs as the quantized blocks before give them: one replay of the model in total, however many blocks."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from apq_mmdet.calibration.blocks import SeenEnough
from apq_mmdet.calibration.distributed import own_images
from apq_mmdet.calibration.importance import CalibrationTask
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.errors import CalibrationError


class QuantizedInputs:
    """Runs each block once per image; what comes between blocks (norms, reshapes) is run again for each block.

    Blocks that are finished hand out their stored quantized outputs instead of running again.

    Args:
        model, samples, task: as for ``calibrate``.
        blocks: all blocks by name.
        store: holds the teacher's outputs and the blocks' inputs, and takes their quantized outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[str, nn.Module],
        samples: Sequence[Any],
        task: CalibrationTask,
        store: CaptureStore,
    ) -> None:
        self._model, self._blocks, self._samples, self._task, self._store = model, blocks, samples, task, store
        self._finished: list[str] = []

    def capture(self, name: str) -> None:
        """Exchange the stored float inputs of a block, all blocks before which are finished.

        Raises:
            CalibrationError: a block does not run as often as in the float pass.
        """
        for image in own_images(len(self._samples)):
            number = self._store.number_of_calls(name, image)
            calls = iter(range(number))

            def see(_: nn.Module, args: tuple, kwargs: dict, image: int = image, calls: Iterator[int] = calls) -> None:
                index = next(calls)
                self._store.replace_input(name, image, index, args, kwargs)  # now: it may change before the next call
                if index + 1 == self._store.number_of_calls(name, image):
                    raise SeenEnough

            if not number:
                continue
            hook = self._blocks[name].register_forward_pre_hook(see, with_kwargs=True)
            with hook, self._replayed(image), contextlib.suppress(SeenEnough):
                self._task.student(self._model, self._samples[image], self._store.get(("teacher", image))[1])
            left = len(list(calls))
            if left:
                raise _other_number(name, image, number, str(number - left))

    def finish(self, name: str) -> None:
        """Run a block, now quantized, on its stored inputs and keep its outputs."""
        for image in own_images(len(self._samples)):
            for index in range(self._store.number_of_calls(name, image)):
                args, kwargs = self._store.get((name, image, index, "input"))
                # without the block's hooks, which act on what is replayed
                output = self._blocks[name].forward(*args, **kwargs)
                self._store.put((name, image, index, "quantized"), output)
                self._store.drop((name, image, index, "input"))
        self._finished.append(name)

    @contextlib.contextmanager
    def _replayed(self, image: int) -> Iterator[None]:
        own = {name: vars(self._blocks[name]).get("forward") for name in self._finished}  # which a user may have set
        for name in self._finished:
            vars(self._blocks[name])["forward"] = self._replay(name, image)
        try:
            yield
        finally:
            for name, forward in own.items():
                del vars(self._blocks[name])["forward"]
                if forward is not None:
                    vars(self._blocks[name])["forward"] = forward

    def _replay(self, name: str, image: int) -> Any:
        number = self._store.number_of_calls(name, image)
        calls = iter(range(number))

        def forward(*_: Any, **__: Any) -> Any:
            index = next(calls, None)
            if index is None:
                raise _other_number(name, image, number, "more")
            output = self._store.get((name, image, index, "quantized"))
            return tree_map_only(Tensor, torch.clone, output)  # what follows may modify it in place

        return forward


def _other_number(name: str, image: int, before: int, now: str) -> CalibrationError:
    return CalibrationError(
        f"block {name!r} ran {before} times in the float pass of image {image}, but {now} times behind quantized "
        f"blocks: there is no float output for each of its calls. Use a recipe with search.block_input='float', or "
        f"leave the block float with an override"
    )
