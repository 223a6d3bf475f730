"""The README.md of an exported model: how to ask it, where it comes from, and how it did while training."""

import json
import subprocess
from pathlib import Path

import yaml

from surgery_r1_jax import __version__, answer
from surgery_r1_jax.codec import BoxCodec

RESIZED = """ as the processor resizes it, whose height and width are
`processor.image_processor.patch_size * inputs["image_grid_thw"][0, 1:]`"""
SHOWN = ("accuracy", "accuracy_no_organ", "macro_f1", "miou", "joint_rate", "illusion_rate", "parse_failure_rate", "n")

USE = """## Use

The system text is part of what the model was trained on; the image stands before the question. Boxes are written in
{units}{resized}.

```python
{imports}from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

system = (
    {system}
)
image, question = Image.open("frame.png").convert("RGB"), "Where is bipolar_forceps located?"
{load}
processor = AutoProcessor.from_pretrained("{processor}")
messages = [
    {{"role": "system", "content": [{{"type": "text", "text": system}}]}},
    {{"role": "user", "content": [{{"type": "image", "image": image}}, {{"type": "text", "text": question}}]}},
]
how = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
inputs = processor.apply_chat_template(messages, **how).to(model.device)
written = model.generate(**inputs, max_new_tokens=256, do_sample=False)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(written, skip_special_tokens=True)[0])
```
"""


def text(name: str, title: str, codec: BoxCodec, source: Path, *, adapter: bool = False) -> str:
    """The card of a model of the family `title` or of its adapter, exported from a run folder or a Hugging Face folder.

    `codec` is the family's. Of paths only the last part is told: what stands before it is nobody's business.
    """
    settings = _without_places(_read(source / "config.yaml"))
    base = settings.get("model", source.name)
    front = dict(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=base,
        tags=["surgical-vqla", "surgery-r1-jax", title.lower()],
    )
    what = "An adapter (LoRA) of a" if adapter else "A"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"{what} {title} model. Base: {base}.",
    ]
    if settings:
        data = settings["data"]
        kind = "GRPO" if "samples" in settings else "SFT"
        parts.append(
            f"Trained by {kind}, {settings['schedule']['steps']} steps, seed {settings['seed']}, on the split "
            f"{data['split']} of {' and '.join(part['root'] for part in data.get('mix') or [data])}."
        )
    parts += [f"Written by surgery-r1-jax {__version__}{_commit()}.\n", _use(name, base, codec, adapter=adapter)]
    parts += _scores(source / "metrics.jsonl")
    if settings:
        parts.append(f"## Configuration\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n")
    parts.append("## Limits\n\nNot validated for clinical use; not a medical device.\n")
    return "\n".join(parts)


def _use(name: str, base: str, codec: BoxCodec, *, adapter: bool) -> str:
    """The lines that ask the model a question."""
    sentences = answer.instruction(codec.units).split(". ")
    system = "\n    ".join(repr(one + ". ") for one in sentences[:-1]) + f"\n    {sentences[-1]!r}"
    whole = f'AutoModelForImageTextToText.from_pretrained("{base if adapter else name}")'
    load = f'model = PeftModel.from_pretrained({whole}, "{name}")' if adapter else f"model = {whole}"
    imports = "from peft import PeftModel\n" if adapter else ""
    return USE.format(
        units=codec.units,
        resized="" if codec.steps else RESIZED,
        imports=imports,
        system=system,
        load=load,
        processor=base if adapter else name,
    )


def _without_places(settings: dict) -> dict:
    """A configuration with the last part of every path alone."""

    def named(part: dict) -> dict:
        return part | {"root": Path(part["root"]).name} if part.get("root") else part

    if not settings:
        return {}
    data = named(settings["data"])
    if data.get("mix"):
        data |= {"mix": [named(part) for part in data["mix"]]}
    return settings | {"model": Path(settings["model"]).name, "data": data}


def _scores(file: Path) -> list[str]:
    """A table of the last evaluation, which chose among checkpoints and is no test result."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
    scores = next((row for row in reversed(rows) if row.get("split") not in (None, "train")), None)
    if scores is None:
        return [""]
    lines = [f"| {key} | {scores[key]:.4g} |" for key in SHOWN if isinstance(scores.get(key), (int, float))]
    about = f"\n## Last evaluation while training, split {scores['split']}, step {scores['step']}\n"
    return [about, "| metric | value |", "| --- | --- |", *lines, ""]


def _read(file: Path) -> dict:
    return yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}


def _commit() -> str:
    """The commit of the program where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" at commit {done.stdout.strip()}" if done.returncode == 0 else ""
