"""Sequence parallelism applied to a model from outside, and the sum of its gradients over ranks."""

from longspan.parallel.adapters import Adapter, register_adapter
from longspan.parallel.apply import parallelize, sum_gradients, unparallelize

__all__ = ["Adapter", "parallelize", "register_adapter", "sum_gradients", "unparallelize"]
