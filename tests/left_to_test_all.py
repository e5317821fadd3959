"""Tests that only `make test-all` runs, because others of their kind run in `make test` already: by what their names match.

A test that is slow by itself has the marker where it stands. Here are parts of grids, of which `make test` has at least one of each
row and column, so that it stays within twelve minutes on two cores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

PATTERNS: tuple[str, ...] = (
    r"attention/test_autocast\.py::test_ranks_give_the_same\[kda",
    r"attention/test_bidirectional\.py::.*\[linear_attention-contiguous-3",
    r"attention/test_conformance\.py::test_sequence_parallel_.*-all_gather-4\]",
    r"attention/test_conformance\.py::test_every_topology_.*-8\]",
    r"attention/test_conformance\.py::test_every_topology_.*-(linear_attention|retention|gated_delta_rule)-",
    r"attention/test_conformance\.py::test_(every_topology|random_packings).*[-[](gla_with_bonus|comba|gated_delta_product)[-\]]",
    r"attention/test_conformance\.py::test_sequence_parallel_.*\[(gla_with_bonus|comba)-",
    r"attention/test_convolution\.py::test_every_rank_.*\[[23]-contiguous",
    r"attention/test_host_waits\.py::.*-documents1\]",
    r"attention/test_isolation\.py::test_nan_.*_document\[(linear_attention|retention|kda|gated_delta_rule)-",
    r"attention/test_isolation\.py::test_nan_.*_document\[(gla_with_bonus|comba|gated_delta_product)-",
    r"attention/test_isolation\.py::test_nan_.*other_layers\[.*-2-",
    r"attention/test_metadata\.py::.*\[kernels of gla",
    r"attention/test_partial_losses\.py::.*-(neighbour|ring|pipelined)\]",
    r"attention/test_softmax_scale\.py::.*\[(ring|all_gather)-3\]",
    r"attention/test_softmax_scores\.py::test_softcap_.*-2\]",
    r"attention/test_softmax_state\.py::test_ranks_may_use_.*\[(ring|all_gather)",
    r"commands/test_torchrun\.py::test_doctor_looks",
    r"exchange/test_exchange\.py::test_an_exchange_.*-contiguous-8\]",
    r"exchange/test_exchange\.py::test_an_exchange_.*-(HeadDecay|Identity)-.*-[348]\]",
    r"exchange/test_modes\.py::.*-autocast\]",
    r"exchange/test_out_of_step\.py::.*\[detaches the last layer-",
    r"exchange/test_small_shapes\.py::.*\[(two_level-zigzag-4-2|all_to_all|pipelined)",
    r"exchange/test_two_level\.py::test_any_shape_.*-contiguous\]",
    r"integrations/transformers/test_compile\.py::.*\[llama",
    r"integrations/transformers/test_dtypes\.py::.*\[olmo_hybrid",
    r"models/test_every_mixer\.py::test_ranks_equal_.*-1\]",
    r"models/test_parallelize\.py::test_a_hybrid_.*\[3-contiguous",
    r"ops/test_causality\.py::test_a_gate_.*\[(simple_gla|retention)-100-",
    r"ops/test_delta_digits\.py::test_chunks_.*-dtype1\]",
    r"ops/test_delta_digits\.py::test_rows_.*\[(comba|gated_delta_product)-(g in \[-1, 0|g in \[-20|one reset|17 resets of -inf)",
    r"ops/test_delta_nonfinite\.py::.*-(63|64|65)-(delta_rule|kda)\]",
    r"ops/triton/test_convolution\.py::test_kernels_equal_.*\[(None-[135]|silu-5)",
    r"ops/triton/test_decay\.py::test_gradients_may_.*\[(simple_gla|retention)",
    r"ops/triton/test_decay\.py::test_kernels_equal_.*\[(31|16)-",
    r"ops/triton/test_decay\.py::test_packed_.*(bfloat16-gla|float16-linear_attention|float16-gla)",
    r"ops/triton/test_decay\.py::test_torch_compile_.*\[gla-documents2",
    r"ops/triton/test_precision\.py::.*\[(gla|linear_attention)",
    r"ops/triton/test_ranks\.py::.*\[(simple_gla-3|linear_attention-2|retention-2)",
    r"parallel/test_materialise\.py::.*(dp_shard=4, sp=1|dp_replicate=2|shard_over_sp=True)",
    r"test_bench\.py::test_the_command_starts_its_ranks",
    r"test_readme\.py::test_commands_run\[\.venv/bin/torchrun",
    r"tracing/test_compile\.py::test_one_graph_.*-False\]",
    r"tracing/test_models\.py::test_one_graph_.*\[simple_gla-True",
)


def leave(items: Sequence[pytest.Item]) -> list[str]:
    """Mark as slow what matches; the patterns that nothing matches are returned."""
    unused = []
    for pattern in PATTERNS:
        matched = [item for item in items if re.search(f"tests/{pattern}", item.nodeid)]
        for item in matched:
            item.add_marker(pytest.mark.slow)
        if not matched:
            unused.append(pattern)
    return unused
