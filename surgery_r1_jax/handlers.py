"""What the commands of `surgery-r1` do with their arguments: one short handler each.

A handler imports what it needs when it runs, so help and refusals come at once, without jax. It returns an exit
status, or None for 0.
"""

import argparse
import contextlib
import os
import signal
import sys
import types
from collections.abc import Iterator

from surgery_r1_jax import heap, hosts, launchers, places
from surgery_r1_jax.errors import InputError, Preempted


def start_devices() -> None:
    """Set what jax and its companions read when they are first imported; the user's environment wins."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(places.cache() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # On GPUs, what `compute.offload` may take of the host's memory: all, where XLA would stop at 64 GiB.
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(installed >> 30))
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # else Grain's worker processes stop at unparsed flags


def start_together(args: argparse.Namespace, *, saves: bool = False) -> None:
    """`start_devices` of a command that many processes may share; a machine that is alone notices nothing.

    One that `saves` when it is told to stop asks for that itself, any other is ended at once.
    """
    place = launchers.find(args.coordinator, args.processes, args.process_id)
    start_devices()
    hosts.join(place, args.join_timeout)
    if place and not saves:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # jax keeps it for who asks


def demo(args: argparse.Namespace) -> int | None:
    """`demo`."""
    # Programs this small are compiled for as long as they run: a quarter less of it costs them no speed.
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {os.environ.get('XLA_FLAGS', '')}"
    start_devices()
    from surgery_r1_jax import demo

    return demo.start(args.out, smoke=args.smoke, seed=args.seed)


def synth(args: argparse.Namespace) -> None:
    """`data synth`."""
    from surgery_r1_jax import synth

    names = synth.write(
        args.directory,
        frames=args.frames,
        seed=args.seed,
        size=args.size,
        max_tools=args.max_tools,
        balance=args.balance,
        jobs=args.jobs,
    )
    print(f"{len(names)} frames written to {args.directory}")


def check(args: argparse.Namespace) -> int | None:
    """`data check`."""
    if args.model is not None:
        start_devices()
    from surgery_r1_jax import survey

    paths = dict(json_path=args.json, html_path=args.html)
    return survey.main(args.directory, strict=args.strict, **paths, model=args.model, boxes=args.boxes)


def unpack(args: argparse.Namespace) -> None:
    """`data unpack`."""
    from surgery_r1_jax import archives, log

    with log.byte_bar("unpacking") as tell:
        files = archives.unpack(args.archive, args.directory, args.max_size, tell=tell)
    print(f"{args.archive}: {files} files unpacked to {args.directory}")


def build(args: argparse.Namespace) -> None:
    """`data build`."""
    from surgery_r1_jax import build, teacher

    if bool(args.teacher) != bool(args.teacher_model):
        raise InputError("--teacher URL and --teacher-model NAME go together; give both or neither")
    ask = None
    if args.teacher:
        beside = places.cache() if places.remote(args.out) else args.out.parent
        cache = args.teacher_cache or beside / f"{args.out.name}.teacher.jsonl"
        ask = teacher.Teacher(args.teacher, args.teacher_model, cache, jobs=args.teacher_jobs)
    build.run(
        args.source,
        args.out,
        kinds=args.kinds,
        split=args.split,
        seed=args.seed,
        size=args.size,
        dialogues=args.dialogues,
        ask=ask,
    )


def data_export(args: argparse.Namespace) -> int | None:
    """`data export`."""
    start_devices()
    from surgery_r1_jax import conversations

    how = dict(model=args.model, form=args.format, boxes=args.boxes, strict=args.strict)
    return conversations.run(args.source, args.out, **how)


def augment(args: argparse.Namespace) -> None:
    """`data augment`."""
    from surgery_r1_jax import options, sheet

    sheet.write(options.load(args.config, args.overrides), args.out, count=args.frames)
    print(f"{args.out}: frames as the run may see them")


def init(args: argparse.Namespace) -> None:
    """`init`."""
    start_devices()
    from surgery_r1_jax import fresh

    print(f"untrained tiny model written to {fresh.write(args.hf_dir, seed=args.seed)}")


def sft(args: argparse.Namespace) -> None:
    """`sft`."""
    with _stoppable():
        from surgery_r1_jax import config, options

        settings = config.load(options.SFT, args.config, args.overrides)  # a mistake is told before jax is there
        start_together(args, saves=True)
        from surgery_r1_jax import sft

        _train(sft, settings, args)


def grpo(args: argparse.Namespace) -> None:
    """`grpo`."""
    with _stoppable():
        from surgery_r1_jax import config, options

        settings = config.load(options.GRPO, args.config, args.overrides)
        start_together(args, saves=True)
        from surgery_r1_jax import grpo

        _train(grpo, settings, args)


def _train(program: types.ModuleType, settings, args: argparse.Namespace) -> None:
    """Begin a run or go on with it; with `--resume auto` whichever it is, and nothing where all steps are done."""
    resume = args.resume
    if resume == "auto":
        from surgery_r1_jax import milestones, run

        step, steps = run.take_up(args.out), settings.schedule.steps  # none yet where there are epochs
        done = step is not None and steps is not None and step >= steps
        if done and milestones.evaluated(args.out, step, settings.evaluation.split):
            print(f"{args.out}: all of its {step} steps are done")
            return
        resume = step is not None
    program.train(settings, args.out, resume=resume, profile=args.profile)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Where a lone process may be told to stop and no step is under way, after which it would save: it just leaves.

    Of several processes each has one that watches it (see `hosts`), which is what gets the signal then.
    """

    def leave(*_: object) -> None:
        told = "stopped: no step was under way; what was saved is whole, go on with --resume auto"
        print(told, file=sys.stderr, flush=True)
        os._exit(Preempted.exit_status)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is leave:
            signal.signal(signal.SIGTERM, before)


def evaluate(args: argparse.Namespace) -> int | None:
    """`evaluate`."""
    start_together(args)
    from surgery_r1_jax import evaluate

    return evaluate.run(
        args.checkpoint,
        args.data,
        args.split,
        args.out,
        frames=args.batch_frames,
        max_tokens=args.max_completion,
        dtype=args.dtype,
        blank=args.blank,
        strict=args.strict,
        boxes=args.boxes,
    )


def export(args: argparse.Namespace) -> None:
    """`export`."""
    heap.keep()
    start_devices()
    from surgery_r1_jax import checkpoint, log

    how = dict(dtype=args.dtype, which=args.which, merge=args.merge, max_shard_bytes=args.max_shard_size)
    with log.byte_bar("exporting") as tell:
        folder = checkpoint.export(args.checkpoint, args.hf_dir, **how, tell=tell)
    print(f"{args.checkpoint} written to {folder}")


def import_folder(args: argparse.Namespace) -> None:
    """`import`."""
    heap.keep()
    start_together(args)
    from surgery_r1_jax import checkpoint, log

    with log.byte_bar("importing", enabled=hosts.first()) as tell:
        folder = checkpoint.import_folder(args.hf_dir, args.out, dtype=args.dtype, tell=tell)
    print(f"{args.hf_dir} written to {folder}")


def ask(args: argparse.Namespace) -> int | None:
    """`ask`."""
    start_devices()
    from surgery_r1_jax import ask

    return ask.run(args.checkpoint, args.image, args.question, save=args.save)


def doctor(args: argparse.Namespace) -> int | None:
    """`doctor`."""
    from surgery_r1_jax import options

    if (args.config is None) == (args.checkpoint is None):
        raise InputError("give either --config FILE or --checkpoint DIR; see surgery-r1 doctor --help")
    settings = options.load(args.config, args.overrides) if args.config else None
    start_devices()
    from surgery_r1_jax import doctor

    return doctor.start(settings, args.config) if settings else doctor.describe(args.checkpoint)


def report(args: argparse.Namespace) -> int | None:
    """`report`."""
    from surgery_r1_jax import report

    return report.run(args.evaluations, args.out, data=args.data)
