"""Opening the model that a user named on the command line."""

import contextlib
import sys
from typing import Any, Literal, get_args

import torch

from tl_paramdecomp.errors import SettingError, UnsupportedModelError
from tl_paramdecomp.pretrained import load_micro_gpt2

Host = Literal["transformers", "transformer_bridge", "hooked_transformer", "nnsight"]
EMBEDDED = "micro-gpt2"


def open_model(name: str, host: str = "transformers", device: str = "cpu", dtype: str | None = None) -> Any:
    """A model by name, with unprocessed weights, and its tokenizer as `model.tokenizer` where it has one; what hosts print
    about it goes to standard error.

    Args:
        name: `micro-gpt2`, a local folder, or a name on the Hugging Face hub.
        host: Which library opens it.
        device: Where it goes.
        dtype: Number type that it is brought to, such as float32; None: as it comes.

    Raises:
        SettingError: No such host, or no such device here.
        UnsupportedModelError: The model cannot be opened.
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


def check_device(name: str) -> None:
    """See whether tensors can be put on a device.

    Raises:
        SettingError: They cannot.
    """
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
