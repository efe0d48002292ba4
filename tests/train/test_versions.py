"""Other releases of NVIDIA's libraries are refused in one line before anything of them is imported."""

import pytest

from nemotron_sft.errors import UserError
from nemotron_sft.train import versions

FITS = {"megatron-bridge": "0.6.1", "megatron-core": "0.19.1", "transformer-engine": "2.16.0+71bbefb"}


@pytest.mark.parametrize(
    ("installed", "on_gpu", "said"),
    [
        ({}, True, None),
        ({"transformer-engine": None}, False, None),
        ({"megatron-bridge": "0.6.2", "megatron-core": "0.19.2", "transformer-engine": "2.20.2"}, True, None),
        ({"megatron-bridge": "0.4.0"}, False, r"^Megatron-Bridge 0\.4\.0: needed are Megatron-Bridge 0\.6\.x, "),
        ({"megatron-core": "0.18.0"}, False, r"^Megatron-Core 0\.18\.0: .*Megatron-Core 0\.19\.x"),
        ({"transformer-engine": "2.14+71bbefb"}, True, r"^Transformer Engine 2\.14\+71bbefb: .* 2\.16 or later"),
        ({"transformer-engine": None}, True, r"^Transformer Engine is not installed: "),
        ({"megatron-bridge": "0.60.0"}, False, r"^Megatron-Bridge 0\.60\.0: "),
    ],
)
def test_versions(monkeypatch, installed, on_gpu, said):
    found = FITS | installed

    def version(name):
        if found.get(name) is None:
            raise versions.importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions.importlib.metadata, "version", version)
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda module: None)
    if said is None:
        return versions.check_versions(on_gpu)
    with pytest.raises(UserError, match=said) as refused:
        versions.check_versions(on_gpu)
    assert "\n" not in str(refused.value)


def test_a_checkout_on_the_path_has_no_version_to_complain_of(monkeypatch):
    def version(name):
        raise versions.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.importlib.metadata, "version", version)
    versions.check_versions(on_gpu=False)


def test_the_installed_ones_fit():
    versions.check_versions(on_gpu=False)
