"""TRL's side of bench_training.py: its own SFTTrainer and GRPOTrainer on the tokens and patches that ours sees.

Its processor is one that hands out the benchmark's frame, so that neither side pays for text and pictures. What GRPO
draws in the first step is replaced when it was drawn, so that loss and gradient can be held against ours.
"""

import time

import numpy as np
import peft
import randomised
import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def row_fields(frame: randomised.Frame, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """What the model takes besides masks: rows of token ids, each with the frame's patches."""
    ids = torch.tensor(rows)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.tensor(frame.patches).repeat(len(ids), 1),
        image_grid_thw=torch.tensor([[1, *grid] for grid in frame.grids] * len(ids)),
        mm_token_type_ids=(ids == randomised.IMAGE).long(),
    )


class Processor(transformers.ProcessorMixin):
    """In the place of a processor: whatever it is given, it hands out one frame with its question, for each row."""

    chat_template = None

    def __init__(self, frame: randomised.Frame, vocabulary: int):
        words = {f"w{i}": i for i in range(vocabulary)}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        special = dict(unk_token="w0", pad_token=f"w{randomised.PAD}", eos_token=f"w{randomised.STOP}")
        self.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
        self._frame = frame

    def __call__(self, images=None, text=None, **_):
        """The fields of these rows, of which none is read."""
        return transformers.BatchFeature(self._fields(len(text)))

    def apply_chat_template(self, conversation, tokenize=False, **_):
        """The prompts of these conversations, of which none is read; as text they are empty."""
        if not tokenize:
            return ""
        fields = self._fields(len(conversation))
        as_lists = ("input_ids", "attention_mask", "mm_token_type_ids")
        return {name: field.tolist() if name in as_lists else field for name, field in fields.items()}

    def batch_decode(self, *args, **kwargs):
        """Text of token ids."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def _fields(self, count: int) -> dict[str, torch.Tensor]:
        return row_fields(self._frame, np.stack([self._frame.flat(0)] * count))


class Watch(transformers.TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__):
        """A step begins: its data are there."""
        self._since = now()

    def on_step_end(self, *_, **__):
        """The weights have changed."""
        self.seconds.append(now() - self._since)


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's, which tells how long it draws, and may be given what it drew."""

    given: list[list[int]] | None  # instead of what is drawn next
    drawing_s = 0.0

    def _generate_single_turn(self, *args, **kwargs):
        since = now()
        drawn, logp = super()._generate_single_turn(*args, **kwargs)
        self.drawing_s = now() - since
        given, self.given = self.given, None
        return given or drawn, logp


def now() -> float:
    """The time when all that was asked of the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def trainer_of(leg, case, args, rate: float, beta: float, clip: float, rank: int) -> transformers.Trainer:
    """TRL's trainer, set as ours is."""
    from bench_training import completions_of, frames_of, worth_of

    low, steps = args.dtype == "bfloat16", args.repeats + 1
    frame, asked = frames_of(case)
    folder = str(args.work / "model")
    vocabulary = transformers.AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    row = {"prompt": [{"role": "user", "content": "-"}], "image": Image.new("RGB", (28, 28))}
    common = dict(model=folder, processing_class=Processor(asked, vocabulary))
    kept = "bfloat16" if low and leg.kind == "lora" else "float32"
    how = dict(
        output_dir=str(args.work / "trl"),
        model_init_kwargs={"dtype": kept, "attn_implementation": leg.attention},
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=clip,
        bf16=low,
        use_cpu=DEVICE == "cpu",
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if leg.kind == "grpo":
        drawn = dict(min_new_tokens=case.completion, bad_words_ids=[[randomised.IMAGE], [randomised.VIDEO]])
        how |= dict(per_device_train_batch_size=case.samples, num_generations=case.samples, generation_kwargs=drawn)
        how |= dict(max_completion_length=case.completion, beta=beta, loss_type="grpo", scale_rewards="none")

        def reward(**_) -> list[float]:
            return worth_of(case).tolist()

        data = Dataset.from_list([row] * steps)
        made = GRPOTrainer(args=trl.GRPOConfig(**how), reward_funcs=reward, train_dataset=data, **common)
        made.given = completions_of(case).tolist()
        return made
    fields = row_fields(frame, np.stack([frame.flat(i) for i in range(case.branches)]))
    fields["labels"] = fields["input_ids"].clone()
    fields["labels"][:, : 1 - case.tokens] = -100  # the prefix, and the first token of a branch
    return trl.SFTTrainer(
        args=trl.SFTConfig(per_device_train_batch_size=case.branches, max_length=None, **how),
        data_collator=lambda _: dict(fields),
        train_dataset=Dataset.from_list([row] * case.branches * steps),
        peft_config=peft.LoraConfig(r=rank, lora_alpha=16, target_modules=ADAPTED) if leg.kind == "lora" else None,
        **common,
    )


def train(leg, case, args, **settings: float) -> dict:
    """A leg of bench_training.py: seconds of its steps, what they told, the device and the most memory held."""
    trainer, watch = trainer_of(leg, case, args, **settings), Watch()
    trainer.add_callback(watch)
    trainer.train()
    told = [[line["loss"], line["grad_norm"]] for line in trainer.state.log_history if "grad_norm" in line]
    device, peak = "cpu", None
    if DEVICE == "cuda":
        device, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**30
    drawing = {"rollout_s": trainer.drawing_s} if leg.kind == "grpo" else {}
    return drawing | {"steps_s": watch.seconds, "told": told, "device": device, "peak_gib": peak}
