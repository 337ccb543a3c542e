"""What cuBLAS is asked for: the arguments of a product for every layout, and the pointer arrays."""

import itertools

import host_kernels
import pytest
import torch
from matrices import gaussian

ORDERS = ["row", "column"]


def layout(rows, cols, order, gap=0):
    """(rows, cols, row_stride, col_stride) in an order of memory, rows or columns `gap` entries apart."""
    return (rows, cols, cols + gap, 1) if order == "row" else (rows, cols, 1, rows + gap)


def ask(c, a, b):
    """The fields of GemmLayout, or None."""
    out = torch.zeros(10, dtype=torch.int64)
    host_kernels.call("gemm_layout", [*c, *a, *b], [], [out])
    return out[1:].tolist() if out[0] else None


def blas(fields, c, a, b):
    """c <- a b on flat memory as the column-major BLAS computes it."""
    swapped, transpose_first, transpose_second, m, n, k, ld_first, ld_second, ld_c = fields
    first, second = (b, a) if swapped else (a, b)
    for i, j in itertools.product(range(m), range(n)):
        c[i + j * ld_c] = sum(
            first[p + i * ld_first if transpose_first else i + p * ld_first]
            * second[j + p * ld_second if transpose_second else p + j * ld_second]
            for p in range(k)
        )


def memory_of(layout, values=None):
    rows, cols, *strides = layout
    extent = sum((n - 1) * stride for n, stride in zip((rows, cols), strides, strict=True)) + 1
    memory = torch.full((extent,), torch.nan, dtype=torch.float64)
    if values is not None:
        memory.as_strided((rows, cols), strides).copy_(values)
    return memory


@pytest.mark.parametrize(("m", "n", "k"), [(3, 5, 4), (1, 4, 3), (4, 1, 3), (3, 4, 1), (1, 1, 5), (1, 1, 1)])
@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("orders", list(itertools.product(ORDERS, repeat=3)), ids="-".join)
def test_every_layout(orders, gap, m, n, k):
    """Guards against a transpose, a leading dimension or an operand taken for another."""
    layouts = [
        layout(*size, order, gap) for size, order in zip([(m, n), (m, k), (k, n)], orders, strict=True)
    ]
    a, b = gaussian(m, k, 1), gaussian(k, n, 2)
    memory = [memory_of(layouts[0]), memory_of(layouts[1], a), memory_of(layouts[2], b)]
    fields = ask(*layouts)
    _, transpose_first, transpose_second, size_m, size_n, _, ld_first, ld_second, ld_c = fields
    # What BLAS itself checks.
    assert ld_c >= max(1, size_m)
    assert ld_first >= (k if transpose_first else size_m)
    assert ld_second >= (size_n if transpose_second else k)
    blas(fields, *memory)
    found = memory[0].as_strided((m, n), layouts[0][2:])
    torch.testing.assert_close(found, a @ b, rtol=0, atol=1e-13)
    assert memory[0].isnan().sum() == len(memory[0]) - m * n


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("strides", [(1, 7), (7, 1), (50, 0), (0, 50)])
def test_strides_of_single_rows_and_columns_mean_nothing(which, strides):
    """Guards against a leading dimension that BLAS refuses, or a vector refused, for a stride that is never used."""
    for size in ((1, 1), (1, 6), (6, 1)):
        sizes = [(size[0], size[1]), (size[0], 3), (3, size[1])]
        layouts = [list(layout(*s, "row")) for s in sizes]
        one = [i for i in (0, 1) if sizes[which][i] == 1]
        for i in one:
            layouts[which][2 + i] = strides[i]
        a, b = gaussian(*sizes[1]), gaussian(*sizes[2])
        memory = [memory_of(layouts[0]), memory_of(layouts[1], a), memory_of(layouts[2], b)]
        blas(ask(*layouts), *memory)
        found = memory[0].as_strided(size, layouts[0][2:])
        torch.testing.assert_close(found, a @ b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("which", range(3))
def test_what_blas_cannot_read_is_refused(which):
    """Guards against numbers of other entries: two strides over 1, rows that overlap, sides beyond 32 bits."""
    fine = [(4, 5, 5, 1), (4, 3, 3, 1), (3, 5, 5, 1)]
    assert ask(*fine) is not None
    rows, cols, *_ = fine[which]
    for strides in ((10, 2), (1, 1), (0, 1), (cols - 1, 1), (1, rows - 1), (cols, -1), (1 << 31, 1)):
        assert ask(*fine[:which], (rows, cols, *strides), *fine[which + 1 :]) is None
    large = 1 << 31
    for m, n, k in ((large, 1, 1), (1, large, 1), (1, 1, large), (0, 2, 2), (2, 0, 2), (2, 2, 0)):
        assert ask(layout(m, n, "row"), layout(m, k, "row"), layout(k, n, "row")) is None


@pytest.mark.parametrize("count", [1, 5, 128])
@pytest.mark.parametrize("skip", [None, 0, 1, -1])
def test_pointer_arrays(count, skip):
    """Guards against a matrix that is written where its outcome says skipped, and arrays mixed up."""
    first, second, c = (torch.arange(count) + start for start in (1000, 2000, 3000))
    outcomes = torch.tensor([2, 3, 1], dtype=torch.uint8).repeat(count)[:count]
    expected = c.clone()
    if skip is not None:
        outcomes[min(skip, count - 1)] = 0
        expected[min(skip, count - 1)] = 77
    arrays = torch.zeros(3 * count + 1, dtype=torch.int64)
    buffers = [first, second, c, torch.tensor([77]), outcomes, arrays]
    host_kernels.call("write_gemm_pointers", [count, 99, skip is not None], [], buffers)
    assert torch.equal(arrays, torch.cat([first, second, expected, torch.tensor([99])]))
