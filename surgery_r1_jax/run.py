"""What every training run has, whatever it trains: folder, mesh, model, and steps with their numbers."""

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from surgery_r1_jax import (
    backends,
    checkpoint,
    config,
    errors,
    evaluate,
    hf,
    images,
    log,
    lora,
    model,
    optim,
    options,
    packed,
    pipeline,
    places,
    saves,
    sharding,
    speed,
    vocabulary,
)
from surgery_r1_jax.plan import Row
from surgery_r1_jax.records import Frame


class Setup(NamedTuple):
    """A model on a mesh, before any training."""

    runner: evaluate.Runner
    graph: nnx.GraphDef  # as the runner's, but for dropout
    params: dict  # what is trained, before the first step; `begin` gives them away
    frozen: dict  # the rest; empty where all is trained
    model: model.Config
    start: str | None  # identity of the model that the run started from, where it must be known again


def prepare(
    out: Path,
    settings: options.SFT | options.GRPO,
    *,
    resume: bool,
    classes: tuple[str, ...] = vocabulary.CLASSES,
    reference: bool = False,
) -> Setup:
    """Make the run folder and load the model that training starts from onto the mesh; `classes` are the answers.

    `reference` says that the start is also what the run is held against.

    Raises: InputError for a run that exists already, and for adapters whose base is no longer what it was.
    """
    if (out / "metrics.jsonl").exists() and not resume:
        raise errors.InputError(f"{out}: this run exists already; add --resume, or choose another --out")
    same_folder(out)  # and all have looked for that log, before the first begins it
    mesh, compute, adapted = sharding.make_mesh(settings.compute.mesh), settings.compute, settings.lora
    attend = backends.choose(compute, mesh)
    loaded = checkpoint.load_model(settings.model, mesh, dtype=adapted.kept)
    graph, abstract = lora.build(loaded.config, compute, adapted, attend)
    still, _ = lora.build(loaded.config, compute, adapted.still, attend)
    params, frozen, base = loaded.params, {}, None
    start = checkpoint.identity(loaded) if adapted.rank or reference else None
    if adapted.rank:
        base = checkpoint.Base(path=settings.model, digest=start, lora=adapted)
        shardings, _ = lora.split(sharding.of_params(abstract, mesh))
        params, frozen = lora.init(loaded.config, adapted, settings.seed, shardings), loaded.params
        if adapted.four_bits:
            frozen = packed.pack(frozen, loaded.config, adapted.base)
    side = out / "model"
    if jax.process_index() == 0 and not resume:
        side.mkdir(parents=True, exist_ok=True)
        checkpoint.Base.write(base, side)
        hf.copy_side_files(loaded.folder, side)
        hf.write_classes(side, classes)
        config.save(settings, out / "config.yaml")
    if resume and side.is_dir() and not checkpoint.Base.same(checkpoint.Base.of(out), base):
        raise errors.InputError(
            f"{out}: was started with other settings of lora, or on another model than {settings.model} holds now; "
            "restore them, or start a new run"
        )
    pictures = images.Kept(settings.data.cache / (1 + settings.data.workers))
    runner = evaluate.runner_of(loaded.folder, loaded.config, mesh, compute, still, classes, pictures)
    return Setup(runner, graph, params, frozen, loaded.config, start)


def take_up(out: Path) -> int | None:
    """The step of a run's last checkpoint, to go on from; None where the run is to be begun.

    The log of a run that was killed before its first save is put away: it is begun anew. All processes ask, and agree.
    """
    step = saves.last_step(out)
    if step is None and jax.process_index() == 0:
        log.put_away(out)
    # Nobody looks into the folder before that is done, and what the first one sees is what all go by.
    step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if step < 0 else step


def same_folder(out: Path) -> None:
    """Refuse a run folder that is not one and the same for all processes. Raises: InputError, in each of them."""
    if jax.process_count() == 1:
        return
    mark = out / f".seen-by-all-{int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))))}"
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        mark.write_bytes(b"removed as soon as all processes have looked")
    multihost_utils.sync_global_devices("marked")
    seen = multihost_utils.process_allgather(np.int32(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if blind := np.flatnonzero(seen == 0).tolist():
        which = f"process{'es' * (len(blind) > 1)} {', '.join(map(str, blind))}"
        raise errors.InputError(f"{out}: {which} cannot see what process 0 writes there; give a folder that all share")


def scheduled(settings: options.SFT | options.GRPO, frames: Sequence) -> options.SFT | options.GRPO:
    """The settings with their epochs worked out as steps."""
    return settings.model_copy(update={"schedule": pipeline.steps(frames, settings.data, settings.schedule)})


def sum_over_parts(function, batch, parts: int, add=None):
    """The sum of `function(group, number)` over `parts` equal groups of frames, one on the device at a time.

    A group takes every `parts`-th frame, so that frames spread over devices stay where they are. `add` joins two
    results (default: leaf by leaf).
    """
    if parts == 1:
        return function(batch, jnp.int32(0))
    add = add or (lambda a, b: jax.tree.map(jnp.add, a, b))
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    first = function(jax.tree.map(lambda x: x[0], cut), jnp.int32(0))
    rest = jax.tree.map(lambda x: x[1:], cut), jnp.arange(1, parts)
    return jax.lax.scan(lambda total, part: (add(total, function(*part)), None), first, rest)[0]


def abstract_state(params: dict, tx: optim.Transformation, mesh: jax.sharding.Mesh) -> optim.TrainState:
    """Shapes, dtypes and shardings of the state in which `params`, which may be abstract, are trained.

    Moments live where their parameters do, or beside them in the host's memory; counters everywhere.
    """
    by_path = {path: leaf.sharding for path, leaf in flatten_dict(params).items()}
    everywhere = sharding.replicated(mesh)

    def place(path, leaf):
        name = optim.parameter_of(path, by_path) if leaf.ndim else None
        where = by_path.get(name, everywhere)
        if tx.offload and name and path[0].name == "opt_state":
            where = sharding.offloaded(where)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(lambda p: optim.start(p, tx), params))


def start_state(params: dict, tx: optim.Transformation, mesh: jax.sharding.Mesh) -> optim.TrainState:
    """The state before the first step, in its places; `params` are given away to it."""
    where = _shardings(abstract_state(params, tx, mesh))
    return jax.jit(lambda p: optim.start(p, tx), donate_argnums=0, out_shardings=where)(params)


def begin(
    out: Path, setup: Setup, tx: optim.Transformation, data_hash: str, *, resume: bool
) -> tuple[saves.Checkpoints, saves.Restored]:
    """A run's checkpoints and what it goes on from: the last of them, or step 0; the setup's parameters are given away.

    Raises: InputError for a checkpoint that cannot be restored, or is of other data.
    """
    saved, mesh = saves.Checkpoints(out), setup.runner.mesh
    if not resume:
        return saved, saves.Restored(start_state(setup.params, tx, mesh), 0, {})
    wanted = abstract_state(setup.params, tx, mesh)
    jax.tree.map(lambda leaf: leaf.delete(), setup.params)  # there need not be room for both
    restored = saved.restore(wanted)
    same_data(restored.meta, data_hash, out)
    return saved, restored


def keep_layout(step: Callable, state: optim.TrainState) -> Callable:
    """`step(state, ...) -> (state, statistics)`, jitted: the state is given away and comes back laid out as it was.

    Left to itself the compiler lays the new state out as it likes: the second step would be compiled anew, and a
    resumed run would add up in another order than one that never stopped.
    """
    where = _shardings(state)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, where.step))


def _shardings(state: optim.TrainState) -> optim.TrainState:
    """Where the arrays of a state are."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def open_log(out: Path, description: str, plan: options.Schedule, resume_step: int | None) -> log.RunLog:
    """The log of a run, which only the first process writes; `resume_step` None for a new one."""
    return log.RunLog(
        out,
        total_steps=plan.steps,
        description=description,
        resume_step=resume_step,
        enabled=jax.process_index() == 0,
        tensorboard=plan.tensorboard,
    )


def frame_names(frames: Sequence[Frame], rows: Sequence[Row], most: int = 8) -> str:
    """The frames of a batch, for a message."""
    names = list(dict.fromkeys(frames[row.frame].id for row in rows))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def check_profile(profile: tuple[int, int] | None, first: int, plan: options.Schedule) -> None:
    """Refuse to trace steps that the run does not have. Raises InputError."""
    if profile and not (first <= profile[1] and profile[0] <= plan.steps):
        here = f"this run goes from step {first} to {plan.steps}"
        raise errors.InputError(f"--profile {profile[0]}:{profile[1]}: {here}; name steps of it")


class Steps:
    """The steps of a run, to be iterated over; a context manager.

    Statistics are read when the next step is under way, so that the device never waits for the log. `names` tells the
    frames of a step. `profile` names the first and the last step of which a trace is written, to `out`/profile.
    """

    def __init__(
        self,
        out: Path,
        first: int,
        plan: options.Schedule,
        journal: log.RunLog,
        clock: speed.Clock,
        names: Callable[[int], str],
        profile: tuple[int, int] | None = None,
    ):
        self._out, self._first, self._plan, self._journal, self._clock = out, first, plan, journal, clock
        self._names = names
        self._profile, self._tracing, self._open = profile or (0, 0), None, None

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_):
        self._open = None
        self._trace(False)

    def __iter__(self) -> Iterator[int]:
        for step in range(self._first, self._plan.steps + 1):
            self._trace(self._profile[0] <= step <= self._profile[1])
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield step

    def dispatched(self, step: int, stats: dict, done: speed.Done) -> None:
        """A step is under way, with these statistics to come; read those of the step before."""
        self.settle()
        self._open = step, stats, done

    def settle(self) -> None:
        """Wait for the last step and read its statistics. Raises NumericError."""
        if self._open is None:
            return
        (step, stats, done), self._open = self._open, None
        self._clock.did(done)
        if step % self._plan.log_every == 0 or step == self._plan.steps:
            self._journal.metrics(step, jax.device_get(stats) | self._clock.line())
        self._check(step, int(stats["skipped_in_a_row"]))

    def _check(self, step: int, bad: int) -> None:
        """Tell of a step that was left out, and stop a run whose numbers have gone bad."""
        if not bad:
            return
        frames = f"loss or gradient of step {step} was not finite, of frames {self._names(step)}"
        if bad < self._plan.max_bad_steps:
            self._journal.say(f"{frames}; it was left out")
            return
        last = saves.last_step(self._out)
        raise errors.NumericError(
            f"{frames}; that was {bad} times in a row and nothing of it was kept. Lower the learning rate or look at "
            f"the data, then {f'go on from step {last} with --resume' if last else 'start anew: nothing was saved'}"
        )

    def _trace(self, wanted: bool) -> None:
        if wanted and not self._tracing:
            self._tracing = contextlib.ExitStack()
            self._tracing.enter_context(traced(self._out / "profile"))
        elif self._tracing and not wanted:
            self.settle()
            self._tracing.close()
            self._tracing = None


@contextlib.contextmanager
def traced(folder: Path) -> Iterator[None]:
    """What is done meanwhile, as a trace that TensorBoard opens."""
    how = jax.profiler.ProfileOptions()
    how.python_tracer_level = 0  # every call of a Python function would be an event
    with places.staged(folder) as here:
        jax.profiler.start_trace(here, profiler_options=how)
        try:
            yield
        finally:
            jax.profiler.stop_trace()


def fingerprint(frames: Sequence, shard: pipeline.Shard, *rest: object) -> str:
    """`pipeline.fingerprint`, for which each process reads its part of the images."""
    own = np.zeros((-(-len(frames) // shard.count), 32), np.uint8)  # equally many everywhere, the last ones unused
    for row, image in enumerate(pipeline.image_hashes(frames[shard.index :: shard.count])):
        own[row] = np.frombuffer(image, np.uint8)
    parts = np.reshape(multihost_utils.process_allgather(own), (shard.count, *own.shape))
    images = [row.tobytes() for row in parts.swapaxes(0, 1).reshape(-1, 32)[: len(frames)]]
    return pipeline.fingerprint(frames, *rest, images=images)


def same_data(meta: dict, data_hash: str, out: Path) -> None:
    """Refuse to resume on other data. Raises InputError."""
    if meta["data"] != data_hash:
        raise errors.InputError(
            f"{out}: labels, images or the settings of their order changed since the checkpoint "
            f"(fingerprint {meta['data'][:12]}, now {data_hash[:12]}); restore them, or start a new run from {out}"
        )
