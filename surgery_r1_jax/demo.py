"""The demo: a tiny Qwen2.5-VL learns to answer and to locate on synthetic surgical frames, in minutes on two cores.

    render frames -> untrained model -> tower warm-up -> SFT on coarse boxes -> GRPO -> report and Hugging Face folder

What only the demo needs is here: the warm-up that stands in for a pretrained tower, the budgets, and the controls.
Everything else is the product itself, called as a user would. Three things are arranged so that a model of 1.5 M
parameters shows the mechanism in minutes, and are said wherever results are shown: SFT sees boxes that are pushed
outwards on purpose (GRPO is rewarded with the exact ones), at most three instruments are in a frame, and states are
drawn more evenly than in EndoVis-18. `--smoke` only shows that all of it runs and learns: exact boxes, one instrument.
"""

import functools
import json
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from surgery_r1_jax import (
    batch,
    checkpoint,
    errors,
    evaluate,
    files,
    grid,
    grpo,
    hf,
    log,
    model,
    optim,
    options,
    pipeline,
    records,
    report,
    scene,
    sft,
    sharding,
    synth,
    tiny,
    vocabulary,
)

SIZE = (112, 84)  # pixels of a frame, on disk and as the model sees it
# One sequence to report, one to choose by, the rest to train on: the fewer frames are drawn for nothing.
SEQUENCES = ("seq_1", "seq_6", *(name for name in synth.SEQUENCES if records.split_of(name) == "train"))
BALANCE = 0.7
MOST_TOOLS = 3
MAX_TOKENS = 20  # the longest right completion has 18
# On CPU it is quicker to compute a layer's activations again than to write them out and read them back.
COMPUTE = options.Compute(remat=True, tower_remat=True, query_chunk=None)
ASKING = dict(frames=32, questions=7)  # of every evaluation: one shape, one program
EVALUATION = options.Evaluation(**ASKING, limit=64, max_tokens=MAX_TOKENS)
MARKER = "demo.json"


class Budget(NamedTuple):
    """Steps and sizes of a run; fixed, so that results repeat."""

    frames: int
    warmup_steps: int
    sft_steps: int
    grpo_steps: int
    eval_frames: int
    max_tools: int  # instruments in a frame
    box_slack: float  # how coarse SFT's boxes are: each side is pushed outwards by up to this share of the box
    tower_rate: float  # share of SFT's learning rate that the tower gets


FULL = Budget(
    frames=5500,
    warmup_steps=300,
    sft_steps=450,
    grpo_steps=280,
    eval_frames=340,
    max_tools=3,
    box_slack=0.4,
    tower_rate=0.1,  # warmed up, it moves slowly: muon's steps are as large for noise as for signal
)
# Too short to tell instruments apart or for GRPO to sharpen boxes: one instrument a frame, and SFT has exact boxes.
SMOKE = Budget(
    frames=1600,
    warmup_steps=160,
    sft_steps=215,
    grpo_steps=4,
    eval_frames=120,
    max_tools=1,
    box_slack=0.0,
    tower_rate=0.5,
)


def start(out: str | Path, *, smoke: bool = False, seed: int = 0) -> int:
    """The `demo` command."""
    out, budget, say = Path(out), SMOKE if smoke else FULL, Console(stderr=True).print
    watch = Stopwatch()
    claim(out, budget, seed)

    draw_frames(out / "data", budget, seed)
    frames = records.read(out / "data")
    watch.lap("data")

    base = warm_up(out, frames, budget, seed)
    watch.lap("warm_up")
    sft.train(sft_settings(out, base, budget, seed), out / "sft")
    watch.lap("sft")
    grpo.train(grpo_settings(out, budget, seed), out / "grpo")
    watch.lap("grpo")

    held_out = records.split(frames, "val")[: budget.eval_frames]
    stages, predictions = {}, {}
    for name, folder in (("base", base), ("sft", out / "sft"), ("grpo", out / "grpo")):
        predictions[name] = answers(folder, held_out)
        stages[name] = evaluate.score(predictions[name])
    floors = {
        "question_only": evaluate.floor_metrics(records.split(frames, "train"), held_out),
        "blank_image": evaluate.score(answers(out / "sft", held_out, blank=True)),
    }
    watch.lap("evaluation")
    checkpoint.export(out / "grpo", out / "hf")

    metrics = stages | {"floors": floors, "seconds": watch.laps | {"total": sum(watch.laps.values())}}
    files.write_json(out / "metrics.json", metrics)
    write_report(out, stages, predictions, floors, watch, budget, seed)
    evaluate.print_scores(stages | floors, title=f"{stages['grpo']['n']} held-out questions")
    say(f"pictures: {out / 'report.html'}\ncheckpoint for transformers: {out / 'hf'}")
    return 0


def draw_frames(folder: Path, budget: Budget, seed: int) -> None:
    """Render the data set with all the machine's cores."""
    jobs = max(1, min(8, os.cpu_count() or 1))
    how = dict(size=SIZE, max_tools=budget.max_tools, balance=BALANCE, sequences=SEQUENCES, jobs=jobs)
    synth.write(folder, frames=budget.frames, seed=seed, **how)


def claim(out: Path, budget: Budget, seed: int) -> None:
    """Make the demo's folder; an earlier demo in it is removed, anything else refused."""
    marker = out / MARKER
    if marker.is_file():
        shutil.rmtree(out)
    if out.exists() and any(out.iterdir()):
        raise errors.InputError(f"{out}: is not empty and holds no earlier demo; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(budget._asdict() | {"seed": seed}) + "\n")


class Stopwatch:
    """Seconds of each phase."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        """End a phase."""
        now = time.monotonic()
        self.laps[name], self._since = round(now - self._since, 1), now


def sft_settings(out: Path, base: Path, budget: Budget, seed: int) -> options.SFT:
    """SFT on boxes as coarse as the budget says."""
    return options.SFT(
        model=str(base),
        seed=seed,
        smoothing_sigma=1.5,
        data=options.Data(root=str(out / "data"), frames=16, questions=4, buckets=1),
        targets=options.Targets(box_slack=budget.box_slack),
        optimizer=options.Optimizer(
            kind="muon",
            learning_rate=0.015,
            warmup=0.05,
            hold=0.3,
            final=0.03,
            rates=options.Rates(tower=budget.tower_rate, merger=budget.tower_rate),
        ),
        compute=COMPUTE,
        schedule=options.Schedule(steps=budget.sft_steps, save_every=budget.sft_steps),
        evaluation=EVALUATION,
    )


def grpo_settings(out: Path, budget: Budget, seed: int) -> options.GRPO:
    """GRPO from the SFT model, rewarded with the exact boxes."""
    return options.GRPO(
        model=str(out / "sft"),
        seed=seed,
        samples=8,
        data=options.Data(root=str(out / "data"), frames=8, questions=2, buckets=1),
        sampler=options.Sampler(max_tokens=MAX_TOKENS),
        objective=options.Objective(beta=0.0),
        optimizer=options.Optimizer(learning_rate=2e-4, b2=0.99, warmup=0.02, schedule="linear"),
        compute=COMPUTE,
        schedule=options.Schedule(steps=budget.grpo_steps, save_every=budget.grpo_steps),
        evaluation=EVALUATION,
    )


def answers(folder: Path, frames, *, blank: bool = False) -> list[dict]:
    """Greedy answers of a checkpoint to every question of these frames."""
    mesh = sharding.make_mesh()
    loaded = checkpoint.load_model(folder, mesh)
    runner = evaluate.runner_of(loaded.folder, loaded.config, mesh, COMPUTE)
    settings = options.Data(root="", **ASKING)
    predict = evaluate.predict_blank if blank else evaluate.predict
    return predict(runner, loaded.params, frames, settings, MAX_TOKENS)


def warm_up(out: Path, frames, budget: Budget, seed: int) -> Path:
    """Draw a tiny model, teach its tower what the frames show, and write it as a Hugging Face folder.

    Stands in for the pretraining that a real checkpoint brings along. Every merged unit is asked which instrument's
    tip it shows, in the words' own embeddings; units with a tip also for the state and the instrument's box.
    """
    folder = tiny.write_folder(out / "untrained", tiny.Sizes(size=SIZE))
    architecture = hf.read_config(folder)
    mesh = sharding.make_mesh()
    runner = evaluate.runner_of(folder, architecture, mesh, COMPUTE)
    params = model.init(architecture, seed)
    D = architecture.text.hidden_size
    probe = {"kernel": 0.02 * jax.random.normal(jax.random.key(seed), (D, 4))}
    params = jax.device_put(params, sharding.replicated(mesh))
    learning = {"tower": params["tower"], "embed": params["embed"], "probe": probe}
    rest = {name: value for name, value in params.items() if name not in learning}

    train = records.split(frames, "train")
    data = options.Data(root=str(out / "data"), frames=32, questions=99, buckets=1)
    stream = pipeline.rollouts(train, runner.encoder, data, seed=seed)
    words = word_ids(runner.encoder.chat)
    settings = options.Optimizer(kind="muon", learning_rate=0.015, warmup=0.05, hold=0.5, final=0.1)
    tx = optim.transformation(settings, budget.warmup_steps, learning)
    state = jax.jit(lambda tree: optim.start(tree, tx))(learning)
    with log.RunLog(out / "warm_up", total_steps=budget.warmup_steps, description="warm-up") as journal:
        for step, (prompts, gold) in zip(range(1, budget.warmup_steps + 1), stream, strict=False):
            tips = batch.stack(
                [tip_targets(train[n], scene_of(train[n].id, budget, seed), runner.encoder) for n in gold.frame_B]
            )
            placed = sharding.put_batch((prompts, tips), mesh)
            state, stats = warm_up_step(runner.graph, tx, state, rest, *placed, words)
            if step % 10 == 0:
                journal.metrics(step, {k: np.asarray(v) for k, v in stats.items()})
    learned = {name: state.params[name] for name in ("tower", "embed")}
    return hf.write_folder(out / "base", rest | learned, architecture, folder)


class Tips(NamedTuple):
    """Where the instruments' tips are and what they are; [B, I], padded to MOST_TOOLS a frame."""

    unit_BI: np.ndarray  # int32 merged unit in the tower's order
    tool_BI: np.ndarray  # int32 index into vocabulary.TOOLS
    state_BI: np.ndarray  # int32 index into vocabulary.STATES
    place_BI: np.ndarray  # int32 index into vocabulary.LOCATIONS
    box_BI4: np.ndarray  # edges relative to the middle of the unit, as shares of the frame
    valid_BI: np.ndarray


def scene_of(frame_id: str, budget: Budget, seed: int) -> scene.Scene:
    """The scene that a frame was drawn from."""
    return synth.scene_of(seed, frame_number(frame_id), max_tools=budget.max_tools, balance=BALANCE)


def tip_targets(frame: records.Frame, drawn: scene.Scene, encoder) -> Tips:
    """What the warm-up asks of a frame: the scene that it was drawn from says where the tips are."""
    boxes = {record.tool: record.box for record in frame.records if record.tool}
    places = {record.tool: record.answer for record in frame.records if record.kind == vocabulary.LOCATION}
    merge = encoder.preprocessor.merge_size
    rows, cols = (n // merge for n in encoder.patch_grid(frame))
    unit_of_token = grid.arrange([encoder.patch_grid(frame)], side=encoder.window_side, merge=merge).unit_of_token
    tips = Tips(*(np.zeros((MOST_TOOLS, *more), kind) for kind, more in _TIP_FIELDS))
    for i, instrument in enumerate(drawn.instruments):
        x, y = instrument.tip
        row, col = min(int(y * rows), rows - 1), min(int(x * cols), cols - 1)
        middle = np.array([col + 0.5, row + 0.5] * 2) / [cols, rows, cols, rows]
        tips.unit_BI[i], tips.valid_BI[i] = unit_of_token[row * cols + col], True
        tips.place_BI[i] = vocabulary.LOCATIONS.index(places[instrument.tool])
        tips.tool_BI[i] = vocabulary.TOOLS.index(instrument.tool)
        tips.state_BI[i] = vocabulary.STATES.index(instrument.state)
        tips.box_BI4[i] = boxes[instrument.tool] - middle
    return tips


_TIP_FIELDS = (*[(np.int32, ())] * 4, (np.float32, (4,)), (bool, ()))


def frame_number(frame_id: str) -> int:
    """Number of the frame that `synth.frame_name` gave this id."""
    sequence, name = frame_id.split("/")
    return int(name.removeprefix("frame")) * len(SEQUENCES) + SEQUENCES.index(sequence)


def word_ids(chat) -> dict[str, np.ndarray]:
    """Token ids of instruments and states, each a single token of the tiny tokenizer."""
    single = lambda word: chat.completion_ids(word)[0]  # noqa: E731
    return {
        "tools": np.array([single(word) for word in vocabulary.TOOLS], np.int32),
        "states": np.array([single(word) for word in vocabulary.STATES], np.int32),
        "places": np.array([chat.tokenizer.token_to_id(f" at {word}") for word in vocabulary.LOCATIONS], np.int32),
    }


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def warm_up_step(graph, tx, state: optim.TrainState, rest: dict, prompts: batch.FrameBatch, tips: Tips, words):
    """One update of tower and words on what the merged units show."""

    def loss_of(params):
        net = model.bind(graph, rest | {"tower": params["tower"], "embed": params["embed"]})
        units_BMD = net.tower(prompts.patches_BWSC, prompts.patch_hw_BWS2, prompts.patch_image_BWS).units_BMD
        table_VD = net.embed[...] * units_BMD.shape[-1] ** -0.5  # the words as questions bring them in
        tools_BMC = units_BMD @ table_VD[words["tools"]].T - 3.0  # most units show no tip
        B, M, C = tools_BMC.shape
        here = jnp.arange(B)[:, None], tips.unit_BI
        wanted = jnp.zeros((B, M, C)).at[(*here, tips.tool_BI)].max(tips.valid_BI.astype(jnp.float32))
        filled = prompts.patch_image_BWS.reshape(B, M, -1)[..., 0] > 0
        tool_loss = jnp.where(filled[..., None], optax.sigmoid_binary_cross_entropy(tools_BMC, wanted), 0.0).sum()
        tip_BID = units_BMD[here]
        states_BIC, places_BIC = (tip_BID @ table_VD[words[name]].T for name in ("states", "places"))
        sides = jnp.abs(tip_BID @ params["probe"]["kernel"] - tips.box_BI4).sum(-1)
        count = jnp.maximum(tips.valid_BI.sum(), 1)
        at_tips = lambda x_BI: jnp.where(tips.valid_BI, x_BI, 0.0).sum() / count  # noqa: E731
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        parts = {
            "tool_loss": tool_loss / count,
            "state_loss": at_tips(cross_entropy(states_BIC, tips.state_BI)),
            "place_loss": at_tips(cross_entropy(places_BIC, tips.place_BI)),
            "box_l1": at_tips(sides),
        }
        right = {
            "tool_accuracy": at_tips(jnp.argmax(tools_BMC[here], -1) == tips.tool_BI),
            "state_accuracy": at_tips(jnp.argmax(states_BIC, -1) == tips.state_BI),
            "place_accuracy": at_tips(jnp.argmax(places_BIC, -1) == tips.place_BI),
        }
        return sum(parts.values()), parts | right

    (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    state, more = optim.update(state, loss, gradients, tx)
    return state, stats | more | {"loss": loss}


def write_report(out: Path, stages, predictions, floors, watch: Stopwatch, budget: Budget, seed: int) -> None:
    """The page of pictures; frames are drawn again, larger than the model sees them."""

    def picture(frame_id):
        return synth.draw(scene_of(frame_id, budget, seed), (480, 384))[0]

    if budget.box_slack:
        boxes = (
            "SFT was given boxes that are pushed outwards on purpose; GRPO was rewarded with the exact ones. SFT on "
            "exact boxes would learn them sooner: the demo shows the mechanism, not that RL beats supervision."
        )
    else:
        boxes = "A smoke run: one instrument a frame, exact boxes for SFT, and too few steps of GRPO to show an effect."
    curve = lambda name: log.read_metrics(out / name / "metrics.jsonl") if name != "base" else []  # noqa: E731
    report.write(
        out / "report.html",
        title="Surgery-R1 in JAX: the demo",
        stages=[report.Stage(name, stages[name], predictions[name], curve(name)) for name in stages],
        floors=floors,
        images=picture,
        facts={
            "seed": str(seed),
            "model": "Qwen2.5-VL architecture, 1.5 M parameters",
            "budget": ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in budget._asdict().items()),
            "seconds": ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in watch.laps.items()),
        },
        notes=[
            "The frames are synthetic, drawn with the label statistics of EndoVis-18-VQLA, instruments and states "
            f"more evenly than there. The model sees {SIZE[0]} x {SIZE[1]} pixels; here the scenes are drawn larger.",
            boxes,
            "The tower's warm-up stands in for a pretrained checkpoint. Rewards and prompts are a reconstruction of "
            "Surgery-R1, whose formulas were not available.",
        ],
    )
