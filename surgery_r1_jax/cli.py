"""The command `surgery-r1`: one parser for each thing it does.

What a handler raises becomes one line on standard error and these exit statuses:

    1    no memory or disk left, or a disk that fails or may    75   stopped on request, state saved: use --resume
         not be written; `data check` found errors
    2    a mistake in the command, a file or the data            130  interrupted from the keyboard
    5    training met non-finite numbers                        69   others of several processes lost

Anything else is a bug and keeps its traceback.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from surgery_r1_jax import __version__, handlers, hosts
from surgery_r1_jax.arguments import Parser, byte_count, nearest, number, on_disk, pixels, span, weights
from surgery_r1_jax.errors import InputError, NumericError, Preempted, StorageError, of_disk, printable
from surgery_r1_jax.places import place

SPLITS = ("train", "dev", "val", "all")
DTYPES = ("float32", "bfloat16")
DATA = "data set: EndoVis-18-VQLA, or your own frames with records.jsonl or records.csv"
ABOUT = "Surgery-R1 in JAX: fine-tune Qwen-VL to answer and locate in robotic surgery, by SFT and by GRPO."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    try:
        return hosts.leave(_guarded(argv))
    except Exception as problem:
        if not hosts.joined():
            raise
        hosts.outlive(problem)
        traceback.print_exc()
        return hosts.leave(1)


def _guarded(argv: Sequence[str] | None) -> int:
    """As `main`; what a user can mend is one line."""
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except (InputError, NumericError, StorageError) as error:
        return _refuse(error, error.exit_status)
    except Preempted as stop:
        return _refuse(stop, stop.exit_status, "stopped")
    except KeyboardInterrupt:
        return _refuse("interrupted", 130, "stopped")
    except MemoryError:
        return _refuse("no memory left; use smaller batches or fewer processes", 1)
    except OSError as error:
        if told := of_disk(error):
            return _refuse(told, StorageError.exit_status)
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 128 + 13  # as a shell reports a process that wrote to a closed pipe
        raise


def commands() -> dict[str, Parser]:
    """Every command's parser by its name."""
    table: dict[str, Parser] = {}

    def command(name: str, handler: Callable, about: str, example: str, overrides: bool = False) -> Callable:
        """A new command; the function that adds its arguments."""
        table[name] = Parser(name, about, example, overrides)
        table[name].set_defaults(handler=handler)
        return table[name].add_argument

    def boxes(add: Callable) -> None:
        """The argument of what reads a data set."""
        about = "what your own frames' boxes are written in (default: as data.json says)"
        add("--boxes", choices=("pixel", "unit", "thousand"), help=about)

    def together(add: Callable) -> None:
        """The arguments of what many processes may do together."""
        add("--coordinator", metavar="HOST:PORT", help="of several processes: where number 0 listens (default: none)")
        add("--processes", type=number(int, 1), metavar="N", help="how many there are (default: by the environment)")
        add("--process-id", type=number(int, 0), metavar="I", help="which of them this is (default: the same)")
        about = "seconds to wait for the others at the start (default: %(default)s)"
        add("--join-timeout", type=number(int, 1), default=hosts.JOIN_S, metavar="S", help=about)

    def config_and_run(add: Callable) -> None:
        """The arguments of a training program."""
        add("--config", type=on_disk, required=True, metavar="FILE", help="YAML configuration")
        add("--out", type=place, required=True, metavar="DIR", help="run directory: checkpoints, best parameters, log")
        about = "go on from the last checkpoint in --out; with 'auto' begin where there is none yet (default: off)"
        add("--resume", nargs="?", choices=("auto",), const=True, default=False, metavar="auto", help=about)
        about = "trace these steps for TensorBoard, to OUT/profile, as in 10:13 (default: none)"
        add("--profile", type=span, metavar="FIRST:LAST", help=about)
        together(add)

    add = command("demo", handlers.demo, "Train and evaluate a tiny model on drawn frames.", "--out runs/demo --smoke")
    add("--out", type=on_disk, required=True, metavar="DIR", help="directory for data, model, runs and report")
    add("--smoke", action="store_true", help="only a few steps, to see that everything works (default: off)")
    add("--seed", type=number(int, 0), default=0, metavar="S", help="random seed (default: %(default)s)")

    about = "Draw a data set of synthetic frames."
    add = command("data synth", handlers.synth, about, "data/synth --frames 200 --seed 0")
    add("directory", type=on_disk, metavar="DIR", help="new directory in the layout of EndoVis-18-VQLA")
    add("--frames", type=number(int, 1), required=True, metavar="N", help="number of frames")
    add("--seed", type=number(int, 0), default=0, metavar="S", help="random seed (default: %(default)s)")
    add("--size", type=pixels, default="1280x1024", metavar="WxH", help="pixels of a frame (default: %(default)s)")
    add("--max-tools", type=number(int, 1), default=4, metavar="K", help="instruments a frame (default: %(default)s)")
    add(
        "--balance",
        type=number(float, 0, 1),
        default=0.0,
        metavar="X",
        help="0: classes as rare as in surgery, 1: all alike (default: %(default)s)",
    )
    add("--jobs", type=number(int, 1), default=1, metavar="N", help="processes that draw (default: %(default)s)")

    example = "data/EndoVis-18-VQLA --html check.html --model checkpoints/Qwen2.5-VL-3B-Instruct"
    add = command("data check", handlers.check, "Find all that is wrong with a data set before a run does.", example)
    add("directory", type=place, metavar="DIR", help=DATA)
    boxes(add)
    add("--strict", action="store_true", help="also refuse what is otherwise mended with a warning (default: off)")
    add("--json", type=on_disk, metavar="FILE", help="write the summary as JSON too (default: not written)")
    add("--html", type=on_disk, metavar="FILE", help="write a page with pictures too (default: not written)")
    add("--model", type=place, metavar="HF_DIR", help="count tokens as this model's folder does (default: not counted)")

    about = "Unpack an archive you do not trust."
    add = command("data unpack", handlers.unpack, about, "EndoVis-18-VQLA.zip data/raw")
    add("archive", type=on_disk, metavar="ARCHIVE", help="zip, tar or tar.gz file; links and bombs are refused")
    add("directory", type=on_disk, metavar="DIR", help="new folder")
    add("--max-size", type=byte_count, default="200GB", metavar="N", help="most to unpack (default: %(default)s)")

    example = "data/EndoVis-18-VQLA data/train54k --kinds vqa_direct,grounding_direct,vqla_cot=2 --seed 0"
    add = command(
        "data build", handlers.build, "Make a training set: each question in six kinds, half with reasoning.", example
    )
    add("source", type=place, metavar="SOURCE", help="data set folder, or a list of labels without images")
    add("out", type=place, metavar="OUT", help="new folder: records, statistics, frames")
    about = (
        "kinds and records of each from a question: vqa, grounding or vqla, _direct or _cot (default: all, one each)"
    )
    add("--kinds", type=weights, metavar="KIND[=W],...", help=about)
    add("--split", choices=SPLITS, default="all", help="what to take; each record tells its own (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, metavar="S", help="random seed (default: %(default)s)")
    add("--size", type=pixels, default="1280x1024", metavar="WxH", help="frames of a list (default: %(default)s)")
    add("--dialogues", action="store_true", help="also write each frame as one conversation (default: off)")
    about = "OpenAI-compatible endpoint that writes the reasoning; key in SURGERY_R1_TEACHER_KEY (default: none)"
    add("--teacher", metavar="URL", help=about)
    add("--teacher-model", metavar="NAME", help="its model (default: none)")
    add("--teacher-jobs", type=number(int, 1), default=8, metavar="N", help="requests at once (default: %(default)s)")
    add("--teacher-cache", type=on_disk, metavar="FILE", help="keeps its answers (default: OUT.teacher.jsonl)")

    example = "data/EndoVis-18-VQLA data/for_trl --model checkpoints/Qwen2.5-VL-3B-Instruct"
    add = command("data export", handlers.data_export, "Write a data set for TRL, ms-swift or LLaMA-Factory.", example)
    add("source", type=place, metavar="SOURCE", help=DATA)
    add("out", type=place, metavar="OUT", help="new folder: conversations and images")
    add("--model", type=place, required=True, metavar="DIR", help="model to train: its box units and pixel limits")
    about = "messages: TRL, ms-swift; sharegpt: LLaMA-Factory, ms-swift (default: %(default)s)"
    add("--format", choices=("messages", "sharegpt"), default="messages", help=about)
    boxes(add)
    add("--strict", action="store_true", help="refuse boxes outside the image instead of clipping them (default: off)")

    about = "Draw frames as a run may see them: augmented, with their moved boxes and answers."
    example = "--config configs/sft_3b.yaml --out augmented.png --data.augment.flip_left_right=0.5"
    add = command("data augment", handlers.augment, about, example, True)
    add("--config", type=on_disk, required=True, metavar="FILE", help="YAML configuration of the run")
    add("--out", type=on_disk, required=True, metavar="PNG", help="picture to write")
    add("--frames", type=number(int, 1, 50), default=4, metavar="N", help="frames, one a row (default: %(default)s)")

    add = command("init", handlers.init, "Write a tiny untrained model to start from.", "checkpoints/tiny")
    add("hf_dir", type=on_disk, metavar="HF_DIR", help="new folder: config, safetensors, tokenizer")
    add("--seed", type=number(int, 0), default=0, metavar="S", help="random seed (default: %(default)s)")

    sft_example = "--config configs/sft_3b.yaml --out runs/sft_3b --optimizer.learning_rate=1e-5"
    config_and_run(command("sft", handlers.sft, "Fine-tune on answers, boxes and reasoning.", sft_example, True))
    grpo_example = "--config configs/grpo_3b.yaml --out runs/grpo_3b --sampler.temperature=1.0"
    config_and_run(command("grpo", handlers.grpo, "Reinforce a fine-tuned model by GRPO.", grpo_example, True))

    example = "--checkpoint runs/grpo --data data/EndoVis-18-VQLA --split val --out val.json"
    add = command("evaluate", handlers.evaluate, "Answer every question of a split and score the answers.", example)
    add("--checkpoint", type=place, required=True, metavar="DIR", help="run directory or Hugging Face folder")
    add("--data", type=place, required=True, metavar="DIR", help=DATA)
    boxes(add)
    add("--split", choices=SPLITS, required=True, help="what to answer; val is reported, dev selects")
    add("--out", type=place, required=True, metavar="FILE", help="metrics and completions as JSON")
    add("--batch-frames", type=number(int, 1), default=16, metavar="N", help="frames at once (default: %(default)s)")
    add(
        "--max-completion",
        type=number(int, 1),
        default=256,
        metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="precision of computing (default: %(default)s)")
    add(
        "--blank",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also answer from a grey image, as a floor (default: --blank)",
    )
    add("--strict", action="store_true", help="refuse boxes outside the image instead of clipping them (default: off)")
    together(add)

    add = command("export", handlers.export, "Write a checkpoint as a Hugging Face folder.", "runs/grpo exported/")
    add("checkpoint", type=place, metavar="CHECKPOINT", help="run directory")
    add("hf_dir", type=place, metavar="HF_DIR", help="new folder: config, safetensors, tokenizer")
    add("--dtype", choices=DTYPES, default="float32", help="precision of the weights (default: %(default)s)")
    add("--merge", action="store_true", help="add adapters to the weights: a whole model (default: peft's own folder)")
    add("--which", choices=("best", "last"), default="best", help="of the run's parameters (default: %(default)s)")
    add(
        "--max-shard-size",
        type=byte_count,
        default="2GB",
        metavar="N",
        help="largest weight file (default: %(default)s)",
    )

    example = "checkpoints/Qwen2.5-VL-3B-Instruct imported/qwen2_5_3b"
    about = "Write a Hugging Face folder as a checkpoint in shards, to start runs from on many hosts."
    add = command("import", handlers.import_folder, about, example)
    sums = "weights are held against its SHA256SUMS or *.sha256, if any"
    add("hf_dir", type=place, metavar="HF_DIR", help=f"folder with config, safetensors, tokenizer; {sums}")
    add("out", type=place, metavar="OUT", help="new run directory")
    add("--dtype", choices=DTYPES, default="float32", help="precision of the weights (default: %(default)s)")
    together(add)

    example = '--checkpoint runs/grpo --image frame.jpg "What is the state of monopolar curved scissors?"'
    add = command("ask", handlers.ask, "Ask one question about one image.", example)
    add("--checkpoint", type=place, required=True, metavar="DIR", help="run directory or Hugging Face folder")
    add("--image", type=on_disk, required=True, metavar="FILE", help="JPEG or PNG frame")
    add("question", metavar="QUESTION", help="the question, in quotes")
    add("--save", type=on_disk, metavar="PNG", help="write the image with the answer on it (default: not written)")

    example = "--config configs/grpo_7b.yaml --compute.mesh=[1,4,2]"
    about = "Tell what a run would be, or what a model is: sizes, tokens, memory, and what is amiss."
    add = command("doctor", handlers.doctor, about, example, True)
    add("--config", type=on_disk, metavar="FILE", help="YAML configuration of a run (default: none)")
    add(
        "--checkpoint",
        type=place,
        metavar="DIR",
        help="instead: a run directory or Hugging Face folder (default: none)",
    )

    add = command(
        "report",
        handlers.report,
        "Make one page from the evaluations of some runs.",
        "runs/sft/val.json runs/grpo/val.json --out report.html",
    )
    add(
        "evaluations",
        type=place,
        nargs="+",
        metavar="FILE.json",
        help="what `evaluate` wrote, in the order of the page",
    )
    add("--out", type=place, required=True, metavar="FILE", help="HTML page in one piece")
    add("--data", type=place, metavar="DIR", help="data set with the frames (default: the one that was evaluated)")
    return table


def _run(argv: list[str]) -> int:
    """Find the command, sort its words and call its handler."""
    table = commands()
    if argv == ["--version"]:
        print(f"surgery-r1 {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help") or argv in (["data"], ["data", "-h"], ["data", "--help"]):
        print(_overview(table))
        return 0 if "-h" in argv or "--help" in argv else 2
    name = next((name for name in (" ".join(argv[:2]), argv[0]) if name in table), None)
    if name is None:
        given = " ".join(argv[:2]) if argv[0] == "data" else argv[0]
        raise InputError(f"unknown command '{given}'; {nearest(given, table)}")
    parser, words = table[name], argv[len(name.split()) :]
    if "-h" in words or "--help" in words:
        print(parser.format_help())
        return 0
    words, overrides = parser.sort(words)
    args = parser.parse_args(words)
    args.overrides = overrides
    return args.handler(args) or 0


def _overview(table: dict[str, Parser]) -> str:
    """The help text of the whole program."""
    lines = [f"  {name:<13}{parser.description}" for name, parser in table.items()]
    return f"""usage: surgery-r1 COMMAND ...

{ABOUT}

commands:
{chr(10).join(lines)}

example:
  surgery-r1 demo --out runs/demo --smoke

'surgery-r1 COMMAND --help' tells the arguments of a command, --version the version."""


def _refuse(reason: object, status: int, word: str = "error") -> int:
    """Print each line of a reason so that it cannot steer the terminal; the status."""
    for line in str(reason).splitlines():
        print(f"{word}: {printable(line)}", file=sys.stderr)
    return status


def _reader_left() -> bool:
    """Whether the program that read our standard output is gone; nothing more is written to it then."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
