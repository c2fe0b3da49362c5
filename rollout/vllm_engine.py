"""The rollout engine on vLLM, in the trainer's process, over tensors that the trainer reads as well."""

import hashlib
import json
import math
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from ..kernels.decode_attention import buffer_bytes
from ..weightshare.base_format import BaseFormat, base_format
from ..weightshare.bnb_checkpoint import nf4_projections
from ..weightshare.guard import SLOT_A, SLOT_B, check_storage
from ..weightshare.loading import checkpoint_directory, read_config, tensor_names
from ..weightshare.memory import (
    ADAM_STATE_BYTES,
    KVLayout,
    check_kv_cache_bytes,
    free_bytes,
    head_dim,
    kv_cache_bytes,
    nf4_saves,
    reserve_bytes,
)
from ..weightshare.vllm_names import check_installed, check_names, vllm_version
from .admission import check_requests
from .engine import RolloutRequest
from .lifecycle import Lifecycle
from .trajectory import Segment, Trajectory
from .vllm_options import TEMPERATURES, check_engine_kwargs, shared_prompt_shape
from .vllm_process import collector_frozen, interrupts_held, vllm_starting

# vLLM itself is imported where it is started: importing it changes the process, which `vllm_starting` undoes.
if TYPE_CHECKING:
    import vllm
    from vllm.config import VllmConfig
    from vllm.inputs.engine import TokensInput
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

    from ..weightshare.vllm_plugin import SharingSession

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
KV_DTYPES = ("auto", "bfloat16", "float16")
MAX_SEQUENCES = {"cuda": 256, "cpu": 64}
PREFILL_TOKENS = {"cuda": 8192, "cpu": 2048}


_open_engine: "weakref.ref[VLLMEngine] | None" = None


class VLLMEngine(Lifecycle):
    """`RolloutEngine` on vLLM. It loads the checkpoint; the policy is then built on `weights` and `adapter`.

    Args:
        model: a checkpoint's directory or hub id, of safetensors.
        lora: the adapter to train, or None for the bare base.
        dtype: of base, slots and products: float32, bfloat16 or float16.
        max_context: prompt + completion tokens of one sequence.
        device: `cuda` (the first visible GPU) or `cpu`, whichever the installed vLLM was built for.
        seed: of the adapter's initialisation; sampling has a seed a request.
        max_sequences: sequences that run at once; by default 256 on a GPU, 64 on the CPU.
        kv_cache_bytes: size of the KV cache; by default from what is free and what `max_sequences` need.
        fp32_head: logits in fp32 whatever the dtype (kernels.head_logits), for the smallest gap to the trainer.
        base: `nf4`, `fp4`: the projections are quantised to it while they load; `auto`: as the checkpoint has them.
        state_bytes: what the optimizer will keep of each of the adapter's parameters, and the KV cache leaves free.
        prompt_tokens: of a usual prompt, which several requests share: a long one's keys and values are read once for
            all of them.
        engine_kwargs: any other of `vllm.EngineArgs`' options that does not conflict with sharing.

    Attributes:
        weights: vLLM's own tensors, under the policy's names.
        adapter: the adapter whose slots vLLM's layers read, or None.
        config: the checkpoint's transformers config.
        kv_cache_bytes: size of the KV cache.

    Raises:
        ValueError: a checkpoint that is missing, incomplete, multimodal, unknown to vLLM or quantised in a format other
            than NF4; projections that the base cannot hold; a dtype or device that does not fit; options that do not
            exist or conflict; too little memory for one sequence.
        VLLMUnusable: vLLM is not installed, cannot be imported, or lacks names that are used.
        RuntimeError: another engine is open in this process.
    """

    def __init__(
        self,
        model: str | Path,
        lora: LoraConfig | None,
        *,
        dtype: torch.dtype,
        max_context: int,
        device: torch.device | str,
        seed: int = 0,
        max_sequences: int | None = None,
        kv_cache_bytes: int | None = None,
        fp32_head: bool = True,
        base: str = "auto",
        state_bytes: int = ADAM_STATE_BYTES,
        prompt_tokens: int = 0,
        engine_kwargs: Mapping[str, Any] | None = None,
    ):
        self._requests: dict[str, RolloutRequest] = {}
        self.max_context, self._device, self._state_bytes = max_context, torch.device(device), state_bytes
        directory = checkpoint_directory(model)
        config = read_config(directory)  # refuses what is no model, and formats that cannot be read
        stored = nf4_projections(tensor_names(directory), config)
        self._base = base_format(base, stored)
        self.config = AutoConfig.from_pretrained(directory)
        _check_arguments(self.config, dtype, max_context, self._device)
        given = dict(engine_kwargs or {})
        given |= {"max_num_seqs": max_sequences} if max_sequences is not None else {}
        given |= {"kv_cache_memory_bytes": kv_cache_bytes} if kv_cache_bytes is not None else {}
        with vllm_starting(self._device):
            given = _usable(self._device, given)
            from ..weightshare.vllm_plugin import SharingSession, sharing

            _check_architecture(self.config)
            if self._device.type == "cpu":
                _check_head_dim(self.config)
            on_gpu = self._device.type == "cuda"
            capability = torch.cuda.get_device_capability(self._device) if on_gpu else None
            self._shared_prompts = shared_prompt_shape(self.config, dtype, capability, prompt_tokens, given)
            options = self._options(directory, lora, dtype, seed, given)
            if fp32_head:
                options["hf_overrides"] = {"head_dtype": "float32"}
            tied = self.config.tie_word_embeddings
            session = SharingSession(
                lora, seed, tied, self._base, stored, lambda *loaded: self._size_kv_cache(options, *loaded)
            )
            _require_first()
            with sharing(session):
                self._engine = _start(options)
        _remember(self)
        self.weights, self.adapter, self._model = session.weights, session.adapter, session.model
        check_storage(self.weights, self.named_tensors())
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what profiling and capturing left behind

    def _options(
        self, directory: Path, lora: LoraConfig | None, dtype: torch.dtype, seed: int, given: dict[str, Any]
    ) -> dict[str, Any]:
        """vLLM's arguments: defaults, then the user's, then what sharing needs."""
        kind = self._device.type
        options: dict[str, Any] = {
            "max_num_seqs": MAX_SEQUENCES[kind],
            "enable_prefix_caching": True,  # a group's samples share their prompt
            "async_scheduling": kind == "cuda",  # the next step is prepared while the card computes this one
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if kind == "cpu":
            options |= {"enforce_eager": True, "enable_chunked_prefill": False}  # see vllm_options
        elif "enforce_eager" not in given:
            options["compilation_config"] = {"cudagraph_mode": "FULL_DECODE_ONLY"}
        if self._shared_prompts is not None:
            options["attention_config"] = _read_shared_prompts_once()
        options |= given
        whole = 0 if options.get("enable_chunked_prefill", True) else self.max_context
        options.setdefault("max_num_batched_tokens", max(PREFILL_TOKENS[kind], options["max_num_seqs"], whole))
        options |= {
            "model": str(directory),
            "quantization": "colora",
            "load_format": "colora",
            "config_format": "hf",
            "model_impl": "vllm",
            "dtype": DTYPES[dtype],
            "seed": seed % 2**32,
            "max_model_len": self.max_context,
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # the trainer's stop tokens and sampling, not the checkpoint's
            "distributed_executor_backend": "uni",
            "gpu_memory_utilization": 0.01,  # only checked against what is free: the KV cache's size is given
            # vLLM keeps compiled graphs on disk and the adapter's shape is not among what it looks them up by.
            "additional_config": dict(given.get("additional_config") or {})
            | {"colora": _fingerprint(lora, self._base)},
        }
        if kind == "cuda":
            options |= {"enable_sleep_mode": True, "worker_cls": f"{__package__}.vllm_worker.KVPoolWorker"}
        return options

    def _size_kv_cache(self, options: dict[str, Any], session: "SharingSession", vllm_config: "VllmConfig") -> None:
        """Set the KV cache's size in vLLM's configuration: the weights are loaded, so what is free is known."""
        cache = vllm_config.cache_config
        prefill, sequences = options["max_num_batched_tokens"], options["max_num_seqs"]
        kv_dtype = str(options.get("kv_cache_dtype", "auto"))
        eight_bits = kv_dtype.startswith(("fp8", "int8"))
        dtype = session.weights.dtype
        layout = KVLayout.of(self.config, 1 if eight_bits else dtype.itemsize, cache.block_size or 16)
        if cache.kv_cache_memory_bytes is not None:
            self.kv_cache_bytes = cache.kv_cache_memory_bytes
            if eight_bits or kv_dtype in KV_DTYPES:  # what others take, vLLM knows
                check_kv_cache_bytes(layout, self.kv_cache_bytes, self.max_context, prefill)
            return
        masters = sum(parameter.numel() for parameter in session.adapter.parameters()) if session.adapter else 0
        later = (self.config, dtype, prefill, sequences, masters, self._state_bytes, self._attention_bytes(sequences))
        reserve = reserve_bytes(*later) if self._device.type == "cuda" else 0
        self.kv_cache_bytes = kv_cache_bytes(
            layout,
            free=free_bytes(self._device),
            reserve=reserve,
            max_sequences=sequences,
            max_context=self.max_context,
            prefill_tokens=prefill,
            saved_by_nf4=nf4_saves(session.weights.layout, dtype, self._base),
        )
        cache.kv_cache_memory_bytes = self.kv_cache_bytes

    def _attention_bytes(self, max_sequences: int) -> int:
        """Buffers of `vllm_attention`, which vLLM does not know of."""
        if self._shared_prompts is None:
            return 0
        return buffer_bytes(self._shared_prompts, max_sequences, self._device)

    def named_tensors(self) -> dict[str, Tensor]:
        """Every parameter of vLLM's model and every slot, by module name: what `guard.check_storage` compares."""
        slots = {name: buffer for name, buffer in self._model.named_buffers() if name.endswith((SLOT_A, SLOT_B))}
        return dict(self._model.named_parameters(remove_duplicate=False)) | slots

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Queue requests, all of them or, where one is refused, none.

        Raises:
            ValueError: see `admission.check_requests`; or a temperature that vLLM does not sample at.
            RuntimeError: asleep or closed.
        """
        self._require_awake("submit")
        check_requests(requests, self._requests.keys(), self.max_context, self.config.vocab_size)
        prepared = [(request, *_vllm_request(request)) for request in requests]
        with interrupts_held():
            for request, prompt, params in prepared:
                self._engine.add_request(request.request_id, prompt, params)
                self._requests[request.request_id] = request

    def step(self) -> list[Trajectory]:
        """Advance every running sequence and return what has finished.

        An interrupt (Ctrl-C) is raised when vLLM has made the step.

        Raises:
            FloatingPointError: log-probs that are not finite.
            RuntimeError: asleep or closed.
            Exception: whatever vLLM raises; the engine is closed then.
        """
        self._require_awake("step")
        with interrupts_held():
            try:
                outputs = self._engine.step()
            except Exception:
                self.close()  # nobody knows what of the step it has done
                raise
        return [self._trajectory(output) for output in outputs if output.finished]

    def _trajectory(self, output: "RequestOutput") -> Trajectory:
        request, completion = self._requests.pop(output.request_id), output.outputs[0]
        logprobs = completion.logprobs.logprobs
        if not all(map(math.isfinite, logprobs)):
            raise FloatingPointError(
                f"request {request.request_id!r}: the model's log-probs are not finite; use bfloat16 where float16 "
                "overflows, check the checkpoint, or resume from the last one before the adapter diverged"
            )
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"request {request.request_id!r}: vLLM ended it with {completion.finish_reason!r}")
        return Trajectory(
            request_id=request.request_id,
            prompt_ids=list(request.prompt_ids),
            segments=[Segment(list(completion.token_ids), "model", logprobs)],
            finish_reason=completion.finish_reason,
            seed=request.seed,
            cached_tokens=output.num_cached_tokens or 0,
        )

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._state == "closed"

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        return len(self._requests)

    def abort(self) -> None:
        """Drop every unfinished request."""
        if self._state != "closed" and self._requests:
            self._engine.abort_request(list(self._requests))
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a step may be under way still, in memory that sleep takes away
        self._requests.clear()

    def adapter_changed(self) -> None:
        """The slots were written: forget the keys and values that were computed with the old ones. Also while asleep.

        Raises RuntimeError while requests are unfinished, or where vLLM does not drop its prefix cache.
        """
        self._require_idle("adapter_changed")
        if not self._engine.reset_prefix_cache():
            raise RuntimeError(
                "adapter_changed: vLLM did not reset its prefix cache; completions would come from the old adapter"
            )

    def sleep(self) -> None:
        """Give the KV cache's memory back; weights, slots and captured graphs stay. Nothing to give back on the CPU.

        Raises RuntimeError while requests are unfinished.
        """
        self._require_idle("sleep")
        if self._state == "awake" and self._device.type == "cuda":
            with collector_frozen():
                self._engine.sleep(level=1)
        self._state = "asleep"

    def wake(self) -> None:
        """Take the memory back. Raises RuntimeError where closed."""
        if self._state == "closed":
            raise RuntimeError("wake: the engine is closed; make a new one")
        if self._state == "asleep" and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()  # the KV cache cannot be put where PyTorch keeps what training has freed
            self._engine.wake_up()
        self._state = "awake"

    def close(self) -> None:
        """Shut vLLM down; the shared weights live on."""
        if self._state == "closed":
            return
        self._state = "closed"
        self._requests.clear()
        self._engine.engine_core.shutdown()
        del self._engine, self._model


def _require_first() -> None:
    """vLLM keeps its state in globals, which the end of one engine clears for all."""
    other = _open_engine() if _open_engine is not None else None
    if other is not None and not other.closed:
        raise RuntimeError(
            "another vLLM engine is open in this process; close it first, that of a trainer with trainer.engine.close()"
        )


def _remember(engine: VLLMEngine) -> None:
    global _open_engine
    _open_engine = weakref.ref(engine)


def _check_arguments(config: PreTrainedConfig, dtype: torch.dtype, max_context: int, device: torch.device) -> None:
    """What can be refused before vLLM is imported."""
    check_installed()
    if config.get_text_config() is not config:
        raise ValueError(
            f"{config.model_type} is multimodal: its decoder cannot be shared with vLLM; set engine='transformers', or "
            "save the text model alone"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one that vLLM can share; use {', '.join(DTYPES.values())}")
    if max_context < 1:
        raise ValueError(f"VLLMEngine: max_context must be at least 1, got {max_context}")
    if device.index not in (None, 0):
        raise ValueError(f"vLLM runs on the first visible GPU, not on {device}; set CUDA_VISIBLE_DEVICES to choose it")


def _check_platform(device: torch.device) -> None:
    from vllm.platforms import current_platform

    if current_platform.device_type != device.type:
        raise ValueError(
            f"the installed vLLM {vllm_version()} is built for {current_platform.device_type}, and the run is on "
            f"{device.type}; install the other build, or set engine='transformers'"
        )


def _check_architecture(config: PreTrainedConfig) -> None:
    from vllm.model_executor.models import ModelRegistry

    known, named = ModelRegistry.get_supported_archs(), config.architectures or []
    if not any(name in known for name in named):
        raise ValueError(
            f"vLLM {vllm_version()} does not know the architecture {', '.join(named) or '(none in config.json)'}; "
            "use a newer vLLM, or set engine='transformers'"
        )


def _check_head_dim(config: PreTrainedConfig) -> None:
    """vLLM's CPU build notices at the first forward only."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim(config) not in known:
        raise ValueError(
            f"vLLM's CPU build supports attention heads of {', '.join(map(str, known))}, and the model's "
            f"have {head_dim(config)}: set engine='transformers'"
        )


def check_vllm(device: torch.device, engine_kwargs: Mapping[str, Any]) -> None:
    """Raise, as VLLMEngine does, where vLLM cannot be used on this kind of device, or for engine_kwargs by their names.

    Raises:
        ValueError: the options; a vLLM that is built for another kind of device.
        VLLMUnusable: vLLM is not installed, cannot be imported, or lacks names that are used.
    """
    check_installed()
    with vllm_starting(device):
        _usable(device, engine_kwargs)


def _usable(device: torch.device, engine_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`engine_kwargs` in vLLM's names, with a vLLM that can be used on this kind of device; raises as `check_vllm`."""
    check_names(device.type)
    import vllm

    _check_platform(device)
    return check_engine_kwargs(engine_kwargs, vllm.EngineArgs, device.type)


def _read_shared_prompts_once() -> dict[str, Any]:
    """vLLM's option for the attention of `vllm_attention`, in the layers that attend to everything."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, f"{__package__}.vllm_attention.SharedPromptBackend")
    return {"backend_per_kind": {"full_attention": "CUSTOM"}}


def _start(options: dict[str, Any]) -> "LLMEngine":
    import vllm
    from pydantic import ValidationError
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        return LLMEngine.from_engine_args(vllm.EngineArgs(**options))
    except ValidationError as error:  # a ValueError of many lines, with all of vLLM's configuration in it
        problems = (": ".join([*map(str, entry["loc"]), entry["msg"]]) for entry in error.errors())
        raise ValueError(
            f"engine_kwargs: vLLM {vllm_version()} refuses its options: {'; '.join(problems)} (max_model_len is "
            "max_context here)"
        ) from error
    except (AssertionError, NotImplementedError) as error:  # how vLLM refuses many a combination
        raise ValueError(
            f"vLLM {vllm_version()} does not serve this model with these options: {error or type(error).__name__}; "
            "change engine_kwargs, or set engine='transformers'"
        ) from error


def _vllm_request(request: RolloutRequest) -> tuple["TokensInput", "vllm.SamplingParams"]:
    import vllm
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    low, high = TEMPERATURES
    if sampling.temperature and not low <= sampling.temperature <= high:
        raise ValueError(
            f"request {request.request_id!r}: vLLM samples at temperature 0 and from {low} to {high}, not at "
            f"{sampling.temperature}"
        )
    return tokens_input(list(request.prompt_ids)), vllm.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        seed=request.seed,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # what ends a completion is the trainer's to say
        logprobs=0,  # of the sampled token
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _fingerprint(lora: LoraConfig | None, base: BaseFormat) -> str:
    """Tells adapters of different shapes, and bases of different formats, apart."""
    settings: dict[str, Any] = {"base": [base.name, sorted(base.only or ())]}
    if lora is not None:
        settings |= {"r": lora.r, "targets": lora.target_modules, "excluded": lora.exclude_modules}
    text = json.dumps(settings, default=sorted, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
