"""`decompose`: the one training loop, for every method.

1. Pick the sites, look at the data and the run's directory, freeze the target.
2. Let the method make its start, or go on from the newest good checkpoint.
3. Take the steps (`loop`).
4. Save the decomposition and return it; the target is as it was.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.data.rows import batch_source
from tl_paramdecomp.data.tokenizer import ROW_START, row_start
from tl_paramdecomp.errors import SettingError, UnsupportedSiteError
from tl_paramdecomp.methods.method import Made, Method
from tl_paramdecomp.methods.random_streams import RandomScope
from tl_paramdecomp.patching.target import frozen
from tl_paramdecomp.settings import from_settings, hints_of, to_settings
from tl_paramdecomp.sites import SitePattern
from tl_paramdecomp.training import watch
from tl_paramdecomp.training.callbacks import Callback
from tl_paramdecomp.training.config import OnNonfinite, RunConfig
from tl_paramdecomp.training.distributed import answering, brought_together, joined
from tl_paramdecomp.training.loop import Run
from tl_paramdecomp.training.run_folder import RunFolder
from tl_paramdecomp.training.watch import Shown


def decompose(
    model: Any,
    sites: SitePattern,
    method: Method[Made],
    data: Any = None,
    steps: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: Literal["auto"] | bool = "auto",
    device: str | torch.device | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    background: Any = None,
    log_every: int = 10,
    checkpoint_every: int = 1000,
    keep_checkpoints: int = 2,
    keep_best: str | None = None,
    on_nonfinite: OnNonfinite = "stop",
    max_skips: int = 10,
    max_seconds: float | int | None = None,
    progress: bool | None = None,
    accumulate: int = 1,
    random_numbers: RandomScope = "per_rank",
    shard: bool = False,
) -> Made:
    """Learn components of a model's weights.

    Started by `torchrun`, every process holds the target and takes its part of every batch; one of them writes and talks.

    With a `run_dir`, SIGINT (Ctrl-C) and SIGTERM let the running step end, save a checkpoint and leave with `KeyboardInterrupt`
    or `SystemExit(143)`; a second one leaves at once. The same call then goes on, bit for bit as if it had never stopped.

    Args:
        model: The target, on any host. It is frozen and in evaluation mode meanwhile, and afterwards as it was.
        sites: Which weights; a glob, a list of globs, or a predicate.
        method: `SPD(...)`, or another method's object.
        data: What `token_batches` gives, token rows [rows, pos], batches, a dataset, or a function from the step's number to
            a batch; see `data.rows.batch_source`. None for a method that looks at none: with `training=None`,
            every basis but `WhitenedSVD`. Every process is given the same.
        steps: Optimiser steps; 0 gives the start as it is. None where there is nothing to train (`SVD(training=None)`); a
            number has no effect there.
        batch_size: Rows per step, of all processes together, where the data comes as rows.
        seed: Start, order of the rows and masks.
        run_dir: Where metrics, checkpoints and the result go; None keeps nothing on disk. One process at a time may have it.
        resume: `auto` goes on from the newest good checkpoint where `run_dir` has one; True demands one; False begins anew.
        device: Must be the model's own; None takes it.
        callbacks: Called after every logged step; see `training.callbacks`. One that returns `STOP` ends the run there.
        background: A second stream of rows, in any of the same forms, for methods that take one (`SPD.targeted`).
        log_every: Steps between lines of `metrics.jsonl`.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many of the newest checkpoints stay.
        keep_best: A logged figure, such as `loss`; the checkpoint where it is lowest stays too.
        on_nonfinite: What a step does whose losses, gradients or new parameters are not finite: `stop` the run, or be taken
            back and left out (`skip`), for which a copy of all that a step changes is kept.
        max_skips: Steps in a row that may be left out.
        max_seconds: The run saves and returns what there is after the first step that ends later than this after the call.
        progress: Show progress bars; None: where standard error is a terminal, or in a notebook.
        accumulate: Micro-batches into which each process divides its rows, where a batch has no room; the gradients are those
            of the whole batch.
        random_numbers: `per_rank`: each process draws the masks of its own rows. `global`: each draws those of the whole batch,
            so that a run is the same, to rounding, on any number of processes and micro-batches.
        shard: Keep components, their gradients and the optimiser's state in shards, one on each process (FSDP2), where they
            outgrow a device; otherwise every process has all of them (DDP).

    Returns:
        The decomposition, where the model is (on the CPU where it was in shards), on every process: a `Decomposition`, from
        `L3D` a `SubnetworkDecomposition`. Where `STOP` or `max_seconds` ended the run early, `info["stopped_after"]` is the
        number of steps done, and the same call goes on.

    Raises:
        NoMatchingSiteError, UnsupportedModelError: No such site, or none that is exact.
        DataError, SettingError: Data or settings that make no sense; a checkpoint of other settings.
        DivergedError: A loss, a gradient or a parameter is not finite; the last checkpoint stays.
        RunInUseError: Another process writes to `run_dir`.
        DecompositionFileError, DiskSpaceError: A checkpoint cannot be read or written; those before stay.
        PeerLostError: Another process of the run died.
    """
    given = locals()
    config = from_settings({name: given[name] for name in hints_of(RunConfig)}, base=RunConfig)
    batch_size, seed = config.batch_size, config.seed
    until = None if config.max_seconds is None else watch.now() + config.max_seconds
    adapter, steps = adapt(model), config.steps_of(method, data)
    if device is not None and torch.device(device).type != adapter.device.type:
        raise SettingError(
            f"device={device!r}, but the model is on {adapter.device}; move the model there first, components follow it."
        )
    chosen = adapter.select(sites)
    for name in chosen:
        if not bool(adapter.weight(name).isfinite().all()):
            raise UnsupportedSiteError(f"{name} has weights that are NaN or infinite; load it again, or leave it out.")
    if steps:
        method.check(adapter)
    source, looked_at = (
        None if data is None else batch_source(data, batch_size, seed, together=method.rows_together, model=adapter)
        for _ in range(2)
    )
    other = None if background is None else batch_source(background, batch_size, seed + 1, model=adapter)
    read = {name: used for name, used in (("data", source), ("background", other)) if used is not None and steps}
    first = {name: used.check() for name, used in read.items()}.get("data")
    settings = {
        "method": to_settings(method), "sites": list(chosen), "batch_size": batch_size, "seed": seed, "steps": steps,
        **{name: used.info for name, used in read.items()},
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(joined(adapter.device))
        run = Run(
            adapter, method, settings, config, steps, tuple(callbacks) if processes.leads else (), processes, until
        )
        run.shown = Shown(progress if processes.leads else False)
        if run_dir is not None:
            run.folder = RunFolder(Path(run_dir), settings, config.keep_checkpoints, keep_best, processes.leads)
            stack.enter_context(run.folder.opened())
        stack.enter_context(frozen(adapter))
        stack.enter_context(answering(processes, run.told))
        begun = run.begin(config.resume)
        made = method.initialise(
            adapter, chosen, torch.Generator().manual_seed(seed), run.shown.phase, looked_at and looked_at.batch
        )
        made.info["run"] = settings
        start = None if source is None or first is None else row_start(adapter, *first, source.writer)
        made.info |= {} if start is None else {ROW_START: start}
        made.requires_grad_(False)
        if run.folder is not None and processes.leads:
            loop = {name: value for name, value in vars(config).items() if name not in (*settings, "run_dir", "resume")}
            run.folder.describe(made, loop=loop, model=type(model).__name__, device=str(adapter.device))
        if source is not None and steps:
            run.prepare(made, source, other, begun)
            with torch.enable_grad():
                run.train()
            run.gradients = method.gradients  # DDP must go before its process group does
            made = brought_together(made).requires_grad_(False)
        if run.folder is not None and processes.leads:
            run.folder.save_result(made)
    return made
