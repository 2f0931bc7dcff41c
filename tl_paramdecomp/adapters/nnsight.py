"""Adapter for nnsight models: the torch module underneath for running, its envoys for traces.

nnsight runs every module's forward under a controller that serves `.input` and `.output`. A torch hook would act
outside it, behind the trace's back; so a site is intercepted inside, as the body the controller runs. Edits of a trace
to a site's input are then seen, and its `.output` shows the patched value.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from tl_paramdecomp.adapters.boundary import shadowed_method
from tl_paramdecomp.adapters.interception import first_argument, torch_call_hook
from tl_paramdecomp.adapters.torch_module import TorchModuleAdapter
from tl_paramdecomp.errors import UnsupportedModelError

CONTROLLER_STATE = "__nnsight__"


class NNsightAdapter(TorchModuleAdapter):
    """Hooks the torch module that an nnsight model wraps."""

    host = "nnsight"

    def __init__(self, model: Any) -> None:
        kind = type(model).__name__
        if any(base.__name__ in ("VLLM", "DiffusionModel") for base in type(model).__mro__):
            raise UnsupportedModelError(
                f"nnsight's {kind} holds no weights on this side that can be read; wrap the transformers model itself."
            )
        super().__init__(model)

    @property
    def root(self) -> nn.Module:
        return self.model._module

    def call_hook(self, module: nn.Module, fn: Callable[[Any, Any], Any]) -> contextlib.AbstractContextManager[None]:
        state = module.__dict__.get(CONTROLLER_STATE)
        return torch_call_hook(module, fn) if not hasattr(state, "body") else _inside_controller(state, fn)

    def envoy(self, path: str) -> Any:
        """The envoy of the module at a dotted path."""
        envoy = self.model
        for part in path.split(".") if path else ():
            envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
        return envoy


def _inside_controller(state: Any, fn: Callable[[Any, Any], Any]) -> contextlib.AbstractContextManager[None]:
    """Run `fn(x, y)` on one module's call, within nnsight's controller."""
    return shadowed_method(state, "body", functools.partial(_patched_body, fn))


def _patched_body(
    fn: Callable[[Any, Any], Any], body: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    return fn(first_argument(args, kwargs), body(module, *args, **kwargs))
