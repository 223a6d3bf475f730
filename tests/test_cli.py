"""The command line answers at once, refuses mistakes with the right name, and ends with the promised statuses."""

import errno
import importlib
import inspect
import os
import shlex
import subprocess
import sys
import time
import types
import unittest.mock
from pathlib import Path

import pytest

import surgery_r1_jax
from surgery_r1_jax import cli, config, handlers, options
from surgery_r1_jax.errors import InputError, NumericError, Preempted

TARGETS = {  # what the handlers call, and an answer of the right kind
    "demo.start": 0,
    "synth.write": ["seq_1/frame000"],
    "survey.main": 0,
    "archives.unpack": 7,
    "build.run": {},
    "teacher.Teacher": None,
    "conversations.run": 0,
    "sheet.write": None,
    "sft.train": {},
    "grpo.train": {},
    "evaluate.run": 0,
    "checkpoint.export": Path("h"),
    "checkpoint.import_folder": Path("k"),
    "ask.run": 0,
    "run.take_up": None,
    "milestones.evaluated": True,
    "doctor.start": 0,
    "doctor.describe": 0,
    "fresh.write": Path("h"),
    "report.run": 0,
}
TELL = unittest.mock.ANY
TRAINING = ["--config", "c.yaml", "--out", "runs/x"]


@pytest.fixture
def calls(monkeypatch):
    """Stands in for every function that a handler calls; the calls they received."""
    received, made = [], []
    for target, answer in TARGETS.items():
        name, function = target.split(".")
        stand_in = sys.modules.get(f"surgery_r1_jax.{name}")
        module = stand_in if stand_in in made else types.ModuleType(f"surgery_r1_jax.{name}")
        made.append(module)

        def record(*args, _target=target, _answer=answer, **options):
            received.append((_target, args, options))
            return _answer

        setattr(module, function, record)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(surgery_r1_jax, name, module, raising=False)
    monkeypatch.setattr(handlers, "start_devices", lambda: received.append("start_devices"))
    monkeypatch.setattr(config, "load", lambda *given: given)  # what was to be read stands for what was read
    monkeypatch.setattr(options, "load", lambda *given: given)
    return received


@pytest.fixture
def sft_raises(calls, monkeypatch):
    """Makes `sft.train` raise."""

    def arrange(error):
        def train(*_, **__):
            raise error

        monkeypatch.setattr(sys.modules["surgery_r1_jax.sft"], "train", train)

    return arrange


def example_of(name):
    """The words of the example in a command's help."""
    return shlex.split(cli.commands()[name].epilog.splitlines()[1])[1:]


def refusal(capsys, *argv, status=2):
    assert cli.main(argv) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.removesuffix("\n")


@pytest.mark.parametrize(
    ("argv", "name", "args", "options"),
    [
        ("demo --out d", "demo.start", (Path("d"),), {"smoke": False, "seed": 0}),
        ("demo --out d --smoke --seed 7", "demo.start", (Path("d"),), {"smoke": True, "seed": 7}),
        (
            "data synth d --frames 5 --seed 2 --size 64x48 --max-tools 2 --balance .5 --jobs 3",
            "synth.write",
            (Path("d"),),
            {"frames": 5, "seed": 2, "size": (64, 48), "max_tools": 2, "balance": 0.5, "jobs": 3},
        ),
        (
            "data synth d --frames 5",
            "synth.write",
            (Path("d"),),
            {"frames": 5, "seed": 0, "size": (1280, 1024), "max_tools": 4, "balance": 0.0, "jobs": 1},
        ),
        (
            "data check d",
            "survey.main",
            (Path("d"),),
            {"strict": False, "json_path": None, "html_path": None, "model": None, "boxes": None},
        ),
        (
            "data check d --strict --json f --html g",
            "survey.main",
            (Path("d"),),
            {"strict": True, "json_path": Path("f"), "html_path": Path("g"), "model": None, "boxes": None},
        ),
        (
            "data unpack a d --max-size 5GB",
            "archives.unpack",
            (Path("a"), Path("d"), 5 * 10**9),
            {"tell": TELL},
        ),
        (
            "data build d o",
            "build.run",
            (Path("d"), Path("o")),
            {"kinds": None, "split": "all", "seed": 0, "size": (1280, 1024), "dialogues": False, "ask": None},
        ),
        (
            "data build d o --kinds vqa_cot,vqla_cot=0.5 --split train --seed 3 --size 64x48 --dialogues",
            "build.run",
            (Path("d"), Path("o")),
            {"kinds": {"vqa_cot": 1.0, "vqla_cot": 0.5}, "split": "train", "seed": 3, "size": (64, 48)}
            | {"dialogues": True, "ask": None},
        ),
        (
            "data export d o --model h --format sharegpt",
            "conversations.run",
            (Path("d"), Path("o")),
            {"model": Path("h"), "form": "sharegpt", "boxes": None, "strict": False},
        ),
        (
            "evaluate --checkpoint k --data d --split dev --out f.json --max-completion 9 --no-blank",
            "evaluate.run",
            (Path("k"), Path("d"), "dev", Path("f.json")),
            {"frames": 16, "max_tokens": 9, "dtype": "float32", "blank": False, "strict": False, "boxes": None},
        ),
        (
            "export k h --max-shard-size 500MB",
            "checkpoint.export",
            (Path("k"), Path("h")),
            {"dtype": "float32", "which": "best", "merge": False, "max_shard_bytes": 500_000_000, "tell": TELL},
        ),
        (
            "import h k --dtype bfloat16",
            "checkpoint.import_folder",
            (Path("h"), Path("k")),
            {"dtype": "bfloat16", "tell": TELL},
        ),
        ("ask --checkpoint k --image i q", "ask.run", (Path("k"), Path("i"), "q"), {"save": None}),
        ("ask q --checkpoint k --image i --save p", "ask.run", (Path("k"), Path("i"), "q"), {"save": Path("p")}),
        ("doctor --config c --a.b=3", "doctor.start", ((Path("c"), ["--a.b=3"]), Path("c")), {}),
        ("doctor --checkpoint k", "doctor.describe", (Path("k"),), {}),
        (
            "data augment --config c --out s.png --frames 2 --a.b=3",
            "sheet.write",
            ((Path("c"), ["--a.b=3"]), Path("s.png")),
            {"count": 2},
        ),
        ("init h --seed 4", "fresh.write", (Path("h"),), {"seed": 4}),
        ("report a b --out r.html", "report.run", ([Path("a"), Path("b")], Path("r.html")), {"data": None}),
    ],
)
def test_every_command_calls_its_module(calls, argv, name, args, options):
    assert cli.main(argv.split()) == 0
    assert calls[-1] == (name, args, options)
    needs_devices = name not in (
        "synth.write",
        "survey.main",
        "archives.unpack",
        "build.run",
        "sheet.write",
        "report.run",
    )
    assert calls[:-1] == (["start_devices"] if needs_devices else [])


def test_a_teacher_is_who_writes(calls):
    words = "data build d o/train --teacher http://h/v1 --teacher-model m --teacher-jobs 3"
    assert cli.main(words.split()) == 0
    assert calls[0] == ("teacher.Teacher", ("http://h/v1", "m", Path("o/train.teacher.jsonl")), {"jobs": 3})
    assert cli.main([*words.split(), "--teacher-cache", "c"]) == 0
    assert calls[2][1] == ("http://h/v1", "m", Path("c"))


@pytest.mark.parametrize("name", list(cli.commands()))
def test_every_call_fits_the_function_it_is_made_for(calls, request, name):
    assert cli.main(example_of(name)) == 0
    target, args, options = calls[-1]
    module, function = target.split(".")
    request.getfixturevalue("monkeypatch").undo()
    if not (Path(surgery_r1_jax.__file__).parent / f"{module}.py").exists():
        pytest.skip(f"surgery_r1_jax.{module} is not written yet")
    real = getattr(importlib.import_module(f"surgery_r1_jax.{module}"), function)
    inspect.signature(real).bind(*args, **options)


@pytest.mark.parametrize("program", ["sft", "grpo"])
def test_training_takes_overrides_anywhere(calls, program):
    argv = [program, "--a.b=c", "--config", "c.yaml", "--seed=3", "--out=runs/x", "--resume", "--profile=10:13"]
    argv.append("--q=[1, 2]")
    assert cli.main(argv) == 0
    read = {"sft": options.SFT, "grpo": options.GRPO}[program], Path("c.yaml"), ["--a.b=c", "--seed=3", "--q=[1, 2]"]
    assert calls[-1] == (f"{program}.train", (read, Path("runs/x")), {"resume": True, "profile": (10, 13)})
    assert cli.main([program, *TRAINING]) == 0
    assert calls[-1][1][0][2] == []
    assert calls[-1][2] == {"resume": False, "profile": None}


@pytest.mark.parametrize("program", ["sft", "grpo"])
def test_the_same_line_starts_goes_on_and_leaves_alone_what_is_done(calls, monkeypatch, capsys, program):
    of_240 = types.SimpleNamespace(schedule=options.Schedule(steps=240), evaluation=options.Evaluation())
    monkeypatch.setattr(config, "load", lambda *_: of_240)
    of_run, of_milestones = (sys.modules[f"surgery_r1_jax.{name}"] for name in ("run", "milestones"))
    for step, evaluated, resume in ((None, False, False), (80, True, True), (240, False, True), (240, True, None)):
        monkeypatch.setattr(of_run, "take_up", lambda out, step=step: step)
        monkeypatch.setattr(of_milestones, "evaluated", lambda *_, evaluated=evaluated: evaluated)
        calls.clear()
        assert cli.main([program, *TRAINING, "--resume", "auto"]) == 0
        trained = (
            []
            if resume is None
            else [(f"{program}.train", (of_240, Path("runs/x")), {"resume": resume, "profile": None})]
        )
        assert calls == ["start_devices", *trained]
    assert capsys.readouterr().out == "runs/x: all of its 240 steps are done\n"


def test_resume_takes_no_other_word(capsys):
    assert cli.main(["sft", *TRAINING, "--resume", "always"]) == 2
    assert "invalid choice: 'always'" in capsys.readouterr().err


def test_the_status_of_a_handler_is_the_status_of_the_command(calls, monkeypatch):
    monkeypatch.setattr(sys.modules["surgery_r1_jax.survey"], "main", lambda *_, **__: 1)
    assert cli.main(["data", "check", "d"]) == 1


@pytest.mark.parametrize("name", list(cli.commands()))
def test_every_mistyped_command_and_flag_is_refused_with_the_nearest_name(calls, capsys, name):
    *group, word = name.split()
    for i in range(len(word)):
        wrong = [*group, word[:i] + word[i] + word[i:]]
        assert f"unknown command '{' '.join(wrong)}'; did you mean '{name}'?" in refusal(capsys, *wrong, "x")
    flags = [flag for flag in cli.commands()[name].flags if flag not in ("--help", "--no-blank")]
    for flag in flags:
        for i in range(3, len(flag)):
            wrong = flag[:i] + flag[i] + flag[i:]
            for form in ([wrong, "x"], [f"{wrong}=x"]):
                message = refusal(capsys, *name.split(), *form)
                assert message == f"error: unknown flag '{wrong}'; did you mean '{flag}'?"
    assert calls == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train", "error: unknown command 'train'; there are demo, data synth, "),
        ("check d", "error: unknown command 'check'; did you mean 'data check'?"),
        ("--hepl", "error: unknown command '--hepl'; there are"),
        ("sft --out x", "error: the following arguments are required: --config; see surgery-r1 sft --help"),
        ("sft --config c --out x --a.b 3", "error: unknown flag '--a.b'; to override a key of the configuration write"),
        ("sft more --config c --out x", "error: unrecognized arguments: more"),
        ("evaluate --a.b=3", "error: unknown flag '--a.b'; there are --help, --checkpoint, --data"),
        ("evaluate --checkpoint k --data d --out f --split vall", "error: argument --split: invalid choice: 'vall'"),
        ("data synth d --frames 0", "error: argument --frames: expected a whole number of at least 1, given '0'"),
        ("data synth d --frames 1.5", "error: argument --frames: expected a whole number"),
        (f"data synth d --frames {'9' * 5000}", "error: argument --frames: expected a whole number"),
        ("data synth d --frames 1 --seed -1", "error: argument --seed: expected"),
        (
            "data synth d --frames 1 --size 64",
            "error: argument --size: expected WIDTHxHEIGHT as in 1280x1024, given '64'",
        ),
        ("data synth d --frames 1 --size 0x", "error: argument --size: expected WIDTHxHEIGHT"),
        (
            "sft --config c --out o --profile 13:10",
            "error: argument --profile: expected FIRST:LAST as in 10:13, given '13:10'",
        ),
        ("grpo --config c --out o --profile 0:3", "error: argument --profile: expected FIRST:LAST"),
        ("grpo --config c --out o --profile 7", "error: argument --profile: expected FIRST:LAST"),
        ("data synth d --frames 1 --balance 1.5", "error: argument --balance: expected a number from 0 to 1"),
        ("data synth d --frames 1 --balance nan", "error: argument --balance: expected a number from 0 to 1"),
        (
            "data build d o --kinds a,a",
            "error: argument --kinds: expected different names as in a,b=2,c=0.5, given 'a,a'",
        ),
        ("data build d o --kinds a=x", "error: argument --kinds: expected a number of at least 0, given 'x'"),
        ("data build d o --teacher http://h/v1", "error: --teacher URL and --teacher-model NAME go together"),
        ("ask --checkpoint k --image i", "error: the following arguments are required: QUESTION"),
        ("report --out r.html", "error: the following arguments are required: FILE.json"),
    ],
)
def test_a_mistaken_argument_is_refused_in_one_line(calls, capsys, argv, message):
    error = refusal(capsys, *argv.split())
    assert error.startswith(message)
    assert "\n" not in error
    assert calls == []


@pytest.mark.parametrize("name", list(cli.commands()))
def test_every_command_has_help_with_an_example_and_the_defaults(capsys, name):
    assert cli.main([*name.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"usage: surgery-r1 {name} " in out
    assert f"example:\n  surgery-r1 {name} " in out
    for action in cli.commands()[name]._actions:
        assert action.help
        if action.option_strings and not action.required and action.dest != "help":
            assert "(default: " in action.help, action.dest


@pytest.mark.parametrize("name", list(cli.commands()))
def test_the_example_of_every_command_is_valid(calls, name):
    assert cli.main(example_of(name)) == 0
    assert len([call for call in calls if call != "start_devices"]) == 1


@pytest.mark.parametrize(
    ("argv", "status"), [([], 2), (["--help"], 0), (["-h"], 0), (["data"], 2), (["data", "-h"], 0)]
)
def test_the_overview_lists_every_command(capsys, argv, status):
    assert cli.main(argv) == status
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.commands())


def test_the_version_is_the_package_s(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"surgery-r1 {surgery_r1_jax.__version__}\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("a.txt:3: no box; add one"), 2, "error: a.txt:3: no box; add one"),
        (InputError("a.yaml:1: x\na.yaml:2: y"), 2, "error: a.yaml:1: x\nerror: a.yaml:2: y"),
        (InputError("label \x1b[31m\u202e is unknown"), 2, r"error: label \x1b[31m\u202e is unknown"),
        (NumericError("step 7: three updates in a row"), 5, "error: step 7: three updates in a row"),
        (Preempted("state saved at step 7"), 75, "stopped: state saved at step 7"),
        (KeyboardInterrupt(), 130, "stopped: interrupted"),
        (MemoryError(), 1, "error: no memory left; use smaller batches or fewer processes"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            1,
            "error: runs/x: No space left on device; make room and start again with --resume",
        ),
        (OSError(errno.EDQUOT, "Quota exceeded"), 1, "error: Quota exceeded; make room"),
        (OSError(errno.EIO, "Input/output error"), 1, "error: Input/output error; see what the system's log says"),
        (OSError(errno.EROFS, "Read-only", "runs/x"), 1, "error: runs/x: Read-only; get the right to it"),
        (OSError(errno.EACCES, "denied", "runs/\x1bx"), 1, r"error: runs/\x1bx: denied; get the right to it"),
    ],
)
def test_errors_end_with_their_status_and_no_traceback(sft_raises, capsys, error, status, message):
    sft_raises(error)
    assert refusal(capsys, "sft", *TRAINING, status=status).startswith(message)


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EACCES, "denied"), BrokenPipeError("a worker")])
def test_a_bug_keeps_its_traceback(sft_raises, error):
    sft_raises(error)
    with pytest.raises(type(error)):
        cli.main(["sft", *TRAINING])


def test_starting_devices_respects_the_environment(monkeypatch):
    from absl import flags

    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "TF_CPP_MIN_LOG_LEVEL")
    names += ("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB",)
    for name in names:
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    handlers.start_devices()
    assert os.environ[names[0]] == str(Path.home() / ".cache" / "surgery_r1_jax" / "xla")
    assert (os.environ[names[1]], os.environ[names[2]]) == ("0.5", "2")
    assert int(os.environ[names[3]]) >= 1
    assert flags.FLAGS.is_parsed()
    for name in names:
        monkeypatch.setenv(name, "/mine")
    handlers.start_devices()
    assert [os.environ[name] for name in names] == ["/mine"] * 4


def test_help_and_mistakes_answer_in_a_second_without_jax():
    code = """
import sys
from surgery_r1_jax import cli
assert cli.main(["grpo", "--help"]) == 0
assert cli.main(["grpo", "--confg=x"]) == 2
heavy = {"jax", "flax", "numpy", "transformers", "torch", "grain", "rich", "pydantic"} & set(sys.modules)
assert not heavy, heavy
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert "usage: surgery-r1 grpo" in done.stdout
    assert done.stderr == "error: unknown flag '--confg'; did you mean '--config'?\n"
    assert seconds < 1.0 or os.getloadavg()[0] > (os.cpu_count() or 1), f"{seconds:.2f} s"


@pytest.mark.parametrize("program", ["sft", "grpo", "doctor"])
def test_a_mistyped_key_is_refused_in_three_seconds_without_jax(tmp_path, program):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: {root: d}\nschedule:\n  stpes: 3\n")
    out = [] if program == "doctor" else ["--out", str(tmp_path / "run")]
    code = f"""
import sys
from surgery_r1_jax import cli, handlers
assert cli.main({[program, "--config", str(path), *out]}) == 2
assert "jax" not in sys.modules
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"error: {path}:4: unknown key 'schedule.stpes'; did you mean 'schedule.steps'?\n"
    assert not (tmp_path / "run").exists()
    assert seconds < 3.0 or os.getloadavg()[0] > (os.cpu_count() or 1), f"{seconds:.2f} s"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_no_error(unbuffered):
    program = [sys.executable, "-m", "surgery_r1_jax.cli", "--help"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
