import mmcv
import mmdet
import pytest
import torch

from apq_mmdet import versions


@pytest.mark.parametrize("version", ["3.3.0", "3.2.0", "3.3.0+cu118", "3.3.0rc1"])
def test_fitting_versions(monkeypatch, version):
    monkeypatch.setattr(mmdet, "__version__", version)
    versions.check_versions()


def test_later_versions_of_the_maintained_forks_fit(monkeypatch):
    monkeypatch.setattr(mmcv, "__version__", "2.3.6")
    versions.check_versions()


@pytest.mark.parametrize("version", ["2.28.2", "3.1.0"])  # 3.1 has no DDQ
def test_a_version_that_does_not_fit_is_named(monkeypatch, version):
    monkeypatch.setattr(mmdet, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs mmdet >=3\.2\.0,<4\.0\.0; mmdet {version} is imported"):
        versions.check_versions()


def test_a_missing_module_is_named(monkeypatch):
    monkeypatch.setitem(versions.SUPPORTED, "no_such_module", ("1.0", "2.0"))
    with pytest.raises(ImportError, match="needs no_such_module"):
        versions.check_versions()


def test_imported_versions():
    assert versions.imported_versions()["torch"] == torch.__version__
