"""What cannot run in segments of time is refused, with the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan import InputError, LayoutError, SequenceLayout, parallelize, stream
from longspan.exchange import Auto, Ring, TopK
from longspan.models.hf import LinearLlamaForCausalLM
from longspan.models.mixers.simple_gla import SimpleGLAMixer
from longspan.streaming import SegmentDone
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import raised, run_on_ranks
from tests.streaming.whole import labels_of


def run(streamed: Any, tokens: Tensor, layout: Any = None, **options: Any) -> Tensor:
    loss: Tensor = streamed.forward_backward(tokens[:, :-1], labels_of(tokens), layout, **options)
    return loss


@pytest.mark.parametrize("segment_tokens", [0, -1, 2.0, True, "4096", None])
def test_a_number_of_tokens_that_is_none_is_refused(segment_tokens: Any) -> None:
    with pytest.raises(InputError, match="segment_tokens must be an int of at least 1"):
        stream(tiny_model(num_layers=1), segment_tokens)


def test_a_model_that_no_adapter_knows_is_refused_by_its_class() -> None:
    with pytest.raises(InputError, match=r"LinearLlama3, and .*; got TransformerEncoderLayer.*register_stream"):
        stream(nn.TransformerEncoderLayer(8, 2), 16)
    with pytest.raises(InputError, match=r"takes a torch\.nn\.Module"):
        stream("model", 16)  # type: ignore[arg-type]


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.ModuleDict({"model": tiny_model(pattern="L", num_layers=1)})


def test_what_is_around_a_model_is_refused_with_the_part_to_pass() -> None:
    around = Wrapped()
    with pytest.raises(InputError, match=r"got Wrapped, whose part 'inside.model' is a LinearLlama3. Pass that part"):
        stream(around, 16)
    model: Any = around.inside["model"]
    outers: list[Any] = [torch.compile(model, backend="eager"), LinearLlamaForCausalLM.of(model)]
    for outer in outers:
        with pytest.raises(InputError, match=rf"got {type(outer).__name__}, whose part '.*' is a LinearLlama3"):
            stream(outer, 16)


class Bidirectional(SimpleGLAMixer):
    reads_future = True


def test_a_layer_that_reads_later_tokens_is_refused_by_name() -> None:
    model: Any = tiny_model(pattern="L", num_layers=3)
    model.blocks[1].mixer = Bidirectional(model.config, 1)
    with pytest.raises(InputError, match="layer 1, Bidirectional, reads later tokens"):
        stream(model, 16)


def test_an_exchange_with_error_feedback_is_refused() -> None:
    for exchange in (Ring(codec=TopK(0.1, feedback=True)), Auto(codec=TopK(0.1, feedback=True))):
        with pytest.raises(
            InputError, match=r"error feedback, and a segment of time is computed twice.*without feedback"
        ):
            stream(parallelize(tiny_model(pattern="L", num_layers=1), None, exchange=exchange), 16)
    stream(parallelize(tiny_model(pattern="L", num_layers=1), None, exchange=Ring(codec=TopK(0.1))), 16)


def test_an_exchange_with_error_feedback_is_refused_wherever_parallelize_came() -> None:
    model = tiny_model(pattern="NL", num_layers=2)
    streamed = stream(model, 8)
    parallelize(model, None, exchange=Ring(codec=TopK(0.5, feedback=True)))
    with pytest.raises(InputError, match=r"error feedback, and a segment of time is computed twice"):
        run(streamed, random_tokens(1, 21))
    parallelize(model, None, exchange=Ring(codec=TopK(0.5)))
    run(streamed, random_tokens(1, 21))


def too_short_on_rank() -> tuple[str, str]:
    model = parallelize(tiny_model(pattern="L", num_layers=1), None)
    tokens = random_tokens(1, 41)
    return raised(run, stream(model, 2), tokens, SequenceLayout(40))


def test_a_segment_shorter_than_the_ranks_is_refused_with_the_least_that_works() -> None:
    for _, message in run_on_ranks(3, too_short_on_rank):
        assert "segment_tokens is 2, fewer than the 3 ranks" in message and "The least that works is 3" in message


def cut_differently_on_rank() -> tuple[tuple[str, str], float]:
    """What is said, and the loss once the ranks agree."""
    model, tokens = parallelize(tiny_model(pattern="L", num_layers=1), None), random_tokens(1, 41)
    layout = SequenceLayout(40)
    # One of the ranks has cut so before, and is asked all the same.
    run(stream(model, 9), tokens, layout)
    wrong = raised(run, stream(model, 8 + dist.get_rank()), tokens, layout)
    return wrong, float(run(stream(model, 9), tokens, layout))


def test_ranks_that_cut_a_sequence_differently_are_all_told() -> None:
    for (kind, message), loss in run_on_ranks(2, cut_differently_on_rank):
        assert kind == "InputError" and "segment_tokens 8, 9. Give all of them the same" in message
        assert loss > 0


def test_a_model_that_does_otherwise_in_the_second_pass_is_refused() -> None:
    model: Any = tiny_model(pattern="L", num_layers=1, operator="mamba2")
    calls: list[None] = []

    def cut(module: Any, given: Any, found: Any) -> Any:
        calls.append(None)
        out, memory = found
        if len(calls) > 3 and memory is not None:
            memory.tensors["state"] = memory.tensors["state"][..., :-1]
        return out, memory

    model.blocks[0].mixer.register_forward_hook(cut)
    with pytest.raises(InputError, match=r"remembers 0\.state of shape .*must do the same in both passes"):
        run(stream(model, 10), random_tokens(1, 41))


def test_tokens_and_labels_that_do_not_fit_are_refused() -> None:
    streamed, tokens = stream(tiny_model(pattern="L", num_layers=1), 8), random_tokens(1, 21)
    for wrong in (tokens[0], tokens.float(), tokens[:, :0]):
        with pytest.raises(InputError, match="tokens must be int64"):
            streamed.forward_backward(wrong, tokens)
    with pytest.raises(InputError, match="labels must be the token after each"):
        streamed.forward_backward(tokens[:, :-1], tokens)
    with pytest.raises(InputError, match="num_valid must be"):
        run(streamed, tokens, num_valid=-1)
    with pytest.raises(InputError, match="layout must be a SequenceLayout"):
        run(streamed, tokens, layout=20)
    with pytest.raises(LayoutError, match="the whole sequence of the layout, 19 tokens; got 20"):
        run(streamed, tokens, layout=SequenceLayout.local(19))
    with pytest.raises(InputError, match="keep_every"):
        stream(tiny_model(num_layers=1), 8, keep_every=0)


class StoppedError(Exception):
    pass


def test_what_is_called_between_segments_hears_of_each_and_may_end_the_step() -> None:
    model, tokens = tiny_model(pattern="L", num_layers=1), random_tokens(1, 31)
    heard: list[SegmentDone] = []
    run(stream(model, 10, keep_every=2), tokens, between=heard.append)
    forward, backward, again = (
        [done.segment for done in heard if done.kind == kind] for kind in ("forward", "backward", "again")
    )
    assert (forward, backward, again) == ([0, 1], [2, 1, 0], [0])
    assert all(done.num_segments == 3 for done in heard)

    def stop(done: SegmentDone) -> None:
        if done == SegmentDone("backward", 2, 3):
            raise StoppedError

    with pytest.raises(StoppedError):
        run(stream(model, 10), tokens, between=stop)


@pytest.mark.parametrize("changes", [{}, {"num_experts": 4, "balance_loss_weight": 0.0, "z_loss_weight": 0.0}])
def test_a_loss_without_gradients_is_the_same(changes: Any) -> None:
    model, tokens = tiny_model(num_layers=2, **changes), random_tokens(2, 31)
    want = run(stream(model, 9), tokens)
    got = stream(model, 7).loss(tokens[:, :-1], labels_of(tokens))
    assert not got.requires_grad
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_a_loss_has_the_dtype_of_a_calls() -> None:
    model, tokens = tiny_model(pattern="L", num_layers=1).float(), random_tokens(1, 31)
    inputs, labels = tokens[:, :-1], labels_of(tokens)
    want = model(inputs, labels=labels).dtype
    streamed = stream(model, 10)
    assert (
        streamed.forward_backward(inputs, labels).dtype == streamed.loss(inputs, labels).dtype == want == torch.float32
    )


def test_a_loss_without_gradients_takes_one_pass_which_is_heard_of() -> None:
    """Also where a loss with gradients first counts the choices of experts."""
    model, tokens = tiny_model(num_layers=2, num_experts=4), random_tokens(1, 31)
    heard: list[SegmentDone] = []
    stream(model, 10).loss(tokens[:, :-1], labels_of(tokens), between=heard.append)
    assert heard == [SegmentDone("forward", segment, 3) for segment in range(3)]
    heard.clear()
    with torch.no_grad():
        run(stream(model, 10), tokens, between=heard.append)
    assert [done.kind for done in heard] == ["forward"] * 3 + ["backward"] * 3


@pytest.mark.parametrize("documents", [None, (0, 4, 21, 22, 30)])
def test_scores_are_those_of_one_piece(documents: Any) -> None:
    model, tokens = tiny_model(pattern="LN", operator="mamba2", num_layers=2), random_tokens(1, 31)
    layout, labels = SequenceLayout.local(30, documents), labels_of(tokens, documents)
    with torch.no_grad():
        want = model(tokens[:, :-1], layout, labels=labels, token_scores=True)
    found = list(stream(model, 8).scores(tokens[:, :-1], labels, layout))
    assert [scores.nats.shape[1] for scores in found] == [8, 8, 8, 6]
    torch.testing.assert_close(torch.cat([scores.nats for scores in found], 1), want.nats, rtol=1e-12, atol=0)
    assert torch.equal(torch.cat([scores.is_likeliest for scores in found], 1), want.is_likeliest)
