"""The operators of the extension, one typed function each.

Every function is a thin call of ``torch.ops.galore_rrf.<name>``: safe under ``torch.compile``, on any
strides, releasing the GIL and leaving thread counts and torch's global generator alone.  None is
differentiable: backward through one raises.  `galore_rrf.reference` has the same functions in plain
PyTorch, `galore_rrf.range_finder` the range finders for everyday use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galore_rrf import fakes  # noqa: F401  (loads the operators)

_ops = torch.ops.galore_rrf


def gaussian_sketch(
    rows: int,
    cols: int,
    *,
    seed: int,
    key: int = 0,
    refresh: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Part of a Gaussian test matrix, a pure function of its arguments.

    Entry (i, j) is normal number (row_offset + i, col_offset + j) of the matrix that belongs to
    (seed, key, refresh): the same bits for every thread count, block size and device.  Philox4x32-10
    (Salmon et al. 2011) with the seed as key and counter (row / 4, column, key, refresh), Box-Muller in
    fp32, then cast to `dtype` (default: torch's default dtype).

    Returns a (rows, cols) tensor.  Raises ValueError for a negative argument, a seed over 2^63 - 1, a key
    or refresh over 2^32 - 1; TypeError for a dtype that is not real floating-point.
    """
    return _ops.gaussian_sketch(
        rows,
        cols,
        seed=seed,
        key=key,
        refresh=refresh,
        row_offset=row_offset,
        col_offset=col_offset,
        dtype=dtype,
        device=None if device is None else torch.device(device),
    )


def range_finder(
    a: Tensor,
    rank: int,
    *,
    oversampling: int = 0,
    sketch: str = "half_power",
    power: int = 1,
    warm: Tensor | None = None,
    coefficients: bool = True,
    ordered: bool = False,
    panel: str = "auto",
    seed: int = 0,
    key: int = 0,
    refresh: int = 0,
    asynchronous: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fixed-rank range finder of a (..., m, n): see `galore_rrf.range_finder` for the arguments.

    `ordered` sorts the basis columns by the energy they keep (always so with oversampling).
    Matrix i of a batch uses the test matrix of `key + i`.  `asynchronous` (by default: on CUDA): the matrices
    of a batch are sketched together, scaled whether they need it or not, and fallbacks are decided on the
    device, for which only the statuses at the end, residuals, oversampling and `ordered` wait.

    Returns basis (..., m, rank), coefficients Q^T a (..., rank, n) (rank 0 without `coefficients`), the
    relative residual (...) in fp64 (NaN without coefficients) and the uint8 status (...).  Basis and
    coefficients are fp64 for fp64 input, else fp32.
    """
    return _ops.range_finder(
        a,
        rank,
        oversampling=oversampling,
        sketch=sketch,
        power=power,
        warm=warm,
        coefficients=coefficients,
        ordered=ordered,
        panel=panel,
        seed=seed,
        key=key,
        refresh=refresh,
        asynchronous=asynchronous,
    )


def adaptive_range_finder(
    a: Tensor,
    tolerance: float,
    *,
    relative: bool = True,
    block: int = 64,
    max_rank: int | None = None,
    method: str = "auto",
    sketch: str = "half_power",
    trim: bool = True,
    extra_blocks: int = 1,
    between: str = "householder",
    panel: str = "householder",
    look_ahead: bool | None = None,
    implicit: bool = False,
    seed: int = 0,
    key: int = 0,
    refresh: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adaptive range finder of a (..., m, n): see `galore_rrf.adaptive_range_finder` for the arguments.

    Returns basis (..., m, cap), coefficients (..., cap, n), both zero beyond the rank, with
    cap = min(m, n, max_rank); int64 rank (...); relative residual (...) in fp64; residuals (..., blocks)
    after every block, NaN where none ran; uint8 status (...); and, with `implicit`, T (..., cap, cap) of the
    block reflector whose V takes the place of the basis, else (..., 0, 0).
    """
    return _ops.adaptive_range_finder(
        a,
        tolerance,
        relative=relative,
        block=block,
        max_rank=max_rank,
        method=method,
        sketch=sketch,
        trim=trim,
        extra_blocks=extra_blocks,
        between=between,
        panel=panel,
        look_ahead=look_ahead,
        implicit=implicit,
        seed=seed,
        key=key,
        refresh=refresh,
    )


def adaptive_range_finders(
    matrices: Sequence[Tensor],
    tolerance: float,
    max_rank: int,
    keys: Sequence[int],
    refreshes: Sequence[int],
    *,
    block: int = 64,
    method: str = "auto",
    sketch: str = "half_power",
    seed: int = 0,
    min_rank: int = 0,
    multiple: int = 1,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Adaptive range finders of many matrices or stacks (m x n, e x m x n; of any shapes) in one call.

    All are trimmed, at one relative tolerance and rank cap, side by side: a matrix a thread.  Element i
    uses the test matrices of ``keys[i]`` (of its first matrix) and ``refreshes[i]``.  The rank is the smallest
    multiple of `multiple`, which divides `block`, within the tolerance, no less than `min_rank` and no more than
    `max_rank` or the shorter side, each of which it may be.

    Returns lists of bases, coefficients, ranks and statuses, as of `adaptive_range_finder`.
    """
    return _ops.adaptive_range_finders(
        matrices,
        tolerance,
        max_rank,
        keys,
        refreshes,
        block=block,
        method=method,
        sketch=sketch,
        seed=seed,
        min_rank=min_rank,
        multiple=multiple,
    )


def panel_qr(panel: Tensor, *, method: str = "householder") -> tuple[Tensor, Tensor, Tensor]:
    """A panel (..., p, w) as H [R; 0] with a block reflector H = I - V T V^T (Schreiber, Van Loan 1989).

    ``method="householder"`` reflects column by column; ``"cholesky_qr"`` and ``"gram_schmidt"`` find Q
    explicitly (`orthonormal_panel`) and reconstruct V from it, or do as householder where they cannot.
    T by the UT transform (Joffrain et al. 2006): T^-1 = striu(V^T V) + diag(V^T V) / 2.

    Returns V (..., p, k), unit lower trapezoidal, T (..., k, k) and R (..., k, w), upper triangular, with
    k = min(p, w); fp64 for fp64 panels, else fp32.
    """
    return _ops.panel_qr(panel, method=method)


def orthonormal_panel(panel: Tensor, *, method: str = "cholesky_qr") -> tuple[Tensor, Tensor, Tensor]:
    """A panel (..., p, w) as Q R, Q (..., p, k) orthonormal, R (..., k, w), k = min(p, w).

    ``"cholesky_qr"``: Cholesky QR twice with Gram matrices in fp64 (Yamamoto et al. 2015), for condition
    numbers to about 10^7; ``"gram_schmidt"``: classical, every column twice (Giraud et al. 2005);
    ``"householder"``, which also serves where the others cannot: the third result (..., bool) says where.
    """
    return _ops.orthonormal_panel(panel, method=method)


def householder_reconstruction(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The block reflector I - V T V^T whose first w columns are those of an orthonormal q, up to signs.

    By the LU factorisation of q diag(signs) - I, which needs no pivoting (Ballard et al. 2014); q (..., p, w).
    Returns V (..., p, w), T (..., w, w) and signs (..., w), +-1: H[:, :w] = q diag(signs).
    """
    return _ops.householder_reconstruction(q)


def apply_block_reflector(v: Tensor, t: Tensor, a: Tensor, *, transpose: bool = False) -> Tensor:
    """H a, or H^T a, with H = I - V T V^T: v (..., p, w), t (..., w, w), a (..., p, any), all of one dtype."""
    return _ops.apply_block_reflector(v, t, a, transpose=transpose)


def explicit_basis(v: Tensor, t: Tensor) -> Tensor:
    """The first w columns (..., p, w) of I - V T V^T: what an implicit basis stands for."""
    return _ops.explicit_basis(v, t)


def svd_of_product(basis: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., m, r), S (..., r), V (..., n, r) with Q B = U diag(S) V^T: Q (..., m, r) orthonormal, B (..., r, n).

    By a QR of B^T and the SVD of its triangle; r <= n.
    """
    return _ops.svd_of_product(basis, coefficients)


def projected_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    bases: Sequence[Tensor],
    steps: Sequence[Tensor],
    coefficients: Sequence[Tensor | None],
    sides: Sequence[int],
    keys: Sequence[int],
    refreshes: Sequence[int],
    refresh_seconds: Tensor | None = None,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    residual_states: Sequence[Tensor] | None = None,
    measures: Tensor | None = None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    maximize: bool = False,
    correct_bias: bool = True,
    arithmetic: str = "torch",
    sketch: str = "warm",
    power: int = 1,
    oversampling: int = 0,
    moments: str = "rotate",
    seed: int = 0,
    stochastic_rounding: bool = False,
    residual: str = "drop",
    residual_scale: float = 1.0,
    refresh_at: str = "start",
    asynchronous: bool | None = None,
) -> Tensor:
    """One projected AdamW step (GaLore, algorithm 2) of a list of matrices, in place, in one call.

    For each parameter, a matrix W (m x n) or a stack (e x m x n), with gradient G of its shape and dtype:
    side 0 (right) has basis Q (n x r), R = G Q (m x r); side 1 (left) has Q (m x r), R = Q^T G (r x n).

        refresh Q (and R with it) from G where `refreshes[i]` >= 0, its number; -1: not due
        M <- b1 M + (1 - b1) R      V <- b2 V + (1 - b2) R*R      step <- step + 1
        N = (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)
        W <- (1 - lr wd) W - lr scale (N Q^T or Q N)

    ``arithmetic="galore_torch"`` adds eps to the uncorrected root and decays last, as that package does;
    ``"bitsandbytes"`` decays last.  ``correct_bias=False`` leaves the divisions by 1 - b^t out.
    All is computed in fp64 for fp64 weights, else in fp32.  Moments (shape of R, contiguous) are of that
    dtype, fp32, bf16, or uint8 codes whose scales (`quantize_moment`) stand in `exp_avg_scales` and
    `exp_avg_sq_scales`, which are empty tensors elsewhere.  `bases` are of any floating dtype, `steps`
    fp32 or fp64 scalars on the device of the weights.  A basis of zeros means none yet: such a matrix is
    refreshed at once.
    `moments`: at a refresh ``"rotate"`` moves them into the new basis, ``"keep"`` leaves them, and ``"reset"``
    begins again: they become zero, and so does the step count before the step; in a stack that has one for all, of
    every matrix, refreshed, skipped or not.
    `refresh_at`: ``"start"``: the new basis serves in this step; ``"end"``: from the next one on.  A warm start
    then has its first product in R, and no new R is needed.  Refresh 0 serves at once.
    `coefficients[i]`: R from a refresh made elsewhere, whose basis is in `bases` already.
    `keys[i]`: the matrix id of the test matrix, of a stack's first.
    `refresh_seconds` (fp64, one number a parameter, on the CPU): the wall-clock time of each parameter's
    refresh is added to it; that of k matrices refreshed side by side counts for 1/k each.
    `measures` (fp64 (parameters, 3) on the device of the weights): receives of each parameter ||G||_F^2 and
    ||R||_F^2, summed over the matrices of a stack, and at a refresh made here with a basis before it the mean
    squared cosine of the angles between both subspaces, ||Q_new^T Q_old||_F^2 / r, the mean of a stack's; NaN
    where there is none.  A skipped matrix is measured by nothing: its three are NaN, and a stack's are those of
    the others.  One pass over G; nobody waits.

    `residual`: what is done with the gradient's part outside the subspace, E = G - Q R (right: G - R Q^T):

        "drop"      nothing (GaLore)
        "sign"      N's product + residual_scale sign(E), entry by entry (FRUGAL, arXiv 2411.07837)
        "normalized"  N's product + residual_scale S, S = E with first its columns (right: rows), then its rows
                    (right: columns) divided by their root mean squares, and both again (arXiv 2502.06742);
                    0 in columns (right: rows) where E is but rounding
        "orthogonalized"  N's product + residual_scale S, S = E with its singular values about sqrt(max(m, n)),
                    1.2 times that at most, by two steps of Newton-Schulz iteration (Muon, Jordan et al. 2024):
                    entries of about sqrt(1 - r / s) in the root mean square, s the projected side, the shorter;
                    0 where E is but rounding; several m x n of temporaries a matrix in flight; the iteration
                    in bf16, but for fp64 and where that takes longer (small matrices, old CPUs)
        "scaled"    N's product + residual_scale S, S = E with each column times ||N_j|| / ||R_j|| (right: row),
                    0 where R_j = 0; S is shortened to 1.01 times the length of the last (Fira, arXiv 2410.01623)
        "feedback"  G + residual_scale * the last step's E in the place of G; what a rotation of the first
                    moment loses, times b1 / (1 - b1), goes into E too (LDAdam, arXiv 2410.16103)

    `residual_states`: for ``"scaled"`` the length of the last S, fp32, one number or one a matrix of a stack, 0:
    none yet; for ``"feedback"`` E, like the weight; both contiguous.  Else ignored.

    `stochastic_rounding`: the new weight, in bf16 or fp16, is rounded up or down so that it is right in the
    mean; random bits are Philox's, of (seed, key, step, entry), by row tiles of W.
    `asynchronous` (by default: on CUDA): matrices of one shape are stepped together, in few launches, and
    nobody waits for the device: which are skipped, and why, is decided there, and a matrix without a basis
    waits for its next refresh.  `lr` may be a scalar tensor on the device, read when the step runs there.
    Else every matrix is a piece of work for one thread.

    Returns one uint8 a parameter, on the device of the weights: 0 skipped (non-finite gradient, nothing
    written), 1 weight decay alone (zero gradient and no basis yet; not counted as a step), 2 stepped,
    3 stepped in a new subspace.  Residuals are looked at tile by tile, so that no m x n temporary is made, but
    for ``"feedback"``, with one a matrix in flight, G + E, and ``"orthogonalized"``.
    """
    return _ops.projected_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        _uncoded(params) if exp_avg_scales is None else exp_avg_scales,
        _uncoded(params) if exp_avg_sq_scales is None else exp_avg_sq_scales,
        bases,
        steps,
        _uncoded(params) if residual_states is None else residual_states,
        coefficients,
        sides,
        keys,
        refreshes,
        refresh_seconds,
        measures,
        lr=_scalar(lr),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        maximize=maximize,
        correct_bias=correct_bias,
        arithmetic=arithmetic,
        sketch=sketch,
        power=power,
        oversampling=oversampling,
        moments=moments,
        seed=seed,
        stochastic_rounding=stochastic_rounding,
        residual=residual,
        residual_scale=residual_scale,
        refresh_at=refresh_at,
        asynchronous=asynchronous,
    )


def _scalar(lr: float | Tensor) -> Tensor:
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")


def _uncoded(params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty(0, device="cpu") for _ in params]


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    correct_bias: bool = True,
    arithmetic: str = "torch",
) -> None:
    """One AdamW step of parameters that are not projected, in place, in one call.

    Serves what torch's own does not: moments of another dtype than the weight's, or 8-bit, and other
    arithmetics.  All tensors contiguous; the rest as in `projected_adamw_`, but that 8-bit codes have one
    run of blocks whatever the shape.  Gradients that are not finite go into weights and moments, as in torch.
    """
    _ops.adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        _uncoded(params) if exp_avg_scales is None else exp_avg_scales,
        _uncoded(params) if exp_avg_sq_scales is None else exp_avg_sq_scales,
        steps,
        lr=_scalar(lr),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        correct_bias=correct_bias,
        arithmetic=arithmetic,
    )


def quantize_moment(moment: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """8-bit codes of a moment, uint8 of its shape, and the largest magnitude of every 256 entries, fp32.

    Dynamic codes (Dettmers et al. 2022); not `is_signed` for the second moment, which is not negative, and of
    which 0 alone is coded as 0.
    Blocks run over the entries in row-major order, of a stack (e, m, n) matrix by matrix: the scale is (blocks,)
    or (e, blocks).  A block with a NaN is lost as a whole.
    """
    codes, scale = _ops.quantize_moment(moment, is_signed)
    return codes, scale


def dequantize_moment(codes: Tensor, scale: Tensor, is_signed: bool) -> Tensor:
    """The fp32 moment that `quantize_moment` has coded: each entry to .36% of its block's largest (.71% if
    signed), those under a tenth of that to a fifth of this, and so on down to a millionth."""
    moment: Tensor = _ops.dequantize_moment(codes, scale, is_signed)
    return moment


def rotate_moments(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    basis: Tensor,
    new_basis: Tensor,
    side: int,
    bias_correction1: float,
    bias_correction2: float,
) -> tuple[Tensor, Tensor]:
    """Moments in the new basis, by LDAdam's rule (Robert et al. 2024), perhaps of another rank.

    With S = new_basis^T basis and, for side 1, moments r x l (side 0: l x r, S from the right):
    m <- S m and v <- |S^2 (v - m^2) + (S m)^2| on m, v divided by the bias corrections 1 - beta^t.
    """
    return _ops.rotate_moments(
        exp_avg, exp_avg_sq, basis, new_basis, side, bias_correction1, bias_correction2
    )
