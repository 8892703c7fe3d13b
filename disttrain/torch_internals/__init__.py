"""Accesses every private name of torch that disttrain uses, each behind one function.

A private name may disappear or change with any release of torch. Each function therefore has a public alternative, and
a probe decides once per process which of the two is used. The probe is a small call whose result is known, not a
version number. Where torch offers no alternative, a function `missing_for_...` returns the missing name, and the caller
rejects the one feature that needs it.
"""

from disttrain.torch_internals.kernels import (
    copy_each,
    divide_each,
    flatten,
    multiply_each,
    norm_each,
    unflatten,
    zero_each,
)
from disttrain.torch_internals.tensors import map_tensors, version_of, version_reader

__all__ = [
    "copy_each",
    "divide_each",
    "flatten",
    "map_tensors",
    "multiply_each",
    "norm_each",
    "unflatten",
    "version_of",
    "version_reader",
    "zero_each",
]
