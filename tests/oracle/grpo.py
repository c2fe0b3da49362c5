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
    advantage_estimator: str = "group"
    scale_rewards: str = "group"
    multi_objective_aggregation: str = "sum_then_normalize"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = True
    importance_sampling_level: str = "token"
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_threshold: float | None = None
    sapo_temperatures: tuple[float, float] = (1.05, 1.0)  # A <= 0, A > 0
    vespo_negative: tuple[float, float] = (3.0, 2.0)  # k, lambda
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    correction_mode: str | None = None
    clip_min: float | None = None
    clip_max: float | None = 2.0
    max_sequence_gap: float | None = None
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
    """(B,): how much better than what it is compared with, for every `advantage_estimator`. NaN: not scored, gets 0.

    GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740), REINFORCE++ (2501.03262), MaxRL (2602.02710),
    GDPO (2601.05242).
    """
    weights, size = weights_F.tolist(), options.num_generations
    columns = rewards_BF.T.tolist()
    if options.multi_objective_aggregation == "normalize_then_sum":
        each = [[v for g in range(0, len(c), size) for v in _whiten(c[g : g + size])] for c in columns]
        scores = [
            _weighted(row, weights, raw) for row, raw in zip(zip(*each, strict=True), rewards_BF.tolist(), strict=True)
        ]
        result = _whiten(scores)
    else:
        rewards = [_weighted(row, weights, row) for row in rewards_BF.tolist()]
        result = []
        for index, reward in enumerate(rewards):
            group = _scored(rewards[index // size * size : index // size * size + size])
            result.append(_compared(reward, group, _scored(rewards), options))
        estimator = options.advantage_estimator
        if estimator == "reinforce_pp_baseline" or (estimator == "rloo" and options.scale_rewards == "batch"):
            result = _whiten(result)
    return torch.tensor([0.0 if math.isnan(value) else value for value in result], dtype=rewards_BF.dtype)


def _compared(reward: float, group: list[float], batch: list[float], options: Options) -> float:
    """One reward against the scored ones of its group and of the batch, of which it is one (or NaN)."""
    if options.advantage_estimator == "rloo":
        return reward - (sum(group) - reward) / (len(group) - 1) if len(group) > 1 else math.nan
    if options.advantage_estimator == "reinforce_pp":
        return (reward - _mean(batch)) / (_std(batch) + 1e-4)
    centred = reward - _mean(group)
    if options.advantage_estimator == "reinforce_pp_baseline":
        return centred
    if options.advantage_estimator == "maxrl":
        return centred / _mean(group) if _mean(group) != 0 else 0.0
    if options.scale_rewards == "none":
        return centred
    return centred / (_std(group if options.scale_rewards == "group" else batch) + 1e-4)


def _weighted(values: Sequence[float], weights: list[float], raw: list[float]) -> float:
    """Sum over the functions with a value; NaN where none of the raw ones scored."""
    if all(math.isnan(value) for value in raw):
        return math.nan
    return sum(value * weight for value, weight in zip(values, weights, strict=True) if not math.isnan(value))


def _scored(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _whiten(values: list[float]) -> list[float]:
    mean, std = _mean(_scored(values)), _std(_scored(values))
    return [(value - mean) / (std + 1e-4) for value in values]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _std(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    return math.sqrt(sum((value - _mean(values)) ** 2 for value in values) / (len(values) - 1))


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


@dataclass
class Row:
    """The tokens of one completion that count, each (n,): log-probs of the policies, advantages, entropies."""

    logp: Tensor
    mu: Tensor  # the engine's
    old: Tensor | None  # None: mu ("bypass")
    trainer: Tensor | None  # of the weights that sampled
    ref: Tensor | None
    advantage: Tensor
    entropy: Tensor
    high: Tensor  # 1 where the entropy is in the top quantile


def correct(row: Row, o: Options) -> tuple[Tensor, Tensor, float]:
    """The log-ratio to differentiate, the factor of each token's policy term, and 0 for a rejected sequence."""
    start = row.logp.detach() if row.old is None else row.old
    log_ratio = row.logp - (row.mu if row.old is None else row.old)
    weight, kept = torch.ones_like(start), 1.0
    if o.max_sequence_gap is not None and row.trainer is not None:
        kept = float((row.trainer - row.mu).mean().abs() <= o.max_sequence_gap)
    if o.correction_mode is None:
        return log_ratio, weight, kept
    level, action = o.correction_mode.rsplit("_", 1)
    each = start - row.mu
    gap = {"token": each, "sequence": each.sum().expand_as(each), "sequence_mean": each.mean().expand_as(each)}[level]
    rho = gap.clamp(-20, 20).exp()
    low, high = o.clip_min or 0.0, math.inf if o.clip_max is None else o.clip_max
    bounded = rho.clamp(low, high) if action == "truncate" else rho * ((rho >= low) & (rho <= high))
    if row.old is not None:
        weight = bounded
    elif o.correction_mode == "token_truncate":  # the ratio is the importance weight: bounded, but not its gradient
        log_ratio = bounded.log() + row.logp - row.logp.detach()
    else:
        weight = bounded / rho
    return log_ratio, weight, kept


def ratio_of(log_ratio: Tensor, level: str) -> Tensor:
    """Token (PPO), sequence (GSPO, arXiv 2507.18071, eq. 7), or GSPO's value with the token's gradient (eq. 14)."""
    if level == "sequence":
        return log_ratio.mean().clamp(-20, 20).exp().expand_as(log_ratio)
    if level == "sequence_token":
        return (log_ratio - log_ratio.detach() + log_ratio.detach().mean()).clamp(-20, 20).exp()
    return log_ratio.clamp(-20, 20).exp()


def policy_term(row: Row, log_ratio: Tensor, weight: Tensor, o: Options) -> Tensor:
    """(n,): what each token adds to the policy loss, its weight multiplied on."""
    a, ratio = row.advantage, ratio_of(log_ratio, o.importance_sampling_level)
    high = o.epsilon if o.epsilon_high is None else o.epsilon_high
    if o.loss_type == "cispo":
        return -ratio.detach().clamp(max=high) * a * row.logp * weight
    if o.loss_type == "sapo":
        tau = torch.tensor([o.sapo_temperatures[int(value > 0)] for value in a], dtype=a.dtype)
        return -4 / tau * (tau * (ratio - 1)).sigmoid() * a * weight
    if o.loss_type == "vespo":  # its weight is that of the sequence
        per_token = o.correction_mode is not None and o.correction_mode.startswith("token")
        extra = weight.log().clamp(math.log(1e-8), 20)
        log_w = log_ratio.detach().clamp(-20, 20).sum() + (extra.sum() if per_token else extra[0])
        log_w = log_w.clamp(math.log(1e-8), 20)
        shapes = [o.vespo_positive if value >= 0 else o.vespo_negative for value in a]
        phi = torch.stack([(rate + k * log_w - rate * log_w.exp()).exp() for k, rate in shapes])
        return -phi * a * row.logp
    if o.loss_type == "gmpo":
        clipped = [
            d.clamp(max=high) if value > 0 else d.clamp(min=-o.epsilon) for d, value in zip(log_ratio, a, strict=True)
        ]
        return -torch.stack(clipped).mean().clamp(-20, 20).exp() * a * weight
    capped = ratio if o.delta is None else ratio.clamp(max=o.delta)
    return -torch.min(capped * a, ratio.clamp(1 - o.epsilon, 1 + high) * a) * weight


def kl_term(row: Row, log_ratio: Tensor, o: Options) -> Tensor:
    assert row.ref is not None
    d = (row.logp - row.ref).clamp(-20, 20)
    kl = {"k1": d, "k2": d * d / 2, "k3": (-d).exp() + d - 1}[o.kl_estimator]
    return kl * ratio_of(log_ratio, o.importance_sampling_level) if o.use_bias_correction_kl else kl


def loss(
    logp_BC: Tensor,
    old_BC: Tensor | None,
    ref_BC: Tensor | None,
    mask_BC: Tensor,
    advantages_B: Tensor,
    options: Options,
    engine_BC: Tensor | None = None,
    trainer_BC: Tensor | None = None,
    entropy_BC: Tensor | None = None,
) -> Tensor:
    """The scalar that is minimised; `advantages_B` may be (B, C). Row by row, each normalised as its paper says.

    DeepSeekMath (arXiv 2402.03300), eq. 3; DAPO (2503.14476), eq. 8; Dr. GRPO (2503.20783); LUSPO (2602.05261).
    """
    mu_BC = engine_BC if engine_BC is not None else old_BC
    assert mu_BC is not None
    live_BC = mask_BC.bool() & mu_BC.isfinite()
    entropy_BC = torch.zeros_like(logp_BC) if entropy_BC is None else entropy_BC
    high_BC = torch.ones_like(logp_BC)
    if options.top_entropy_quantile < 1:
        values = sorted(entropy_BC[live_BC].tolist())
        place = (1 - options.top_entropy_quantile) * (len(values) - 1)
        low, high = values[math.floor(place)], values[math.ceil(place)]
        high_BC = (entropy_BC >= low + (high - low) * (place - math.floor(place))).to(logp_BC.dtype)
    count, tokens, longest = len(logp_BC), int(live_BC.sum()), options.max_completion_length
    acting = max(int((live_BC * high_BC).sum()), 1)
    total = 0.0 * torch.where(live_BC, logp_BC, 0).sum()  # part of the graph even if no token counts
    for index, live in enumerate(live_BC):
        if not live.any():
            continue
        pick = [x if x is None else x[index][live] for x in (logp_BC, mu_BC, old_BC, trainer_BC, ref_BC)]
        advantage = advantages_B[index].expand(len(live))[live]
        row = Row(*pick, advantage, entropy_BC[index][live], high_BC[index][live])  # type: ignore[arg-type]
        log_ratio, weight, kept = correct(row, options)
        token = policy_term(row, log_ratio, weight, options) * row.high
        if options.off_policy_threshold is not None:
            far = (row.mu - row.logp.detach()).mean() > options.off_policy_threshold
            token = token * ~((row.advantage < 0) & far)
        if options.beta:
            token = token + options.beta * kl_term(row, log_ratio, options)
        if options.loss_type in ("grpo", "sapo", "gmpo"):
            normaliser = count * len(token)
        elif options.loss_type == "dr_grpo":
            normaliser = count * longest
        else:
            normaliser = count if options.loss_type == "luspo" else tokens
        bonus = (row.entropy * row.high).sum() / acting
        total = total + kept * (token.sum() / normaliser - options.entropy_coef * bonus)
    return total


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
