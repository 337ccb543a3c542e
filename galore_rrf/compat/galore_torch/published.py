"""What that package's optimizers have in common."""

from __future__ import annotations

from galore_rrf.options import SubspaceKeys

PUBLISHED: SubspaceKeys = {"preset": "published", "projector": "svd", "arithmetic": "galore_torch"}
"""Defaults of the group keys: refreshes every 200 steps by an exact SVD, moments kept, scale .25."""
