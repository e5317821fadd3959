"""Faults that the tests must see: each is planted in a copy of the package, where a few tests of the default selection must fail.

A fault is one change of text. What it replaces is short, and must occur in its file exactly once; where it no longer does, plant
the same fault in the code that took its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class NotPlantedError(Exception):
    """The text that a fault replaces does not occur exactly once."""


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in `file`, and one of `tests` (arguments of pytest) fails."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted_in(self, source: str) -> str:
        count = source.count(self.old)
        if count != 1 or self.old == self.new:
            raise NotPlantedError(
                f"{self.old!r} occurs {count} times in {self.file}; it must be there once, and be changed"
            )
        return source.replace(self.old, self.new)


CONFORMANCE = "tests/attention/test_conformance.py::test_sequence_parallel_equals_the_recurrent_form_on_every_rank"
CHUNKS = "tests/ops/test_variants.py"
SCAN = "tests/attention/test_selective_scan.py::test_every_rank_equals_the_recurrence[contiguous-all_gather-4]"
LONG = "tests/attention/test_long_convolution.py::test_every_rank_equals_the_definition_with_every_gradient"
LOSS = "tests/ops/test_chunked_cross_entropy.py"
SEGMENTS = "tests/integrations/transformers/test_stream.py::test_segments_on_one_rank_are_one_piece"

FAULTS: dict[str, Fault] = {
    "a sign in the reverse exchange": Fault(
        "longspan/state.py",
        "adjoint[index].apply(grad) + grad_in",
        "adjoint[index].apply(grad) - grad_in",
        (f"{CONFORMANCE}[simple_gla-contiguous-all_gather-3]",),
    ),
    "the gate's gradient without the term of the rank's boundary": Fault(
        "longspan/state.py",
        "(grad_out * state_in).sum(summed_dims)",
        "(0.0 * grad_out * state_in).sum(summed_dims)",
        (f"{CONFORMANCE}[simple_gla-contiguous-all_gather-3]",),
    ),
    "what later segments of time send is not handed on": Fault(
        "longspan/streaming/engine.py",
        "return torch.zeros_like(x) if found is None else found",
        "return torch.zeros_like(x)",
        ("tests/streaming/test_stream.py::test_segments_of_any_length_are_one_piece[simple_gla]",),
    ),
    "a layer of Transformers that begins every segment of time anew": Fault(
        "longspan/integrations/transformers/segment.py",
        "before = self.before.tensors.get(name)",
        "before = {}.get(name)",
        (f"{SEGMENTS}[mamba]",),
    ),
    "keys of Transformers' layers without the gradients of later segments": Fault(
        "longspan/integrations/transformers/segment.py",
        "if made is not None and held is not None:",
        "if made is not None and held is None:",
        (f"{SEGMENTS}[llama4]",),
    ),
    "a state of RWKV that goes on from a segment with smaller keys as it is": Fault(
        "longspan/integrations/transformers/functions.py",
        "torch.exp(so_far - largest)",
        "torch.exp(largest - largest)",
        (f"{SEGMENTS}[rwkv]",),
    ),
    "gradients of bfloat16 weights summed over segments in bfloat16": Fault(
        "longspan/streaming/gradients.py",
        "parameter.grad.float()",
        "parameter.grad",
        ("tests/streaming/test_gradients.py", "-k", "many_small_parts"),
    ),
    "backward passes of segments under the caller's autocast": Fault(
        "longspan/streaming/engine.py",
        "with around_backward(segment == 0), without_autocast(loss):",
        "with around_backward(segment == 0):",
        ("tests/integrations/transformers/test_stream_dtypes.py", "-k", "what_forward_computes_in_float32"),
    ),
    "a prompt's segment that does not go on from the one before it": Fault(
        "longspan/integrations/transformers/prefill.py",
        "memory = segment.take()",
        "segment.take()",
        ("tests/integrations/transformers/test_prefill_segments.py", "-k", "recurrent_gemma"),
    ),
    "keys of a document that has ended, in memory that grows": Fault(
        "longspan/models/mixers/softmax.py",
        "before[0].shape[1] <= layout.continues",
        "before[0].shape[1] >= layout.continues",
        ("tests/models/test_growing.py", "-k", "begins_with_a_stretch and hybrid"),
    ),
    "other random numbers in the second pass over a segment": Fault(
        "longspan/streaming/random_states.py",
        "self._set(self._begun.setdefault(segment, self._behind))",
        "self._set(self._behind)",
        ("tests/streaming/test_random.py::test_dropout_draws_the_same_in_both_passes",),
    ),
    "choices of experts counted once more where a segment is computed again for what was not kept": Fault(
        "longspan/streaming/llama.py",
        "self._routing if self._is_counting else None",
        "self._routing if self.counts_first else None",
        ("tests/streaming/test_composition.py::test_auxiliary_losses_of_experts_are_those_of_the_whole_sequence",),
    ),
    "balance of each segment instead of the sequence": Fault(
        "longspan/models/routing.py",
        "if of_sequence is None else of_sequence",
        "if True else of_sequence",
        ("tests/streaming/test_composition.py::test_auxiliary_losses_of_experts_are_those_of_the_whole_sequence",),
    ),
    "a tile of a long convolution without the tokens behind it, backward": Fault(
        "longspan/ops/long_convolution/fourier.py",
        "tile.stop + (tile.after if after else 0)",
        "tile.stop",
        (f"{LONG}[2-zigzag-0-taps]",),
    ),
    "a state of exponentials that enters a segment and has faded for a chunk more": Fault(
        "longspan/ops/long_convolution/exponentials.py",
        "yield chunk, state",
        "yield chunk, factors[plan.kinds[chunk]] * state",
        (f"{LONG}[2-zigzag-0-exponentials]",),
    ),
    "exponents without their gradient through what enters a segment": Fault(
        "longspan/attention/long_convolution/recurrence.py",
        "(lengths * transition.factor().conj() * found).sum(0)",
        "(0.0 * lengths * transition.factor().conj() * found).sum(0)",
        (f"{LONG}[2-zigzag-0-exponentials]",),
    ),
    "turns that go the same way in the reverse exchange": Fault(
        "longspan/state.py",
        "replace(self, rates=self.rates.conj()) if",
        "replace(self, rates=self.rates) if",
        (f"{LONG}[2-zigzag-0-complex exponentials]",),
    ),
    "a run that goes on with ranks in the order of their numbers": Fault(
        "longspan/train/trainer.py",
        "                self.take_order(order)",
        "                pass",
        ("tests/train/test_rank_order.py::test_a_run_takes_the_order_of_its_links_and_goes_on_in_it",),
    ),
    "a prefix of one stretch too few in the scan": Fault(
        "longspan/state.py",
        "pair.transition[index].apply(state)",
        "pair.transition[max(index - 1, 0)].apply(state)",
        (f"{CONFORMANCE}[simple_gla-contiguous-all_gather-3]",),
    ),
    "a document that is not cut from the one before": Fault(
        "longspan/attention/linear.py",
        "return transition.cut(cut)",
        "return transition.cut([False for _ in cut])",
        (f"{CONFORMANCE}[simple_gla-contiguous-all_gather-3]",),
    ),
    "the two segments of a rank swapped in zigzag order": Fault(
        "longspan/exchange/segments.py",
        "segment.rank * layout.num_segments + segment.slot",
        "(segment.rank + 1) * layout.num_segments - 1 - segment.slot",
        (f"{CONFORMANCE}[simple_gla-zigzag-all_gather-3]",),
    ),
    "the gradient of the query without the scale": Fault(
        "longspan/ops/decay/read.py",
        "grad_query.view_as(query), with_scale(factors.query, call.scale)",
        "grad_query.view_as(query), factors.query",
        (f"{CHUNKS}::test_chunk_form_equals_recurrent_form", "-k", "simple_gla and overlapped"),
    ),
    "NaN in the gradient that one rank receives": Fault(
        "longspan/exchange/topologies/all_gather.py",
        "return reorder_rows(outgoing, [index - first for index in own], layout)",
        'return reorder_rows(outgoing, [index - first for index in own], layout) * (float("nan") if layout.rank == 1 else 1.0)',
        (f"{CONFORMANCE}[simple_gla-contiguous-all_gather-3]",),
    ),
    "the gradient of a group of heads given to another key head": Fault(
        "longspan/ops/matrices.py",
        ".unflatten(2, (num_key_heads, -1)).sum(3)",
        ".unflatten(2, (-1, num_key_heads)).sum(2)",
        (f"{CHUNKS}::test_heads_may_share_keys_and_sizes_need_be_no_power_of_two", "-k", "simple_gla"),
    ),
    "a final state to which what entered the rank is added undecayed": Fault(
        "longspan/ops/decay/carried.py",
        "transition([(piece.start, piece.stop)]).apply(state)",
        "state * 1.0",
        (f"{CONFORMANCE}[simple_gla-contiguous-all_gather-3]",),
    ),
    "a slot's gate whose gradient has what its token wrote with the wrong sign": Fault(
        "longspan/ops/slots/scores.py",
        "gate.add(weight, dw, -1.0)",
        "gate.add(weight, dw)",
        (CHUNKS, "-k", "gradcheck and gated_slot_attention"),
    ),
    "slots that read what arrived of other ranks as if nothing had decayed since": Fault(
        "longspan/ops/slots/scores.py",
        "BlockFactors(None, None, None, None, call.factors.prefix(block))",
        "BlockFactors(None, None, None, None, call.factors.prefix(block) ** 0)",
        (f"{CONFORMANCE}[gated_slot_attention-zigzag-all_gather-2]",),
    ),
    "what RWKV-7 reads and writes of what it removes, turned round": Fault(
        "longspan/attention/rwkv7.py",
        '{"a": -kappa, "b": kappa * a, "g": w}',
        '{"a": -kappa * a, "b": kappa, "g": w}',
        (
            "tests/attention/test_published_layers.py::test_a_layer_equals_its_recurrence_on_every_rank[contiguous-1-rwkv7]",
        ),
    ),
    "a later layer of RWKV-7 without the values of the first": Fault(
        "longspan/models/mixers/rwkv7.py",
        "torch.lerp(v, first, share.to(v.dtype))",
        "torch.lerp(v, first, 0.0 * share.to(v.dtype))",
        ("tests/models/test_references.py::test_a_mixer_is_the_layer_of_its_paper[rwkv7-2]",),
    ),
    "a selective scan that goes on from the document before": Fault(
        "longspan/ops/selective_scan/block.py",
        "entering[token] if token in entering else state_of[token]",
        "state_of[token]",
        ("tests/ops/test_selective_scan.py::test_packed_documents_equal_separate_ones",),
    ),
    "a selective scan without the gradient of what later ranks read": Fault(
        "longspan/ops/selective_scan/nodes.py",
        "if grads[0] is not None:",
        "if grads[0] is None:",
        (SCAN,),
    ),
    "a selective scan that sends the rates' decays of one step": Fault(
        "longspan/ops/selective_scan/passes.py",
        "copy_(passed.distance.unsqueeze(1))",
        "copy_(loaded.steps[:1].transpose(0, 1))",
        (SCAN,),
    ),
    "a selective scan that takes for nothing what is left": Fault(
        "longspan/ops/selective_scan/sums.py",
        "torch.float32: -60.0",
        "torch.float32: -6.0",
        ("tests/ops/test_selective_scan_sums.py::test_a_sum_equals_the_recurrence[all of it-state-float32]",),
    ),
    "a selective scan that leaves out what is not finite": Fault(
        "longspan/ops/selective_scan/sums.py",
        "return all(math.isfinite(",
        "return all(True or math.isfinite(",
        ("tests/ops/test_selective_scan_sums.py::test_a_token_that_is_not_finite_is_in_the_sum[nothing-state-x-nan]",),
    ),
    "a halo that is one token too early": Fault(
        "longspan/exchange/halo.py",
        "(first_length[source.rank] if source.slot else 0) - source.start",
        "(first_length[source.rank] if source.slot else 0) - source.start - (start > source.start)",
        ("tests/attention/test_convolution.py::test_every_rank_equals_the_definition_with_every_gradient", "-k", "3-"),
    ),
    "a causal mask that lets queries see the next key": Fault(
        "longspan/layout/visibility.py",
        "ahead = 0 if visibility.causal",
        "ahead = 1 if visibility.causal",
        ("tests/attention/test_softmax.py::test_every_rank_equals_dense_attention", "-k", "all_gather-3"),
    ),
    "labels that are shifted after the split": Fault(
        "longspan/layout/sequence_layout.py",
        "return self.shard(shifted_labels(self, tokens, ignore_index))",
        "labels = self.shard(shifted_labels(self, tokens, ignore_index))\n"
        "        return torch.where(labels < 0, ignore_index, self.shard(tokens[:, : self.seq_len]).roll(-1, 1))",
        ("tests/test_layout.py",),
    ),
    "the gradient of a head's matrix counted twice": Fault(
        "longspan/ops/chunked/sums.py",
        "total.addmm_(first.t(), second)",
        "total.addmm_(first.t(), second, alpha=2)",
        (f"{LOSS}::test_loss_and_gradients_are_those_of_all_logits",),
    ),
    "tokens behind the last whole chunk left out of the loss": Fault(
        "longspan/ops/chunked/sums.py",
        "for first in range(0, num_tokens, chunk_size))",
        "for first in range(0, max(1, num_tokens // chunk_size) * chunk_size, chunk_size))",
        (f"{LOSS}::test_loss_and_gradients_are_those_of_all_logits",),
    ),
    "ignored tokens in the gradients of a loss in chunks": Fault(
        "longspan/ops/chunked/loss_node.py",
        "grad_logits.masked_fill_(ignored.unsqueeze(1), 0.0)",
        "grad_logits.masked_fill_(ignored.unsqueeze(1), 1.0)",
        (f"{LOSS}::test_any_label_may_be_the_ignored_one",),
    ),
    "matrices into the residual stream drawn as all others": Fault(
        "longspan/models/initial.py",
        "self._residual_std if residual else STD",
        "STD",
        (
            "tests/models/test_initial_weights.py::test_matrices_are_drawn_as_llamas_and_what_is_no_projection_is_not[gla]",
        ),
    ),
    "a cache whose rows stay where they are in beam search": Fault(
        "longspan/models/hf/cache.py",
        "group.take([place_of[chosen[row]] for row in rows], rows)",
        "group.take([row % len(group.rows) for row in rows], rows)",
        ("tests/models/hf/test_generation.py", "-k", "beams"),
    ),
    "a token written where another text has written one": Fault(
        "longspan/models/mixers/growing.py",
        "self.stop == self.room.stop and",
        "",
        ("tests/models/test_growing.py", "-k", "several_texts"),
    ),
    "channels of a scaled rotary embedding that turn faster than before": Fault(
        "longspan/models/rotary.py",
        ".clamp(0, 1)",
        ".clamp(0)",
        ("tests/models/test_rotary.py", "-k", "frequencies"),
    ),
    "experts that each rank balances by itself": Fault(
        "longspan/models/routing.py",
        "choices = sum_over_ranks(choices, ranks.group)",
        "choices = sum_over_ranks(choices, ranks.group) * 0 + choices",
        (
            "tests/parallel/test_experts.py::test_loss_gradients_and_statistics_are_those_of_one_process",
            "-k",
            "degrees0",
        ),
    ),
    "the weight of an expert left out of the gradient of its matrices": Fault(
        "longspan/ops/experts/swiglu.py",
        "grad_inner = (grad_weighted * w).to(dtype)",
        "grad_inner = grad_weighted.to(dtype)",
        ("tests/ops/test_expert_swiglu.py::test_output_and_gradients_are_those_of_each_token_alone",),
    ),
    "an expert's output given to the token before": Fault(
        "longspan/ops/experts/dispatch.py",
        "rows[self.row[:, number]]",
        "rows[self.row[:, number].roll(1)]",
        ("tests/ops/test_expert_swiglu.py::test_output_and_gradients_are_those_of_each_token_alone",),
    ),
    "messages of a chain that end a segment too early": Fault(
        "longspan/exchange/chain.py",
        "later.start not in bounds",
        "later.stop not in bounds",
        ("tests/exchange/test_exchange.py", "-k", "is_the_scan and ring-ScalarDecay"),
    ),
    "of the gradients that later stretches give to keys the last one alone": Fault(
        "longspan/attention/softmax/key_heads.py",
        "own += grad",
        "own.copy_(grad)",
        ("tests/attention/test_earlier_keys.py::test_stretches_equal_one_call[ring-2]",),
    ),
    "a document that sees the keys of the one before it, in an earlier stretch": Fault(
        "longspan/attention/softmax/earlier.py",
        "return self.num_tokens if layout.continues is None else layout.continues",
        "return self.num_tokens",
        ("tests/attention/test_earlier_keys.py::test_stretches_equal_one_call[ring-2]",),
    ),
    "a document that begins with a stretch and goes on from the state before": Fault(
        "longspan/attention/linear.py",
        "if initial_state is None or layout.continues == 0:",
        "if initial_state is None:",
        ("tests/attention/test_stretches.py::test_a_memory_state_passes_from_stretch_to_stretch[simple_gla-2]",),
    ),
}


def outcome(fault: Fault, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the fault's tests in a copy of the project in `folder` that has it."""
    for part in ("longspan", "tests", "benchmarks"):
        shutil.copytree(PROJECT_ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT_ROOT / "pyproject.toml", folder)
    planted = folder / fault.file
    planted.write_text(fault.planted_in(planted.read_text(encoding="utf-8")), encoding="utf-8")
    # The tests of the copy are a session of their own, and import the copy even where another one is installed.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *fault.tests]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
