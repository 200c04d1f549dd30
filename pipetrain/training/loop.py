"""The training loop of one rank. All ranks run it in step; `train` is the page to print out."""

import contextlib
import dataclasses
from enum import IntEnum
from functools import partial

import torch

from pipetrain import config
from pipetrain.data.images.sets import ImageSet
from pipetrain.data.text import TokenFolder
from pipetrain.data.translation.batches import PairBatches
from pipetrain.data.translation.prepare import PairFolder
from pipetrain.derived import num_stages
from pipetrain.engine.minibatch import MiniBatch
from pipetrain.engine.report import StepReport
from pipetrain.engine.transport import Transport
from pipetrain.errors import Exit, PipetrainError, StageFailed
from pipetrain.training import checkpoint, init_from, state, status, vocabulary
from pipetrain.training.build import (
    balance_of,
    build_recipe,
    build_runtime,
    build_schedule,
    outer_parameters,
    steps_drawn,
    ties_of,
)
from pipetrain.training.console import Console
from pipetrain.training.data import group_in, open_data, part_of_batch, share_of
from pipetrain.training.ema import WeightAverage
from pipetrain.training.evaluate import Evaluator, text_values
from pipetrain.training.hindsight import Hindsight
from pipetrain.training.job import Job
from pipetrain.training.measured import pipeline_values
from pipetrain.training.memory import memory_advice
from pipetrain.training.metrics import Metrics, compared_settings
from pipetrain.training.optim import build_optimizer, learning_rate
from pipetrain.training.plan import drawn, make_plan
from pipetrain.training.record import Recorder
from pipetrain.training.stale import StaleSteps
from pipetrain.training.steps import Advance, Pieces, Steps, SynchronousSteps


class Request(IntEnum):
    """What a signal asked a rank for. Added up over all ranks, INTERRUPT stays recognisable."""

    NOTHING = 0
    PREEMPT = 1
    INTERRUPT = 10_000


class Signals:
    """The latest request; signal handlers set it, the loop reads it once a step."""

    def __init__(self) -> None:
        self.request = Request.NOTHING


def train(job: Job, transport: Transport, device: torch.device, signals: Signals) -> Exit:
    """Trains this rank's stage until the last step, or until a signal asks to stop.

    Raises:
        NonFiniteError: if the loss or a gradient became NaN or infinite; that step updates nothing and saves nothing.
        CheckpointError: if a checkpoint could not be written or read.
        StageFailed: for everything else, with the action and the step.
    """
    trainer = Trainer(job, transport, device, signals)
    try:
        return trainer.run()
    except PipetrainError:
        raise
    except Exception as error:
        action, step = trainer.runtime.current, trainer.step + 1
        stage = action.stage if action is not None else trainer.schedule.stages_of(transport.rank)[0]
        where = f"failed at {action}, step {step}" if action is not None else f"failed around step {step}"
        rank = transport.replicas.number * transport.num_ranks + transport.rank
        raise StageFailed(f"{job.place_of(rank, stage)} {where}{memory_advice(error)}") from error
    finally:
        trainer.close()


class Trainer:
    """One rank's pieces and how far they have come."""

    def __init__(self, job: Job, transport: Transport, device: torch.device, signals: Signals) -> None:
        cfg = self.cfg = job.cfg
        self.job, self.transport, self.signals = job, transport, signals
        self.step = 0
        self._loss_val: float | None = None
        self._requests = 0.0

        recipe = self.recipe = build_recipe(cfg, job.data)
        balance = self.balance = balance_of(cfg, len(recipe.layers), num_stages(cfg, transport.num_ranks))
        self.ties = ties_of(recipe, balance)
        self._build_schedule = partial(build_schedule, cfg, recipe, balance, transport.num_ranks)
        self.schedule = self._build_schedule()
        self.runtime = build_runtime(cfg, recipe, balance, self.schedule, transport, device)
        self.optimizer = build_optimizer(
            cfg.optimizer,
            self.runtime.own_parameters,
            stage_of=self._stage_of(),
            outer=outer_parameters(recipe, self.runtime.own_parameters),
        )
        self._share = share_of(cfg, transport.replicas.number)
        self.data = open_data(cfg, job.data, "train", self._share)
        for stage in self.runtime.stages.values():
            stage.segments.steps_of_epoch = self.data.num_batches
        self.last_step = cfg.steps or (cfg.epochs or 0) * self.data.num_batches
        self.average = self._start()
        self.recorder = self._recorder() if job.record else None
        self.hindsight = Hindsight(job.prediction, self.schedule) if job.prediction is not None else None
        first, last = (stage in self.runtime.stages for stage in (0, len(balance) - 1))
        self._batch = partial(part_of_batch, cfg, device, first=first, last=last)
        self.steps = self._steps()
        self.evaluator = Evaluator(self.runtime, recipe, self.schedule, self._batch)
        self._tokenizer_id = vocabulary.tokenizer_id(job.data)
        parameters = self._count_parameters()
        plan = make_plan(self.schedule, job.devices, recipe, balance, parameters, cfg.recompute, job.prediction)
        # The first rank of the first replica is the one that writes.
        self.console: Console | None = None
        self.metrics: Metrics | None = None
        if transport.rank == 0 and transport.replicas.number == 0:
            counted = "tokens" if self._counts_tokens else "samples"
            job.run.plan.write_text(plan.to_json())
            vocabulary.keep(job.run, job.data)
            self.console = Console(self.step, self.last_step, counted=counted, quiet=job.record)
            shown = self.schedule if self.schedule.waits else self._build_schedule(steps_drawn(cfg, len(balance)))
            for line in (*plan.table(), *drawn(shown)):
                self.console.say(line)
            self.metrics = Metrics(job.run, self.console, compared_settings(cfg, balance), self.step)
            self.metrics.text("config", f"```json\n{config.to_json(cfg)}\n```")

    def _start(self) -> WeightAverage | None:
        """Gives all that is trained its first values; returns the average of the weights, if there is to be one."""
        reader = checkpoint.Reader(self.job.checkpoint) if self.job.checkpoint is not None else None
        if reader is not None:
            state.restore(reader, self.runtime, self.optimizer, self.ties)
            state.restore_memories(reader, self.runtime, self._share)
            self.step = reader.manifest.step
        elif self.job.start is not None:
            init_from.load(checkpoint.Reader(self.job.start), self.runtime, self.ties)
        if self.cfg.ema is None:
            return None
        average = WeightAverage(self.cfg.ema, self.runtime.own_parameters)
        if reader is not None:
            state.restore_average(reader, average, self.ties)
        return average

    def _stage_of(self) -> dict[str, int | None]:
        """Of each parameter of this rank, where its stages update by themselves; None for one that several share."""
        if self.schedule.waits:
            return {}
        tied = {name for tie in self.ties for name, _ in tie.uses if len({stage for _, stage in tie.uses}) > 1}
        names = {index: [name for name, _ in stage.named_parameters()] for index, stage in self.runtime.stages.items()}
        return {name: None if name in tied else index for index in names for name in names[index]}

    def _steps(self) -> Steps:
        pieces = Pieces(
            job=self.job,
            recipe=self.recipe,
            balance=self.balance,
            schedule=self.schedule,
            runtime=self.runtime,
            optimizer=self.optimizer,
            average=self.average,
            fetch=self._fetch,
            recorder=self.recorder,
        )
        return (
            SynchronousSteps(pieces)
            if self.schedule.waits
            else StaleSteps(pieces, self._build_schedule, self.last_step)
        )

    @property
    def _counts_tokens(self) -> bool:
        """Whether the loss is a mean over tokens."""
        return isinstance(self.job.data, TokenFolder | PairFolder)

    def _fetch(self, step: int) -> MiniBatch:
        inputs, targets = self._batch(self.data, step)
        if targets is None:
            return MiniBatch(inputs, None)
        every = targets if self._share.replicas == 1 else (self.data.targets(step),)
        return MiniBatch(inputs, targets, self.recipe.count(every))

    # ---- the loop --------------------------------------------------------------------------------------------

    def run(self) -> Exit:
        """Goes on from the current step to the last one."""
        self._write_status("running", None)
        while self.step < self.last_step:
            advance = self.steps.advance(self.step, float(self.signals.request))
            for number, report in enumerate(advance.reports):
                self.step += 1
                self._log(report, advance, number)
            self._record(report)
            last = self.step == self.last_step
            save = last or self._due(self.cfg.checkpoint.every)
            self._requests, self._loss_val = report.requests, None
            # A checkpoint is compared by its validation loss; a signal does not wait for one.
            if self.cfg.eval.every and not self._requests and (save or self._due(self.cfg.eval.every)):
                self._evaluate()
            stop = self._exit_asked_for()
            if save or stop is not None:
                self._save()
            if stop is not None:
                self._write_status(status.STATE_OF_EXIT[stop], stop)
                return stop
        self._write_status("finished", Exit.DONE)
        self._look_back()
        return Exit.DONE

    def _look_back(self) -> None:
        """Says how right the prediction was."""
        lines = self.hindsight.lines() if self.hindsight is not None else []
        if self.metrics is not None and self.console is not None and lines:
            self.metrics.text("prediction", "\n\n".join(lines))
            for line in lines:
                self.console.say(line)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _exit_asked_for(self) -> Exit | None:
        """What the signals of all ranks together ask for; the same on every rank."""
        if self._requests == 0:
            return None
        return Exit.INTERRUPTED if self._requests >= Request.INTERRUPT else Exit.PREEMPTED

    # ---- what is written -------------------------------------------------------------------------------------

    def _recorder(self) -> Recorder:
        layers = [layer for stage in self.runtime.stages.values() for layer in stage.layers]
        modules = ((layer.full_name(n), module) for layer in layers for n, module in layer.module.named_modules())
        return Recorder(lambda step: self.job.run.recorded(step, self.transport.rank), modules)

    def _record(self, report: StepReport) -> None:
        if self.recorder is None:
            return
        saved = state.collect(self.runtime, self.optimizer, self.ties, self.average)
        prefix = "optimizer/"
        averages = {f"{name.removeprefix('ema/')}/ema": saved[name] for name in saved if name.startswith("ema/")}
        self.recorder.write(
            self.step,
            loss=report.loss_sum / report.count,
            norm=report.grad_norm,
            parameters=self.runtime.parameters,
            buffers={name: buffer for stage in self.runtime.stages.values() for name, buffer in stage.named_buffers()},
            optimizer={name.removeprefix(prefix): saved[name] for name in saved if name.startswith(prefix)} | averages,
        )

    def _log(self, report: StepReport, advance: Advance, number: int) -> None:
        """
        Args:
            number: which step of the advance it is.
        """
        if self.metrics is None or self.console is None:
            return
        step_s = advance.seconds / len(advance.reports)
        if self.hindsight is not None:
            self.hindsight.note(step_s, report.stages, advance.schedule)
        self.console.tick(self.step, report.loss_sum / report.count, report.count / step_s)
        if not (self.step in (1, self.last_step) or self._due(self.cfg.log_every)):
            return
        values = {
            "loss/train": report.loss_sum / report.count,
            "lr": learning_rate(self.cfg.optimizer.lr, self.cfg.lr_rule, self.step - 1),
            "grad/norm": report.grad_norm,
            "speed/step_s": step_s,
            "speed/samples_per_s": self.data.rows(self.step - 1) / step_s,
        }
        if self._counts_tokens:
            values["speed/tokens_per_s"] = report.count / step_s
        if isinstance(self.job.data, ImageSet) and self.job.data.skipped:
            values["data/skipped"] = self.job.data.skipped
        if self.job.prediction is not None:
            values["predicted/step_s"] = self.job.prediction.step_s
            values["predicted/bubble"] = self.job.prediction.bubble_fraction
        if not advance.schedule.waits:
            values |= {f"stage_{s}/staleness": late[number] for s, late in enumerate(advance.staleness)}
        self.metrics.log(self.step, values | pipeline_values(report.stages, advance.schedule, step_s))
        self._write_status("running", None)

    def _evaluate(self) -> None:
        data = open_data(self.cfg, self.job.data, "valid", self._share)
        with self.average.as_weights() if self.average is not None else contextlib.nullcontext():
            values, of_group, self._requests = self.evaluator.run(
                data, self.cfg.eval.batches, group=group_in(data), request=lambda: float(self.signals.request)
            )
        if values and isinstance(self.job.data, TokenFolder):
            values |= text_values(values["loss/val"], self.job.data, "valid")
        self._loss_val = values.get("loss/val")
        if self.metrics is not None and values:
            if isinstance(self.data, PairBatches):
                values |= {f"val_nll/{way}": its["val/nll"] for way, its in of_group.items()}
                values |= {f"pairs_seen/{way}": count for way, count in self.data.seen(self.step).items()}
            self.metrics.log(self.step, values)

    def _save(self) -> None:
        checkpoint.save(
            self.job.run.checkpoints,
            state.collect(self.runtime, self.optimizer, self.ties, self.average),
            self.transport,
            step=self.step,
            config=dataclasses.asdict(self.cfg),
            data=self.job.data_id,
            loss_val=self._loss_val,
            keep=self.cfg.checkpoint.keep,
            tokenizer=self._tokenizer_id,
        )

    def _write_status(self, name: str, code: Exit | None) -> None:
        if self.metrics is not None:
            exit_code = None if code is None else int(code)
            status.write(
                self.job.run, name, step=self.step, exit_code=exit_code, error=None, metrics=self.metrics.latest
            )

    def _count_parameters(self) -> list[int]:
        """Parameters of every stage, a tied one where it is used first."""
        later_uses = {name for tie in self.ties for name, _ in tie.uses[1:]}
        counts = torch.zeros(len(self.balance), dtype=torch.float64)
        for index, stage in self.runtime.stages.items():
            counts[index] = sum(p.numel() for name, p in stage.named_parameters() if name not in later_uses)
        return [int(n) for n in self.transport.all_reduce(counts)]

    def close(self) -> None:
        """Gives back the terminal and flushes the files."""
        if self.console is not None:
            self.console.close()
        if self.metrics is not None:
            with contextlib.suppress(OSError):  # what could not be flushed must not hide why the run ended
                self.metrics.close()
