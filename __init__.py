"""GRPO of language models on one GPU, where rollouts and training share one copy of the weights and of the adapter."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .rl.config import GRPOConfig
    from .rl.policy import load
    from .rl.trainer import GRPOTrainer

__version__ = "0.1.0"
__all__ = ["GRPOConfig", "GRPOTrainer", "__version__", "load"]

# Where PEFT imports bitsandbytes on a CPU, it warns that a product of its own is missing, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_LAZY = {"GRPOConfig": ".rl.config", "GRPOTrainer": ".rl.trainer", "load": ".rl.policy"}


def __getattr__(name: str) -> Any:
    """Import the public names when they are used, so that `import colora` does not import torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'colora' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
