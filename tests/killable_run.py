"""A run of 30 steps that tells how far it is, to be killed by `rl/test_kill.py`. Executed with `runpy`, not imported.

The global `arguments` has `model` and `output` (directories), `engine`, `options` (of GRPOConfig), `events`, a
connection on which (what, step) is sent: what it is about to do, and `hold`: after that step it waits to be killed.
"""

import gc
import random
import time

import numpy as np
import torch
from colora import GRPOConfig, GRPOTrainer
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

arguments = globals()["arguments"]
events = arguments["events"]


class Tell(TrainerCallback):
    """Sends what comes next; after `on_step_end` the Trainer logs, evaluates and saves."""

    def on_step_end(self, args, state, control, **kwargs):
        events.send(("saving", state.global_step))
        while state.global_step >= arguments["hold"]:
            time.sleep(1)

    def on_save(self, args, state, control, **kwargs):
        events.send(("saved", state.global_step))


def noisy(completion_ids, trainer_state, **_):
    """A reward with every kind of randomness that a checkpoint keeps."""
    events.send(("scoring", trainer_state.global_step))
    noise = random.random() + float(np.random.random()) + torch.rand(()).item()
    return [0.25 * sum(token % 3 == 0 for token in ids) + noise * random.random() for ids in completion_ids]


def report(phase: str, done: int, total: int) -> None:
    """The trainer reports each finished completion and each micro-batch."""
    events.send((phase, trainer.state.global_step))


gc.freeze()  # vLLM collects garbage several times while it starts: not over what was imported before the fork
torch.set_num_threads(1)
config = GRPOConfig(
    arguments["output"],
    engine=arguments["engine"],
    max_steps=30,
    per_device_train_batch_size=8,
    num_generations=4,
    max_completion_length=10,
    learning_rate=3e-3,
    report_to=[],
    device="cpu",
    gradient_checkpointing=False,
    disable_tqdm=True,
    **arguments["options"],
)
# Seven prompts, two a generation: three generations an epoch, so that the run has several epochs.
prompts = Dataset.from_dict({"prompt": [f"{n}+1=" for n in range(7)]})
held_out = Dataset.from_dict({"prompt": ["8+1=", "9+1="]})
lora = LoraConfig(r=4, init_lora_weights=False)
trainer = GRPOTrainer(arguments["model"], noisy, config, prompts, held_out, callbacks=[Tell()], peft_config=lora)
trainer.collector.report = trainer.learner.report = report
events.send(("ready", 0))
trainer.train(resume_from_checkpoint=True)
trainer.engine.close()
