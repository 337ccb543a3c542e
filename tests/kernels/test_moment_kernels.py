"""The kernels over moments on the host: the bits of the element in torch, and of the CPU's codes."""

import math

import host_kernels
import pytest
import torch

from galore_rrf import ops

WIDE = [torch.float32, torch.float64]
KEPT = [torch.float32, torch.float64, torch.bfloat16, torch.uint8]
ENTRIES = [1, 255, 256, 257, 700]
BLOCKS = 1 << 20
OPTIONS = [0.9, 0.999, 1e-8, 0.1, 0.25]  # beta1, beta2, eps, weight decay, scale
SKIPPED, DECAYED, STEPPED, REFRESHED = range(4)


def normals(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def keep(wide, kept, is_signed):
    """A moment as it is kept, and its scale; as the CPU does it."""
    if kept == torch.uint8:
        return ops.quantize_moment(wide.float(), is_signed)
    return wide.to(kept), torch.empty(0)


def read(values, scale, wide, is_signed):
    if values.dtype == torch.uint8:
        return ops.dequantize_moment(values, scale, is_signed).to(wide)
    return values.to(wide)


def list_of(entries, kept, wide, is_signed, matrices=3):
    moments = []
    for b in range(matrices):
        x = normals(entries, seed=b, dtype=wide) * 10.0 ** (b - 1)
        moments.append(keep(x if is_signed else x.square(), kept, is_signed))
    return moments


def cloned(moments):
    return [(values.clone(), scale.clone()) for values, scale in moments]


def element(g, m, v, factors, options, maximize):
    """AdamElement in torch, an operation at a time, in the dtype of g."""
    beta1, beta2, eps = options[:3]
    root_scale, step_length = (torch.tensor(x, dtype=torch.float64).to(g.dtype) for x in factors[:2])
    g = -g if maximize else g
    m = m + torch.tensor(1 - beta1, dtype=g.dtype) * (g - m)
    v = torch.tensor(beta2, dtype=g.dtype) * v + torch.tensor(1 - beta2, dtype=g.dtype) * (g * g)
    root = torch.tensor([math.sqrt(x) for x in v.tolist()], dtype=g.dtype)  # torch's may be off by a bit
    return step_length * (m / (root * root_scale + torch.tensor(eps, dtype=g.dtype))), m, v


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("wide", WIDE, ids=str)
@pytest.mark.parametrize(
    ("entries", "blocks", "maximize"), [(n, BLOCKS, n == 255) for n in ENTRIES] + [(700, 1, False)]
)
def test_adam_is_the_element_between_reading_and_keeping(entries, blocks, maximize, wide, kept):
    """Guards against lost entries, another scale than the block's largest, moments that move where none may.

    Three matrices: stepped, left alone, refreshed.
    """
    gap = 3
    gradients = torch.full((3, entries + gap), 7.0, dtype=wide)
    gradients[:, :entries] = normals(3, entries, seed=9, dtype=wide)
    gradients[1, 0] = math.nan
    means, squares = (list_of(entries, kept, wide, is_signed) for is_signed in (True, False))
    factors = torch.tensor([[1.5, -0.01, 0.9], [1.0, 0.0, 1.0], [31.0, -1e-3, 1.0]], dtype=torch.float64)
    outcomes = torch.tensor([STEPPED, SKIPPED, REFRESHED], dtype=torch.uint8)

    expected_steps = torch.full_like(gradients, 7.0)
    expected = []
    for b in range(3):
        if outcomes[b] < STEPPED:
            expected_steps[b, :entries] = 0
            expected += [*means[b], *squares[b]]
            continue
        m, v = read(*means[b], wide, True), read(*squares[b], wide, False)
        step, m, v = element(gradients[b, :entries], m, v, factors[b].tolist(), OPTIONS, maximize)
        expected_steps[b, :entries] = step
        expected += [*keep(m, kept, True), *keep(v, kept, False)]

    tensors = [t for m, v in zip(cloned(means), cloned(squares), strict=True) for t in (*m, *v)]
    whole = [WIDE.index(wide), KEPT.index(kept), 3, entries, entries + gap, blocks, maximize, True, 0]
    host_kernels.call("adam", whole, OPTIONS, [gradients, factors, outcomes, *tensors])
    assert torch.equal(gradients, expected_steps)
    for found, right in zip(tensors, expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("wide", WIDE, ids=str)
@pytest.mark.parametrize(("entries", "blocks"), [(n, BLOCKS) for n in ENTRIES] + [(700, 1)])
def test_moments_are_read_and_kept_as_on_the_cpu(entries, blocks, wide, kept, is_signed):
    """Guards against a code, scale or rounding that differs from the CPU's, and writes where none may be."""
    moments = list_of(entries, kept, wide, is_signed)
    memory = torch.full((3, entries + 1), 7.0, dtype=wide)
    whole = [WIDE.index(wide), KEPT.index(kept), 3, entries, entries + 1, blocks, is_signed]
    tensors = [t for moment in cloned(moments) for t in moment]
    active = torch.tensor([1, 0, 1], dtype=torch.uint8)
    host_kernels.call("load_moments", whole, [], [memory, active, *tensors])
    for b in range(3):
        assert torch.equal(memory[b, :entries], read(*moments[b], wide, is_signed))
    assert (memory[:, entries] == 7).all()

    memory[:, :entries] = normals(3, entries, seed=5, dtype=wide).abs()
    if is_signed:
        memory[:, ::2] *= -1
    host_kernels.call("store_moments", whole, [], [memory, active, *tensors])
    for b in range(3):
        right = keep(memory[b, :entries].clone(), kept, is_signed) if active[b] else moments[b]
        assert torch.equal(tensors[2 * b], right[0])
        assert torch.equal(tensors[2 * b + 1], right[1])


@pytest.mark.parametrize("is_signed", [True, False])
def test_codes_of_extreme_blocks_are_those_of_the_cpu(is_signed):
    """Guards against a block of zeros that divides by 0, infinities that become NaN, NaN that is lost."""
    wide = torch.stack([torch.zeros(600), normals(600).abs(), normals(600).abs() * 1e-42])
    wide[1, 5], wide[1, 300] = math.inf, math.nan
    values, scales = torch.full((3, 600), 99, dtype=torch.uint8), torch.full((3, 3), 5.0)
    tensors = [t for b in range(3) for t in (values[b], scales[b])]
    active = torch.ones(3, dtype=torch.uint8)
    host_kernels.call("store_moments", [0, 3, 3, 600, 600, BLOCKS, is_signed], [], [wide, active, *tensors])
    for b in range(3):
        codes, scale = ops.quantize_moment(wide[b], is_signed)
        assert torch.equal(codes, values[b])
        torch.testing.assert_close(scale, scales[b], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_adam_takes_memory_that_is_not_aligned(kept):
    """Guards against loads and stores of several entries at once."""
    g, m, v = (normals(1, 300, seed=i) for i in range(3))
    kept_m, kept_v = keep(m[0], kept, True), keep(v[0].square(), kept, False)
    factors = torch.tensor([[1.5, -0.01, 0.9]], dtype=torch.float64)
    outcomes = torch.tensor([STEPPED], dtype=torch.uint8)
    results = []
    for entries_past in (0, 1):
        tensors = [host_kernels.misaligned(t, entries_past) for t in (g, factors, outcomes, *kept_m, *kept_v)]
        host_kernels.call("adam", [0, KEPT.index(kept), 1, 300, 300, BLOCKS, 0, 1, 0], OPTIONS, tensors)
        results.append(tensors)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def memory_of(shape, dtype, transposed, gap):
    """A stack of matrices with rows (or columns) in one piece and room between them; and all of its memory."""
    matrices, height, width = shape
    lengths = (width, height) if transposed else (height, width)
    memory = torch.full((matrices, lengths[0], lengths[1] + gap), 7.0, dtype=dtype)
    view = memory[:, :, : lengths[1]]
    return memory, view.mT if transposed else view


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("shape", "blocks"), [((1, 1, 1), BLOCKS), ((3, 5, 33), BLOCKS), ((2, 3, 300), 1), ((2, 40, 2), 2)]
)
def test_rotation_elements_are_the_formulae(shape, blocks, transposed, dtype):
    """Guards against strides of another tensor, lost entries, corrections of another matrix."""
    matrices = shape[0]
    corrections = 0.1 + normals(matrices, 2, dtype=torch.float64).square()
    memories, views = zip(*(memory_of(shape, dtype, transposed, gap) for gap in (0, 1, 2, 3)), strict=True)
    mean, variance, m, v = views
    m.copy_(normals(*shape, seed=1))
    v.copy_(normals(*shape, seed=2).square())
    strides = [s for memory in memories for s in (memory.stride(1), memory.stride(0))]
    whole = [WIDE.index(dtype), matrices, *memories[0].shape[1:], blocks, *strides]
    host_kernels.call("moments_to_variance", whole, [], [*memories, corrections])
    inverse = (1 / corrections).to(dtype)[:, :, None, None]
    assert torch.equal(mean, m * inverse[:, 0])
    assert torch.equal(variance, v * inverse[:, 1] - mean * mean)

    variance.neg_()  # so that the absolute value tells
    m.fill_(0)
    v.fill_(0)
    host_kernels.call("variance_to_moments", whole, [], [*memories, corrections])
    correction = corrections.to(dtype)[:, :, None, None]
    assert torch.equal(m, mean * correction[:, 0])
    assert torch.equal(v, (variance + mean * mean).abs() * correction[:, 1])
    for memory, gap in zip(memories, range(4), strict=True):
        assert (memory[:, :, memory.shape[2] - gap :] == 7).all()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("arithmetic", ["torch", "galore_torch", "bitsandbytes"])
def test_step_factors_follow_the_outcome(arithmetic, correct_bias, dtype):
    """Guards against a step count of another matrix, or one that begins at another number."""
    beta1, beta2, _, weight_decay, scale = OPTIONS
    lr = 0.02
    steps = [0, 1, 7, 1000, 3]
    outcomes = [STEPPED, REFRESHED, DECAYED, STEPPED, SKIPPED]
    decay = 1 - lr * weight_decay
    expected = []
    for count, outcome in zip(steps, outcomes, strict=True):
        correction1 = 1 - beta1 ** (count + 1.0) if correct_bias else 1.0
        root = math.sqrt(1 - beta2 ** (count + 1.0)) if correct_bias else 1.0
        length = -lr * scale / correction1
        root_scale = 1 / root
        if arithmetic == "galore_torch":
            length, root_scale = length * root, 1.0
        if arithmetic != "torch":
            length *= decay
        moved = [root_scale, length, decay]
        expected.append({SKIPPED: [1.0, 0.0, 1.0], DECAYED: [1.0, 0.0, decay]}.get(outcome, moved))
    factors = torch.full((5, 3), math.nan, dtype=torch.float64)
    taken = [torch.tensor([float(count)], dtype=dtype) for count in steps]
    others = [torch.tensor([lr], dtype=torch.float64), torch.tensor(outcomes, dtype=torch.uint8)]
    whole = [
        WIDE.index(dtype),
        5,
        0,
        correct_bias,
        ["torch", "galore_torch", "bitsandbytes"].index(arithmetic),
    ]
    host_kernels.call("step_factors", whole, OPTIONS, [factors, *others, *taken])
    assert factors.tolist() == expected
