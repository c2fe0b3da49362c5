"""A decoder of about a million parameters and a character-level tokenizer, made and warmed up on the spot.

The warm-up is plain supervised learning from a careless teacher, who forgets to carry in CARELESS of the sums: the
model ends up right on the problems that need no carry, and on few others. To carry is left to the reward function.
"""

import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = "0123456789+= "
LARGEST, WIDTH = 99, 2
CARELESS = 0.65  # share of sums in which the teacher forgets to carry
WARM = 0.36  # mean probability of the right answer at which the warm-up stops; a perfect pupil would reach 0.53
HELD_OUT = 400
HEAD_DIM = 32

Problem = tuple[int, int]


def problems(seed: int, largest: int = LARGEST, most: int = 100_000) -> tuple[list[Problem], list[Problem]]:
    """Sums of two numbers up to `largest`, shuffled, at most `most` of them: (to learn from, held out)."""
    rng = random.Random(seed)
    pairs = [
        divmod(index, largest + 1) for index in rng.sample(range((largest + 1) ** 2), min(most, (largest + 1) ** 2))
    ]
    return pairs[:-HELD_OUT], pairs[-HELD_OUT:]


def question(problem: Problem, width: int = WIDTH) -> str:
    """Both numbers in `width` digits: 05+48=."""
    return f"{problem[0]:0{width}}+{problem[1]:0{width}}="


def answer(problem: Problem, width: int = WIDTH) -> str:
    """The sum, in a digit more: 053."""
    return f"{sum(problem):0{width + 1}}"


def careless_answer(problem: Problem, width: int = WIDTH) -> str:
    """The sum of each column, carries forgotten: 043."""
    columns = zip(*(f"{number:0{width}}" for number in problem), strict=True)
    return "0" + "".join(str((int(a) + int(b)) % 10) for a, b in columns)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and an end-of-text token."""
    vocab = {token: index for index, token in enumerate([*CHARACTERS, "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()  # characters are joined without spaces
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_model(tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 4) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // HEAD_DIM,
            num_key_value_heads=hidden // HEAD_DIM,
            head_dim=HEAD_DIM,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(
    pairs: list[Problem], answers: list[str], tokenizer: PreTrainedTokenizerFast, width: int = WIDTH
) -> tuple[Tensor, Tensor]:
    """Token ids and labels (only the answer and the end of text count), both (problems, longest)."""
    asked = len(question(pairs[0], width))
    longest = asked + width + 2  # the answer and the end of text
    ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), longest), -100)
    for row, (pair, text) in enumerate(zip(pairs, answers, strict=True)):
        tokens = tokenizer(question(pair, width) + text)["input_ids"] + [tokenizer.eos_token_id]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, asked : len(tokens)] = ids[row, asked : len(tokens)]
    return ids, labels


@torch.no_grad()
def right_probability(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor) -> float:
    """Mean probability of the right answer as a whole."""
    logprobs, wanted = model(input_ids=ids).logits[:, :-1].log_softmax(-1), labels[:, 1:]
    each = logprobs.gather(-1, wanted.clamp(min=0)[..., None])[..., 0].masked_fill(wanted == -100, 0.0)
    return each.sum(-1).exp().mean().item()


def warm_up(
    directory: Path,
    seed: int,
    *,
    largest: int = LARGEST,
    hidden: int = 128,
    layers: int = 4,
    batch: int = 128,
    learning_rate: float = 2e-3,
    until: float = WARM,
    device: str = "cpu",
) -> Path:
    """Make tokenizer and model, train until the right answer has the probability `until`, and save to `directory`.

    Returns `directory` at once where it already holds them.
    """
    if (directory / "model.safetensors").is_file():
        return directory
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden, layers).to(device)
    pairs, held_out = problems(seed, largest)
    teacher = random.Random(seed)
    width = len(str(largest))
    lessons = [(careless_answer if teacher.random() < CARELESS else answer)(pair, width) for pair in pairs]
    right_answers = [answer(pair, width) for pair in held_out]
    ids, labels = (tensor.to(device) for tensor in encode(pairs, lessons, tokenizer, width))
    test = [tensor.to(device) for tensor in encode(held_out, right_answers, tokenizer, width)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    started, step, right = time.perf_counter(), 0, 0.0
    while right < until:
        rows = torch.randint(0, len(ids), (batch,), device=device)
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ramp.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            right = right_probability(model, *test)
        if step % 50 == 0:
            seconds = time.perf_counter() - started
            print(f"  warm-up step {step}: probability of the right answer {right:.2f}, {seconds:.0f} s", flush=True)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory
