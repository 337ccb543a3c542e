"""The operators of `galore_rrf.ops` in plain PyTorch, as close to the formulae as they can be written.

For readers and tests; nothing here runs in training.  Signatures, defaults and what is returned are those
of `galore_rrf.ops`.  Arguments are not checked, memory and time are not saved, and every matrix is scaled
by a power of two where the operators do so only when they must.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CONVERGED, RANK_CAP, FLOOR, ZERO, NONFINITE = range(5)  # the status of a range finder
SKIPPED, DECAYED, STEPPED, REFRESHED = range(4)  # the outcome of a step

_WORD = 0xFFFFFFFF
_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


# --- Random numbers -----------------------------------------------------------------------------------


def philox4x32_10(counter: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter of four words (Salmon et al. 2011), all int64 below 2^32.

    A 32 x 32 bit product wraps in int64, but its 64 bits are those of the unsigned product.
    """
    x0, x1, x2, x3 = counter
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (
            ((p1 >> 32) & _WORD) ^ x1 ^ key0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ x3 ^ key1,
            p0 & _WORD,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return x0, x1, x2, x3


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals in fp64; u alone is rounded to fp32.  The operator computes in fp32 throughout."""
    u = (radius_word.to(torch.float32).double() * 2.0**-32 + 2.0**-33).to(torch.float32).double()
    radius = torch.sqrt(-2 * torch.log(u))
    angle = 2 * math.pi * 2.0**-32 * angle_word.double()
    return radius * torch.cos(angle), radius * torch.sin(angle)


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
    """Part of a Gaussian test matrix: Philox words to the bit, Box-Muller in fp64, cast to `dtype`."""
    row = torch.arange(row_offset, row_offset + rows)
    counter = torch.broadcast_tensors(
        row[:, None] // 4,
        torch.arange(col_offset, col_offset + cols)[None, :],
        torch.tensor(key),
        torch.tensor(refresh),
    )
    words = philox4x32_10(counter, seed)
    normals = torch.stack([*_box_muller(*words[:2]), *_box_muller(*words[2:])])  # 4 x rows x cols
    result = normals.gather(0, (row % 4)[None, :, None].expand(1, rows, cols))[0]
    return result.to(dtype=dtype or torch.get_default_dtype(), device=device)


# --- Range finders ------------------------------------------------------------------------------------


def _compute_dtype(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _orth(a: Tensor) -> Tensor:
    """Q of the Householder QR factorisation.

    Column k depends on the span of the first k columns of a alone, not on their lengths or signs.
    """
    return torch.linalg.qr(a)[0]


def _scale(a: Tensor, exponent: int) -> Tensor:
    """2^exponent a, in two steps since one factor may overflow."""
    half = exponent // 2
    return a * 2.0**half * 2.0 ** (exponent - half)


def _by_energy(q: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q U, U^T B and the squared singular values of B, U its left singular vectors (signs are arbitrary)."""
    u, sigma, _ = torch.linalg.svd(b.double(), full_matrices=False)
    return q @ u.to(q.dtype), (u.mT @ b.double()).to(b.dtype), sigma.square()


def _relative_residual(a: Tensor, q: Tensor, b: Tensor) -> float:
    a = a.double()
    return float(torch.linalg.norm(a - q.double() @ b.double()) / torch.linalg.norm(a))


def _fixed_rank(
    a: Tensor,
    rank: int,
    oversampling: int,
    sketch: str,
    power: int,
    warm: Tensor | None,
    ordered: bool,
    seed: int,
    key: int,
    refresh: int,
) -> tuple[Tensor, Tensor, float, int]:
    """Algorithms 4.1 (plain) and 4.4 (power) of Halko, Martinsson, Tropp 2011; half a power step."""
    m, n = a.shape
    dtype = _compute_dtype(a)
    largest = float(a.abs().max())
    q, b = torch.zeros(m, rank, dtype=dtype), torch.zeros(rank, n, dtype=dtype)
    if not math.isfinite(largest):
        return q, b, math.nan, NONFINITE
    if largest == 0:
        return q.fill_diagonal_(1), b, 0.0, ZERO
    exponent = math.frexp(largest)[1]
    a = _scale(a.to(dtype), -exponent)

    width = min(rank + oversampling, m, n)

    def omega(rows: int, first: int = 0) -> Tensor:
        return gaussian_sketch(
            rows, width - first, seed=seed, key=key, refresh=refresh, col_offset=first, dtype=dtype
        )

    if sketch in ("half_power", "warm"):
        left = omega(m)
        if sketch == "warm":
            assert warm is not None
            known = warm[:, :width].to(dtype)
            left = torch.cat([known, omega(m, known.shape[1])], 1)
            if not (a.mT @ left).any():  # the previous basis is orthogonal to all of a
                left = omega(m)
        y = a @ _orth(a.mT @ left)
    else:
        y = a @ omega(n)
        for _ in range(power if sketch == "power" else 0):
            y = a @ _orth(a.mT @ _orth(y))

    q = _orth(y)
    b = q.mT @ a
    if ordered or width > rank:
        q, b, _ = _by_energy(q, b)
        q, b = q[:, :rank], b[:rank]
    return q, _scale(b, exponent), _relative_residual(a, q, b), CONVERGED


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fixed-rank range finder of every matrix of a batch; `panel` makes no difference here."""
    *batch, m, n = a.shape
    matrices = a.reshape(-1, m, n)
    previous = [None] * len(matrices) if warm is None else list(warm.reshape(-1, m, warm.shape[-1]))
    found = [
        _fixed_rank(x, rank, oversampling, sketch, power, w, ordered, seed, key + i, refresh)
        for i, (x, w) in enumerate(zip(matrices, previous, strict=True))
    ]
    q, b, residual, status = map(list, zip(*found, strict=True))
    kept = rank if coefficients else 0
    if not coefficients:
        residual = [r if code == ZERO else math.nan for r, code in zip(residual, status, strict=True)]
    return (
        torch.stack(q).view(*batch, m, rank),
        torch.stack(b)[:, :kept].view(*batch, kept, n),
        torch.tensor(residual, dtype=torch.float64).view(batch),
        torch.tensor(status, dtype=torch.uint8).view(batch),
    )


def _adaptive(
    a: Tensor,
    tolerance: float,
    relative: bool,
    block: int,
    max_rank: int,
    sketch: str,
    trim: bool,
    extra_blocks: int,
    columns: int,
    seed: int,
    key: int,
    refresh: int,
    min_rank: int,
    multiple: int,
) -> tuple[Tensor, Tensor, float, list[float], int]:
    """One matrix, by deflation (randQB, Martinsson and Voronin 2016).

    Penke's Householder form (2024) sketches the trailing rows of H_k ... H_1 A, which are (I - Q Q^T) A in
    another basis of the complement of Q: with the plain sketch every block spans the same space here, with
    half a power step only one of the same quality, since its left test matrix meets other coordinates.
    """
    m, n = a.shape
    dtype = _compute_dtype(a)
    largest = float(a.abs().max())
    q, b = torch.zeros(m, 0, dtype=dtype), torch.zeros(0, n, dtype=dtype)
    if not math.isfinite(largest):
        return q, b, math.nan, [], NONFINITE
    if largest == 0:
        return q, b, 0.0, [], ZERO
    exponent = math.frexp(largest)[1]
    rest = _scale(a.to(dtype), -exponent)

    def energy(x: Tensor) -> float:
        return float(x.double().square().sum())

    total = energy(rest)
    tau = tolerance if relative else math.ldexp(tolerance, -exponent) / math.sqrt(total)
    threshold = tau**2 * total
    residuals: list[float] = []
    left = total

    def add_block() -> None:
        nonlocal q, b, rest, left
        new_columns = slice(q.shape[1], min(q.shape[1] + block, columns))
        width = new_columns.stop - new_columns.start
        rows = m if sketch == "half_power" else n
        omega = gaussian_sketch(
            rows, width, seed=seed, key=key, refresh=refresh, col_offset=new_columns.start, dtype=dtype
        )
        y = rest @ omega if sketch == "plain" else rest @ _orth(rest.mT @ omega)
        if y.shape[1] < width:  # more columns than n: any will do
            y = torch.cat([y, omega[:, y.shape[1] :]], 1)
        new = _orth(torch.cat([q, _orth(y)], 1))[
            :, new_columns
        ]  # reorthogonalised against the earlier blocks
        kept = new.mT @ rest
        rest = rest - new @ kept
        q, b = torch.cat([q, new], 1), torch.cat([b, kept])
        left = energy(rest)
        residuals.append(math.sqrt(left / total))

    while q.shape[1] < columns and (left > threshold or q.shape[1] < min_rank):
        add_block()
    trim = trim and left <= threshold
    for _ in range(extra_blocks if trim else 0):  # so that trimming comes close to the smallest rank
        if q.shape[1] < min(columns, m, n) and left > 0:
            add_block()

    if trim or q.shape[1] > max_rank:
        q, b, energies = _by_energy(q, b)
        rank, beyond = q.shape[1], left
        while rank > max_rank or (trim and rank > 0 and beyond + float(energies[rank - 1]) <= threshold):
            rank -= 1
            beyond += float(energies[rank])
        rank = min(max(min_rank, -(-rank // multiple) * multiple), max_rank, q.shape[1])
        left += float(energies[rank:].sum())
        q, b = q[:, :rank], b[:rank]
    short = FLOOR if tau < 200 * _UNIT_ROUNDOFF[dtype] else RANK_CAP
    status = CONVERGED if left <= threshold else short
    return q, _scale(b, exponent), math.sqrt(left / total), residuals, status


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
    min_rank: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adaptive range finder of every matrix of a batch (Penke 2024); the last two as of `adaptive_range_finders`.

    `method`, `between`, `panel` and `look_ahead` make no difference here, nor to what is found but for rounding.
    """
    *batch, m, n = a.shape
    cap = min(m, n) if max_rank is None else min(m, n, max_rank)
    # The last sketch of a tall matrix of full rank is square: a few columns more, trimmed off again.
    full = min(m, n + 16) if m > n and not implicit else min(m, n)
    block = min(block, n) if sketch == "half_power" else block
    columns = full if cap == min(m, n) else min(full, cap + (extra_blocks * block if trim else 0))
    matrices = a.reshape(-1, m, n)
    count, blocks, dtype = len(matrices), -(-columns // block), _compute_dtype(a)
    basis = torch.zeros(count, m, cap, dtype=dtype)
    coefficients = torch.zeros(count, cap, n, dtype=dtype)
    rank = torch.zeros(count, dtype=torch.int64)
    residual = torch.zeros(count, dtype=torch.float64)
    residuals = torch.full((count, blocks), math.nan, dtype=torch.float64)
    status = torch.zeros(count, dtype=torch.uint8)
    factor = torch.zeros(count, cap if implicit else 0, cap if implicit else 0, dtype=dtype)
    for i, x in enumerate(matrices):
        q, b, residual[i], history, status[i] = _adaptive(
            x,
            tolerance,
            relative,
            block,
            cap,
            sketch,
            trim,
            extra_blocks,
            columns,
            seed,
            key + i,
            refresh,
            min(min_rank, cap),
            multiple,
        )
        r = rank[i] = q.shape[1]
        basis[i, :, :r], coefficients[i, :r] = q, b
        residuals[i, : len(history)] = torch.tensor(history, dtype=torch.float64)
        if implicit:
            basis[i, :, :r], factor[i, :r, :r], _ = panel_qr(q)
    return (
        basis.view(*batch, m, cap),
        coefficients.view(*batch, cap, n),
        rank.view(batch),
        residual.view(batch),
        residuals.view(*batch, blocks),
        status.view(batch),
        factor.view(*batch, *factor.shape[1:]),
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
    """Adaptive range finders of many matrices or stacks."""
    found = [
        adaptive_range_finder(
            a,
            tolerance,
            max_rank=max_rank,
            block=block,
            sketch=sketch,
            seed=seed,
            key=key,
            refresh=refresh,
            min_rank=min_rank,
            multiple=multiple,
        )
        for a, key, refresh in zip(matrices, keys, refreshes, strict=True)
    ]
    bases, coefficients, ranks, _, _, statuses, _ = map(list, zip(*found, strict=True))
    return bases, coefficients, ranks, statuses


# --- Their building blocks ------------------------------------------------------------------------------


def panel_qr(panel: Tensor, *, method: str = "householder") -> tuple[Tensor, Tensor, Tensor]:
    """LAPACK's reflectors, T column by column (Schreiber and Van Loan 1989); `method` makes no difference."""
    *_, p, w = panel.shape
    k = min(p, w)
    factored, tau = torch.geqrf(panel.to(_compute_dtype(panel)))
    v = factored[..., :k].tril(-1) + torch.eye(p, k, dtype=factored.dtype)
    t = torch.zeros(*panel.shape[:-2], k, k, dtype=v.dtype)
    for j in range(k):
        tau_j, v_j = tau[..., j, None], v[..., j, None]
        t[..., :j, j] = -tau_j * (t[..., :j, :j] @ (v[..., :j].mT @ v_j))[..., 0]
        t[..., j, j] = tau_j[..., 0]
    return v, t, factored[..., :k, :].triu()


def orthonormal_panel(panel: Tensor, *, method: str = "cholesky_qr") -> tuple[Tensor, Tensor, Tensor]:
    """The QR factorisation; `method` makes no difference."""
    q, r = torch.linalg.qr(panel.to(_compute_dtype(panel)))
    return q, r, torch.zeros(panel.shape[:-2], dtype=torch.bool)


def householder_reconstruction(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ballard et al. 2014 in other words: V, T of the QR factorisation of q, whose R is diag(signs)."""
    v, t, r = panel_qr(q)
    return v, t, r.diagonal(dim1=-2, dim2=-1).sign()


def apply_block_reflector(v: Tensor, t: Tensor, a: Tensor, *, transpose: bool = False) -> Tensor:
    """H a or H^T a with H = I - V T V^T."""
    return a - v @ ((t.mT if transpose else t) @ (v.mT @ a))


def explicit_basis(v: Tensor, t: Tensor) -> Tensor:
    """The first columns of H."""
    return apply_block_reflector(v, t, torch.eye(*v.shape[-2:], dtype=v.dtype).expand(v.shape))


def svd_of_product(basis: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of B, U rotated by Q."""
    u, s, vh = torch.linalg.svd(coefficients, full_matrices=False)
    return basis @ u, s, vh.mT


# --- The optimizer's step -----------------------------------------------------------------------------


def rotate_moments(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    basis: Tensor,
    new_basis: Tensor,
    side: int,
    bias_correction1: float,
    bias_correction2: float,
) -> tuple[Tensor, Tensor]:
    """LDAdam's rule (Robert et al. 2024): m <- S m, v <- |S^2 (v - m^2) + (S m)^2| with S = Q_new^T Q_old."""
    s = new_basis.mT.to(exp_avg.dtype) @ basis.to(exp_avg.dtype)
    m, v = exp_avg / bias_correction1, exp_avg_sq / bias_correction2
    if side == 0:
        m, v = m.mT, v.mT
    new_m = s @ m
    new_v = (s.square() @ (v - m.square()) + new_m.square()).abs()
    if side == 0:
        new_m, new_v = new_m.mT, new_v.mT
    return new_m * bias_correction1, new_v * bias_correction2


def dynamic_code(is_signed: bool) -> Tensor:
    """The 256 values of the 8-bit codes, ascending (Dettmers et al. 2022): in each of seven decades below 1 the
    middles of equal parts, twice as many as in the decade before; 0 and 1."""
    positive = [torch.zeros(1, dtype=torch.float64)]
    for k in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (k if is_signed else k + 1) + 1, dtype=torch.float64)
        positive.append(10.0 ** (k - 6) * (edges[:-1] + edges[1:]) / 2)
    positive.append(torch.ones(1, dtype=torch.float64))
    values = torch.cat(positive)
    return torch.cat((-values[1:-1].flip(0), values)).float() if is_signed else values.float()


def quantize_moment(moment: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest codes of entries over the largest magnitude of their block of 256, and those magnitudes."""
    pieces = moment.flatten(1) if moment.dim() == 3 else moment.reshape(1, -1)
    padded = torch.nn.functional.pad(pieces.float(), (0, -pieces.shape[1] % 256)).unflatten(1, (-1, 256))
    scale = padded.abs().amax(-1).clamp(max=torch.finfo(torch.float32).max)
    relative = padded / torch.where(scale == 0, 1, scale).unsqueeze(-1)
    magnitudes = dynamic_code(is_signed)[127 if is_signed else 0 :]
    codes = torch.bucketize(relative.abs(), (magnitudes[1:] + magnitudes[:-1]) / 2)
    if is_signed:  # -1 is no code
        codes = torch.where(relative < 0, 127 - codes.clamp(max=127), 127 + codes)
    else:  # a variance must not vanish beside a mean that does not
        codes = torch.where((codes == 0) & (relative > 0), 1, codes)
    codes = codes.to(torch.uint8)
    codes = codes.flatten(1)[:, : pieces.shape[1]].reshape(moment.shape)
    return codes, scale if moment.dim() == 3 else scale[0]


def dequantize_moment(codes: Tensor, scale: Tensor, is_signed: bool) -> Tensor:
    """The values of the codes, times the scale of their block."""
    pieces = codes.flatten(1) if codes.dim() == 3 else codes.reshape(1, -1)
    scales = scale.reshape(len(pieces), -1).repeat_interleave(256, dim=1)[:, : pieces.shape[1]]
    return (dynamic_code(is_signed)[pieces.long()] * scales).reshape(codes.shape)


class _Stored:
    """Both moments of a parameter as they are computed with, and the way back to how they are kept."""

    def __init__(
        self, mean: Tensor, square: Tensor, scales: tuple[Tensor | None, Tensor | None], dtype: torch.dtype
    ) -> None:
        self.kept = [(mean, scales[0], True), (square, scales[1], False)]
        self.mean, self.square = (
            values.to(dtype) if scale is None else dequantize_moment(values, scale, is_signed).to(dtype)
            for values, scale, is_signed in self.kept
        )

    def write(self) -> None:
        for (values, scale, is_signed), moment in zip(self.kept, (self.mean, self.square), strict=True):
            if scale is None:
                values.copy_(moment)
            else:
                codes, new_scale = quantize_moment(moment, is_signed)
                values.copy_(codes)
                scale.copy_(new_scale)


def _scales(
    values: Tensor, i: int, lists: tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]
) -> tuple[Tensor | None, Tensor | None]:
    """Of parameter i, where its moments are coded."""
    first, second = (None if scales is None or values.dtype != torch.uint8 else scales[i] for scales in lists)
    return first, second


def _direction(
    r: Tensor,
    m: Tensor,
    v: Tensor,
    t: float,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
    correct_bias: bool,
    arithmetic: str,
) -> Tensor:
    """Moves the moments by a gradient and returns what Adam makes of them at step t."""
    r = -r if maximize else r
    m.copy_(beta1 * m + (1 - beta1) * r)
    v.copy_(beta2 * v + (1 - beta2) * r * r)
    correction1, correction2 = (1 - beta1**t, 1 - beta2**t) if correct_bias else (1.0, 1.0)
    if arithmetic == "galore_torch":  # eps beside the uncorrected root
        return m * (math.sqrt(correction2) / correction1) / (v.sqrt() + eps)
    return (m / correction1) / ((v / correction2).sqrt() + eps)


def _decay_and_update(w: Tensor, update: Tensor, decay: float, arithmetic: str) -> None:
    if arithmetic == "torch":
        w.copy_(decay * w.to(update.dtype) - update)
    else:  # decay last
        w.copy_(decay * (w.to(update.dtype) - update))


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    correct_bias: bool = True,
    arithmetic: str = "torch",
) -> None:
    """One AdamW step (Loshchilov and Hutter 2019), in place."""
    for i, w in enumerate(params):
        stored = _Stored(
            exp_avgs[i].view(-1),
            exp_avg_sqs[i].view(-1),
            _scales(exp_avgs[i], i, (exp_avg_scales, exp_avg_sq_scales)),
            _compute_dtype(w),
        )
        t = float(steps[i].add_(1))
        g = grads[i].to(stored.mean.dtype).reshape(-1)
        n = _direction(
            g, stored.mean, stored.square, t, beta1, beta2, eps, maximize, correct_bias, arithmetic
        )
        _decay_and_update(w, lr * n.view(w.shape), 1 - lr * weight_decay, arithmetic)
        stored.write()


def _of_matrices(param: Tensor, state: Tensor | None) -> list[Tensor]:
    """A parameter's residual state by matrices; zeros where it has none."""
    count = len(param) if param.dim() == 3 else 1
    if state is None or state.shape == (0,):
        return [param.new_zeros(())] * count
    return list(state) if param.dim() == 3 else [state]


def _root_mean_square(a: Tensor, dim: int | None) -> Tensor:
    return a.square().mean(dim, keepdim=dim is not None).sqrt()


def _orthogonalized(a: Tensor) -> Tensor:
    """Two steps of Newton and Schulz towards the orthogonal polar factor, on the singular values themselves."""
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    s = s / s.pow(4).sum().pow(1 / 4)  # the root of ||A A^T||_F
    for _ in range(2):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh * math.sqrt(max(a.shape))


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
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    *,
    lr: float,
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
    residual: str = "drop",
    residual_scale: float = 1.0,
    residual_states: Sequence[Tensor] | None = None,
    refresh_at: str = "start",
) -> Tensor:
    """One step of GaLore's projected AdamW (Zhao et al. 2024, algorithm 2) for every matrix, in place."""

    def new_subspace(g: Tensor, q: Tensor, known: bool, key: int, refresh: int) -> tuple[Tensor, Tensor, int]:
        found, b, _, status = range_finder(
            g,
            q.shape[-1],
            oversampling=oversampling,
            sketch="half_power" if sketch == "warm" and not known else sketch,
            power=power,
            warm=q if sketch == "warm" and known else None,
            ordered=moments == "keep",
            seed=seed,
            key=key,
            refresh=refresh,
        )
        if known and moments == "keep":  # singular vectors have no sign: that of the previous ones
            signs = torch.where((found * q).sum(0) < 0, -1, 1)
            found, b = found * signs, b * signs.unsqueeze(1)
        return found, b, int(status)

    def step(
        tensors: Sequence[Tensor], given: Tensor | None, t: float, side: int, key: int, refresh: int
    ) -> int:
        w, g, m, v, q, kept = tensors
        dtype = _compute_dtype(w)

        def back(x: Tensor, q: Tensor = q) -> Tensor:
            return x @ q.to(dtype).mT if side == 0 else q.to(dtype) @ x

        if residual == "feedback":
            g = g + residual_scale * kept
        known = bool(q.any())
        at_end = refresh_at == "end" and refresh > 0 and known and given is None
        new_q, outcome = None, STEPPED
        if given is not None:  # of a refresh made elsewhere
            r, outcome = given.to(dtype), REFRESHED
        elif not known or (refresh >= 0 and not at_end):
            new_q, r, status = new_subspace(g.mT if side == 0 else g, q, known, key, max(refresh, 0))
            r = r.mT if side == 0 else r
            outcome = REFRESHED
            if status == ZERO:
                new_q, outcome = None, STEPPED if known else DECAYED
        else:
            r = g.to(dtype) @ q.to(dtype) if side == 0 else q.to(dtype).mT @ g.to(dtype)

        decay = 1 - lr * weight_decay
        if not (g.isfinite().all() and r.isfinite().all()):
            return SKIPPED
        if outcome == DECAYED:
            w.mul_(decay)
            return DECAYED
        if moments == "reset" and outcome == REFRESHED:
            t = 0
        if new_q is not None:
            before = back(m)
            move(tensors, new_q, known, t, side)
            if residual == "feedback" and known and moments == "rotate" and t > 0:
                lost = (before - back(m)) * (-1 if maximize else 1) * beta1 / (1 - beta1)
                g = g + (residual_scale * lost).to(g.dtype)
        n = _direction(r, m, v, t + 1, beta1, beta2, eps, maximize, correct_bias, arithmetic)

        update = back(n)
        outside = g.to(dtype) - back(r)
        if residual == "sign":
            update += residual_scale * (-outside if maximize else outside).sign()
        elif residual == "normalized":
            least = 32 * torch.finfo(r.dtype).eps * _root_mean_square(back(r), None)
            s = torch.where(_root_mean_square(outside, side - 1) > least, outside, 0)
            for dim in (side - 1, side) * 2:
                lengths = _root_mean_square(s, dim)
                s = torch.where(lengths > 0, s / lengths, 0)
            update += residual_scale * (-s if maximize else s)
        elif residual == "orthogonalized":
            least = 32 * torch.finfo(r.dtype).eps * r.norm()
            s = _orthogonalized(outside) if outside.norm() > least else torch.zeros_like(outside)
            update += residual_scale * (-s if maximize else s)
        elif residual == "scaled":
            lengths = r.norm(dim=side - 1, keepdim=True)
            phi = torch.where(lengths > 0, n.norm(dim=side - 1, keepdim=True) / lengths, 0)
            s = (-outside if maximize else outside) * phi
            norm = s.norm()
            if 0 < 1.01 * kept < norm:
                s *= 1.01 * kept / norm
            if norm > 0:
                kept.copy_(s.norm())
            update += residual_scale * s
        elif residual == "feedback":
            kept.copy_(outside)
        _decay_and_update(w, lr * scale * update, decay, arithmetic)
        if at_end:
            new_q, _, status = new_subspace(g.mT if side == 0 else g, q, known, key, refresh)
            if status == CONVERGED:
                move(tensors, new_q, known, t + 1, side)
                outcome = REFRESHED
        return outcome

    def move(tensors: Sequence[Tensor], new_q: Tensor, known: bool, t: float, side: int) -> None:
        _, _, m, v, q, _ = tensors
        if moments == "reset":
            m.zero_()
            v.zero_()
        elif known and moments == "rotate" and t > 0:
            rotated = rotate_moments(m, v, q, new_q, side, 1 - beta1**t, 1 - beta2**t)
            m.copy_(rotated[0])
            v.copy_(rotated[1])
        q.copy_(new_q)

    def matrices(x: Tensor) -> list[Tensor]:
        return list(x if x.dim() == 3 else x.unsqueeze(0))

    result = []
    for i, param in enumerate(params):
        stored = _Stored(
            exp_avgs[i],
            exp_avg_sqs[i],
            _scales(exp_avgs[i], i, (exp_avg_scales, exp_avg_sq_scales)),
            _compute_dtype(param),
        )
        tensors = list(
            zip(
                *map(matrices, (param, grads[i], stored.mean, stored.square, bases[i])),
                _of_matrices(param, None if residual_states is None else residual_states[i]),
                strict=True,
            )
        )
        given = coefficients[i]
        outcomes = [
            step(
                mine,
                None if given is None else matrices(given)[j],
                float(steps[i]),
                sides[i],
                keys[i] + j,
                refreshes[i],
            )
            for j, mine in enumerate(tensors)
        ]
        # A stack keeps one clock, and has refreshed or stepped if any of its matrices has.
        outcome = next((o for o in (REFRESHED, STEPPED, DECAYED) if o in outcomes), SKIPPED)
        if moments == "reset" and outcome == REFRESHED:
            steps[i].zero_()
            for (_, _, m, v, _, _), mine in zip(tensors, outcomes, strict=True):
                if mine != REFRESHED:
                    m.zero_()
                    v.zero_()
        if outcome in (STEPPED, REFRESHED):
            steps[i].add_(1)
            stored.write()
        result.append(outcome)
    return torch.tensor(result, dtype=torch.uint8)
