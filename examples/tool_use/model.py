"""A small chat model that knows a calculator but seldom uses it, made and warmed up on the spot.

The warm-up is plain supervised learning from a proud pupil: it answers most products off the top of its head, which
gives a number that looks right and is not, and asks the calculator now and then, sometimes for the wrong product. That
asking carefully is worth it is left to the reward function.
"""

import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = "0123456789*.:{}[]'_\"\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,()<>/-+=?!`|"
CALL, CLOSE = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "', '"}}\n</tool_call>'
USER, TOOL, MODEL, END = "<user>", "<tool>", "<model>", "<end>"
SPECIAL = (USER, TOOL, MODEL, END)
LARGEST = 99
ASKS, SLIPS, MISREADS = 0.3, 0.2, 0.1  # how often the pupil asks, for the wrong product, and copies a wrong digit
LESSONS, BATCH, STEPS = 20_000, 64, 1200
HELD_OUT = 200

Problem = tuple[int, int]
Message = dict[str, Any]

# Names of tools are all that it writes: a larger model would get their descriptions as well.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<user>{{ message.content }}<end>"
    "{% elif message.role == 'tool' %}<tool>{{ message.content }}<end>"
    "{% else %}<model>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    """<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}"""
    "\n</tool_call>{% endfor %}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)


def problems(seed: int) -> tuple[list[Problem], list[Problem]]:
    """Products of two numbers of two digits, shuffled: (to learn from, held out)."""
    pairs = [(a, b) for a in range(10, LARGEST + 1) for b in range(10, LARGEST + 1)]
    random.Random(seed).shuffle(pairs)
    return pairs[:-HELD_OUT], pairs[-HELD_OUT:]


def question(problem: Problem) -> list[Message]:
    return [{"role": "user", "content": f"{problem[0]}*{problem[1]}"}]


def answer(problem: Problem) -> str:
    return str(problem[0] * problem[1])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and one for each of the texts that calls and turns begin and end with."""
    vocab = {token: index for index, token in enumerate(["<pad>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()  # characters are joined without spaces
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (CALL, CLOSE)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def lesson(problem: Problem, pupil: random.Random) -> list[tuple[str, bool]]:
    """What the pupil does with a problem: texts, and whether they are its own."""
    asked = f"{USER}{problem[0]}*{problem[1]}{END}{MODEL}"
    if pupil.random() >= ASKS:
        near = problem[0] * problem[1] + 10 * pupil.randint(-40, 40) + pupil.randint(0, 9)
        return [(asked, False), (f"{max(near, 100)}{END}", True)]
    a, b = problem
    if pupil.random() < SLIPS:
        a = 10 * (a // 10) + pupil.randint(0, 9)
    seen = said = str(a * b)
    if pupil.random() < MISREADS:
        at = pupil.randrange(len(seen))
        said = f"{seen[:at]}{pupil.randint(0, 9)}{seen[at + 1 :]}"
    call = f"{CALL}{a}*{b}{CLOSE}{END}"
    return [(asked, False), (call, True), (f"{TOOL}{seen}{END}{MODEL}", False), (f"{said}{END}", True)]


def encode(lessons: list[list[tuple[str, bool]]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids and labels (only the pupil's own texts count), both (lessons, longest)."""
    encoded = iter(tokenizer([text for parts in lessons for text, _ in parts])["input_ids"])
    rows = [[(token, own) for _, own in parts for token in next(encoded)] for parts in lessons]
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for number, row in enumerate(rows):
        tokens = torch.tensor([token for token, _ in row])
        ids[number, : len(row)] = tokens
        labels[number, : len(row)] = torch.where(torch.tensor([own for _, own in row]), tokens, -100)
    return ids, labels


def warm_up(directory: Path, seed: int, *, hidden: int = 96, layers: int = 3, steps: int = STEPS) -> Path:
    """Make tokenizer and model, train, and save to `directory`; at once where it already holds them."""
    if (directory / "model.safetensors").is_file():
        return directory
    torch.manual_seed(seed)
    tokenizer, pupil, started = make_tokenizer(), random.Random(seed), time.perf_counter()
    model = make_model(tokenizer, hidden, layers)
    learn, _ = problems(seed)
    ids, labels = encode([lesson(pupil.choice(learn), pupil) for _ in range(LESSONS)], tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    ramp = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        rows = torch.randint(0, len(ids), (BATCH,))
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ramp.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"  warm-up step {step}: loss {loss.item():.2f}, {time.perf_counter() - started:.0f} s", flush=True)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory
