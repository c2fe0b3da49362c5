"""The LoRA adapter: fp32 masters that the optimizer updates, one cast into the slots that both forwards read.

Configured by `peft.LoraConfig` and saved in PEFT's files, so that `PeftModel.from_pretrained` loads what was trained
here. All masters lie in one flat fp32 buffer, [every A | every B], all slots in another of the compute dtype with the
same layout: handing the adapter to the engine is a copy of the first half and a scaled copy of the second.
"""

import json
import math
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..kernels.lora_add import LoraPart
from .linear import LoraSlot, OutputPart, SharedLinear
from .weights import SharedWeights

ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
DECODER = "model"  # where the decoder's layers lie in a Hugging Face model; deeper in multimodal ones


def check_lora_config(config: LoraConfig) -> None:
    """Raise ValueError, naming the option and the remedy, for everything of PEFT's LoRA that is not trained here."""
    if not isinstance(config, LoraConfig):
        raise ValueError(f"peft_config is a {type(config).__name__}: pass a peft.LoraConfig, such as LoraConfig(r=16)")
    variant = "the engine computes plain LoRA only; leave it unset"
    refused = {
        "use_dora": "DoRA rescales the frozen weight, which the engine shares; use plain LoRA",
        "lora_bias": "biases belong to the frozen base; leave it False",
        "modules_to_save": "whole modules are part of the shared frozen base; leave it unset",
        "trainable_token_indices": "embeddings are part of the shared frozen base; leave it unset",
        "target_parameters": "only linear modules are adapted; use target_modules",
        "layer_replication": "layers cannot be replicated over shared weights; leave it unset",
        "use_qalora": "the update must have the base's shape; leave it False",
        "fan_in_fan_out": "no model family here stores transposed weights; leave it False",
        "megatron_config": "the model is not parallelised by Megatron; leave it unset",
        "velora_config": variant,
        "alora_invocation_tokens": variant,
        "monteclora_config": variant,
        "use_bdlora": variant,
        "arrow_config": variant,
        "kasa_config": variant,
    }
    for option, reason in refused.items():
        value = getattr(config, option, None)
        if value:
            raise ValueError(f"LoraConfig.{option}={value!r} is not supported: {reason}")
    if config.bias != "none":
        raise ValueError(
            f"LoraConfig.bias={config.bias!r} is not supported: biases belong to the frozen base; use 'none'"
        )
    if config.lora_dropout:
        raise ValueError(
            f"LoraConfig.lora_dropout={config.lora_dropout} is not supported: the engine samples without dropout, "
            "so the trainer's log-probs would not be those of the sampled policy; use 0"
        )
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError(
            "LoraConfig.rank_pattern/alpha_pattern are not supported: "
            "one rank and alpha for all targets; leave them empty"
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"LoraConfig.init_lora_weights={config.init_lora_weights!r} is not supported: "
            "initialisations that edit the base cannot share it; use True, False or 'gaussian'"
        )
    if config.r < 1:
        raise ValueError(f"LoraConfig.r must be at least 1, got {config.r}")
    if config.lora_alpha == 0:
        raise ValueError("LoraConfig.lora_alpha=0 is not supported: the update is scaled by it; use one above 0")
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            f"LoraConfig.task_type={config.task_type!r} is not supported: PEFT would load the adapter into another "
            "kind of model; use 'CAUSAL_LM' or leave it unset"
        )


def targeted_parts(
    weights: SharedWeights, config: LoraConfig, decoder: str = DECODER
) -> dict[str, tuple[OutputPart, ...]]:
    """Fused projection -> its parts that `config` matches, by PEFT's own rules, against the names below `decoder`.

    Raises ValueError where nothing matches, or where a name in the list matches no linear of the blocks.
    """
    resolved = copy(config)
    if config.target_modules is None or config.target_modules == "all-linear":
        resolved.target_modules = sorted({part.name for linear in weights.linears.values() for part in linear.parts})
    hits: dict[str, tuple[OutputPart, ...]] = {}
    matched_names: set[str] = set()
    known: set[str] = set()
    for linear in weights.linears.values():
        parts = []
        for part in linear.parts:
            known.add(part.name)
            name = _module_name(linear, part.name, decoder)
            if check_target_module_exists(resolved, name):
                parts.append(part)
                matched_names.add(name)
        if parts:
            hits[linear.name] = tuple(parts)
    known_text = ", ".join(sorted(known))
    if not hits:
        known_text += (
            f". A text is a regular expression for whole names, such as {name}; for names of linears give a list"
            if isinstance(config.target_modules, str)
            else ""
        )
        raise ValueError(
            f"LoraConfig.target_modules={config.target_modules!r} matches no linear of the model; "
            f"its linears are: {known_text}"
        )
    if isinstance(config.target_modules, (list, set, tuple)):
        for target in config.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in matched_names):
                raise ValueError(
                    f"LoraConfig.target_modules: {target!r} matches no linear of the model's blocks; "
                    f"they are: {known_text}"
                )
    return hits


def _module_name(linear: SharedLinear, part: str, decoder: str) -> str:
    """The Hugging Face module of one part, e.g. `model.language_model.layers.0.self_attn.q_proj`."""
    return f"{decoder}.{linear.name.removeprefix(f'{DECODER}.').rpartition('.')[0]}.{part}"


@dataclass(frozen=True)
class _Placement:
    """Where one fused projection's A and B lie in the flat buffers."""

    linear: SharedLinear
    parts: tuple[LoraPart, ...]
    a_start: int
    b_start: int
    a_shape: tuple[int, int]
    b_shape: tuple[int, int]


class Adapter(nn.Module):
    """Masters (parameters, fp32) and slots of one LoRA adapter over `weights`; binding it sets every target's slot.

    Args:
        weights: the shared base; `SharedLinear.slot` is set on each targeted projection.
        config: which linears, rank, alpha, initialisation.
        generator: for the initialisation of A; torch's default generator where None.
        decoder: where the decoder lies in the Hugging Face model that the saved adapter is for.
        place_a: called with a projection and the shape of its stacked A, gives the memory of that slot; by default the
            slots of A lie one after the other.

    Raises:
        ValueError: options that are not supported, or targets that match nothing.
    """

    def __init__(
        self,
        weights: SharedWeights,
        config: LoraConfig,
        generator: torch.Generator | None = None,
        decoder: str = DECODER,
        place_a: Callable[[SharedLinear, tuple[int, int]], Tensor] | None = None,
    ):
        super().__init__()
        check_lora_config(config)
        self.config, self.decoder = config, decoder
        self.scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self._placements, a_numel, b_numel = _place(weights, targeted_parts(weights, config, decoder), config.r)
        self._a_numel = a_numel
        self._flat_master = torch.zeros(a_numel + b_numel, dtype=torch.float32, device=weights.device)
        self._flat_slot_b = torch.zeros(b_numel, dtype=weights.dtype, device=weights.device)
        self._slots_a: list[Tensor] = []
        flat_slot_a = torch.zeros(0 if place_a else a_numel, dtype=weights.dtype, device=weights.device)
        self.masters_a, self.masters_b = nn.ParameterList(), nn.ParameterList()
        for place in self._placements:
            slot_a = (
                place_a(place.linear, place.a_shape) if place_a else _view(flat_slot_a, place.a_start, place.a_shape)
            )
            slot_b = _view(self._flat_slot_b, place.b_start, place.b_shape)
            master_a = _view(self._flat_master, place.a_start, place.a_shape)
            master_b = _view(self._flat_master, a_numel + place.b_start, place.b_shape)
            self._slots_a.append(slot_a)
            self.masters_a.append(nn.Parameter(master_a))
            self.masters_b.append(nn.Parameter(master_b))
            place.linear.slot = LoraSlot(
                slot_a, slot_b, self.masters_a[-1], self.masters_b[-1], self.scale, place.parts
            )
        self._initialise(generator)
        self.publish()

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        """PEFT's rules: A uniform in +-1/sqrt(in) (kaiming, a = sqrt 5) or N(0, 1/r), B zero; False: B random too."""
        for master_a, master_b in zip(self.masters_a, self.masters_b, strict=True):
            if self.config.init_lora_weights == "gaussian":
                master_a.normal_(0.0, 1.0 / self.config.r, generator=generator)
                continue
            bound = 1.0 / math.sqrt(master_a.shape[1])
            master_a.uniform_(-bound, bound, generator=generator)
            if self.config.init_lora_weights is False:
                bound = 1.0 / math.sqrt(self.config.r)
                master_b.uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def publish(self) -> None:
        """Cast the masters into the slots, in place; B is multiplied by alpha / r on the way."""
        torch._foreach_copy_(self._slots_a, list(self.masters_a))
        torch.mul(self._flat_master[self._a_numel :], self.scale, out=self._flat_slot_b)

    @torch.no_grad()
    def is_published(self) -> bool:
        """Whether the slots are what the masters give: False where someone else wrote to them, or to the masters."""
        dtype = self._flat_slot_b.dtype
        wrong = [(slot != master.to(dtype)).any() for slot, master in zip(self._slots_a, self.masters_a, strict=True)]
        wrong.append((self._flat_slot_b != (self._flat_master[self._a_numel :] * self.scale).to(dtype)).any())
        return not torch.stack(wrong).any().item()

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots."""
        return self._flat_slot_b.nbytes + sum(slot.nbytes for slot in self._slots_a)

    def named_matrices(self, gradients: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(PEFT's parameter name, view of the fp32 master or of its gradient) for each adapted linear's A and B."""
        for place, master_a, master_b in zip(self._placements, self.masters_a, self.masters_b, strict=True):
            a, b = (master_a.grad, master_b.grad) if gradients else (master_a.detach(), master_b.detach())
            assert a is not None and b is not None, "gradients are asked for before a backward pass"
            for part in place.parts:
                module = PEFT_PREFIX + _module_name(place.linear, part.name, self.decoder)
                yield f"{module}.lora_A.weight", a[part.a]
                yield f"{module}.lora_B.weight", b[part.b]

    def save(self, directory: str | Path, base_model: str | None = None) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` (fp32) as PEFT does."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: master.cpu().contiguous() for name, master in self.named_matrices()},
            directory / ADAPTER_FILE,
            {"format": "pt"},
        )
        settings = self.config.to_dict()
        settings |= {
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "task_type": settings["task_type"] or "CAUSAL_LM",
        }
        if self.decoder != DECODER:  # spell the targets out: PEFT would find linears of the same names elsewhere too
            names = (name.removeprefix(PEFT_PREFIX) for name, _ in self.named_matrices())
            settings["target_modules"] = sorted({name.removesuffix(".weight").rpartition(".")[0] for name in names})
        elif settings["target_modules"] is None:
            settings["target_modules"] = "all-linear"
        settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))

    @torch.no_grad()
    def load(self, directory: str | Path) -> None:
        """Read PEFT's files into the masters and publish them.

        Raises ValueError where a tensor is missing, of another shape, or not part of this adapter.
        """
        path = Path(directory) / ADAPTER_FILE
        if not path.is_file():
            raise ValueError(f"no adapter in {directory}: {ADAPTER_FILE} is missing")
        stored = load_file(path, device="cpu")
        for name, master in self.named_matrices():
            if name not in stored:
                raise ValueError(f"{path}: {name} is missing; the adapter was trained with other target_modules")
            tensor = stored.pop(name)
            if tensor.shape != master.shape:
                raise ValueError(
                    f"{path}: {name} has shape {tuple(tensor.shape)}, this adapter's is {tuple(master.shape)}: "
                    "another rank or base model"
                )
            master.copy_(tensor)
        if stored:
            raise ValueError(
                f"{path}: {len(stored)} tensors belong to no target of this adapter, e.g. {next(iter(stored))}"
            )
        self.publish()


def _view(flat: Tensor, start: int, shape: tuple[int, int]) -> Tensor:
    return flat[start : start + math.prod(shape)].view(shape)


def _place(
    weights: SharedWeights, targets: dict[str, tuple[OutputPart, ...]], rank: int
) -> tuple[list[_Placement], int, int]:
    placements, a_numel, b_numel = [], 0, 0
    for name, parts in targets.items():
        linear = weights.linears[name]
        lora_parts, b_rows = [], 0
        for index, part in enumerate(parts):
            rows = part.stop - part.start
            lora_parts.append(
                LoraPart(
                    part.name,
                    slice(part.start, part.stop),
                    slice(b_rows, b_rows + rows),
                    slice(index * rank, (index + 1) * rank),
                )
            )
            b_rows += rows
        a_shape, b_shape = (len(parts) * rank, linear.weight.in_features), (b_rows, rank)
        placements.append(_Placement(linear, tuple(lora_parts), a_numel, b_numel, a_shape, b_shape))
        a_numel += math.prod(a_shape)
        b_numel += math.prod(b_shape)
    return placements, a_numel, b_numel
