"""Opening the model that a user named on the command line."""

from typing import Any, Literal, get_args

from tl_paramdecomp.errors import SettingError, UnsupportedModelError
from tl_paramdecomp.pretrained import load_micro_gpt2, micro_gpt2_tokenizer

Host = Literal["transformers", "transformer_bridge", "hooked_transformer", "nnsight"]
EMBEDDED = "micro-gpt2"


def open_model(name: str, host: str = "transformers") -> Any:
    """A model by name, with unprocessed weights.

    Args:
        name: `micro-gpt2`, a local folder, or a name on the Hugging Face hub.
        host: Which library opens it.

    Raises:
        SettingError: No such host.
        UnsupportedModelError: The model cannot be opened.
    """
    if host not in get_args(Host):
        raise SettingError(f"--host {host!r} is none of {', '.join(get_args(Host))}.")
    _quiet()
    if name == EMBEDDED:
        return load_micro_gpt2(host)
    try:
        return _open(name, host)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(
            f"{name!r} cannot be opened with {host}: {first} Give {EMBEDDED!r}, a folder that holds a transformers model, "
            "or a name on the hub while online."
        ) from error


def tokenizer_of(name: str, model: Any) -> Any:
    """The model's tokenizer; None where it has none."""
    held = getattr(model, "tokenizer", None)
    if held is not None:
        return held
    if name == EMBEDDED:
        return micro_gpt2_tokenizer()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None


def _open(name: str, host: str) -> Any:
    if host == "hooked_transformer":
        from transformer_lens import HookedTransformer

        return HookedTransformer.from_pretrained_no_processing(name, device="cpu")
    if host == "transformer_bridge":
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(name, device="cpu")
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(name).eval()
    if host == "transformers":
        return hf
    from nnsight import NNsight

    return NNsight(hf)


def _quiet() -> None:
    """No bars for the loading of small files: the only bar a user sees is that of the long work."""
    from transformers.utils import logging

    logging.disable_progress_bar()
