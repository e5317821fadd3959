"""Sequence parallelism applied to a model from outside, and the sum of its gradients over ranks."""

from longspan.parallel.apply import parallelize, sum_gradients

__all__ = ["parallelize", "sum_gradients"]
