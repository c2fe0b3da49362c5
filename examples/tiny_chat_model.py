"""Makes a chat model of some 200,000 parameters, to try an example on a CPU: it knows a few answers, and no question.

    python examples/tiny_chat_model.py runs/tiny-model examples/code/tiny_says.txt

The first argument is the directory to write, the second a text file with answers, separated by lines of `---`. The
model is taught to say one of them whatever it is asked, so what it samples varies, and rewards have something to tell
apart. It learns no task: what it is for is to see every part of a run work, in a minute and without a download.
"""

import math
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 1000
WINDOW = 64  # tokens that a token sees before it: what is said depends little on how long the prompt is
LONGEST_PROMPT = 2 * WINDOW  # tokens of what stands before an answer while it is taught; two layers see no more
WARM = 3.0  # nats an answer at which the teaching stops: some come out whole, others do not
MOST_STEPS, BATCH = 500, 8
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from `texts`, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=32768,
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=0,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def teach(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, answers: list[str], noise: str) -> float:
    """Supervised: after any piece of `noise`, one of `answers`. Returns the last loss, in nats an answer."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    start = tokenizer("\nassistant: ")["input_ids"]
    told = [tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id] for answer in answers]
    before = tokenizer(noise)["input_ids"]
    nats = math.inf
    for _ in range(MOST_STEPS):
        length = rng.randint(1, LONGEST_PROMPT)  # one for all of a batch, so that little is padding
        starts = [rng.randrange(len(before) - length) for _ in range(BATCH)]
        rows = [(before[first : first + length] + start, rng.choice(told)) for first in starts]
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((BATCH, longest), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        nats = loss.item() * sum(len(answer) for _, answer in rows) / BATCH
        if nats < WARM:
            break
    return nats


def main(directory: str, says: str) -> None:
    """Make tokenizer and model and write them to `directory`."""
    torch.manual_seed(0)
    answers = [answer.strip() for answer in Path(says).read_text().split("\n---\n")]
    # What an example asks is written in its source, so its words become tokens too.
    noise = "\n".join(path.read_text() for path in sorted(Path(says).parent.glob("*.py")))
    tokenizer = make_tokenizer([*answers, noise])
    model = make_model(tokenizer)
    nats = teach(model, tokenizer, answers, noise)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"{directory}: {model.num_parameters():,} parameters, {nats:.1f} nats an answer, of {len(answers)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
