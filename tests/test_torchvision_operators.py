import pytest
import torch
from mmengine.utils.dl_utils import collect_env

import apq_mmdet  # noqa: F401  (declares what is missing)


@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="a build of torch for GPUs")
def test_torchvision_imports_beside_a_cpu_build():
    torchvision = pytest.importorskip("torchvision")
    assert collect_env()["TorchVision"] == torchvision.__version__  # as mmengine's Runner does
    if not torchvision.extension._has_ops():
        with pytest.raises(RuntimeError, match="Couldn't load custom C\\+\\+ ops"):
            torchvision.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)
