"""The whole algorithm, slow and obvious: GRPO with LoRA in plain torch, padded, one loop, no cache.

Everything the package computes in a clever way is computed here in the plain one; the tests compare the two. Notation
as in DeepSeekMath (arXiv 2402.03300): G completions y_i of a prompt x, rewards R_i, ratio r_t = pi(y_t) / pi_old(y_t).
Shapes: B completions, T tokens of the longest row, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Options:
    """What the algorithm can be told; the defaults are those of the package."""

    num_generations: int = 2
    max_completion_length: int = 8
    temperature: float = 1.0
    loss_type: str = "dapo"
    scale_rewards: str = "group"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    num_iterations: int = 1
    mask_truncated: bool = False
    learning_rate: float = 1e-5
    max_grad_norm: float = 1.0
    total_steps: int = 1


@dataclass
class Completion:
    """One sampled completion: its ids (the stop token included), and whether it ended by itself."""

    prompt: list[int]
    ids: list[int]
    stopped: bool


class LoraLinear(nn.Module):
    """y = x W^T + (alpha / r) (x A^T) B^T with W frozen."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float):
        super().__init__()
        self.base, self.scale, self.on = base, scale, True
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.scale * (x @ self.a.T) @ self.b.T if self.on else y


def attach_lora(model: nn.Module, adapter: dict[str, Tensor], scale: float) -> dict[str, nn.Parameter]:
    """Freeze `model`, put the adapter's matrices on its linears, and return them by PEFT's names.

    Args:
        adapter: `base_model.model.<module>.lora_A.weight` and `...lora_B.weight` -> values.
    """
    model.requires_grad_(False)
    trained: dict[str, nn.Parameter] = {}
    for name in [key for key in adapter if key.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        lora = LoraLinear(model.get_submodule(module), adapter[name], adapter[name.replace("lora_A", "lora_B")], scale)
        parent, _, child = module.rpartition(".")
        setattr(model.get_submodule(parent), child, lora)
        trained[name], trained[name.replace("lora_A", "lora_B")] = lora.a, lora.b
    return trained


def switch_lora(model: nn.Module, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.on = on


@torch.no_grad()
def sample(model: nn.Module, prompt: list[int], uniforms: Tensor, options: Options, stops: Sequence[int]) -> Completion:
    """One token at a time, the whole sequence forwarded for each; the token is the inverse CDF at the next uniform."""
    ids: list[int] = []
    while len(ids) < options.max_completion_length:
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].float() / options.temperature
        cumulative = logits.log_softmax(-1).double().exp().cumsum(-1)
        token = int(torch.searchsorted(cumulative, uniforms[len(ids)] * cumulative[-1], right=True))
        ids.append(min(token, len(cumulative) - 1))
        if ids[-1] in stops:
            return Completion(prompt, ids, stopped=True)
    return Completion(prompt, ids, stopped=False)


def advantages(rewards_BF: Tensor, weights_F: Tensor, options: Options) -> Tensor:
    """(B,): rewards weighted and summed, less the group's mean, over the standard deviation. NaN: not scored."""
    result = []
    total_B = [
        math.nan
        if all(math.isnan(value) for value in row)
        else sum(v * w for v, w in zip(row, weights_F.tolist(), strict=True) if not math.isnan(v))
        for row in rewards_BF.tolist()
    ]
    scored = [value for value in total_B if not math.isnan(value)]
    for start in range(0, len(total_B), options.num_generations):
        group = total_B[start : start + options.num_generations]
        valid = [value for value in group if not math.isnan(value)]
        for value in group:
            if math.isnan(value):
                result.append(0.0)
                continue
            centred = value - sum(valid) / len(valid)
            if options.scale_rewards == "none":
                result.append(centred)
            else:
                spread = _std(valid if options.scale_rewards == "group" else scored)
                result.append(0.0 if math.isnan(spread) else centred / (spread + 1e-4))
    return torch.tensor(result)


def _std(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def logprobs(model: nn.Module, completions: Sequence[Completion], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of every completion token and their mask, both (B, C), C the longest completion; rows padded right."""
    rows = [completion.prompt + completion.ids for completion in completions]
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    attention_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    all_BTV = (model(input_ids=ids_BT, attention_mask=attention_BT).logits.float() / temperature).log_softmax(-1)
    longest = max(len(completion.ids) for completion in completions)
    values_BC, mask_BC = [], torch.zeros(len(rows), longest)
    for index, completion in enumerate(completions):
        first = len(completion.prompt)
        steps = [all_BTV[index, first + t - 1, token] for t, token in enumerate(completion.ids)]
        values_BC.append(torch.stack(steps + [torch.zeros(())] * (longest - len(steps))))
        mask_BC[index, : len(completion.ids)] = 1
    return torch.stack(values_BC), mask_BC


def loss(
    logp_BC: Tensor, old_BC: Tensor, ref_BC: Tensor | None, mask_BC: Tensor, advantages_B: Tensor, options: Options
) -> Tensor:
    """The scalar that is minimised (eq. 3 and 4; DAPO, arXiv 2503.14476, eq. 8; Dr. GRPO, arXiv 2503.20783)."""
    ratio = (logp_BC - old_BC).exp()
    high = options.epsilon if options.epsilon_high is None else options.epsilon_high
    clipped = ratio.clamp(1 - options.epsilon, 1 + high)
    capped = ratio if options.delta is None else ratio.clamp(max=options.delta)
    token_BC = -torch.min(capped * advantages_B[:, None], clipped * advantages_B[:, None])
    if ref_BC is not None:
        kl = (ref_BC - logp_BC).exp() - (ref_BC - logp_BC) - 1
        token_BC = token_BC + options.beta * (kl * ratio if options.use_bias_correction_kl else kl)
    summed_B, count_B = (token_BC * mask_BC).sum(1), mask_BC.sum(1)
    if options.loss_type == "grpo":
        return (summed_B / count_B.clamp(min=1)).mean()
    if options.loss_type in ("bnpo", "dapo"):
        return summed_B.sum() / count_B.sum().clamp(min=1)
    if options.loss_type == "dr_grpo":
        return summed_B.sum() / (len(summed_B) * options.max_completion_length)
    raise ValueError(options.loss_type)


def updates(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    completions: Sequence[Completion],
    advantages_B: Tensor,
    options: Options,
) -> Iterator[float]:
    """`num_iterations` optimizer steps on the same completions; yields each loss, gradients still in place."""
    with torch.no_grad():
        old_BC, mask_BC = logprobs(model, completions, options.temperature)
        ref_BC = None
        if options.beta:
            switch_lora(model, on=False)
            ref_BC, _ = logprobs(model, completions, options.temperature)
            switch_lora(model, on=True)
    if options.mask_truncated:
        mask_BC = mask_BC * torch.tensor([[float(completion.stopped)] for completion in completions])
    for _ in range(options.num_iterations):
        optimizer.zero_grad()
        value = loss(
            logprobs(model, completions, options.temperature)[0], old_BC, ref_BC, mask_BC, advantages_B, options
        )
        value.backward()
        nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
        optimizer.step()
        yield value.item()


def train(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    batches: Sequence[Sequence[list[int]]],
    reward: Callable[[Completion], float],
    uniforms: Callable[[int, int, int], Tensor],
    options: Options,
    stops: Sequence[int],
) -> tuple[list[float], list[Completion]]:
    """The run: for each batch of prompts sample, score, and update; AdamW with a linearly falling learning rate.

    Args:
        batches: the prompts (token ids) of each generation.
        uniforms: (generation, prompt, sample) -> the random numbers of that completion.

    Returns:
        the loss of every optimizer step, and every completion in order.
    """
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / options.total_steps))
    losses, everything = [], []
    for generation, prompts in enumerate(batches):
        completions = [
            sample(model, prompt, uniforms(generation, slot, index), options, stops)
            for slot, prompt in enumerate(prompts)
            for index in range(options.num_generations)
        ]
        rewards_BF = torch.tensor([[reward(completion)] for completion in completions])
        for value in updates(
            model, trained, optimizer, completions, advantages(rewards_BF, torch.ones(1), options), options
        ):
            losses.append(value)
            scheduler.step()
        everything += completions
    return losses, everything
