"""Functions that are registered for classes of modules."""

from mmdet.models.backbones.swin import SwinBlock
from torch import nn

from apq_mmdet.calibration.units import VIEWS
from apq_mmdet.registry import ByClass


class Deeper(nn.Linear):
    pass


class Deepest(Deeper):
    pass


def test_a_class_has_what_its_nearest_registered_ancestor_has():
    found = ByClass()
    found.register(nn.Linear, nn.Conv2d)(lambda _: "linear or convolution")
    found.register(Deeper)(lambda _: "deeper")  # later, and yet nearer
    assert found.find(nn.Linear(1, 1))(None) == found.find(nn.Conv2d(1, 1, 1))(None) == "linear or convolution"
    assert found.find(Deeper(1, 1))(None) == found.find(Deepest(1, 1))(None) == "deeper"
    assert found.find(nn.ReLU()) is None


def test_the_decorated_function_stays_what_it_is():
    found = ByClass()

    @found.register(nn.Linear)
    def function(module):
        return module

    assert function(1) == 1
    assert found.find(nn.Linear(1, 1)) is function


def test_a_users_swin_block_may_have_a_view_of_its_own(monkeypatch):
    class Mine(SwinBlock):
        pass

    block = Mine(embed_dims=8, num_heads=1, feedforward_channels=8)
    assert VIEWS.find(block) is VIEWS[SwinBlock]
    monkeypatch.setitem(VIEWS, Mine, lambda block: None)
    assert VIEWS.find(block)(block) is None
