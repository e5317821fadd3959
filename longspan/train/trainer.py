"""The steps of a run: forward, backward, sum over ranks, update; validation; saving and going on."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from longspan.comm.profiling import named_range
from longspan.comm.traffic import Traffic, record_traffic
from longspan.data.loader import Loader
from longspan.errors import CheckpointError, DataError, LongspanError
from longspan.faults import reached
from longspan.launch import StopRequest
from longspan.models import LinearLlama3, Routing
from longspan.models.weights import check_shapes, shapes_of
from longspan.parallel import gathered
from longspan.parallel.sharded import accumulating, free_gathered
from longspan.train import config as configs
from longspan.train.balance import (
    Balance,
    balance_of_checkpoint,
    measured_balance,
    measures_speed,
    stated_balance,
)
from longspan.train.checkpoint import complete_checkpoints
from longspan.train.config import Config
from longspan.train.data import RunData
from longspan.train.exchange import (
    describe,
    figures_to_save,
    forget_taken,
    measures,
    sends_exactly,
    take_saved_figures,
)
from longspan.train.loading import OTHER_VERSION, SavedCheckpoint
from longspan.train.loss import Evaluation, evaluate, loss_share
from longspan.train.memory import StepMemory
from longspan.train.metrics import MetricsFile, Totals
from longspan.train.model import (
    build_model,
    build_parallel,
    checked_dtype,
    compute_dtype,
    copy_shares,
    copy_weights,
    sum_over_ranks,
)
from longspan.train.optimizer import (
    build_optimizer,
    clip_gradients,
    empty_optimizer_tensors,
    gradient_norm,
    learning_rate,
    optimizer_tensors,
    set_learning_rate,
)
from longspan.train.order import RankOrder, measured_order, measures_links, order_of_checkpoint, stated_order
from longspan.train.phase import RunPhase
from longspan.train.ranks import Ranks
from longspan.train.rate import ModelOperations
from longspan.train.replicas import ReplicaError, check_replicas
from longspan.train.report import Report
from longspan.train.routers import router_metrics, shares_of_rank
from longspan.train.run_folder import RunFolder
from longspan.train.saving import CheckpointSaver
from longspan.train.segment_steps import SegmentsOfStep, StepStoppedError
from longspan.train.segments import Segmentation
from longspan.train.selfcheck import SelfCheck, self_check
from longspan.train.snapshot import MemorySnapshot
from longspan.train.step_batch import StepBatch, layouts_over, make_step_batch
from longspan.train.step_numbers import RankNumbers, StepNumbers
from longspan.train.trace import StepTrace
from longspan.train.trackers import build_trackers


class TrainingError(LongspanError):
    """Training cannot go on: too many steps in a row were not finite."""


class Trainer:
    """Model, optimizer, data and counters of a run; `step` is the number of optimizer steps that are behind it."""

    def __init__(
        self, config: Config, ranks: Ranks, folder: RunFolder, data: RunData, report: Report, phase: RunPhase
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.folder = folder
        self.data = data
        self.report = report
        self.phase = phase
        self.metrics = MetricsFile(folder.metrics, build_trackers(config, folder))
        self.trace = StepTrace(folder.traces, config.run.trace_step, ranks.rank, ranks.device)
        self.snapshot = MemorySnapshot(folder.traces, config.run.memory_snapshot_step, ranks.rank)
        self.memory = StepMemory(ranks.device, config.run.release_memory_every)
        self.batches = data.batches
        self.balance, self.rank_order = stated_balance(config, ranks), stated_order(config, ranks)
        self._lay_out()
        self.model = build_parallel(config, data.vocab_size, ranks, compute_dtype(config))
        self.segments = Segmentation.of(config.train)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.operations = ModelOperations(self.model)
        self.peak_flops: float | None = None
        """Of all ranks together, operations per second; None is unknown."""
        self.saver = CheckpointSaver(
            folder.checkpoints,
            ranks,
            config.checkpoint.keep,
            config.checkpoint.asynchronous,
            config.parallel.timeout_seconds,
        )
        self.has_saved_figures = False
        self.has_saved_balance = False
        self.has_saved_order = False
        self._has_said_exchange = not measures(config, ranks)
        self.step = 0
        self.skipped_in_a_row = 0
        self.totals = Totals()
        self.validation: Evaluation | None = None

    def take_balance(self, balance: Balance) -> None:
        """Let each rank hold such a share of the sequences from now on."""
        self.balance = balance
        self._lay_out()

    def take_order(self, order: RankOrder) -> None:
        """Let the ranks hold the sequences in such an order from now on."""
        self.rank_order = order
        self._lay_out()

    def _lay_out(self) -> None:
        own = self.ranks.dp_rank
        shares, rank_order = self.balance.groups[own], self.rank_order.groups[own]
        self._layout = layouts_over(self.ranks, self.config.parallel.order, shares, rank_order)
        self.layout = self._layout(self.config.train.seq_len, None)

    def measure_balance(self) -> None:
        """Measure how fast each rank computes, and take the shares that follow; every rank calls this, once the order is known."""
        lengths = self.batches.tokens_by_document_length(self.step)
        orders = self.rank_order.groups
        self.take_balance(measured_balance(self.config, self.data.vocab_size, self.ranks, lengths, orders))

    def measure_order(self) -> None:
        """Measure the links between ranks, and take the order that follows; every rank calls this."""
        self.take_order(measured_order(self.model, self.layout, self.ranks))

    def _build_model(self) -> LinearLlama3:
        return build_model(self.config, self.data.vocab_size, self.ranks.device)

    def whole_weights(self) -> dict[str, Tensor]:
        """The present weights by name, on rank 0; the other ranks, which must call this as well, have none."""
        return gathered(self.model.named_parameters(), self.ranks.is_first)

    def model_for_one_process(self, weights: dict[str, Tensor]) -> LinearLlama3:
        """The model with these weights, whole, for one process."""
        return copy_weights(weights, self._build_model())

    def _make_batch(self, step: int) -> StepBatch:
        reached("batch", step + 1)
        return make_step_batch(self.batches, step, self.ranks, self.config.train.micro_batch_sequences, self._layout)

    def check(self, threads_alone: int) -> SelfCheck:
        """Compare the next batch, or as much of it as one process is asked to compute, with one process."""
        sequences = self.ranks.together(lambda: self.batches.batch(self.step))
        wanted = self.config.train.check_tokens
        rows = min(len(sequences), max(1, wanted // self.config.train.seq_len))
        rows = max(self.ranks.dp, rows - rows % self.ranks.dp)
        length = max(self.ranks.sp, min(self.config.train.seq_len, wanted // rows))
        weights = self.whole_weights()
        dtype = checked_dtype(self.config)
        checked = self_check(
            self._model_to_check(dtype),
            lambda: self.model_for_one_process(weights).to(dtype),
            sequences.rows(0, rows).shortened(length),
            self._layout,
            self.ranks,
            threads_alone,
            self.segments,
        )
        if not self.checks_itself and not self._has_said_exchange:
            forget_taken(self.layout, self.ranks)
        return checked

    @property
    def checks_itself(self) -> bool:
        """Whether `check` computes with the model as it is trained, and its states travel as in training."""
        plain = compute_dtype(self.config) is None and checked_dtype(self.config) == torch.float32
        return plain and sends_exactly(self.config) == self.config

    def say_exchange(self) -> None:
        """Say, once, how states are exchanged, if that is measured; every rank calls this, when the run has exchanged some."""
        if not self._has_said_exchange:
            self._has_said_exchange = True
            self.report.heading("exchange", describe(self.layout, self.ranks, self.has_saved_figures))

    def _model_to_check(self, dtype: torch.dtype) -> LinearLlama3:
        """The model as it is trained, but for a lower precision, whose rounding would hide what the check looks for.

        Of what is computed and of what travels.
        """
        if self.checks_itself:
            return self.model
        model = build_parallel(sends_exactly(self.config), self.data.vocab_size, self.ranks, weights=dtype)
        copy_shares(self.model, model)
        return model

    def run(self, stop: StopRequest) -> bool:
        """Train up to the last step; True if a signal stopped the run before, with a checkpoint."""
        config = self.config
        self.phase.name = "starting to train"
        stop.begin_steps()
        stopping = bool(self.ranks.gather_numbers([stop.requested]).any())
        # A rank gives up its own batch before the others give up the rank: so all of them hear which batch it was.
        timeout = 0.9 * config.parallel.timeout_seconds
        whose = f" of rank {self.ranks.rank}" if self.ranks.world_size > 1 else ""
        loader = Loader(self._make_batch, self.step, config.train.steps, timeout_seconds=timeout, whose=whose)
        with self.report, loader:
            self._await_batch(loader)
            self.memory.begin()
            while self.step < config.train.steps and not stopping:
                before = self.step
                with self.trace.of(self.step + 1), self.snapshot.of(self.step + 1):
                    stopping = self._train_step(loader, stop)
                if self.step == before:
                    # Given up between two segments: what follows a step has followed the one before.
                    break
                self.say_exchange()
                if self.saver.is_pending:
                    self.phase.name = "saving a checkpoint"
                    self.saver.advance()
                last = self.step == config.train.steps
                if _is_due(self.step, config.train.check_replicas_every):
                    self.phase.name = "comparing replicas"
                    self._check_replicas()
                if last or _is_due(self.step, config.validation.every):
                    self.validate()
                if last or _is_due(self.step, config.checkpoint.every):
                    self._save()
            if stopping:
                self._save()
            self.phase.name = "saving a checkpoint"
            self.saver.finish()
        return stopping and self.step < config.train.steps

    def _check_replicas(self) -> None:
        try:
            check_replicas(self.model, self.ranks, self.step)
        except ReplicaError:
            # All ranks come here: what was saved before is completed.
            self.saver.finish()
            raise

    def _await_batch(self, loader: Loader[StepBatch]) -> None:
        """Wait for the first batch; where a rank cannot read its own, all raise why."""
        self.phase.name = "reading a batch"
        loader.wait()
        self.ranks.together(loader.check)

    def _train_step(self, loader: Loader[StepBatch], stop: StopRequest) -> bool:
        """One optimizer step; True if a signal has reached any rank, and given up if that was between two segments of time."""
        start = time.perf_counter()
        self.phase.step = self.step + 1
        batch = loader.take()
        routing = Routing(self.config.train.batch_tokens) if self.config.model.num_experts else None
        with record_traffic() as traffic:
            random = torch.get_rng_state()
            try:
                loss = self._forward_backward(batch, routing, stop)
            except StepStoppedError:
                self._give_up_step(random)
                return True
            reached("gradients", self.step + 1, self.model)
            self.phase.name = "summing gradients"
            with named_range("longspan.train.sum_gradients"):
                sum_over_ranks(self.model, self.ranks)
            reached("gradients.summed", self.step + 1, self.model)
        norm = gradient_norm(self.model)
        # One exchange for all that the ranks must know of each other, so that all of them decide alike: also whether each of them
        # has its part of the next batch.
        loss_value, norm_value = float(loss), float(norm)
        self.phase.name = "reading a batch"
        data_wait = loader.wait()
        held, peak = self.memory.take()
        own = RankNumbers(
            loss=loss_value,
            gradient_norm=norm_value,
            stops=stop.requested,
            waited=traffic.wait_seconds,
            peak_bytes=peak,
            data_wait=data_wait,
            lacks_batch=loader.has_failed,
            held_bytes=held,
            exchanging=traffic.exchange_seconds,
            operations=self.operations.of_batch(batch) / self.ranks.sp,
        )
        numbers = own.gathered(self.ranks, shares_of_rank(routing))
        lr = learning_rate(self.config.optim, self.step + 1, self.config.train.steps)
        self.phase.name = "updating the weights"
        if numbers.is_finite:
            set_learning_rate(self.optimizer, lr)
            with named_range("longspan.train.update"):
                clip_gradients(self.model, norm, self.config.optim.clip_norm)
                self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.memory.end()
        seconds = time.perf_counter() - start
        self._record(numbers, norm_value, lr, seconds, traffic, batch, routing)
        if numbers.lacks_batch:
            self.phase.name = "reading a batch"
            self.ranks.together(loader.check)
        return numbers.stops

    def _forward_backward(self, batch: StepBatch, routing: Routing | None, stop: StopRequest) -> Tensor:
        """Make the gradients of this rank's part of the batch; return its part of the cross-entropy, a scalar."""
        total = torch.zeros((), device=self.ranks.device)
        num_valid, last = batch.num_valid_tokens, len(batch.micro_batches) - 1
        between = SegmentsOfStep(self.step + 1, last + 1, self.ranks, stop, self.phase, self.report, self.memory)
        for number, (packed, layout) in enumerate(batch.micro_batches):
            self.phase.name = "computing forward"
            given = packed.to(self.ranks.device)
            if self.segments is not None:
                with named_range("longspan.train.segments"):
                    streamed = self.segments.stream(self.model)
                    total += streamed.forward_backward(
                        given.inputs, given.labels, layout,
                        num_valid=num_valid, routing=routing, is_last=number == last, between=between,
                    )  # fmt: skip
                continue
            with named_range("longspan.train.forward"):
                loss = loss_share(self.model, given, layout, num_valid, routing)
            self.phase.name = "computing backward"
            with named_range("longspan.train.backward"), accumulating(self.model, number == last):
                loss.backward()
            total += loss.detach()
        return total if routing is None else torch.as_tensor(routing.cross_entropy)

    def _give_up_step(self, random: Tensor) -> None:
        """Be as before the step: no gradients, no gathered weights, the random state of before."""
        self.model.zero_grad(set_to_none=True)
        free_gathered(self.model)
        torch.set_rng_state(random)

    def _record(
        self,
        numbers: StepNumbers,
        norm: float,
        lr: float,
        seconds: float,
        traffic: Traffic,
        batch: StepBatch,
        routing: Routing | None,
    ) -> None:
        num_tokens, loss = self.config.train.batch_tokens, numbers.loss
        self.totals.add(num_tokens, seconds, numbers.waited, numbers.peak_bytes, loss)
        self.totals.add_data(numbers.data_wait, batch.tokens_by_document_length)
        record: dict[str, Any] = {
            "step": self.step,
            "loss": loss,
            "gradient_norm": norm,
            "lr": lr,
            "skipped": not numbers.is_finite,
            "tokens": self.step * num_tokens,
            "valid_tokens": batch.num_valid_tokens,
            **numbers.rates(num_tokens, seconds, self.peak_flops, traffic),
            **{f"tokens_seen/{length}": count for length, count in self.totals.by_document_length.items()},
            **router_metrics(routing, numbers.of_routers),
        }
        if self.ranks.is_first:
            self.metrics.append(record)
        self.report.step(record)
        self.skipped_in_a_row = 0 if numbers.is_finite else self.skipped_in_a_row + 1
        if numbers.is_finite:
            return
        what = f"loss {loss}, gradient norm {norm}"
        self.report.line(f"step {self.step}: {what}; the weights stay as they are")
        if self.skipped_in_a_row >= self.config.train.max_skipped_steps:
            self.saver.finish()
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row were not finite, the last one step {self.step} ({what}). "
                + self._way_on()
            )

    def _way_on(self) -> str:
        """What a user can do after steps that were not finite."""
        lower = "Lower optim.lr or optim.clip_norm"
        saved = complete_checkpoints(self.folder.checkpoints)
        if not saved:
            return f"There is no checkpoint yet. {lower}, and start a new run"
        return f"The last checkpoint is {saved[-1]}. {lower}, and go on with --resume {self.folder.path}"

    def validate(self) -> None:
        """Compute the loss on the held-out sequences, write it down and say it."""
        self.phase.name = "validating"
        data = self.data
        self.validation = evaluate(
            self.model,
            data.held_out,
            data.token_bytes,
            self._layout,
            self.ranks,
            self.segments,
            self.memory.pass_ended,
        )
        if self.ranks.is_first:
            numbers = {f"validation_{name}": value for name, value in self.validation.numbers.items()}
            self.metrics.append({"step": self.step, **numbers})
        self.report.line(
            f"step {self.step}: validation {self.validation} ({data.baseline_name} baseline {data.baseline})"
        )

    def _save(self) -> None:
        self.phase.name = "saving a checkpoint"
        if self.ranks.is_first:
            self.metrics.sync()
        measured = figures_to_save(self.layout, self.ranks) if measures(self.config, self.ranks) else None
        tensors = {
            **{f"model/{name}": parameter for name, parameter in self.model.named_parameters()},
            **{f"optimizer/{key}": value for key, value in optimizer_tensors(self.model, self.optimizer).items()},
            "random/torch": torch.get_rng_state(),
        }
        self.saver.start(self.step, tensors, self._state(measured))

    def _state(self, exchange: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "step": self.step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "totals": asdict(self.totals),
            "data": self.data.fingerprint,
            "config": configs.to_mapping(self.config),
            "exchange": exchange,
            "balance": self.balance.as_json() if measures_speed(self.config, self.ranks) else None,
            "rank_order": self.rank_order.as_json() if measures_links(self.config, self.ranks) else None,
        }

    def restore(self, saved: SavedCheckpoint) -> None:
        """Go on from `saved`.

        Raises:
            DataError: if the prepared data is not what the checkpoint was trained on.
            CheckpointError: if the weights are not this model's.
        """
        trained_on = saved.value("data", dict)
        changed = [name for name, checksum in self.data.fingerprint.items() if trained_on.get(name) != checksum]
        if changed:
            raise DataError(
                f"the prepared data is not what the checkpoint of step {saved.step} was trained on: "
                f"{', '.join(changed)} changed. Restore the data folder, or start a new run"
            )
        if measures(self.config, self.ranks):
            self.has_saved_figures = take_saved_figures(saved, self.layout, self.ranks)
        if measures_links(self.config, self.ranks) and self.config.parallel.rank_order == ("measured",):
            order = order_of_checkpoint(saved, self.layout, self.ranks)
            if order is not None:
                self.take_order(order)
            self.has_saved_order = order is not None
        if measures_speed(self.config, self.ranks) and self.config.parallel.balance == ("measured",):
            balance = balance_of_checkpoint(saved, self.ranks)
            if balance is not None:
                self.take_balance(balance)
            self.has_saved_balance = balance is not None
        self._restore_weights(saved)
        try:
            saved.read("optimizer", empty_optimizer_tensors(self.model, self.optimizer, saved.shapes("optimizer")))
            random = torch.get_rng_state()
            saved.read("random", {"torch": random})
            torch.set_rng_state(random)
            # Those of a checkpoint that has none begin anew: what is derived from them is of the steps that they count.
            self.totals = Totals(**saved.state.get("totals", {}))
        except CheckpointError:
            raise
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint of step {saved.step} does not hold the state of this optimizer: "
                f"{type(error).__name__}: {error}. {OTHER_VERSION}"
            ) from error
        self.step = saved.step
        self.skipped_in_a_row = saved.value("skipped_in_a_row", int)

    def _restore_weights(self, saved: SavedCheckpoint) -> None:
        parameters = dict(self.model.named_parameters())
        wanted = shapes_of(self.model)
        check_shapes(f"the weights of step {saved.step}", saved.shapes("model"), wanted, OTHER_VERSION)
        saved.read("model", parameters)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
