"""The operators of `galore_rrf.ops` in plain PyTorch, as close to the formulae as they can be written.

For readers and tests; nothing here runs in training.  Signatures, defaults and what is returned are those
of `galore_rrf.ops`.  Arguments are not checked, memory and time are not saved, and every matrix is scaled
by a power of two where the operators do so only when they must.
"""

from galore_rrf.reference.adamw import DECAYED, REFRESHED, SKIPPED, STEPPED, adamw_, projected_adamw_
from galore_rrf.reference.moments import dequantize_moment, dynamic_code, quantize_moment, rotate_moments
from galore_rrf.reference.panels import (
    apply_block_reflector,
    explicit_basis,
    householder_reconstruction,
    orthonormal_panel,
    panel_qr,
    svd_of_product,
)
from galore_rrf.reference.range_finders import (
    CONVERGED,
    FLOOR,
    NONFINITE,
    RANK_CAP,
    ZERO,
    adaptive_range_finder,
    adaptive_range_finders,
    range_finder,
)
from galore_rrf.reference.sketch import gaussian_sketch, philox4x32_10

__all__ = [
    "CONVERGED",
    "DECAYED",
    "FLOOR",
    "NONFINITE",
    "RANK_CAP",
    "REFRESHED",
    "SKIPPED",
    "STEPPED",
    "ZERO",
    "adamw_",
    "adaptive_range_finder",
    "adaptive_range_finders",
    "apply_block_reflector",
    "dequantize_moment",
    "dynamic_code",
    "explicit_basis",
    "gaussian_sketch",
    "householder_reconstruction",
    "orthonormal_panel",
    "panel_qr",
    "philox4x32_10",
    "projected_adamw_",
    "quantize_moment",
    "range_finder",
    "rotate_moments",
    "svd_of_product",
]
