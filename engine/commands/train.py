"""`run.py train`: base metrics, the loop, tuned metrics, the exported model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.agreement import require_agreement
from data.batch import RunFailed, UnsoundWeights
from data.catalogue import release_freed_memory
from data.cold import EarlierRun
from data.identity import Overlap, describe_overlap, overlap
from data.ledger import read_ledger
from data.pairs import Pairs, data_key
from data.store.feature_split import FeatureSplit
from engine.clip.model import LoadedModel, distribute
from engine.commands import auto
from engine.commands.common import (
    evaluate_splits,
    load_model,
    open_data,
    open_probe,
    open_run,
    open_source,
    read_weights,
    with_probe,
)
from engine.commands.training import Training, open_training, refuse_cached, split_dataset
from engine.config.fields import Config, as_dict, config_fields
from engine.optim import Plan, Rates, adamw_by_name
from engine.publish.export import Origin, Tuned, export
from engine.publish.hub import push
from engine.ranks.signals import StopSignal
from engine.ranks.world import World, explain_collective_errors
from engine.run_folder import folder
from engine.run_folder.board import Metrics, WeightDrift, comparable_settings
from engine.run_folder.checkpoint import Saver, State
from engine.run_folder.log import Log, Reference
from engine.run_folder.nonfinite import NonfiniteGuard
from engine.run_folder.profiler import profiler, require_profiled_steps
from engine.run_folder.repair import saved_metrics
from engine.sweep.interpolate import interpolate, replace_values, snapshot
from engine.train import Callbacks, Replica, fit
from eval.metrics import Retrieval
from eval.report.report import write_report
from eval.report.show import AnswerLog, shown_split
from eval.report.table import metrics_table
from eval.retrieval import SplitEmbeddings, differences, embed_split


def train(cfg: Config, world: World, stop: StopSignal) -> int:
    """Measure the base model, run the loop, measure the tuned model, export it."""
    # Open everything, what a typo breaks first: a misspelt split is an error before a model is loaded.
    out, resuming = open_run(cfg, world)
    row_cfg, shards = split_dataset(cfg, world.say)
    source = open_source(row_cfg, world, shards=shards.measured, run=earlier_run(out, world, resuming))
    probe = open_probe(cfg, world)
    model = load_model(cfg, world)
    refuse_cached(cfg, model)
    trained = model.trained_model(cfg.micro_batch)
    pairs = with_probe(cfg, world, model, open_data(row_cfg, world, model, source.hand_over()), probe)
    if cfg.recipe == "auto":
        return auto.train_auto(cfg, world, out, model, pairs)
    training = open_training(cfg, world, pairs, shards.train, out)
    plan = plan_steps(cfg, training.rows)
    names = evaluated_splits(cfg, pairs)
    saver = make_saver(cfg, world, out, model, training, names)

    # The order at resume matters; the docstring of engine/run_folder/checkpoint.py lists all its events.
    # 1. Take what is compared with the base model while the base weights are still loaded.
    base_weights = snapshot(model.trainable) if cfg.interpolate else {}
    drift = WeightDrift(model.trainable)
    base = evaluate_splits(pairs.feature_splits(names), model.head, world) if resuming else {}
    answers = open_answers(out, names, pairs, model, base, world)
    # 2. Load weights, optimizer moments and step of the newest valid checkpoint; other data or settings end here.
    state = first_state(saver, world, plan, resuming)
    if (state.enough or state.step == plan.steps) and folder.is_complete(out, as_dict(cfg, "train"), world):
        return repeat_results(world, out)
    # 3. Replace config.json and ledger.jsonl, after every refusal: a refused resume leaves both files as they were.
    folder.write_run_header(out, as_dict(cfg, "train"), world, model.precision, training.begin(state.step, stop.ask))
    # 4. Keep the base metrics of the earlier process, unless they are damaged; at step 0 they are measured again.
    metrics = saved_metrics(out / "metrics.json", summaries(base), world.warn) if state.step else {}
    metrics |= find_overlap(pairs, world) | named_classes(pairs)
    # 5. Cut the log after the checkpoint's step; the loop writes the later steps again.
    step_world = training.step_world(cfg, world, model)
    log = Log(out, step_world, plan, state, drift, Reference(comparable_settings(cfg), metrics.get("base", {})))
    evaluator = Evaluator(pairs, names, model, plan, state, saver, log, answers, world, metrics, base, cfg)
    # 6. `fit` asks for the inputs from `state.step` on: the order of pairs is a function of seed and epoch.
    batches = training.batches(cfg, state, step_world)
    guard = training.guard(cfg, step_world, out, trained)
    with explain_collective_errors("sharing the weights"):
        replica = Replica(distribute(trained, step_world.size), saver.optimizer, step_world, model.precision)
    saver.require_equal_weights(state.step)
    with closing(log), stop.graceful_exit(), profiler(cfg.profile, state.step, out, world.rank, log) as prof:
        evaluate = stop.immediate_exit()(evaluator)  # a signal may cut it off: its step was saved before
        evaluation_missing = state.evaluated < state.step and plan.due(state.step, cfg.eval_every)
        results_lost = state.step == plan.steps and not evaluation_missing and lacks_results(metrics, answers, world)
        if state.step == 0 or evaluation_missing:
            evaluate()
        with saved_on_failure(state, replica, log, guard, partial(training.save, replace(saver, world=step_world))):
            fit(replica, batches, plan, state, cfg, Callbacks(log, prof, evaluate, partial(training.save, saver),
                                                              partial(stop.agreed_signal, world), guard.check))
        best_step = saver.load_best_weights(state, world.warn)
        if best_step or results_lost:
            evaluate(best_step)
        if cfg.interpolate and not state.stopped:
            apply_interpolation(cfg, evaluator, base_weights)
            evaluate(best_step or state.step)
    return write_results(cfg, world, model, out, metrics, partial(write_run_report, out, pairs, answers))


@contextmanager
def saved_on_failure(state: State, replica: Replica, log: Log, guard: NonfiniteGuard,
                     save: Callable[[State], None]) -> Iterator[None]:
    """Save the last whole step before an error inside ends the run, so that --resume goes on from there.

    Not where weights are unsound or an update of them was cut off; nor where ranks share steps and only some failed:
    the losses since the last flush are spread over all.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        world = replica.world
        is_sound = replica.optimizer.is_whole and not isinstance(error, UnsoundWeights)
        lost_rank = world.size > 1 and isinstance(error, RunFailed)
        if is_sound and state.step and not lost_rank and world.have_all_failed(state.step):
            # Saving may fail too, as on a full disk or a failed device: `error` ends the run, not that failure.
            with suppress(Exception):
                guard.check(log.flush(wait=True))
                if log.written == state.step and not guard.skipped:
                    save(state)
                    log.say(f"the run fails after step {state.step}, which is saved; --resume goes on from there")
        raise


def plan_steps(cfg: Config, rows: int) -> Plan:
    """Return the plan of the run's steps. Raises UserError where --profile names steps that it does not have."""
    plan = Plan(rows, cfg.batch_size, cfg.epochs)
    require_profiled_steps(cfg.profile, plan.steps)
    return plan


def evaluated_splits(cfg: Config, pairs: Pairs) -> list[str]:
    """Return the splits that --eval-splits names, and the probe; without that flag all splits."""
    if not cfg.eval_splits:
        return list(pairs.splits)
    return [name for name in pairs.splits if name in (*cfg.eval_splits, "probe")]


def make_saver(cfg: Config, world: World, out: Path, model: LoadedModel, training: Training,
               names: Sequence[str]) -> Saver:
    """Return the Saver of this run, with a new optimizer.

    Its checkpoints belong to the base model, to the rows of train and of the measured splits `names`, and to every
    setting that may not change on resume.
    """
    identity = identity_of(training.identity, training.pairs, ["train", *names])
    identity |= {"the precision": str(model.precision), "the number of pairs": str(training.rows)}
    recipe = {name: value for name, value in as_dict(cfg, "train").items() if not config_fields()[name].resumable}
    rates = Rates(cfg.lr_tower, cfg.lr_text, cfg.relative)
    optimizer = adamw_by_name(model.trainable, cfg.lr, cfg.weight_decay, cfg.l2_sp, rates)
    return Saver(out, model.trainable, optimizer, identity, recipe, training.order(cfg), cfg.keep, cfg.best_metric,
                 cfg.patience, world)


def first_state(saver: Saver, world: World, plan: Plan, resuming: bool) -> State:
    """Return the state to train from. Raises AgreedError where ranks would train on other data or from another step."""
    state = saver.resume(world.warn) if resuming else State()
    require_agreement(world.team, {**saver.identity, "the checkpoint to go on from": state.step,
                                   "the number of steps": plan.steps})
    return state


def earlier_run(out: Path, world: World, resuming: bool) -> EarlierRun | None:
    """Return the ledger of the run to go on with, for the opening of its data; None for a new run."""
    if not resuming:
        return None
    # Rank 0 reads it for all: on another node the file may not be there, or be an older copy.
    ledger = read_ledger(out / "ledger.jsonl") if world.is_main else []
    return EarlierRun(world.exchange(ledger)[0], replays=False)


def open_answers(out: Path, names: Collection[str], pairs: Pairs, model: LoadedModel, base: Mapping[str, Retrieval],
                 world: World) -> AnswerLog:
    """Return the log of answers; for a resumed run (`base` is measured) with the answers of its earlier processes."""
    answers = AnswerLog(out, shown_split(names), pairs.album.title, pairs.album.picture, world.warn if base else None)
    if base and world.exchange(answers.lacks("base"))[0]:
        shown = pairs.feature_splits([answers.split])[answers.split]  # all ranks encode it
        if world.is_main:
            answers.add("base", embed_shown(model, shown), base[answers.split])
    return answers


def embed_shown(model: LoadedModel, split: FeatureSplit) -> SplitEmbeddings:
    """Return the embeddings of a split whose answers people are shown."""
    return embed_split(model.head.image, model.head.text, split.parts())[0]


def warn_of_collapse(log: Log, results: Mapping[str, Retrieval]) -> None:
    """Print the splits on which all image embeddings, or all title embeddings, are equal."""
    for name, result in results.items():
        if result.collapsed:
            log.say(f"warning: {name}: {result.collapsed}")


def lacks_results(metrics: Mapping[str, object], answers: AnswerLog, world: World) -> bool:
    """Return, the same on all ranks, whether a run after its last step lacks answers or figures in metrics.json."""
    return world.exchange("tuned" not in metrics or answers.lacks("tuned"))[0]


def identity_of(identity: Mapping[str, str], pairs: Pairs, names: Collection[str]) -> dict[str, str]:
    """Return the digests of towers and data without those of splits that are not among `names`."""
    unused = {data_key(name) for name in pairs.splits if name not in names}
    return {key: digest for key, digest in identity.items() if key not in unused}


def summaries(results: Mapping[str, Retrieval]) -> dict[str, dict[str, Any]]:
    """Return the metrics with their intervals, by split, as metrics.json has them."""
    return {name: result.summarise() for name, result in results.items()}


def find_overlap(pairs: Pairs, world: World) -> dict[str, Overlap]:
    """Return the entry of metrics.json for splits that share images or titles, {} where none do; also print it."""
    shared = overlap(pairs.contents)
    release_freed_memory()
    if not shared:
        return {}
    world.say(describe_overlap(shared, {name: len(split) for name, split in pairs.splits.items()}))
    return {"overlap": shared}


def named_classes(pairs: Pairs) -> dict[str, Mapping[str, int]]:
    """Return the entry of metrics.json for splits whose titles are class names, {} where there are none."""
    return {"classes": pairs.classes} if pairs.classes else {}


@dataclass
class Evaluator:
    """Evaluates the model, logs the metrics and tracks the best checkpoint.

    Before the first step and after the last one all splits are measured, with intervals, differences and answers to
    show; between them only train and valid.
    """

    pairs: Pairs
    names: Sequence[str]  # splits to measure
    model: LoadedModel
    plan: Plan
    state: State
    saver: Saver
    log: Log
    answers: AnswerLog
    world: World
    metrics: dict[str, Any]  # content of metrics.json
    base: Mapping[str, Retrieval]  # row by row, of the model that the run began with
    cfg: Config

    def __call__(self, restored_step: int = 0) -> None:
        """Evaluate now. `restored_step` is the step whose weights replaced the last ones, 0 if none did."""
        step = self.state.step
        at_end = bool(restored_step) or step in (0, self.plan.steps)
        names = self.names
        if not at_end:
            names = [name for name in self.names if name in ("train", "valid")] or self.names
        splits = self.pairs.feature_splits(names)
        results: Mapping[str, Retrieval] = evaluate_splits(splits, self.model.head, self.world)
        if at_end and step:
            splits, results = self._measure_same_rows(splits, results)
        scores = summaries(results) if at_end else {name: each.values() for name, each in results.items()}
        self.log.metrics(scores, restored_step or step)
        warn_of_collapse(self.log, results)
        self.saver.record_evaluation(self.state, scores)
        if at_end:
            self._record_end(results, scores, splits[self.answers.split])

    def _measure_same_rows(self, splits: Mapping[str, FeatureSplit], results: Mapping[str, Retrieval]
                           ) -> tuple[Mapping[str, FeatureSplit], Mapping[str, Retrieval]]:
        """Return splits and results in which the tuned model is measured on the same rows as the base model.

        Where pictures were lost in between, the base model is measured again without their rows: its weights are put in
        the place of the trained ones meanwhile.
        """
        base = self.metrics.get("base", {})
        # In a loop, since the second measurement may lose further pictures.
        while names := [name for name, result in results.items()
                        if {self.base[name].pairs, base.get(name, {}).get("pairs")} != {result.pairs}]:
            self.world.say(f"pictures of {', '.join(names)} were lost since the base model was measured: it is "
                           "measured again without their rows")
            trained = snapshot(self.model.trainable)
            replace_values(self.model.trainable, read_weights(self.cfg, self.world))
            splits = {**splits, **self.pairs.feature_splits(names)}
            again = evaluate_splits({name: splits[name] for name in names}, self.model.head, self.world)
            if self.world.is_main and self.answers.split in names:
                shown = embed_shown(self.model, splits[self.answers.split])
                self.answers.add("base", shown, again[self.answers.split])
            self.base = {**self.base, **again}
            base |= summaries(again)
            replace_values(self.model.trainable, trained)
            if any(again[name].pairs != results[name].pairs for name in names):  # more were lost meanwhile
                splits = self.pairs.feature_splits(self.names)
                results = evaluate_splits(splits, self.model.head, self.world)
        return splits, results

    def _record_end(self, results: Mapping[str, Retrieval], scores: Metrics, shown: FeatureSplit) -> None:
        """Write metrics.json, and the answers that people are shown, before the first step or after the last."""
        when = "tuned" if self.state.step else "base"
        self.metrics[when] = scores
        if when == "tuned":
            self.metrics["difference"] = differences(self.base, results)
        else:
            self.base = results
        folder.write_metrics(self.saver.run, self.metrics, self.world)
        if self.world.is_main:
            space = embed_shown(self.model, shown)
            self.answers.record(when, space, results[self.answers.split], self.log.board, self.state.step)


def apply_interpolation(cfg: Config, evaluator: Evaluator, base_weights: Mapping[str, torch.Tensor]) -> None:
    """Leave the parameters between base and tuned as --interpolate says; write the curve of valid (else train)."""
    names = evaluator.names
    chosen = next(name for name in ("valid", "train", *names) if name in names)
    measured = [chosen, "probe"] if "probe" in names and chosen != "probe" else [chosen]

    def score() -> dict[str, dict[str, float]]:
        results = evaluate_splits(evaluator.pairs.feature_splits(measured), evaluator.model.head, evaluator.world)
        return {name: results[name].values() for name in measured}

    curve = interpolate(evaluator.model.trainable, base_weights, cfg.interpolate, score, cfg.best_metric)
    evaluator.metrics["interpolation"] = curve
    evaluator.log.curve("interpolation", curve["curve"])


def write_results(cfg: Config, world: World, model: LoadedModel, out: Path, metrics: dict[str, Any],
                  write_page: Callable[[], Path] | None = None) -> int:
    """Write the model folder, the page and the digests of a finished run, print its table; return the exit code."""
    if world.is_main:
        tuned = Tuned(model.trainable, Origin.of(cfg, model.clip, model.trainable, metrics))
        export(model.clip, out / "model", tuned, metrics_table(tuned.origin.metrics), cfg.license)
        page = f"report      {write_page()}\n" if write_page else ""
        folder.write_manifest(out)
    # Other ranks end when the results are whole, or when rank 0 shows no sign of life.
    world.monitored_exchange(None)
    if world.is_main:
        world.show(metrics_table(metrics), str(out / "metrics.json"))  # a pager may keep it waiting
        world.say(f"run folder  {out}\nmodel       {out / 'model'}\n{page}"
                  f"TensorBoard tensorboard --logdir {out.parent}")
        if cfg.push_to_hub:
            push(out / "model", cfg, str(out), ["push_to_hub", "private"], world.say)
    return 0


def repeat_results(world: World, out: Path) -> int:
    """Print the table of a finished run, whose files stay as they are; return the exit code."""
    if world.is_main:
        world.show(metrics_table(folder.read_json(out / "metrics.json")), str(out / "metrics.json"))
        world.say(f"run folder  {out}: this run had ended, and nothing in it has changed")
    return 0


def write_run_report(out: Path, pairs: Pairs, answers: AnswerLog) -> Path:
    """Write the before/after page of a run; return its path."""
    sizes = {name: len(split) for name, split in pairs.splits.items()}
    return write_report(out, answers.split, sizes, answers.answers, answers.title, answers.picture)
