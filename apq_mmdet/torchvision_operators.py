"""Makes torchvision importable beside a CPU build of torch.

PyPI has torchvision for Linux built against CUDA only. Beside a CPU build of torch its compiled operators do not load,
and ``import torchvision`` then fails, because its Python part registers kernels of two operators that nobody declared.
That stops timm, and also mmengine's Runner, which imports torchvision for its log and is prepared only for its absence.
"""

import torch

MISSING = "operator torchvision::nms does not exist"
_declared: list[torch.library.Library] = []  # operators live as long as their library


def declare_missing_operators() -> None:
    """Declare the operators of a torchvision that fails to import for lack of them; they get no kernels.

    torchvision's own functions still say, when called, that the operators could not be loaded. Beside a build of torch
    for GPUs nothing is done: there, a torchvision that does not load is one that does not match.
    """
    if torch.version.cuda or torch.version.hip:
        return
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # whatever else is wrong with it is for those to see who need it
        if MISSING in str(error):
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)
