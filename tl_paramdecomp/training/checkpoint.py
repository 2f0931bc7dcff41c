"""Checkpoints: everything a run needs to go on bit for bit, as safetensors and JSON, written whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_paramdecomp.adapters.fingerprint import differs
from tl_paramdecomp.components.files import read_tensors, write_tensors, write_text
from tl_paramdecomp.errors import DecompositionFileError, TargetMismatchError

FOLDER, STATE = "checkpoint", "run.json"
OPTIMISER, MEMORY = "optimiser.safetensors", "memory.safetensors"


def save_checkpoint(
    run_dir: Path,
    step: int,
    decomposition: Any,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    memory: Mapping[str, Tensor],
    settings: dict[str, Any],
) -> Path:
    """Write the state after `step` steps; the checkpoint before stays until this one is complete."""
    scratch, final, old = (run_dir / name for name in (f".{FOLDER}-new", FOLDER, f".{FOLDER}-old"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    decomposition.save(scratch / "decomposition")
    state = optimiser.state_dict()["state"]
    tensors = {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}
    tensors["rng.masks"] = generator.get_state()
    tensors["rng.torch"] = torch.get_rng_state()
    write_tensors(scratch / OPTIMISER, tensors)
    write_tensors(scratch / MEMORY, memory)
    write_text(scratch / STATE, json.dumps({"step": step, "settings": settings}, indent=1))
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(scratch, final)
    shutil.rmtree(old, ignore_errors=True)
    return final


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """Step and settings of a run's checkpoint; None where there is none.

    Raises:
        DecompositionFileError: It is there and cannot be read.
    """
    old = run_dir / f".{FOLDER}-old"
    if old.exists() and not (run_dir / FOLDER).exists():
        os.rename(old, run_dir / FOLDER)  # the run ended between the two renames of a save
    path = run_dir / FOLDER / STATE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DecompositionFileError(
            f"{path} cannot be read ({error}); delete {run_dir / FOLDER} to begin anew."
        ) from error


def restore(
    run_dir: Path, decomposition: Any, optimiser: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Tensor]:
    """Put a checkpoint's state into a freshly made decomposition, optimiser and generator; returns the method's memory.

    Raises:
        DecompositionFileError: The checkpoint does not fit them.
        TargetMismatchError: It is of a model with other weights.
    """
    saved = type(decomposition).load(run_dir / FOLDER / "decomposition")
    for name, known in saved.fingerprints.items():
        found = decomposition.fingerprints.get(name)
        difference = None if found is None else differs(known, found)
        if difference:
            raise TargetMismatchError(
                f"The checkpoint in {run_dir / FOLDER} is of a model with other weights ({name}: {difference}); choose another "
                "run_dir, or pass resume=False to begin anew there."
            )
    tensors = read_tensors(run_dir / FOLDER / OPTIMISER)
    try:
        decomposition.load_state_dict(saved.state_dict())
        generator.set_state(tensors.pop("rng.masks"))
        torch.set_rng_state(tensors.pop("rng.torch"))
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    except (KeyError, ValueError, RuntimeError) as error:
        raise DecompositionFileError(
            f"The checkpoint in {run_dir / FOLDER} does not fit this run ({error}); delete it to begin anew."
        ) from error
    return read_tensors(run_dir / FOLDER / MEMORY, next(decomposition.parameters()).device)
