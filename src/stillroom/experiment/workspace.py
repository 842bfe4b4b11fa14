"""The stages of a study, in order: what each reads, what it writes, and whether it is done.

A stage's output carries the fingerprint of what it was made from; a stage whose output has the right one is not
run again. Stages meet in files, so each can be run alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from stillroom import offline_teacher_data as otd
from stillroom.analysis.frame import worse_or_equal, write_summary
from stillroom.config import BASELINE_LABELS, Group, ModelRef, fingerprint
from stillroom.data.chat_templates import chat_template_hash
from stillroom.data.corpus import examples_digest
from stillroom.errors import UserError
from stillroom.evaluation.baselines import Baseline
from stillroom.evaluation.generation import teacher_answers
from stillroom.experiment.jobs import CapturePlan, TrialPlan, finished, run_capture, run_trial
from stillroom.experiment.local_sweep import sweep as sweep_here
from stillroom.experiment.ray_sweep import capture_on_workers, sweep
from stillroom.experiment.reporting import as_planned, report_planned
from stillroom.experiment.resources import cores
from stillroom.experiment.sharded_trial import train_sharded
from stillroom.experiment.sources import Sources
from stillroom.experiment.tracker import Tracker
from stillroom.experiment.watching import SweepWatch
from stillroom.files import exclusive, read_json, remove_tree, write_json
from stillroom.folders import snapshots_of
from stillroom.models.architecture import PROBE, check_capture, try_miniature
from stillroom.models.hub import absolute, load_config, load_model, model_identity
from stillroom.models.output_head import load_output_head
from stillroom.models.precision import DTYPES, default_device, release_memory
from stillroom.offline_teacher_data.recomputation import check_with_head, full_support_error, recompute, sample_ids
from stillroom.offline_teacher_data.shards import Slice
from stillroom.offline_teacher_data.store import MANIFEST, SignalStore
from stillroom.provenance import record_run
from stillroom.training.fine_tuning import fine_tune_teacher, fine_tuned_teacher
from stillroom.training.train_student import Trial


class Workspace(Sources):
    """A study and its stages."""

    def fine_tune(self) -> ModelRef:
        """The teacher to capture: fine-tuned if the study says so, and then only once."""
        if self.study.teacher.fine_tune.method == "none":
            return self.teacher_ref
        folder = self.folder.teacher
        origin = self.fine_tuning_fingerprint(model_identity(self.teacher_ref))
        if (known := fine_tuned_teacher(folder, origin)) is not None:
            return ModelRef(model=str(known), trust_remote_code=self.study.teacher.trust_remote_code)
        self.require_supported()
        self.require_aligned()
        with exclusive(folder, "fine-tuning"):
            ref = fine_tune_teacher(
                self.teacher_ref,
                self.study.teacher.fine_tune,
                self.study.evaluation,
                self.fine_tuning_examples,
                folder,
                origin,
                partial(self.progress, "fine-tuning the teacher, steps"),
            )
        release_memory()  # the trained copy's: reference cycles would keep it alive
        self._record("fine-tune", {"teacher": self.teacher_identity})
        return ref

    def origin(self) -> dict[str, Any]:
        """What the study's store must have been made from."""
        teacher, signals = self.study.teacher, self.study.signals
        limit = self.study.evaluation.max_new_tokens
        tokenizer, examples = self.tokenizers[0], self.examples.all
        return otd.made_from(self.teacher_identity, teacher.dtype, tokenizer, signals, examples, limit)

    def capture(self, slice_: Slice | None = None, workers: int = 0) -> SignalStore | None:
        """Run the teacher over the corpus, unless a finished store of the same origin, or its snapshot, is there.

        With a slice, this process captures that slice, and the result is None until every slice is done. With
        workers, so many on Ray divide the work. A finished and archived store of another origin is replaced; one
        that is not archived is refused.
        """
        origin = self.origin()
        if (captured := self._captured()) == self.store_path:
            self._make_room(origin)
        if (captured / MANIFEST).is_file():
            store = SignalStore.open(captured)
            otd.require_matching(store, origin)
            return store
        if self.study.signals.imported:
            raise UserError(
                f"{captured}: no log-probabilities are imported yet (signals.imported): `stillroom import STUDY "
                "--requests FILE` writes what the teacher has to read, `stillroom import STUDY FILES` reads the answers"
            )
        self.require_supported()
        self.require_aligned()
        plan = CapturePlan(
            teacher=absolute(self.fine_tune()),
            tokenizer=absolute(self.teacher_ref),
            precision=self.study.teacher.dtype,
            signals=self.study.signals,
            evaluation=self.study.evaluation,
            corpus=self.folder.corpus.resolve(),
            store=self.store_path.resolve(),
            origin=origin,
            quantization=self.study.teacher.quantization,
        )
        of_slice = f", slice {slice_.number} of {slice_.of}" if slice_ else ""
        progress = partial(self.progress, f"capturing the teacher's signals{of_slice}, examples")
        if workers:
            capture_on_workers(plan, workers, self.study.sweep.address, len(self.examples.all), progress)
        elif not run_capture(plan, slice_ or Slice(), progress):
            return None
        self._record("capture", {"made_from": origin, "store": str(self.store_path)})
        return SignalStore.open(self.store_path)

    def import_signals(self, files: Sequence[Path]) -> SignalStore:
        """Fill the store with log-probabilities that were captured elsewhere; see `otd.import_signals`."""
        if not self.study.signals.imported:
            raise UserError(
                "the study captures its teacher: set signals.imported: true to import log-probabilities instead"
            )
        origin = self.origin()
        self.require_supported()
        self._make_room(origin)
        vocabulary = load_config(self.teacher_ref).get_text_config().vocab_size
        store = otd.import_signals(
            files,
            self.tokenizers[0],
            self.examples.all,
            self.study.signals,
            vocabulary,
            self.store_path,
            origin,
            partial(self.progress, "importing log-probabilities, examples"),
        )
        self._record(
            "capture", {"made_from": origin, "store": str(self.store_path), "imported": store.manifest["imported"]}
        )
        return store

    def _captured(self) -> Path:
        """The store to go on with: the working one or, where that is gone or another study's, this one's snapshot."""
        origin, there = self.origin(), (self.store_path / MANIFEST).is_file()
        if there and SignalStore.open(self.store_path).manifest["made_from"] == origin:
            return self.store_path
        return self._archived(origin) or self.store_path

    def _make_room(self, origin: dict[str, Any]) -> None:
        def in_the_way() -> bool:
            if not (self.store_path / MANIFEST).is_file():
                return False
            made_from = SignalStore.open(self.store_path).manifest["made_from"]
            return bool(made_from != origin) and self._archived(made_from) is not None

        if in_the_way():
            # the processes of a divided capture start together: what one has begun, another must not remove
            with exclusive(self.store_path.parent, "capture", f".{self.store_path.name}.lock", wait=60):
                if in_the_way():
                    remove_tree(self.store_path)

    def verify(self, samples: int = 20, recomputed: int = 0) -> dict[str, Any]:
        """The gate: check the store and that it is this study's; see `verify_saved_data`.

        `recomputed` examples are run through the teacher again; with none, stored hidden states times the output
        head must give the stored top-k back, where the teacher's files are available.
        """
        store = SignalStore.open(self._captured())
        otd.require_matching(store, self.origin())
        record = otd.verify_saved_data(store.path, samples)
        if (snapshot := self._archived(self.origin())) is not None:
            otd.require_record(snapshot)
        teacher, signals = self.fine_tune(), self.study.signals
        if signals.imported and recomputed:
            raise UserError(
                "the store was imported (signals.imported), and this teacher is not run: leave out --recompute"
            )
        if not signals.top_k:  # no log-probability is stored that the remade ones could be compared with
            recomputed = max(recomputed, 2)
        if recomputed:
            model = load_model(teacher, self.study.teacher.dtype, "auto", self.study.teacher.quantization)
            if signals.teacher_head:
                record["full_support"] = full_support_error(store, model, sample_ids(store, recomputed))
            record["recomputed"] = recompute(store, model, sample_ids(store, recomputed))
            if signals.teacher_answers:
                record["answers_that_differ"] = self._answers_that_differ(store, model, sample_ids(store, recomputed))
        elif signals.imported:
            record["imported"] = [file["name"] for file in store.manifest["imported"]]
        elif (head := store.teacher_head if signals.teacher_head else load_output_head(teacher)) is not None:
            dtype = DTYPES[self.study.teacher.dtype]
            record["with_output_head"] = check_with_head(store, head, sample_ids(store, 2), dtype)
        else:
            record["not_checked"] = "values against the teacher: its output head is not among its files here"
        record |= {"store": str(store.path), "fingerprint": store.manifest["fingerprint"]}
        self._record("verify", record)
        return record

    def _answers_that_differ(self, store: SignalStore, model: Any, ids: list[str]) -> int:
        """How many of the teacher's answers it gives otherwise when asked again; in float32 none may."""
        asked = [example for example in self.examples.all if example.example_id in ids]
        again = teacher_answers(model, self.tokenizers[0], asked, self.study.evaluation)
        found = [e.example_id for e, text in zip(asked, again, strict=True) if store.answers[e.example_id] != text]
        if found and (self.study.teacher.dtype == "float32" or len(found) == len(asked)):
            raise UserError(f"{store.path}: example {found[0]}: the kept answer is not this teacher's")
        return len(found)

    def archive(self) -> Path:
        """The dated snapshot of the verified store; the one there is, if it is archived."""
        store = SignalStore.open(self._captured())
        otd.require_matching(store, self.origin())
        path = otd.archive(store.path) if store.path == self.store_path else otd.seal(store.path)
        self._record("archive", {"snapshot": str(path), "fingerprint": store.manifest["fingerprint"]})
        self.tracker.log_snapshot(path, store.manifest["fingerprint"])
        return path

    def _archived(self, origin: dict[str, Any]) -> Path | None:
        """The newest snapshot beside the store with this origin."""
        for path in reversed(snapshots_of(self.store_path)):
            if (path / MANIFEST).is_file() and SignalStore.open(path).manifest["made_from"] == origin:
                return path
        return None

    def snapshot(self) -> Path:
        """The archived store the trials read. `UserError` says what to run if there is none."""
        found = self._archived(self.origin())
        if found is None:
            if (self.store_path / MANIFEST).is_file():
                otd.require_matching(SignalStore.open(self.store_path), self.origin())
            raise UserError(
                f"no archived teacher data of this study beside {self.store_path}: run `stillroom capture`, "
                "`stillroom verify` and `stillroom archive`, or `stillroom run`"
            )
        return found

    def baselines(self) -> dict[str, dict[str, Any]]:
        """Metrics of the teacher and the student before training; tasks on which the teacher is no better."""
        if due := [baseline for baseline in self.measured_baselines if baseline.read() is None]:
            self.require_supported()
            self.require_aligned()
            for role in BASELINE_LABELS:
                self._measure(role, [baseline for baseline in due if baseline.role == role])
                release_memory()  # of one model, before the next is loaded
            self._record("evaluate", {"measured": [baseline.name for baseline in due]})
        found = {baseline.name: baseline.read() or {} for baseline in self.measured_baselines}
        measured = {role: found[role] for role in BASELINE_LABELS if role in found}
        no_better = worse_or_equal(*(facts["metrics"] for facts in measured.values())) if len(measured) == 2 else []
        return {**measured, "teacher_no_better": {"tasks": no_better}}

    @property
    def _student_device(self) -> torch.device | str:
        """Where the student before training is scored: one too large for a GPU is spread over all of them."""
        return default_device() if self.study.sweep.processes == 1 else "auto"

    def _measure(self, role: str, due: list[Baseline]) -> None:
        if not due:
            return
        ref, device = (self.fine_tune(), "auto") if role == "teacher" else (self.student_ref, self._student_device)
        model = load_model(
            ref, due[0].precision, device, self.study.teacher.quantization if role == "teacher" else None
        )
        if role == "student" and self.study.captures_student and try_miniature(model.config) is None:
            check_capture(model, PROBE)  # which `require_supported` could not, and a trial would only after the capture
        for baseline in due:
            shown = partial(self.progress, f"evaluating the {BASELINE_LABELS[role]}, examples")
            baseline.measure(model, self.tokenizers[role == "student"], shown)

    def plans(self) -> list[TrialPlan]:
        """Every trial of the study, group by group, seed by seed; needs the archived snapshot."""
        store = self.snapshot()
        plans = [
            TrialPlan(
                trial=Trial(self.trial_id(group, seed, store), group, seed),
                student=absolute(self.student_ref),
                training=self.study.training,
                objective=self.study.objective,
                evaluation=self.study.evaluation.with_whole_paths(),
                corpus=self.folder.corpus.resolve(),
                store=store,
                experiment=self.folder.trials.resolve(),
                minimum_coverage=self.study.signals.minimum_coverage,
                max_length=self.study.corpus.max_length,
                keep_checkpoints=self.study.sweep.keep_checkpoints,
                lora=self.study.student.lora,
            )
            for group in self.study.groups
            for seed in self.study.sweep.seeds
        ]
        trials = [{"name": p.trial.name, "group": p.trial.group.name, "seed": p.trial.seed} for p in plans]
        planned = {
            "study": self.study.model_dump(mode="json"),
            "snapshot": store.name,
            "fingerprint": read_json(store / MANIFEST)["fingerprint"],
            "corpus": read_json(self.folder.corpus_facts)["fingerprint"],
            "baselines": {baseline.name: baseline.fingerprint for baseline in self.measured_baselines},
            "trials": trials,
        }
        write_json(self.folder.planned, planned)
        return plans

    def trial_id(self, group: Group, seed: int, store: Path) -> str:
        """8 digits of the fingerprint of all that decides a trial's numbers."""
        made_from = read_json(store / MANIFEST)["fingerprint"]
        objective = group.objective(self.study.objective)
        return fingerprint(
            made_from,
            self.student_identity,
            self.study.training,
            self.study.evaluation,
            examples_digest(self.examples.test),
            objective,
            group.name,
            seed,
            *([self.study.student.lora] if self.study.student.lora else []),
            *([chat_template_hash(self.tokenizers[1])] if self.study.has_chats else []),
            *([self.examples.harness] if self.examples.harness else []),
        )[:8]

    def train_one(self, group: str, seed: int) -> dict[str, Any]:
        """Train one trial here, without Ray, unless it is finished; returns its result."""
        self.study.group(group)
        chosen = [p for p in self.plans() if p.trial.group.name == group and p.trial.seed == seed]
        if not chosen:
            raise UserError(f"seed {seed} is not in the study; it has {list(self.study.sweep.seeds)}")
        if not (known := finished(chosen[0])):
            self.require_supported()
        count, by = self.study.sweep.processes, None
        if count > 1:
            by = partial(train_sharded, count=count, threads=max(1, cores() // count))
        result = run_trial(chosen[0], progress=partial(self.progress, f"training {group}, seed {seed}, steps"), by=by)
        write_summary(self.results)
        if not known:
            self._record("train", {"trial": result["trial"]})
        self.tracker.log_trial(chosen[0].folder)
        return result

    def sweep(self) -> dict[str, str]:
        """Run the trials that are missing, here or on Ray, and write the summary; returns failed trials' errors."""
        plans = self.plans()
        if not all(map(finished, plans)):
            self.require_supported()
        release_memory()  # the teacher's, where it ran in this process
        shown = SweepWatch(plans, self.progress)

        def watch(event: str, facts: dict[str, Any]) -> None:
            if event == "finished":
                with suppress(UserError):  # the trials go on; at the end it is done again, and then it must succeed
                    write_summary(self.results)
                    self.tracker.log_trial(self.folder.trial(facts["trial"]).path)
            shown.tell(event, facts)

        self.tracker.check()
        write_summary(self.results)
        shown.show()
        if self.study.sweep.launched_by() == "local":
            errors = sweep_here(plans, self.study.sweep, watch)
        else:
            storage = self.study.sweep.storage or str(self.folder.ray)
            where = storage if "://" in storage else str(Path(storage).resolve())
            errors = sweep(plans, self.study.sweep, where, watch)
        write_summary(self.results)
        self._record("sweep", {"trials": len(plans), "failed": errors})
        for plan in plans:
            if finished(plan):
                self.tracker.log_trial(plan.folder)
        return errors

    def report(self) -> Path:
        """Write `report.html` and its figures from what is in the results folder, for the study as it is now.

        Its trials are planned again only if the study, or its newest archive, is another than when they were planned
        last. If models or teacher data are unavailable then, reports the last planned study and warns.
        """
        if as_planned(self.study) is None:
            try:
                self.plans()
            except UserError as error:
                logging.getLogger("stillroom").warning("warning: reported as planned last, since: %s", error)
        return report_planned(self.study)

    @cached_property
    def tracker(self) -> Tracker:
        """The experiment tracker."""
        return Tracker(self.study, self.results)

    def _record(self, stage: str, facts: dict[str, Any]) -> None:
        record_run(self.folder.run_record, stage, {**self.meter.read(), **facts}, self.study.model_dump(mode="json"))
