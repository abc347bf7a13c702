import os
from collections.abc import Callable, Iterator
from typing import Any

# read once, when huggingface_hub is imported: no test waits for a network
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast.model.from_timm import from_timm
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ModelInfo

NAMES = ("ant", "bee", "cow", "dog", "elk")


def build_vit(**options: Any) -> VisionTransformer:
    """A tiny timm ViT whose every parameter matters: 24 x 32 pixels, patch 8, 12 patches, 5 classes."""
    settings = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        vit = VisionTransformer(**(settings | options)).eval()
        for parameter in vit.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.4
            parameter.add_(torch.randn_like(parameter) * spread)
    return vit


@pytest.fixture(scope="session")
def tiny_vit() -> VisionTransformer:
    """In float64."""
    return build_vit().double()


@pytest.fixture
def make_model() -> Callable[..., SparseViT]:
    """`SparseViT` of `build_vit`, in a dtype."""

    def make(dtype: torch.dtype = torch.float64, **options: Any) -> SparseViT:
        info = ModelInfo("tiny", "0" * 64, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), NAMES)
        return from_timm(build_vit(**options).double(), info).with_dtype(dtype)

    return make


@pytest.fixture
def model(make_model: Callable[..., SparseViT]) -> SparseViT:
    """`SparseViT` of `build_vit` in float32."""
    return make_model(torch.float32)


@pytest.fixture
def pixels() -> Tensor:
    """Six images for it."""
    return torch.randn(6, 3, 24, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session", autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the caches of whoever runs the tests, and nothing is left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that a second thread gains nothing, and is waited for where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
