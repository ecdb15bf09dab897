"""TRL's turns, in TRL's environment: whole steps of its GRPOTrainer, or a part of them.

Decode is `generate` of transformers; prefill and scoring are forward passes as the trainer makes them; update is a
whole step less its rollout, which is generation, rewards and advantages.

    python trl_side.py CASE MODEL ROWS FOLDER MICRO_BATCH_ROWS DEVICES
"""

import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import protocol
import shapes
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.trainer.utils import selective_log_softmax

TURNS = 10_000  # more than anybody asks for
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}


def tokenizer_of(model):
    """A tokenizer in whose text every id is a word of its own."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(model.vocabulary)}, unk_token=str(shapes.FIRST)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(shapes.PAD),
                                                eos_token=str(shapes.EOS), padding_side="left")  # fmt: skip


def reward(completion_ids, **_):
    """The share of even ids, as the other sides reward it."""
    return [sum(token % 2 == 0 for token in row) / max(1, len(row)) for row in completion_ids]


class TakeTurns(transformers.TrainerCallback):
    """Makes the trainer wait before each step, and answers after it."""

    def __init__(self, turns, parts, only_update):
        self._turns, self._parts, self._only_update, self._start = turns, parts, only_update, None

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            self._turns.ready(**VERSIONS)
        if state.global_step and not self._turns.wait():
            control.should_training_stop = control.should_epoch_stop = True
            raise SystemExit
        self._parts.clear()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if state.global_step > 1:
            seconds = time.perf_counter() - self._start
            left_out = self._parts["rollout"] if self._only_update else 0.0
            self._turns.done(seconds - left_out, parts={} if self._only_update else dict(self._parts))


def timed(parts, name, function):
    """The function, whose seconds are added to parts[name]."""

    def call(*args, **kwargs):
        start = time.perf_counter()
        found = function(*args, **kwargs)
        parts[name] = parts.get(name, 0.0) + time.perf_counter() - start
        return found

    return call


def steps(turns, model, rows, folder, micro_batch_rows, only_update):
    """Whole steps: generation, reward, and one optimizer step on all rows."""
    ids = [row for turn in range(64) for row in shapes.prompt_ids(rows, model, turn)]
    prompts = Dataset.from_list([{"prompt": " ".join(map(str, row))} for row in ids])
    accumulation = rows.count // micro_batch_rows
    settings = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=TURNS, per_device_train_batch_size=micro_batch_rows,
        gradient_accumulation_steps=accumulation, num_generations=rows.group, max_completion_length=rows.new_tokens,
        learning_rate=shapes.LEARNING_RATE, lr_scheduler_type="constant", beta=0.0, loss_type="dapo",
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no",
        logging_steps=TURNS, disable_tqdm=True, shuffle_dataset=False, dataloader_pin_memory=False,
    )  # fmt: skip
    parts = {}
    trainer = trl.GRPOTrainer(
        model=loaded(folder), reward_funcs=reward, args=settings, train_dataset=prompts,
        processing_class=tokenizer_of(model), callbacks=[TakeTurns(turns, parts, only_update)],
    )  # fmt: skip
    trainer._generate_and_score_completions = timed(parts, "rollout", trainer._generate_and_score_completions)
    trainer.train()


def loaded(folder):
    """The weights that all sides start from, in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def prompts_of(rows, model, number):
    """The prompts of a turn, each as often as its group has rows: [B,P]."""
    return torch.tensor(shapes.prompt_ids(rows, model, number)).repeat_interleave(rows.group, dim=0)


def forward(turns, model, rows, folder, micro_batch_rows, scored):
    """Prefill, all rows at once, to their keys and values; or, by micro-batches, the log-probs of completions."""
    policy = loaded(folder).eval()
    completions = torch.tensor([[shapes.FIRST + (row + 5 * column) % (model.vocabulary - shapes.FIRST)
                                 for column in range(rows.new_tokens)] for row in range(rows.count)])  # fmt: skip

    def turn(number):
        ids = prompts_of(rows, model, number)
        with torch.no_grad():
            if not scored:
                policy(ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
                return
            for piece in torch.cat([ids, completions], dim=1).split(micro_batch_rows):
                logits = policy(piece, attention_mask=torch.ones_like(piece), logits_to_keep=rows.new_tokens + 1).logits
                selective_log_softmax(logits[:, :-1], piece[:, rows.prompt_tokens :])

    turns.serve(turn, **VERSIONS)


def decoding(turns, model, rows, folder):
    """Generation alone: every row has a prompt, as `generate` has them."""
    policy = loaded(folder).eval()
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=rows.new_tokens, eos_token_id=shapes.EOS,
        pad_token_id=shapes.PAD,
    )  # fmt: skip

    def turn(number):
        ids = prompts_of(rows, model, number)
        with torch.no_grad():
            out = policy.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert rows.ending or out.shape == (rows.count, rows.prompt_tokens + rows.new_tokens)

    turns.serve(turn, **VERSIONS)


def main(case, model, rows, folder, micro_batch_rows, devices):
    turns = protocol.Turns()
    given = (turns, shapes.MODELS[model], shapes.ROWS[rows], pathlib.Path(folder))
    if case in ("step", "update"):
        steps(*given, int(micro_batch_rows), only_update=case == "update")
    elif case == "decode":
        decoding(*given)
    else:
        forward(*given, int(micro_batch_rows), scored=case == "scoring")


if __name__ == "__main__":
    main(*sys.argv[1:])
