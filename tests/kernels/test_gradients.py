"""What callers do with gradients, for every operator: PyTorch's own operation is the judge.

Autograd keeps what an operator returns as `.grad` and adds to it in place, so gradients that share memory are wrong
after a second backward pass, or after clipping. `torch.autograd.grad` cannot see that.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.kernels import reference
from fastdeit.kernels.attention import attention
from fastdeit.kernels.bias_gelu import bias_gelu
from fastdeit.kernels.distillation_loss import distillation_loss
from fastdeit.kernels.layer_norm import add_layer_norm, layer_norm
from fastdeit.kernels.reference import Kept
from fastdeit.kernels.token_assembly import assemble_tokens, embed_patches

pytestmark = pytest.mark.usefixtures("poisoned")

B, N, C = 3, 7, 32


class Op(NamedTuple):
    """An operator, PyTorch's equivalent, and the shapes of their arguments."""

    ours: Callable[..., tuple[Tensor, ...]]
    judge: Callable[..., tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]


def _by_sdpa(qkv: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2),)


def _by_cat(patches: Tensor, pos_embed: Tensor, bias: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat([*(token.expand(B, -1, -1) for token in tokens), patches + bias], 1) + pos_embed,)


def _factors(x: Tensor) -> Tensor:
    return torch.tensor([0.0, 1.25, 2.0], device=x.device)


def _kept(x: Tensor) -> Kept:
    return Kept(_factors(x), torch.tensor([-1, 0, 1], dtype=torch.int32, device=x.device), 2)


def _by_add(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    total = x + branch * _factors(x).view(-1, 1, 1)
    return total, F.layer_norm(total, (C,), weight, bias, 1e-6)


def _labels(logits: Tensor) -> tuple[Tensor, Tensor]:
    targets = torch.linspace(-2, 2, logits.numel(), device=logits.device).view_as(logits).softmax(1)
    return targets, torch.arange(B, device=logits.device)


def _loss(cls: Tensor, dist: Tensor) -> tuple[Tensor, ...]:
    return tuple(distillation_loss(cls, dist, *_labels(cls)))


def _by_cross_entropy(cls: Tensor, dist: Tensor) -> tuple[Tensor, ...]:
    targets, taught = _labels(cls)
    base, distill = F.cross_entropy(cls, targets), F.cross_entropy(dist, taught)
    return (base + distill) / 2, base, distill


OPS = {
    "attention": Op(lambda qkv: (attention(qkv),), _by_sdpa, ((B, N, 3, 2, 16),)),
    "assemble_tokens": Op(
        lambda x, p, b, c, d: (assemble_tokens(x, c, d, p, b),),
        _by_cat,
        ((B, N, C), (1, N + 2, C), (C,), (1, 1, C), (1, 1, C)),
    ),
    "assemble_tokens, no dist_token": Op(
        lambda x, p, b, c: (assemble_tokens(x, c, None, p, b),), _by_cat, ((B, N, C), (1, N + 1, C), (C,), (1, 1, C))
    ),
    "embed_patches": Op(
        lambda x, w, p, b, c, d: (embed_patches(x, w, b, c, d, p),),
        lambda x, w, p, b, c, d: _by_cat(x @ w.flatten(1).T, p, b, c, d),
        ((B, N, 12), (C, 3, 2, 2), (1, N + 2, C), (C,), (1, 1, C), (1, 1, C)),
    ),
    "layer_norm": Op(
        lambda x, w, b: (layer_norm(x, w, b),),
        lambda x, w, b: (F.layer_norm(x, (C,), w, b, 1e-6),),
        ((B, N, C), (C,), (C,)),
    ),
    "layer_norm of the first tokens": Op(
        lambda x, w, b: (layer_norm(x[:, :2], w, b),),
        lambda x, w, b: (F.layer_norm(x[:, :2], (C,), w, b, 1e-6),),
        ((B, N, C), (C,), (C,)),
    ),
    "add_layer_norm": Op(
        lambda x, y, w, b: add_layer_norm(x, y, w, b, mask=_factors(x)), _by_add, ((B, N, C), (B, N, C), (C,), (C,))
    ),
    "add_layer_norm of kept samples": Op(
        lambda x, y, w, b: add_layer_norm(x, y, w, b, mask=_kept(x), only=_kept(x)),
        lambda x, y, w, b: reference.add_layer_norm(x, y, w, b, mask=_kept(x), only=_kept(x)),
        ((B, N, C), (2, N, C), (C,), (C,)),
    ),
    "bias_gelu": Op(lambda x, b: (bias_gelu(x, b),), lambda x, b: (F.gelu(x + b),), ((B, N, C), (C,))),
    "distillation_loss": Op(_loss, _by_cross_entropy, ((B, 11), (B, 11))),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def draw(op: Op, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in op.shapes]


def loss_of(results: tuple[Tensor, ...]) -> Tensor:
    """A scalar that every element of every result enters with a weight of its own."""
    weights = [torch.linspace(-1, 1, r.numel(), device=r.device).view_as(r) + 0.5 for r in results]
    return torch.stack([(r * w).sum() for r, w in zip(results, weights, strict=True)]).sum()


def both(op: Op, device: torch.device, use: Callable[[Callable[..., tuple[Tensor, ...]], list[Tensor]], object]):
    """Let `use` do the same with our operator and with PyTorch's, on arguments of their own; then compare `.grad`."""
    ours, judge = draw(op, device), draw(op, device)
    use(op.ours, ours)
    use(op.judge, judge)
    for place, (mine, right) in enumerate(zip(ours, judge, strict=True)):
        assert (mine.grad is None) == (right.grad is None), f"argument {place}"
        if right.grad is not None:
            torch.testing.assert_close(mine.grad, right.grad, rtol=1e-4, atol=2e-5, msg=lambda m, p=place: f"{p}: {m}")


def test_no_two_gradients_share_memory(op, device):
    arguments = draw(op, device)
    loss_of(op.ours(*arguments)).backward()
    for place, argument in enumerate(arguments):
        argument.grad.fill_(place)
    for place, argument in enumerate(arguments):
        assert (argument.grad == place).all(), f"the gradient of argument {place} changed with another"


def backward(function, arguments, passes=2):
    for _ in range(passes):
        loss_of(function(*arguments)).backward()


@pytest.mark.slow
@pytest.mark.parametrize("passes", [2, 3])
def test_backward_passes_add_up(op, device, passes):
    both(op, device, lambda function, arguments: backward(function, arguments, passes))


def backward_twice(function, arguments):
    loss = loss_of(function(*arguments))
    loss.backward(retain_graph=True)
    loss.backward()


def test_one_graph_backward_twice(op, device):
    both(op, device, backward_twice)


def test_clipping_after_two_passes(op, device):
    def use(function, arguments):
        backward(function, arguments)
        torch.nn.utils.clip_grad_norm_(arguments, 0.5)

    both(op, device, use)


@pytest.mark.slow
def test_unscaling(op, device):
    def use(function, arguments):
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
        optimizer = torch.optim.SGD(arguments, lr=0.0)
        for _ in range(2):
            scaler.scale(loss_of(function(*arguments))).backward()
        scaler.unscale_(optimizer)

    both(op, device, use)


def test_hooks_on_gradients(op, device):
    """One that replaces its gradient, one that changes it in place, one that clears it once it is added."""

    def forget(leaf):
        leaf.grad.zero_()

    def use(function, arguments):
        arguments[0].register_hook(lambda grad: 3 * grad)
        for argument in arguments[1:]:
            argument.register_hook(lambda grad: grad.mul_(2))
        arguments[-1].register_post_accumulate_grad_hook(forget)
        backward(function, arguments)

    both(op, device, use)


@pytest.mark.slow
def test_frozen_arguments(op, device):
    count = len(op.shapes)
    for frozen in itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in range(1, count)):

        def use(function, arguments, frozen=frozen):
            for place in frozen:
                arguments[place].requires_grad_(False)
            backward_twice(function, arguments)

        both(op, device, use)


def test_tied_arguments(op, device):
    """The same tensor for two arguments, wherever two have the same shape."""
    for first, second in itertools.combinations(range(len(op.shapes)), 2):
        if op.shapes[first] != op.shapes[second]:
            continue

        def use(function, arguments, first=first, second=second):
            arguments[second] = arguments[first]
            backward(function, arguments)

        both(op, device, use)


def test_gradients_of_a_sum_over_two_calls(op, device):
    def use(function, arguments):
        (loss_of(function(*arguments)) + loss_of(function(*arguments))).backward()

    both(op, device, use)


def test_results_share_no_memory_with_each_other_or_the_arguments(op, device):
    arguments = draw(op, device)
    results = [r.detach() for r in op.ours(*arguments)]
    before = [a.detach().clone() for a in arguments]
    for place, result in enumerate(results):
        result.fill_(place)
    assert all((r == place).all() for place, r in enumerate(results))
    assert all(torch.equal(a.detach(), b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("what", ["results", "arguments"])
def test_changes_in_place_between_the_passes(op, device, what):
    """After the caller changes a result or an argument, gradients are PyTorch's or autograd refuses; never others."""

    def gradients(function, arguments, place):
        leaves = [argument.detach().requires_grad_() for argument in arguments]
        inner = [leaf * 1 for leaf in leaves]
        results = function(*inner)
        loss = loss_of(results)
        with torch.no_grad():
            changed = (results if what == "results" else inner)[place]
            changed.mul_(-3).add_(1)
        return torch.autograd.grad(loss, leaves, retain_graph=True)

    untouched = draw(op, device)
    right = torch.autograd.grad(loss_of(op.judge(*untouched)), untouched)
    count = len(op.ours(*untouched)) if what == "results" else len(untouched)
    for place in range(count):
        try:
            found = gradients(op.ours, draw(op, device), place)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            continue
        for mine, wanted in zip(found, right, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=2e-5)
