"""Opening the model that a user named on the command line."""

import contextlib
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.errors import SettingError, UnsupportedModelError
from tl_paramdecomp.pretrained import load_micro_gpt2

Host = Literal["transformers", "transformer_bridge", "hooked_transformer", "nnsight"]
EMBEDDED = "micro-gpt2"


def open_model(name: str, host: str = "transformers", device: str = "cpu", dtype: str | None = None) -> Any:
    """A model by name, with unprocessed weights, and its tokenizer as `model.tokenizer` where it has one; what hosts print
    about it goes to standard error. SettingError where there is no such host or device, else UnsupportedModelError.
    """
    if host not in get_args(Host):
        raise SettingError(f"--host {host!r} is none of {', '.join(get_args(Host))}.")
    check_device(device)
    from transformers.utils import logging

    logging.disable_progress_bar()  # the only bar a user sees is that of the long work
    with contextlib.redirect_stdout(sys.stderr):
        opened = load_micro_gpt2(host) if name == EMBEDDED else _named(name, host)
        opened = opened if device == "cpu" else opened.to(device)
        return opened if dtype is None else opened.to(getattr(torch, dtype))


def open_both(name: str, folder: Path, host: str, device: str, out: Path | None = None) -> tuple[Any, Decomposition]:
    """Model and decomposition; SettingError, before any work is done, where there can be no file at `out`."""
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(f"--out {out} cannot be written: {error}") from error
    check_device(device)
    loaded = Decomposition.load(folder, device)
    return open_model(name, host, device), loaded


def check_device(name: str) -> None:
    """See whether tensors can be put on a device (else SettingError)."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _named(name: str, host: str) -> Any:
    try:
        if host == "hooked_transformer":
            from transformer_lens import HookedTransformer

            return HookedTransformer.from_pretrained_no_processing(name, device="cpu")
        if host == "transformer_bridge":
            from transformer_lens.model_bridge import TransformerBridge

            return TransformerBridge.boot_transformers(name, device="cpu")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(name).eval()
        with contextlib.suppress(OSError, ValueError, KeyError):
            model.tokenizer = AutoTokenizer.from_pretrained(name)
        if host == "transformers":
            return model
        from nnsight import NNsight

        return NNsight(model)
    except (OSError, ValueError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(
            f"{name!r} cannot be opened with {host}: {first} Give {EMBEDDED!r}, a folder that holds a transformers model, "
            "or a name on the hub while online."
        ) from error
