"""The main path of a run: from text to a trained model, its checkpoint and its report."""

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mor_layers import save_model, to_mapping
from mor_megatron import RoutingReport
from mor_megatron.platform import on_first_rank
from mor_tools.formats import RUN_MODEL
from mor_tools.pretraining import distributed, endings, launcher, run_folder
from mor_tools.pretraining.command_line import load_settings
from mor_tools.pretraining.data.datasets import (
    Datasets,
    batches,
    build_datasets,
    order_after_extension,
    unigram_entropy,
)
from mor_tools.pretraining.data.text import TextTokenizer, prepare
from mor_tools.pretraining.launcher import LauncherLost
from mor_tools.pretraining.models import build, initial_weights, sizes, teacher
from mor_tools.pretraining.models.decoder import decoder_config
from mor_tools.pretraining.reporting import demonstration
from mor_tools.pretraining.reporting.display import Costs, Display
from mor_tools.pretraining.reporting.history import History
from mor_tools.pretraining.reporting.report import Report, render
from mor_tools.pretraining.reporting.summary import write_summary
from mor_tools.pretraining.settings import Settings
from mor_tools.pretraining.training import Batches, StepResult, Trainer
from mor_tools.pretraining.watch import shared_watch
from mor_tools.reports.health import NO_GRADIENT, Health, Plan, PlannedSteps
from mor_tools.reports.rows import Routing, Row, Validation
from mor_tools.reports.trackers import TensorBoard, Tracker, Wandb

_INTERRUPTED = 130
"""Exit status of a process that was told to stop before it took a step, as shells have it."""


def main(arguments: Sequence[str]) -> None:
    """Train or resume the run that the arguments describe; exits with code 2 if they are wrong."""
    try:
        settings = load_settings(arguments)
        settings.data_parallel_size(distributed.world_size())
        distributed.stop_at_once()
        with distributed.process_groups(settings):
            pretrain(settings)
    except distributed.Interrupted:
        if distributed.is_first_rank():
            print("stopped before a step was taken: there is nothing new to save.")
        raise SystemExit(_INTERRUPTED) from None
    except (*distributed.ERRORS, FloatingPointError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends those that need not speak
        endings.tell(str(error), distributed.is_first_on_machine())
        raise SystemExit(2) from None
    except LauncherLost as error:  # possibly on this machine only
        if distributed.is_first_on_machine():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def pretrain(settings: Settings, is_alone: bool = True) -> None:
    """Train from text to a model, its checkpoint, report.html and summary.json.

    Args:
        is_alone: whether the run is all that the user asked for; if so, it ends by suggesting what to
            do with the model.
    """
    build.check(settings)
    sizes.require_room(settings)
    console = Console() if distributed.is_first_rank() else None
    if on_first_rank(lambda: run_folder.is_complete(settings)):
        if console is not None:
            console.print(
                f"{settings.output} is complete: all {settings.training.steps} steps are done. See "
                f"{settings.output}/report.html. A larger training.steps= extends the run; for a "
                "new run, choose another output=.",
                soft_wrap=True,
            )
        return
    # Before any work, so that a folder that is in use or cannot be written is reported at once.
    with distributed.locked(Path(settings.output)) as taken_over:
        left_behind = on_first_rank(lambda: run_folder.put_in_order(settings))
        _pretrain(settings, console, [taken_over, *left_behind], is_alone)


def _pretrain(
    settings: Settings, console: Console | None, notes: list[str | None], is_alone: bool
) -> None:
    """The work of one process of the run that holds the folder; `notes` are messages to print
    first.
    """
    with _working(console, "preparing the text"):
        text = on_first_rank(lambda: prepare(settings.data))
    on_first_rank(lambda: run_folder.claim(settings, text))
    extension = on_first_rank(lambda: run_folder.extend(settings))
    tokenizer = TextTokenizer(text.tokenizer, settings.data.end_of_document)
    data = build_datasets(settings, text, tokenizer)
    sizes.require_room(settings, tokenizer.vocab_size)
    if extension is not None:
        order = order_after_extension(data.train, settings, extension.planned_steps)
        notes += [extension.told, order]
    distributed.seed(settings.training.seed, step=0)
    chunks = build.build_model(settings, tokenizer.vocab_size)
    decoder = decoder_config(settings, tokenizer.vocab_size)
    if settings.training.initial_weights is not None:
        source = Path(settings.training.initial_weights)
        branch = on_first_rank(lambda: initial_weights.branch(source, tokenizer.path))
        initial_weights.load(source, chunks, decoder)
        if not run_folder.has_checkpoint(settings):
            notes.append(branch)
    dense = None if settings.uptrain is None else teacher.open_dense(settings, tokenizer)
    if dense is not None and not run_folder.has_checkpoint(settings):
        teacher.load_recursive(chunks, settings, dense)
    taught_by = teacher.build(settings, dense) if settings.is_distilled else None
    watch = shared_watch(settings.training.timeout_seconds)
    trainer = Trainer(settings, chunks, decoder, watch, taught_by)
    notes += trainer.resume()
    session = Session(settings, trainer, data, tokenizer, console)
    with contextlib.closing(session.history), session.display:
        for note in filter(None, [*notes, session.history.lost]):
            session.display.say(note)
        with watch:
            session.train()
        if trainer.step == settings.training.steps:
            session.finish()
            if is_alone:
                session.display.say(_what_next(settings))


def _working(console: Console | None, doing: str) -> contextlib.AbstractContextManager[object]:
    """Show on the first rank's terminal what is being done."""
    return contextlib.nullcontext() if console is None else console.status(f"{doing} ...")


class Session:
    """The work of one process, from a start or resume to the next stop."""

    def __init__(
        self,
        settings: Settings,
        trainer: Trainer,
        data: Datasets,
        tokenizer: TextTokenizer,
        console: Console | None,
    ) -> None:
        self.settings, self.trainer, self.data, self.tokenizer = settings, trainer, data, tokenizer
        self.folder = Path(settings.output)
        self.shape = build.shape(settings, tokenizer.vocab_size)
        self.unigram_entropy = unigram_entropy(data.held_out, tokenizer.vocab_size)
        is_writer = console is not None
        trackers: list[Tracker] = []
        on_first_rank(lambda: trackers.extend(_trackers(settings, trainer.step)))
        self.history = History(self.folder, trainer.step, trackers, is_writer)
        self.health = Health(_plan(settings))
        for row in self.history.rows:  # earlier sessions reported what they found
            self.health.add(row)
        self.display = Display(
            settings.output, settings.training.steps, self.unigram_entropy, console
        )
        self.display.follow(self.history.rows)
        self.is_stopping = distributed.StopRequest()
        self.validation: Validation | None = None
        self.train_seconds, self.train_tokens = 0.0, 0

    def train(self) -> None:
        """Take steps until the run is complete or asked to stop, and leave a checkpoint."""
        settings, trainer = self.settings, self.trainer
        if trainer.step > 0:
            self.display.say(f"resumed at step {trainer.step} of {settings.training.steps}")
        train_batches = batches(self.data.train, settings, first_step=trainer.step)
        while trainer.step < settings.last_step and not self.is_stopping():
            row = self.step(train_batches)
            self.history.add(row)
            self.display.follow([row])
            for finding in self.health.add(row):
                self.display.say(str(finding))
            if row.tokens_per_second is not None or row.validation_loss is not None:
                self.display.show(row, self.costs(row))
            # An extension of the run resumes from the checkpoint before the decay.
            is_stable_end = trainer.step == settings.training.decay_start
            if is_stable_end or trainer.step % settings.training.checkpoint_every == 0:
                trainer.save()
            trainer.finish_save()
        trainer.save()
        trainer.finish_save(waits=True)
        stopped = (
            f"stopped after step {trainer.step} of {settings.training.steps}, saved in "
            f"{trainer.saved_folder}."
        )
        if self.is_stopping.launcher_is_gone:
            raise LauncherLost(f"The run {stopped}")
        if trainer.step < settings.training.steps:
            self.display.say(f"{stopped} {_run_again(settings)}")

    def step(self, train_batches: Batches) -> Row:
        """Take one optimizer step, and do what is due after it."""
        settings, trainer = self.settings, self.trainer
        started = time.monotonic()
        result = trainer.train_step(train_batches)
        self.train_seconds += time.monotonic() - started
        self.train_tokens += settings.training.global_batch_size * settings.data.sequence_length
        speed = routing = None
        is_last = trainer.step == settings.training.steps
        if trainer.step % settings.log_every == 0 or is_last:
            speed = self.train_tokens / self.train_seconds
            routing = self.routing(result)
            self.train_seconds, self.train_tokens = 0.0, 0
        self.validation = None
        if trainer.step % settings.evaluation.every == 0 or is_last:
            self.validation = self.validate()
        return Row(
            trainer.step,
            result.loss,
            result.learning_rate,
            result.gradient_norm,
            speed,
            routing,
            self.validation and self.validation.loss,
            self.validation and self.validation.causal_loss,
            result.divergence,
        )

    def routing(self, result: StepResult) -> Routing | None:
        """What the recursions did in a step, and whether their router can learn from it."""
        has_gradient = self.trainer.router_has_gradient()
        routing = self._combined(result.routing)
        if routing is None or has_gradient is not False:
            return routing
        return replace(routing, metrics=routing.metrics | {NO_GRADIENT: 1.0})

    def validate(self) -> Validation:
        """Held-out loss and routing: as in training, and as in generation."""
        loss, reports = self.trainer.evaluate(self.data.held_out)
        if not reports:
            return Validation(loss)
        causal_loss, causal_reports = loss, reports
        if not all(recursion.router.is_causal for recursion in self.settings.recursions):
            causal_loss, causal_reports = self.trainer.evaluate(self.data.held_out, causal=True)
        return Validation(
            loss, self._combined(reports), causal_loss, self._combined(causal_reports)
        )

    def _combined(self, reports: Sequence[RoutingReport]) -> Routing | None:
        blocks = [schedule.num_blocks for schedule in self.settings.schedules]
        return Routing.from_reports(reports, blocks)

    def costs(self, row: Row) -> Costs:
        """The computation of a step."""
        shares = row.routing.shares if row.routing else None
        flops = build.flops_per_token(self.shape, self.settings, shares)
        peak = self.settings.peak_tflops
        utilization = None
        if peak is not None and row.tokens_per_second is not None:
            utilization = flops * row.tokens_per_second / (peak * 1e12 * distributed.world_size())
        return Costs(flops, utilization)

    def finish(self) -> None:
        """Demonstrate the trained model, and write report.html and summary.json."""
        validation = self.validation or self.validate()
        losses = {"Held-out loss": validation.loss, "Unigram entropy": self.unigram_entropy}
        if validation.causal_loss is not None:
            losses["Held-out loss, routed as in generation"] = validation.causal_loss
        for name, value in losses.items():
            self.display.say(f"{name}: {value:.3f} nats per token")
        trained, sample, passage = None, "", []
        if self.settings.evaluation.sample_tokens > 0:
            size = self.tokenizer.vocab_size
            trained = build.torch_model(self.settings, self.trainer.chunks, size)
        if not distributed.is_first_rank():
            return
        if trained is not None:
            sample = demonstration.continuation(trained, self.settings, self.tokenizer)
            passage = demonstration.depths(trained, self.data.held_out[0], self.tokenizer)
            save_model(trained, self.folder / RUN_MODEL, self.tokenizer.path, self.tokenizer.eod)
            self.display.say(f"a continuation:\n{sample}\n")
            is_served = not self.settings.routes_by_layer
            purpose = ", for `mor generate` and `mor serve`" if is_served else ""
            self.display.say(f"wrote {self.folder}/{RUN_MODEL}{purpose}")
        parameters = build.parameters(self.shape)
        routing = validation.routing
        flops = build.flops_per_token(self.shape, self.settings, routing and routing.shares)
        report = Report(
            title=f"Pretraining {self.settings.output}",
            facts={name: f"{value:.3f} nats per token" for name, value in losses.items()}
            | {
                "Optimizer steps": f"{self.settings.training.steps:,}",
                "Parameters": f"{parameters:,}",
                "Training FLOPs per token": f"{flops:.4g}",
            },
            rows=self.history.rows,
            unigram_entropy=self.unigram_entropy,
            validation=validation,
            passage=passage,
            sample=sample,
            findings=self.health.findings,
        )
        run_folder.write_atomically(self.folder / "report.html", render(report))
        write_summary(
            self.folder / "summary.json",
            self.settings,
            self.history,
            validation=validation,
            unigram_entropy=self.unigram_entropy,
            parameters=parameters,
            flops_per_token=flops,
            sample=sample,
        )
        self.display.say(f"wrote {self.folder}/report.html and summary.json")


def _plan(settings: Settings) -> Plan:
    """The facts about the run that follow from its settings."""
    length = settings.data.sequence_length
    planned, warmups = [], []
    for recursion in settings.recursions:
        number, router = recursion.num_recursions, recursion.router
        capacities = router.capacities_for(number, length)
        shares = capacities and tuple(tokens / length for tokens in capacities)
        planned.append(PlannedSteps(number, shares))
        warmups.append(getattr(router, "warmup_steps", 0))  # not all routers have one
    return Plan(settings.training.global_batch_size, planned, max(warmups, default=0))


def _run_again(settings: Settings) -> str:
    """How the user resumes a run that stopped."""
    stops = settings.training.stop_after is not None
    changes = ("training.stop_after=null",) if stops else ()
    command = launcher.command(*changes)
    if command is None:
        return "Run the command again to resume."
    return f"Resume with:\n  {command}"


def _what_next(settings: Settings) -> str:
    """What a user can do with a completed run, as commands."""
    model, temperature = f"{settings.output}/{RUN_MODEL}", settings.evaluation.temperature
    given = f"{shlex.quote(settings.evaluation.prompt)} --temperature {temperature}"
    text = "README.md" if Path("README.md").is_file() else "TEXT_FILE"
    longer = f"training.steps={2 * settings.training.steps}"
    lines = {
        "train longer": launcher.command(longer, with_mor=True)
        or f"the same command with {longer}",
    }
    # Without a sample no model was written, and layers that route by themselves are not served yet.
    if settings.evaluation.sample_tokens > 0 and not settings.routes_by_layer:
        lines = {
            "continue a text": f"mor generate --model {model} {given}",
            "see each token's depth": f"mor inspect {settings.output} --text {text}",
        } | lines
    width = max(map(len, lines))
    head = 'What to try next (in a checkout, after eval "$(make -s env)"):'
    return "\n".join([head, *(f"  {name:{width}}  {line}" for name, line in lines.items())])


def _trackers(settings: Settings, step: int) -> list[Tracker]:
    """Where the numbers of each step go besides history.jsonl."""
    folder = Path(settings.output)
    trackers: list[Tracker] = [TensorBoard(folder / "tensorboard", purge_step=step + 1)]
    if settings.wandb is not None:
        wandb = settings.wandb
        trackers.append(
            Wandb(wandb.project, folder / "wandb", wandb.mode, folder.name, to_mapping(settings))
        )
    return trackers
