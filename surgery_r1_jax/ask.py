"""One question about one image: reasoning, answer and box, printed and, if wanted, drawn."""

from collections.abc import Sequence
from pathlib import Path

from surgery_r1_jax import (
    answer,
    checkpoint,
    errors,
    evaluate,
    images,
    options,
    pictures,
    pipeline,
    sharding,
    vocabulary,
)
from surgery_r1_jax.records import Frame, Record

NOWHERE = (0.0, 0.0, 1.0, 1.0)  # stands for the true box, which is not known


def run(
    checkpoint_dir: str | Path,
    image: str | Path,
    question: str,
    *,
    save: str | Path | None = None,
    max_tokens: int = 256,
) -> int:
    """The `ask` command: any question is put to the model; one of the data set's is put in its official words."""
    picture = images.load(image)
    kind, topic = vocabulary.question_kind(question)
    question = question.strip() if kind < 0 else vocabulary.ask(kind, topic)
    if not question:
        raise errors.InputError('the question is empty; ask one, such as "What organ is being operated?"')
    if save is not None and not Path(save).absolute().parent.is_dir():
        raise errors.InputError(f"{save}: its folder does not exist; make it first")

    mesh = sharding.make_mesh()
    loaded = checkpoint.load_model(checkpoint_dir, mesh)
    runner = evaluate.runner_of(loaded.folder, loaded.config, mesh, classes=loaded.classes)
    record = Record(question, answer="", box=NOWHERE, kind=kind, tool=None, source=str(image))
    frame = Frame("asked", "asked", Path(image), *picture.size, (record,))
    # One frame fills one place of the mesh; the others hold padding.
    settings = options.Data(root="", frames=sharding.frame_devices(mesh), questions=1, threads=1)
    ((prompts, _),) = pipeline.once([frame], runner.encoder, settings)[0]
    greedy = options.Sampler(max_tokens=max_tokens, temperature=0.0)
    drawn = evaluate.decode(runner.graph, loaded.params, sharding.put_batch(prompts, mesh), runner.vocabulary, greedy)
    text = runner.encoder.chat.decode(drawn.tokens_BJT[0, 0])
    parsed = answer.parse(text, truncated=not bool(drawn.stopped_BJ[0, 0]), classes=runner.encoder.classes)
    box = None
    if parsed.box is not None:
        box = runner.encoder.codec.decode(parsed.box, *runner.encoder.preprocessor.resized(*picture.size))

    lines = told(question, parsed, text, box, picture.size, runner.encoder.classes)
    print("\n".join(lines))
    if save is not None:
        pictures.save(pictures.draw(picture, prediction=box, lines=lines), save)
    return 0


def told(
    question: str, parsed: answer.Parsed, text: str, box, size: tuple[int, int], classes: Sequence[str]
) -> list[str]:
    """What the model said, a line each; control characters are spelt out."""
    name = classes[parsed.answer] if parsed.answer >= 0 else "none"
    lines = [f"question:  {question}", f"reasoning: {parsed.think or 'none'}", f"answer:    {name}", "box:       none"]
    if box is not None:
        pixels = (round(edge * side) for edge, side in zip(box, size * 2, strict=True))
        unit = ", ".join(f"{edge:.4f}" for edge in box)
        lines[-1] = f"box:       {', '.join(map(str, pixels))} of {size[0]} x {size[1]} pixels ({unit})"
    if not parsed.format_ok:
        lines += [f"not in the grammar: {parsed.reason.name}", f"completion: {text or 'empty'}"]
    return [pictures.visible(line) for line in lines]
