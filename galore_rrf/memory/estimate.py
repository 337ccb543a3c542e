"""Bytes of a training run from the shapes of its parameters, nothing allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Any

import torch
from torch import Tensor, nn

from galore_rrf._binding import quick_entries
from galore_rrf.memory.activations import llama_activations
from galore_rrf.options import SubspaceOptions
from galore_rrf.param_groups import EXCLUDE, INCLUDE, NamedParameter, param_groups
from galore_rrf.subspace import (
    LEFT,
    OPTION_TENSORS,
    RIGHT,
    TUCKER,
    as_matrices,
    bases_of,
    compute_dtype,
    is_projected,
    matrix_count,
    new_state,
    zero_moments,
)

OPTIMIZERS = ("adamw", "galore", "lora")

_STEP = 4  # bytes of a step count, an fp32 scalar
_TILE = 2**17  # entries of the tile that half precision is cast in (csrc/range_finder/product.cpp)
_ROTATED = 256  # columns of moments rotated at a time (csrc/optimizer/rotate.cpp)
_RESIDUAL_TILE = 2**16  # entries of the residual that are there at a time (csrc/optimizer/row_tiles.cpp)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part of training; all exact but for `workspace` and `activations`, which are estimates.

    Attributes:
        parameters: of the model, a number; adapters are not counted.
        weights: of the model and of adapters.
        gradients: of what is trained.
        master_weights: fp32 copies of what is trained, in mixed precision.
        momentum, variance: first and second moments.
        bases: of the subspaces.
        buffers: what `residual` and `basis_from` keep beside these: an error, an average, a norm.
        steps: the count that the state of every parameter has.
        workspace: what a step allocates beyond all that, at its peak: on a CPU, refreshes at fixed rank from
            a warm start.
        activations: what a forward pass keeps for the backward pass; None: not estimated.
    """

    parameters: int
    weights: int
    gradients: int
    master_weights: int
    momentum: int
    variance: int
    bases: int
    buffers: int
    steps: int
    workspace: int
    activations: int | None = None

    @property
    def state(self) -> int:
        """What `state_bytes` counts after the first step."""
        return self.momentum + self.variance + self.bases + self.buffers + self.steps

    @property
    def held(self) -> int:
        """What is there from step to step; exact."""
        return self.weights + self.gradients + self.master_weights + self.state

    @property
    def total(self) -> int:
        """At the peak: activations are gone when a step needs its workspace.  An estimate."""
        return self.held + max(self.workspace, self.activations or 0)


def estimate(
    model: nn.Module,
    optimizer: str = "adamw",
    *,
    rank: int | None = None,
    proj_type: str = "std",
    state_dtype: torch.dtype | None = None,
    projected_state_dtype: torch.dtype | None = None,
    residual: str = "drop",
    basis_from: str = "gradient",
    include: Sequence[str] = INCLUDE,
    exclude: Sequence[str] = EXCLUDE,
    dtype: torch.dtype | None = None,
    mixed_precision: bool = False,
    tokens: int | None = None,
    checkpointing: bool = False,
    threads: int | None = None,
) -> MemoryEstimate:
    """The memory that training `model` takes, from shapes alone: it may be on the meta device.

    What requires no gradient has weights alone, so a model with adapters in it (peft) is ``"adamw"``.

    Args:
        model: on any device, in any dtype.
        optimizer: ``"adamw"``: torch.optim.AdamW.  ``"galore"``: GaLoreAdamW over
            ``param_groups(model, rank)``, moments in fp32 where projected (fp64 for fp64 weights).
            ``"lora"``: torch.optim.AdamW over adapters of `rank` beside every matrix in the projected group
            of ``param_groups(model, rank)``, which is frozen, and over all other parameters; adapters in
            the dtype of the weights (peft with ``autocast_adapter_dtype=False``).
        rank: for ``"galore"`` (with `tolerance` the cap) and ``"lora"``.
        proj_type, state_dtype, residual, basis_from: as of `SubspaceOptions`; the last three with ``"galore"``
            alone.
        projected_state_dtype: of what is projected, where its group or preset has another; None: `state_dtype`.
        include, exclude: as of `param_groups`.
        dtype: of weights and gradients, and of the moments that are not projected; None: as they are.
        mixed_precision: weights and gradients in bf16 (or `dtype`), the optimizer over fp32 master weights;
            the cast of gradients for it is not counted.
        tokens: in one forward pass, for the estimate of activations; the model needs the ``config`` of a
            Llama.
        checkpointing: of activations.
        threads: each has a matrix in flight; None: ``torch.get_num_threads()``.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed; ValueError too where no
            parameter is to be projected.
    """
    options = SubspaceOptions(
        rank=rank,
        proj_type=proj_type,
        state_dtype=projected_state_dtype or state_dtype,
        residual=residual,
        basis_from=basis_from,
    )
    _check(optimizer, options, dtype, mixed_precision, tokens, threads)
    if mixed_precision:
        dtype = dtype or torch.bfloat16
    stand_ins = {
        p: torch.empty_like(p, device="meta", dtype=dtype if p.is_floating_point() else None)
        for p in model.parameters()
    }
    frozen = [stand_ins[p] for p in stand_ins if not p.requires_grad]
    named = model.named_parameters(remove_duplicate=False)
    trained = [(name, stand_ins[p]) for name, p in named if p.requires_grad]
    chosen, plain = _split(trained, rank, include, exclude)
    parameters = sum(p.numel() for p in stand_ins.values())
    adapters = 0
    projected: list[Tensor] = []
    if optimizer == "galore":
        projected = [p for p in chosen if is_projected(p, options)]
        plain += [p for p in chosen if not is_projected(p, options)]
    elif optimizer == "lora":
        assert rank is not None
        adapters = len(chosen)
        frozen += chosen
        plain += [factor for p in chosen for factor in _adapter(p, rank)]

    weights = _bytes(frozen + projected + plain)
    gradients = _bytes(projected + plain)
    master_weights = 0
    if mixed_precision:
        projected, plain = [p.float() for p in projected], [p.float() for p in plain]
        master_weights = _bytes(projected + plain)
    states = [new_state(p, options, key=0) for p in projected]
    moments = [*states, *(_plain_moments(p, state_dtype) for p in plain)]
    activations = None
    if tokens is not None:
        activations = llama_activations(
            getattr(model, "config", None),
            tokens,
            dtype or next((p.dtype for p in stand_ins.values()), torch.float32),
            adapter_rank=rank or 0,
            adapters=adapters,
            checkpointing=checkpointing,
        )
    return MemoryEstimate(
        parameters=parameters,
        weights=weights,
        gradients=gradients,
        master_weights=master_weights,
        momentum=_bytes_of(moments, "exp_avg"),
        variance=_bytes_of(moments, "exp_avg_sq"),
        bases=_bytes(basis for state in states for basis in bases_of(state).values()),
        buffers=_bytes(state[name] for state in states for name in OPTION_TENSORS if name in state),
        steps=_STEP * len(projected + plain),
        workspace=_workspace(plain, projected, states, options, threads or torch.get_num_threads()),
        activations=activations,
    )


def _check(
    optimizer: str,
    options: SubspaceOptions,
    dtype: torch.dtype | None,
    mixed_precision: bool,
    tokens: int | None,
    threads: int | None,
) -> None:
    """What `SubspaceOptions` does not check."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"Invalid optimizer: {optimizer!r} (must be one of {', '.join(map(repr, OPTIMIZERS))})"
        )
    if (options.rank is None) != (optimizer == "adamw"):
        allowed = "None" if optimizer == "adamw" else "a positive integer"
        raise ValueError(f"Invalid rank: {options.rank!r} (must be {allowed} with optimizer={optimizer!r})")
    for name in ("state_dtype", "residual", "basis_from") if optimizer != "galore" else ():
        value, default = getattr(options, name), getattr(SubspaceOptions, name)
        if value != default:
            raise ValueError(f"Invalid {name}: {value!r} (must be {default!r} with optimizer={optimizer!r})")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"Invalid dtype: {dtype!r} (must be a real floating-point torch.dtype or None)")
    if mixed_precision and dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"Invalid dtype: {dtype} (must be torch.bfloat16 or torch.float16 in mixed precision)"
        )
    for name, value in (("tokens", tokens), ("threads", threads)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"Invalid {name}: {value!r} (must be a positive integer or None)")
        if value is not None and value < 1:
            raise ValueError(f"Invalid {name}: {value!r} (must be a positive integer or None)")


def _split(
    named: list[NamedParameter], rank: int | None, include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of the projected group, and all others; tied ones once."""
    if rank is None:
        return [], list(dict.fromkeys(p for _, p in named))
    groups = param_groups(named, rank, include=include, exclude=exclude)
    chosen, plain = ([p for _, p in group["params"]] for group in (*groups, {"params": []})[:2])
    return chosen, plain


def _adapter(p: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both factors of a LoRA adapter: r x in, out x r."""
    *stack, m, n = as_matrices(p).shape
    return p.new_empty(*stack, rank, n), p.new_empty(*stack, m, rank)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _bytes_of(states: Iterable[Mapping[str, Tensor]], name: str) -> int:
    """Of a moment and its scale."""
    return sum(_bytes(state[key] for key in (name, f"{name}_scale") if key in state) for state in states)


def _plain_moments(p: Tensor, state_dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    if state_dtype is None:
        return {"exp_avg": p, "exp_avg_sq": p}  # torch's, like the parameter
    return zero_moments(p, (p.numel(),), state_dtype)


def _workspace(
    plain: list[Tensor],
    projected: list[Tensor],
    states: list[dict[str, Any]],
    options: SubspaceOptions,
    threads: int,
) -> int:
    """The larger of what plain parameters need, one after the other, and projected ones, side by side.

    torch's AdamW takes one parameter at a time on a CPU and holds a root and a quotient of its size; its
    foreach path, the default on a GPU, holds the roots of all, its fused path nothing.
    """
    of_plain = 2 * max(map(_bytes, ([p] for p in plain)), default=0)
    of_one_side, of_modes, apart, averaged, coefficients = [], [0], [0], [0], 0
    for p, state in zip(projected, states, strict=True):
        if state["side"] not in (RIGHT, LEFT):
            of_modes.append(_tucker_workspace(p, state))
            continue
        of_matrix = _residual_workspace(p, state, options.residual)
        if options.basis_from == "gradient":
            fed = _fed(p, options.residual) // matrix_count(p)
            of_matrix = max(of_matrix, fed + _refresh_workspace(p, state))
        else:  # one parameter after the other, before the step of all; its projected gradient waits for that
            coefficients += compute_dtype(p).itemsize * state["exp_avg"].numel()
            apart.append(_apart_workspace(p, state, options.basis_from))
            averaged.append(_bytes([p]) if options.basis_from == "average" else 0)  # what is finite of G
        of_one_side += [of_matrix] * matrix_count(p)
    of_all = coefficients + max(*apart, sum(nlargest(threads, of_one_side)), 0)
    return max(of_plain, *averaged, of_all, *of_modes)


def _refresh_workspace(p: Tensor, state: Mapping[str, Any]) -> int:
    """Bytes that one matrix of `p` needs in a step that refreshes by a warm start and rotates.

    Read off csrc/range_finder/fixed_rank.cpp and csrc/optimizer; docs/benchmarks.md has such a peak measured.
    """
    side, length, rank = _sizes(p, state)
    dtype = compute_dtype(p)
    long, short = length * rank, side * rank  # entries of the projected gradient, of the basis
    loaded = 0 if state["exp_avg"].dtype == dtype else 2 * long  # both moments, to be rotated
    # The projected gradient and the basis, the rotation, moments in tiles
    rotating = long + short + 2 * rank**2 + 4 * rank * min(_ROTATED, length) + loaded
    return max(_finding_workspace(p, state), dtype.itemsize * rotating + 8 * length)


def _finding_workspace(p: Tensor, state: Mapping[str, Any]) -> int:
    """The same of a warm start alone."""
    side, length, rank = _sizes(p, state)
    size = compute_dtype(p).itemsize
    half = p.element_size() < size
    long, short = length * rank, side * rank
    tile = min(_TILE, side * length) if half else 0
    # The projected gradient is there throughout; beside it
    entries = long + max(
        2 * long,  # the inner factor and its LU
        long + short + tile,  # the inner factor and the sketch
        3 * short,  # the sketch, its reflectors, the basis
    )
    return size * entries + 8 * length  # the order of the rows of the LU


def _sizes(p: Tensor, state: Mapping[str, Any]) -> tuple[int, int, int]:
    """Of one matrix of `p`: the projected side, the other one, the rank."""
    side, rank = state["basis"].shape[-2:]
    return side, state["exp_avg"].numel() // (rank * matrix_count(p)), rank


def _fed(p: Tensor, residual: str) -> int:
    """Bytes of the gradients of `p` with the errors that they are fed."""
    return _bytes([p]) if residual == "feedback" else 0


def _residual_workspace(p: Tensor, state: Mapping[str, Any], residual: str) -> int:
    """Bytes that one matrix of `p` needs where its residual is put to use, after the refresh or with its end.

    Read off csrc/optimizer/residual_step.cpp, complement.cpp, limited_scales.cpp, orthogonalized.cpp and
    projected_adamw.cpp.
    """
    side, length, rank = _sizes(p, state)
    size = compute_dtype(p).itemsize
    half = p.element_size() < size
    long, short, entries = length * rank, side * rank, side * length
    cast = short if half else 0  # the basis
    tile = min(_RESIDUAL_TILE, entries)
    tiles = 3 * tile if half else tile  # of the gradient and the weight too
    if residual == "drop":
        return 0
    if residual == "feedback":
        in_tiles = min(_TILE, entries) if half else 0
        kept = 3 * long + cast + in_tiles  # the projected gradient, the step, the former negated
        lost = 4 * short + rank**2 + in_tiles + cast // 2  # what rotation loses, as one product
        moved = short + 2 * rank**2 + 4 * rank * min(_ROTATED, length)
        rotated = 5 * long + max(lost, moved)  # moments, and the first of them before and after
        return _fed(p, residual) // matrix_count(p) + size * max(kept, rotated)
    step = size * (2 * long + cast)  # the projected gradient beside the step
    if residual == "orthogonalized":
        others = side - rank  # dimensions that E lies in
        outside, gram = others * length, min(others, length) ** 2
        # Bytes of an entry in the iteration: of large fp32 matrices it is in bf16 where a CPU has that.
        least = quick_entries()
        quick = 2 if size == 4 and least is not None and outside >= least else size
        coordinates = size * (outside + (2 * long if half else long))
        iteration = quick * (outside + max(5 * gram, gram + outside))
        made = size * others * rank + max(coordinates, (size + quick) * outside, iteration)
        return step + size * (entries + tile) + max(made, size * (long + tiles - tile))
    if residual == "normalized":
        columns = as_matrices(p).shape[-1]  # one scale for each, and what others are made of, partly in fp64
        return step + size * (long + entries + columns + tiles - tile) + 25 * max(side, length)
    if residual == "scaled":  # norms of columns in fp64, of which the scales are made
        return step + max(size * (tiles + length), size * tile + 36 * length)
    return step + size * tiles


def _apart_workspace(p: Tensor, state: Mapping[str, Any], basis_from: str) -> int:
    """Bytes that a refresh outside the step operator needs, beyond the projected gradient that it leaves.

    Read off galore_rrf/refresh.py: of a stack all matrices at once, but for the range finder and the rotation.
    """
    side, length, rank = _sizes(p, state)
    size, count = compute_dtype(p).itemsize, matrix_count(p)
    half = p.element_size() < size
    long, short = count * length * rank, count * side * rank
    source = size * p.numel() if basis_from == "momentum" else 0
    cast = size * p.numel() if half else 0  # the gradient, and where it is added to the momentum
    copied = long if half and basis_from == "average" else 0
    found = size * (short + copied - length * rank) + _finding_workspace(p, state)
    rotation = 2 * rank**2 + 4 * rank * min(_ROTATED, length)
    old = 3 * short // 2 if half else 0  # the basis before cast, the new one rounded
    return max(
        source + cast + size * (long + short),
        source + found,
        size * (2 * long + short + max(rotation + old, long)),
    )


def _tucker_workspace(p: Tensor, state: Mapping[str, Any]) -> int:
    """The same of a parameter with more than one basis (galore_rrf/tucker.py), all of it."""
    size, core = compute_dtype(p).itemsize, state["exp_avg"].numel()
    half = p.element_size() < size
    bases = list(bases_of(state).values())
    left, peak, held = p.numel(), 0, 0  # what is left of the gradient; besides, the bases found before
    for i, basis in enumerate(bases):
        side, rank = basis.shape[-2:]
        short, long = basis.numel(), left // side * rank
        unfolded = left if i and state["side"] == TUCKER else 0  # a copy
        found = long + max(2 * long, long + short, 4 * short) + (short if half else 0)
        found += 8 // size * (left // side)  # the order of the rows of the LU
        peak = max(peak, held + (left if i else 0) + unfolded + found)
        left, held = long, held + short
    rotation = 2 * rank**2 + 4 * rank * min(_ROTATED, core // rank)
    loaded = 0 if state["exp_avg"].dtype == compute_dtype(p) else 2 * core
    expanded = p.numel() // bases[0].shape[-2] * rank
    return size * max(
        (p.numel() if half else 0) + max(peak, held + 3 * core + rotation + loaded),
        (p.numel() + held if half else 0) + 3 * core + expanded,
    )
