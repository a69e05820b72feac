"""A sweep from the launcher's point of view: check all jobs, start each as N ranks, keep records, go on or stop."""

from __future__ import annotations

import copy
import datetime
import functools
import logging
import math
import os
import pickle
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Mapping, Sequence

from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, flag_override, open_dict, read_write

from nemo_dist_conf.composition.agreement.config_tree import as_ranks_read, same_now
from nemo_dist_conf.composition.agreement.drawn_values import find_drawn, put_drawn
from nemo_dist_conf.composition.agreement.rank_logs import rank_file
from nemo_dist_conf.composition.callback import check_of
from nemo_dist_conf.composition.command_line import raw_words
from nemo_dist_conf.composition.hydra_inside import call_last_at_the_end, error_of_job, failed_job, without_callbacks
from nemo_dist_conf.composition.sweep_check import Job, SweepRefused, compose_jobs, judge, refusal
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.launch.failure import Failure, Interrupted, JobFailed
from nemo_dist_conf.launch.forkserver import start_forkserver
from nemo_dist_conf.launch.nodes import Nodes
from nemo_dist_conf.launch.records import Record, Records, text_table
from nemo_dist_conf.launch.settings import Settings, read_settings
from nemo_dist_conf.launch.sweep_folder import SweepFolder
from nemo_dist_conf.launch.task import Payload, pack, refuse_unguarded
from nemo_dist_conf.topology.launched_ranks import about_to_start

__all__ = ["TorchrunSweep"]

log = logging.getLogger(__name__)


class TorchrunSweep:
    """What the launcher plugin does. Raises SweepRefused for whatever cannot work, before a process is started."""

    def __init__(
        self, options: Mapping[str, Any], context: HydraContext, task: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.context, self.task = config, context, task
        self.failed = False
        try:
            self.settings: Settings = read_settings(options)
            refuse_unguarded(task, self.settings.options.start_method.name)
            resume = self.settings.options.resume
            if resume is not None:
                _continue_sweep(config, resume)
            self.nodes = Nodes(self.settings)
            self.now, self.mark = self.nodes.agree("sweep", lambda: (datetime.datetime.now(), uuid.uuid4().hex[:8]))
            self._same_time()
            asked = str(config.hydra.sweep.dir)
            self.folder = self._claimed_folder(resume)
            self._moved = str(config.hydra.sweep.dir) != asked
        except ConfigError as error:
            raise SweepRefused(*error.problems) from None
        self.records = Records(self.folder.path if self.folder else Path(str(config.hydra.sweep.dir)), bool(resume))
        call_last_at_the_end(context, _AtTheEnd(self))

    def _claimed_folder(self, resume: str | None) -> SweepFolder | None:
        """None on a node that does not lead: it uses the leading node's folder."""
        folder: SweepFolder | None = None

        def claim() -> str:
            nonlocal folder
            folder = SweepFolder(self.config, resume)
            return str(folder.path)

        path = self.nodes.agree("folder", claim)
        if folder is None:
            with flag_override(self.config, ["readonly", "struct"], False):
                self.config.hydra.sweep.dir = path
        return folder

    def _same_time(self) -> None:
        if self.nodes.count > 1:
            same_now(self.now, self.config)

    def launch(self, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
        """Run a batch of jobs, one after the other; what each gives, in order."""
        setup_globals()
        self._same_time()
        self._log_as_hydra()
        options = self.settings.options
        with about_to_start(self.settings.start):
            jobs = compose_jobs(self.config, job_overrides, first, self.context.config_loader)
            self._move(jobs)
            self._same_jobs(jobs, first)
            judge(jobs, of=check_of)
            self._refuse(jobs)
            todo = [job for job in jobs if not job.refused and self._completed(job) is None]
            if todo:
                start_forkserver(self.settings, {job.model_type for job in todo if isinstance(job.model_type, str)})
            ranks = "1 rank" if self.settings.world_size == 1 else f"{self.settings.world_size} ranks"
            log.info("Launching %d %s, each on %s", len(todo), "job" if len(todo) == 1 else "jobs", ranks)
            results: list[JobReturn] = []
            for job in jobs:
                try:
                    results.append(self._result(job))
                except (KeyboardInterrupt, Interrupted) as end:
                    stopped = end if isinstance(end, Interrupted) else Interrupted(signal.SIGINT)
                    self._stopped(job, jobs, stopped)
                    raise stopped from None
                if results[-1].status is JobStatus.FAILED and not job.refused:
                    self.failed = True
                    error = error_of_job(results[-1])
                    assert error is not None, "it failed"
                    if options.on_failure.name == "raise":
                        self._not_started(job, jobs)
                        self.show_table()
                        if isinstance(error, JobFailed):
                            raise error.with_traceback(None)  # Hydra 1.4 would show our frames and not the message
                        raise error
                    log.error("%s", error)
        return results

    def _same_jobs(self, jobs: list[Job], first: int) -> None:
        """Refuse a batch that is not the same on all nodes: other words typed, or a sweeper that draws its own."""
        if self.nodes.count == 1:
            return
        try:
            mine = [f"{job.words or 'no overrides'}{' (completed)' if self._completed(job) else ''}" for job in jobs]
            typed = " ".join(raw_words(self.config.hydra.overrides.task)) or "no overrides"
            leads, *others = self.nodes.gather(f"batch{first}", (typed, mine))
            for other in others:
                if other[1] != leads[1]:
                    raise _different_jobs(leads, other, first)
        except ConfigError as error:
            if self.folder:
                self.folder.forget()
            raise SweepRefused(*error.problems) from None

    def _move(self, jobs: list[Job]) -> None:
        """Jobs are composed from what was typed, which names another folder where this sweep had to move."""
        for job in jobs if self._moved else []:
            with flag_override(job.config, ["readonly", "struct"], False):
                job.config.hydra.sweep.dir = str(self.config.hydra.sweep.dir)

    def _refuse(self, jobs: list[Job]) -> None:
        refused = [job for job in jobs if job.refused]
        if not refused:
            return
        if self.settings.options.on_invalid.name == "raise":
            if self.folder:
                self.folder.forget()
            raise SweepRefused(refusal(jobs, "hydra.launcher.on_invalid=skip"))
        for job in refused:
            reasons = "\n".join(str(problem) for problem in job.refused)
            log.warning("#%d %s is skipped, it cannot work:\n%s", job.number, job.words, reasons)

    def _completed(self, job: Job) -> Record | None:
        resumed = self.settings.options.resume is not None
        return self.records.completed(job.number, _task_words(job)) if resumed else None

    def _result(self, job: Job) -> JobReturn:
        record = self._completed(job)
        if record is not None:
            log.info("\t#%d : %s : completed before", job.number, job.words)
            done = JobReturn(overrides=record.overrides, cfg=job.config, status=JobStatus.COMPLETED)
            done.return_value = record.value
            return done
        if job.refused:
            reasons = "\n".join(str(problem) for problem in job.refused)
            self._record(job, "skipped", reason=reasons)
            return self._without_value(JobReturn(overrides=_task_words(job)), SweepRefused(*job.refused))
        log.info("\t#%d : %s", job.number, job.words)
        began = time.perf_counter()
        result = self._run(job)
        seconds = time.perf_counter() - began
        failed = error_of_job(result)
        if failed is None:
            self._record(job, "completed", value=result.return_value, seconds=seconds)
            return result
        reason = failed.reason if isinstance(failed, JobFailed) else f"{type(failed).__name__}: {failed}"
        self._record(job, "failed", seconds=seconds, reason=reason)
        return self._without_value(result, failed)

    def _without_value(self, result: JobReturn, error: BaseException) -> JobReturn:
        """Sweepers that read values decide about failures by themselves; Hydra's own reads none and would stop."""
        basic = str(self.config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper")
        return failed_job(result, error, raises=not basic)

    def _run(self, job: Job) -> JobReturn:
        """Hydra's own job in this process, once: folder, ``.hydra``, callbacks; the ranks stand for its function."""
        context = self.context
        if not self.nodes.leads:
            context = without_callbacks(context)
            with flag_override(job.config, ["readonly", "struct"], False):
                job.config.hydra.output_subdir = None

        @functools.wraps(self.task)
        def start_ranks(config: DictConfig) -> Any:
            try:
                return self._run_ranks(job)
            except ConfigError as error:
                raise SweepRefused(*error.problems) from None

        end = f"job{job.number}/end"
        try:
            return run_job(
                hydra_context=context,
                task_function=start_ranks,
                config=job.config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                configure_logging=self.nodes.leads,
            )
        finally:
            self.nodes.post(end, Failure(f"node {self.nodes.number} could not start its ranks", when=time.time()))
            self._log_as_hydra()

    def _run_ranks(self, job: Job) -> Any:
        from nemo_dist_conf.launch.agent import run_ranks

        options, full = self.settings.options, copy.deepcopy(job.config)
        now = self.nodes.agree(f"job{job.number}/now", datetime.datetime.now)
        fork = options.start_method.name == "fork"
        body = self.nodes.agree(f"job{job.number}/body", lambda: self._body(full, now, None if fork else self.task))
        folder = Path(str(job.config.hydra.runtime.output_dir))
        log_dir = options.log_dir or str(folder / "ranks")
        allowed = getattr(self.context, "execution_whitelist", None)
        payload = Payload(body, JobRuntime.instance().get("name"), now, self.settings.threads, allowed)
        payload.environment.update(options.env)
        endpoint, run_id = self.nodes.endpoint(job.number), f"job{job.number}-{self.mark}"
        blob = pickle.dumps(payload)
        mine: Any
        try:
            mine = run_ranks(self.settings, endpoint, run_id, log_dir, blob, self.task if fork else None)
        except Failure as failure:
            mine = failure
        except Interrupted:
            self.nodes.post(f"job{job.number}/end", Failure(f"node {self.nodes.number} was stopped"))
            raise
        ends = self.nodes.gather(f"job{job.number}/end", mine)
        failures = [end for end in ends if isinstance(end, Failure)]
        if failures:
            first = min(failures, key=lambda failure: failure.when)
            raise JobFailed(job.number, job.words, first, _log_file(full, first.rank, log_dir))
        value = next(value for has_rank_0, value in ends if has_rank_0)
        if not _is_finite(value):
            no_value = Failure(f"returned {value}, which no sweeper can compare", 0)
            raise JobFailed(job.number, job.words, no_value, _log_file(full, 0, log_dir))
        return value

    def _body(self, full: DictConfig, now: datetime.datetime, task: TaskFunction | None) -> bytes:
        """Draw once for all ranks, note the tree beside Hydra's own files as it reads at the start, and pack it."""
        drawn = find_drawn(full)
        put_drawn(full, drawn)
        config = copy.deepcopy(full)
        with read_write(config), open_dict(config):
            del config["hydra"]
        if full.hydra.output_subdir is not None:
            same_now(now)
            noted = OmegaConf.create(as_ranks_read(config), flags={"allow_objects": True})
            setup_globals()
            self._same_time()
            OmegaConf.save(noted, Path(full.hydra.runtime.output_dir) / full.hydra.output_subdir / "resolved.yaml")
        return pack(task, config, full, drawn)

    def _record(self, job: Job, status: str, **more: Any) -> None:
        if not self.nodes.leads:
            return
        folder = OmegaConf.select(job.config, "hydra.runtime.output_dir", throw_on_missing=False)
        where = os.path.relpath(folder, self.records.folder) if folder else ""
        ranks = self.settings.world_size
        self.records.add(Record(job.number, _task_words(job), job.layout, status, folder=where, ranks=ranks, **more))

    def _not_started(self, last: Job, jobs: list[Job]) -> None:
        for job in jobs:
            if job.number > last.number and self._completed(job) is None:
                self._record(job, "skipped" if job.refused else "not started")

    def _stopped(self, job: Job, jobs: list[Job], end: Interrupted) -> None:
        """Ctrl-C or a signal: say what was not done and how to go on."""
        self._record(job, "interrupted", reason=f"stopped by {end.name}")
        self._not_started(job, jobs)
        if self.nodes.leads:
            self.show_table()
            print(f"stopped by {end.name}; to go on: hydra.launcher.resume={self.records.folder}", file=sys.stderr)

    def show_table(self) -> None:
        if self.nodes.leads and self.records.of_job:
            print(f"\n{text_table(self.records.all())}\n{self.records.folder / 'sweep.md'}", flush=True)

    def _log_as_hydra(self) -> None:
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)


class _AtTheEnd(Callback):
    """Shows the table of the sweep, and ends with status 1 where a job failed that the sweep went on after."""

    def __init__(self, sweep: TorchrunSweep) -> None:
        self.sweep, self.handled = sweep, sys.exc_info()[1]

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if sys.exc_info()[1] is not self.handled:
            return  # Hydra 1.4 comes here with the error that ends the sweep, too; an exit would hide it
        self.sweep.show_table()
        if self.sweep.failed:
            raise SystemExit(1)


def _is_finite(value: Any) -> bool:
    """Whether no number among what a job returned is infinite or none at all."""
    if isinstance(value, (list, tuple)):
        return all(_is_finite(item) for item in value)
    try:
        return isinstance(value, str) or math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # no number, or an integer beyond floats
        return True


def _task_words(job: Job) -> list[str]:
    return list(filter_overrides(job.overrides))


def _different_jobs(leads: tuple[str, list[str]], other: tuple[str, list[str]], first: int) -> ConfigError:
    """The refusal of two nodes with different jobs: what was typed, and the words. first: number of the first job."""
    pairs = [(number, *pair) for number, pair in enumerate(zip(leads[1], other[1]), first) if pair[0] != pair[1]]
    shown = [f"#{number} {one} | {two}" for number, one, two in pairs[:5]]
    if len(leads[1]) != len(other[1]):
        shown.append(f"{len(leads[1])} jobs | {len(other[1])} jobs")
    return ConfigError(
        Problem(
            what=f"the nodes of this sweep have different jobs: {'; '.join(shown)}",
            asked=other[0],
            allowed="one command line for all nodes, and a seed for a sweeper that draws",
            instead=leads[0],
        )
    )


def _continue_sweep(config: DictConfig, resume: str) -> None:
    """Take over the overrides of the sweep that goes on. Raises ConfigError where others were typed."""
    sweeper = str(config.hydra.sweeper.get("_target_"))
    if not sweeper.endswith(".BasicSweeper"):
        asked = f"hydra.launcher.resume={resume}"
        what = f"{sweeper.rpartition('.')[2]} chooses its jobs as it goes, so only the sweeper itself can go on"
        raise ConfigError(
            Problem(
                what=what,
                asked=asked,
                allowed="the sweeper's own storage",
                instead="hydra.sweeper.storage=sqlite:///sweep.db",
            )
        )
    saved: Any = OmegaConf.select(OmegaConf.load(Path(resume) / "multirun.yaml"), "hydra.overrides.task")
    before = raw_words(saved)
    typed = raw_words(config.hydra.overrides.task)
    if typed and typed != before:
        raise ConfigError(
            Problem(
                what="the sweep in this folder was another one, and its jobs have numbers by their place in it",
                asked=f"hydra.launcher.resume={resume} {' '.join(typed)}",
                allowed=" ".join(before) or "no overrides",
                instead=f"hydra.launcher.resume={resume}",
            )
        )
    with flag_override(config, ["readonly", "struct"], False):
        config.hydra.overrides.task = before


def _log_file(full: DictConfig, rank: int | None, log_dir: str) -> str:
    """Where the rank logs, as Hydra's own file handler is set; the folder of what ranks print where there is none."""
    path = OmegaConf.select(full, "hydra.job_logging.handlers.file.filename")
    return rank_file(str(path), rank or 0) if path else log_dir
