"""checks.py: what the properties of all sets need: comparisons that complain in plain words."""

import inspect

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensor(*numbers):
    """A float64 tensor of numbers or of lists of them."""
    return torch.tensor(numbers, dtype=torch.float64)


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


def normal(*shape, seed=0):
    """A float64 tensor of normal numbers, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def say(numbers):
    """A small tensor as one reads it."""
    short = [f"{x:.4g}" for x in numbers.detach().double().flatten()[:8].tolist()]
    return f"[{', '.join(short)}{', ...' if numbers.numel() > 8 else ''}]"


def close(got, want, why="", tol=1e-5):
    """AssertionError unless got is a tensor with the shape and the numbers of want."""
    assert isinstance(got, torch.Tensor), f"it gives back {type(got).__name__}, not a tensor"
    want = torch.as_tensor(want, dtype=torch.float64)
    shapes = f"it gives back shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.shape == want.shape, shapes
    got = got.detach().double()
    # the first of the two: inf equals inf, but inf - inf is nan
    near = (got - want).abs() <= tol * (1 + want.abs())
    same = (got == want) | (near & want.isfinite())
    told = f"it is {say(got)}, and should be {say(want)}"
    assert same.all(), f"{why}: {told}" if why else told


def parts(got, n):
    """The n tensors of a tuple. AssertionError for anything else."""
    what = type(got).__name__
    if isinstance(got, (tuple, list)):
        what = f"{len(got)} things"
        if len(got) == n and all(isinstance(x, torch.Tensor) for x in got):
            return got
    raise AssertionError(f"it gives back {what}, not a tuple of {n} tensors")


def gradient(loss, x):
    """d loss.sum() / dx. AssertionError if x has no part in the loss."""
    assert loss.requires_grad, "no gradient reaches the argument: is something detached?"
    (g,) = torch.autograd.grad(loss.sum(), x, allow_unused=True)
    return torch.zeros_like(x) if g is None else g


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made inside of the `with`; bytes are none."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.dtype != torch.uint8:
                self.numbers = max(self.numbers, x.numel())
        return made


def guarded(function, writes=()):
    """The function, with an AssertionError where it changes an argument that is not its to change.

    writes: the numbers of those that are.
    """

    def call(*args, **kwargs):
        leaves = [(i, x) for i, given in enumerate(args) for x in tree_leaves(given)]
        kept = [(i, x.detach()) for i, x in leaves if isinstance(x, torch.Tensor)]
        before = [x.clone() for _, x in kept]
        result = function(*args, **kwargs)
        for old, (i, new) in zip(before, kept, strict=True):
            same = torch.equal(old.nan_to_num(), new.nan_to_num())
            assert i in writes or same, changed(i)
        return result

    def changed(i):
        names = list(inspect.signature(function).parameters)
        x = names[i]
        told = f"`{x}` was changed: make a new tensor, as `{x} + 1` is and `{x} += 1` is not"
        if not writes:
            return told
        return f"{told} ({' and '.join(names[j] for j in writes)} are to be written in place)"

    return call
