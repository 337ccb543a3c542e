"""What is done with residuals, and steps added to lists of weights, on the host, to the bit."""

import math

import host_kernels
import pytest
import torch

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (1, 7, 5), (3, 2, 131), (2, 140, 3), (2, 1, 300)]
BLOCKS = 1 << 20


def operands(shape, dtype, gap=0):
    """A stack, a list's memory with NaN between its rows, and a factor for every matrix."""
    g = torch.Generator().manual_seed(sum(shape))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    stack = torch.randn(shape, dtype=wide, generator=g)
    memory = torch.full((*shape[:-1], shape[-1] + gap), math.nan, dtype=dtype)
    memory[..., : shape[-1]] = torch.randn(shape, dtype=wide, generator=g).to(dtype)
    return stack, memory, 0.5 + torch.arange(shape[0], dtype=torch.float64)


def call(name, stack, memory, factors, blocks=BLOCKS, *more):
    whole = [DTYPES.index(memory.dtype), *stack.shape, memory.shape[-1], blocks, *more]
    host_kernels.call(name, whole, [], [stack, memory, factors])


@pytest.mark.parametrize("blocks", [1, BLOCKS])
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_signs_of_differences(shape, dtype, gap, blocks):
    """Guards against an entry left out or met twice, another matrix's factor, and what lies between rows."""
    stack, memory, factors = operands(shape, dtype, gap)
    given = memory[..., : shape[-1]].to(stack.dtype)
    stack.view(-1)[::5] = given.reshape(-1)[::5]  # of equal ones 0
    expected = factors.view(-1, 1, 1).to(stack.dtype) * (given - stack).sign()
    before = memory.clone()
    call("signs_of_difference", stack, memory, factors, blocks)
    assert torch.equal(stack, expected)
    assert torch.equal(memory.nan_to_num(9), before.nan_to_num(9))


def test_signs_of_no_numbers():
    """Guards against NaN that comes through: where nothing is known, no step; and infinities have a sign."""
    inf, nan = math.inf, math.nan
    memory = torch.tensor([[[nan, 1.0, nan, inf, inf, -inf, inf]]])
    stack = torch.tensor([[[1.0, nan, nan, inf, 1.0, 1.0, -inf]]])
    call("signs_of_difference", stack, memory, torch.tensor([3.0], dtype=torch.float64))
    assert stack.view(-1).tolist() == [0, 0, 0, 0, 3, -3, 3]


@pytest.mark.parametrize("blocks", [1, BLOCKS])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaled_rows_and_columns(shape, dtype, dim, blocks):
    """Guards against the scale of another row, column or matrix, an entry left out, and NaN times 0."""
    stack, memory, _ = operands(shape, dtype, 3)
    scales = torch.arange(1, 1 + shape[0] * shape[1 + dim], dtype=stack.dtype).view(shape[0], -1)
    scales[0, 0] = 0
    scale = scales.unsqueeze(2 - dim)
    given = memory[..., : shape[-1]].to(stack.dtype)
    expected = stack + scale * given
    memory[..., : shape[-1]].masked_fill_(scale.expand_as(given) == 0, math.nan)
    call("add_scaled", stack, memory, scales, blocks, dim)
    assert torch.equal(stack, expected)


@pytest.mark.parametrize("blocks", [1, BLOCKS])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squares_of_rows_and_columns(shape, dtype, dim, blocks):
    """Guards against an entry left out or met twice, and sums that are not added to what is there."""
    stack, memory, _ = operands(shape, dtype, 3)
    sums = torch.ones(shape[0], shape[2 - dim], dtype=torch.float64)
    expected = 1 + memory[..., : shape[-1]].double().square().sum(1 + dim)
    call("add_squares", stack, memory, sums, blocks, dim)
    torch.testing.assert_close(sums, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("blocks", [1, BLOCKS])
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_rounded_once(shape, dtype, gap, blocks):
    """Guards against a sum in half precision, an entry left out, and writing between rows."""
    stack, memory, factors = operands(shape, dtype, gap)
    beta = factors.view(-1, 1, 1).to(stack.dtype)
    expected = (beta * memory[..., : shape[-1]].to(stack.dtype) + stack).to(dtype)
    before = stack.clone()
    call("add_stack", stack, memory, factors, blocks)
    assert torch.equal(memory[..., : shape[-1]], expected)
    assert memory[..., shape[-1] :].isnan().all()
    assert torch.equal(stack, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_left_alone(dtype):
    """Guards against a weight that a factor of 1 and a step of 0 change."""
    stack, memory, _ = operands((1, 5, 9), dtype)
    before = memory.clone()
    call("add_stack", torch.zeros_like(stack), memory, torch.ones(1, dtype=torch.float64))
    assert torch.equal(memory, before)
