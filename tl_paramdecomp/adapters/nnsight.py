"""Adapter for nnsight models: the torch module underneath for running, its envoys for traces.

nnsight runs every module's forward under a controller that serves `.input` and `.output`. A torch hook would act
outside it, behind the trace's back; so a site is intercepted inside, as the body the controller runs. Edits of a trace
to a site's input are then seen, and its `.output` shows the patched value.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

from torch import nn

from tl_paramdecomp.adapters.boundary import shadowed_method
from tl_paramdecomp.adapters.interception import torch_call_hook
from tl_paramdecomp.adapters.passes import first_argument
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
        if not hasattr(state, "body"):
            return torch_call_hook(module, fn)

        def patched(body: Callable, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return fn(first_argument(args, kwargs), body(module, *args, **kwargs))

        return shadowed_method(state, "body", patched)

    def envoy(self, path: str) -> Any:
        """The envoy of the module at a dotted path."""
        envoy = self.model
        for part in path.split(".") if path else ():
            envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
        return envoy

    def standing(self) -> "Standing":
        """Where the running body of a trace stands among the model's passes; UnsupportedModelError where none is running."""
        mediator = running_body()
        if mediator is None:
            raise UnsupportedModelError("Nothing is traced here; call this in model.trace(...), or use patched(...).")
        entered, left = (mediator.occurrence(f"{self.model.path}.{end}") for end in ("input", "output"))
        call = _call_of(self.root) if entered > left else None
        if mediator.iteration is None:  # amid a step that `tracer.iter` has come to, or between two
            return Standing(entered - 1 if call else entered, call, mediator)
        return Standing(mediator.iteration, call if mediator.iteration == entered - 1 else None, mediator)


class Standing(NamedTuple):
    """Where the body of a trace stands among the forward passes of its model."""

    step: int  # passes before the one that the body is about: what `tracer.iter[...]` has come to
    call: tuple[tuple, dict] | None
    """What the model was called with, where that pass is under way; None where it is yet to begin, or is over."""
    mediator: Any  # nnsight's record of the body

    def is_past(self, location: str) -> bool:
        """Whether the pass has gone by a place, such as the `.input` of an envoy's path."""
        if self.call is None and self.mediator.iteration is None:
            return False  # the pass is yet to begin, or is one of a part of the model alone
        return self.mediator.occurrence(location) > self.step


def running_body() -> Any:
    """nnsight's record of the running body of a trace, which is a greenlet; None where there is none."""
    from greenlet import getcurrent

    found = getattr(getcurrent(), "mediator", None)
    return None if found is None else found()


def _call_of(root: nn.Module) -> tuple[tuple, dict] | None:
    """Arguments of the call of a module that waits for the running body, or None; nnsight serves a call's input only once."""
    from nnsight.intervention.source import Controller

    calls = (frame.f_locals for frame in _waiting_frames() if frame.f_code is Controller.__call__.__code__)
    return next(((call["args"], call["kwargs"]) for call in calls if call.get("module") is root), None)


def generate_call(root: nn.Module) -> tuple[tuple, dict] | None:
    """What transformers' `generate`, whose decoding loop waits for the running body, was called with; None outside of one."""
    calls = (frame.f_locals for frame in _waiting_frames() if frame.f_code.co_name == "generate")
    found = next((call for call in calls if call.get("self") is root and "kwargs" in call), None)
    if found is None:
        return None
    return () if found.get("inputs") is None else (found["inputs"],), found["kwargs"]


def _waiting_frames() -> Iterator[FrameType]:
    """Frames of the model's side of a trace, innermost first."""
    from greenlet import getcurrent

    model_side = getcurrent().parent
    while model_side is not None:
        frame = model_side.gr_frame
        while frame is not None:
            yield frame
            frame = frame.f_back
        model_side = model_side.parent
