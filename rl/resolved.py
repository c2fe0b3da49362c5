"""The configuration of a run with every default filled in, as a YAML that gives the same run again."""

from dataclasses import fields
from typing import Any

import yaml

from .config import GRPOConfig
from .option_rules import remarks
from .options import HONOURED, INERT, REFUSED
from .run_config import RunConfig, run_fields

_SECRET = ("hub_token",)


def resolved_yaml(run: RunConfig, config: GRPOConfig) -> str:
    """What was chosen first, then what its algorithm set, what is left at its default, and as comments what follows."""
    values = config.to_dict()
    defaults = GRPOConfig(output_dir=config.output_dir).to_dict()
    names = [entry.name for entry in fields(GRPOConfig) if entry.name in HONOURED or entry.name not in INERT | REFUSED]
    names = [name for name in names if name not in _SECRET and name != "output_dir"]
    chosen: dict[str, Any] = {entry.name: getattr(run, entry.name) for entry in run_fields()}
    chosen = {name: value for name, value in chosen.items() if value not in (None, {})}
    chosen["output_dir"] = config.output_dir
    preset = {name: values[name] for name in names if name in (config.preset or {}) and name != "algorithm"}
    if preset:
        preset["preset"] = values["preset"]
    names = [name for name in names if name not in preset]
    chosen |= {name: values[name] for name in names if values[name] != defaults[name]}
    left = {name: values[name] for name in names if values[name] == defaults[name]}
    by_preset = f"# set by algorithm {config.algorithm}\n{_dump(preset)}\n" if preset else ""
    return (
        f"# chosen\n{_dump(chosen)}\n{by_preset}# at their defaults\n{_dump(left)}\n"
        f"# a generation: {config.prompts_per_generation} prompts x {config.num_generations} completions = "
        f"{config.completions_per_generation} completions\n"
        f"# an optimizer step: {config.completions_per_step} completions; {config.updates_per_generation} for each "
        "generation\n"
        f"# device: {config.device}\n" + "".join(f"# note: {remark}\n" for remark in remarks(config))
    )


def _dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
