"""PyTorch's attention with a fixed backend; otherwise PyTorch picks one by its version and the shape."""

from __future__ import annotations

from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class _Attention(Attention):
    backend: SDPBackend

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        # Set in the forward pass, where torch.compile sees it. The backward pass uses the same backend.
        with sdpa_kernel(self.backend):
            return super().forward(x, attn_mask, is_causal)


def use_backend(model: nn.Module, name: str) -> None:
    """Make all plain timm attention in `model` use the backend `name` from `BACKENDS`, in place.

    A shape that the backend does not support raises RuntimeError in the forward pass.
    """
    for module in model.modules():
        if type(module) is Attention:
            module.__class__ = _Attention
            module.backend = BACKENDS[name]  # pyright: ignore[reportArgumentType]
