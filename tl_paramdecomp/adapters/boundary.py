"""Where the library meets a model: in one thread at a time, and, when it asks something itself, in evaluation mode.

What is open on a model is kept by the module that holds the weights, so that every host around that module sees it. Contexts
may end in any order; the last one to end leaves the model as the first one found it. A copy that is made meanwhile stands alone
and has nothing of them.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from torch import nn

from tl_paramdecomp.errors import PatchConflictError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False)
class _Open:
    """What is open on one module tree."""

    thread: int | None = None
    holders: int = 0
    asking: int = 0
    training: list[nn.Module] = field(default_factory=list)
    interceptions: list[Any] = field(default_factory=list)


_OPEN: "weakref.WeakKeyDictionary[nn.Module, _Open]" = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def _open(core: nn.Module) -> _Open:
    found = _OPEN.get(core)
    return found if found is not None else _OPEN.setdefault(core, _Open())


def interceptions_of(core: nn.Module) -> list[Any]:
    """Contexts of `intercept` that are open on a module tree, the first opened first."""
    return _open(core).interceptions


# --- one thread, evaluation mode --------------------------------------------------------------------------------------
@contextlib.contextmanager
def one_thread(core: nn.Module) -> Iterator[None]:
    """Hold a model for this thread (else PatchConflictError): what one puts on it, another would run through."""
    me = threading.get_ident()
    with _LOCK:
        state = _open(core)
        if state.holders and state.thread != me:
            raise busy(core)
        state.thread = me
        state.holders += 1
    try:
        yield
    finally:
        with _LOCK:
            state.holders -= 1


def busy(core: nn.Module) -> PatchConflictError:
    """The error of a second thread."""
    return PatchConflictError(
        f"This {type(core).__name__} is patched, trained on or asked something in another thread at present, and would give a "
        "mixture of both. Let one thread at a time use it (a lock around each use), or give every thread a model of its own."
    )


@contextlib.contextmanager
def evaluating(core: nn.Module, *around: nn.Module) -> Iterator[None]:
    """Within this context a model is in evaluation mode and this thread's alone (else PatchConflictError).

    Afterwards every module is in the mode that it was in. `around` takes part in its passes, such as a bridge.
    """
    with one_thread(core):
        state = _open(core)
        if not state.asking:
            trees = (core, *(tree for tree in around if tree is not core))
            state.training = list({m: None for tree in trees for m in tree.modules() if m.training})
            for module in state.training:
                module.training = False
        state.asking += 1
        try:
            yield
        finally:
            state.asking -= 1
            if not state.asking:
                for module in state.training:
                    module.training = True
                state.training = []


# --- contexts ---------------------------------------------------------------------------------------------------------
class _Once(contextlib._GeneratorContextManager):
    """A context that says so when it is entered again."""

    def __enter__(self) -> Any:
        if not hasattr(self, "args"):  # contextlib lets go of them as it enters
            name = getattr(self.gen, "__name__", "it")
            raise PatchConflictError(
                f"This context of {name}(...) was entered before, and is good for one time; call {name}(...) again for another."
            )
        return super().__enter__()


def entered_once(function: Callable[P, Iterator[T]]) -> Callable[P, contextlib.AbstractContextManager[T]]:
    """`contextlib.contextmanager`, for contexts that users hold."""

    @functools.wraps(function)
    def made(*args: Any, **kwargs: Any) -> Any:
        factory: Any = function  # of generators
        return _Once(factory, args, kwargs)

    return made


# --- hooks, and methods of single instances ---------------------------------------------------------------------------
class Hook(functools.partial):
    """A torch hook of an open context. A copy of the module that it is on, or a pickle, has one that does nothing."""

    def __reduce__(self) -> Any:
        return functools.partial, (_do_nothing,)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


Around = Callable[..., Any]  # called as `around(original, *args, **kwargs)` in place of a method


class Shadow:
    """Stands under a method's name on one instance and runs what the open contexts put around that method."""

    def __init__(self, original: Callable[..., Any], own: bool) -> None:
        functools.update_wrapper(self, original)  # hosts inspect the signature
        self.original = original
        self.own = own
        self.arounds: list[Around] = []

    def __reduce__(self) -> Any:
        return Shadow, (self.original, self.own)  # which is bound to the copy of the instance, in a copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.original
        for around in self.arounds:
            call = functools.partial(around, call)
        return call(*args, **kwargs)


@contextlib.contextmanager
def shadowed_method(instance: Any, name: str, around: Around) -> Iterator[None]:
    """Run `around(original, *args, **kwargs)` for calls of one instance's method, by an attribute of the instance."""
    with _LOCK:
        shadow = getattr(instance, name)
        if not isinstance(shadow, Shadow):
            shadow = Shadow(shadow, own=name in getattr(instance, "__dict__", (name,)))
            object.__setattr__(instance, name, shadow)
        shadow.arounds.append(around)
    try:
        yield
    finally:
        with _LOCK:
            shadow.arounds.remove(around)
            still_there = getattr(instance, name) is shadow  # else another library has wrapped it meanwhile
            if not shadow.arounds and still_there and shadow.own:
                object.__setattr__(instance, name, shadow.original)
            elif not shadow.arounds and still_there:
                object.__delattr__(instance, name)
