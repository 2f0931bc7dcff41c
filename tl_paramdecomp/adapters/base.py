"""What every host adapter offers: what its model holds, and ways to run it with functions at its weight sites."""

import contextlib
import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tl_paramdecomp.adapters import attention, shortcuts
from tl_paramdecomp.adapters.boundary import evaluating, interceptions_of, one_thread
from tl_paramdecomp.adapters.identity import behind, composed
from tl_paramdecomp.adapters.interception import Interception, OnError, torch_call_hook
from tl_paramdecomp.adapters.limits import Limits, PaddingTrials, starts_later
from tl_paramdecomp.adapters.norms import NormWiring
from tl_paramdecomp.adapters.probe import probe
from tl_paramdecomp.adapters.shared_parameters import repeated, with_ties
from tl_paramdecomp.adapters.weights import ModelWeights
from tl_paramdecomp.adapters.wiring import Wiring, find_module, structure
from tl_paramdecomp.errors import UnsupportedModelError, UnsupportedSiteError
from tl_paramdecomp.sites import SiteCall, SiteFn

Rows = Shaped[Tensor, "batch ..."]  # token rows [batch, pos], or a toy model's inputs
RowMask = Int[Tensor, "batch pos"] | None  # 1 where a position counts
Output = Float[Tensor, "batch ..."]


class Captured(NamedTuple):
    """One clean forward pass."""

    output: Float[Tensor, "batch ..."]
    """Logits; where the pass ended before the unembedding, the vectors [batch, pos, d_model] that reached it."""
    inputs: dict[str, Tensor]  # x of each captured site: [batch, pos, d_in], or indices [batch, pos] for an embedding
    blocks: tuple[Any, ...] = ()  # what each of the adapter's `blocks` returned, where that was asked for

    @property
    def logits(self) -> Float[Tensor, "batch ..."]:
        """The pass's output, where it ran to the logits."""
        return self.output


class ModelAdapter(ModelWeights, ABC):
    """Reads and runs one host model. It knows hosts; it knows no components.

    A subclass finds its host's sites in its `__init__` (`add` for each, `settle` at the end) and says how the host runs
    (`run`, `watch`).
    """

    host: ClassVar[str]  # the host's name in messages and saved files

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._seen_rows: tuple[weakref.ref[Tensor], int | None] | None = None
        self._padding = PaddingTrials()
        self.context_length: int | None = None
        """Positions of the longest row that the model can read; None where nothing in it ends there."""
        self.reads_tokens = True
        """Whether the model is a language model, whose rows are token ids, whatever it makes of them."""
        self.gives_logits = True
        """Whether outputs are logits over a vocabulary, or a plain module's, which are taken for what their user does."""

    @property
    def interceptions(self) -> list[Interception]:
        """Contexts of `intercept` that are open on this model, on any host."""
        return interceptions_of(self.core)

    @property
    def device(self) -> torch.device:
        """Device of the model's first parameter."""
        return next(self.root.parameters()).device

    @property
    def processing(self) -> str | None:
        """What the host did to the weights after loading, such as folding LayerNorm; None when they are as trained."""
        return None

    def signature(self) -> Hashable:
        """What the wiring depends on; an adapter made of another is made anew."""
        return structure(self.root), self.flags(), tuple(shortcuts.logit_settings(self.root))

    def flags(self) -> tuple[Hashable, ...]:
        """Settings of the host that change the wiring."""
        return ()

    # --- making one -------------------------------------------------------------------------------------------------
    def refuse_repeated(self) -> None:
        """Refuse sites whose module stands in several blocks."""
        self.refuse(repeated(self.root, self.wirings, self.block_modules()))

    def settle(self, known: bool) -> None:
        """Try the sites out unless tests hold such wirings exact, and note ties; UnsupportedModelError where none is left."""
        if not known:
            self.wirings, reasons = probe(self)
            self.refused |= reasons
        self.wirings = with_ties(self.root, self.wirings)
        if not self.wirings:
            refusals = "; ".join(f"{name}: {reason}" for name, reason in list(self.refused.items())[:3])
            raise UnsupportedModelError(
                f"{type(self.root).__name__} holds no linear map or embedding table that can be read exactly "
                f"(nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d). {refusals}"
            )

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of the table in which token ids are looked up; None where there is none, or several could be theirs."""
        tables = [wiring.site.d_in for wiring in self.wirings.values() if wiring.site.kind == "embedding"]
        return tables[0] if len(tables) == 1 else None

    # --- running ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def run(self, tokens: Rows, attention_mask: RowMask = None) -> Output:
        """Logits of token rows, in the mode that the model is in."""

    @abstractmethod
    def watch(self, stack: contextlib.ExitStack, interception: Interception) -> None:
        """Tell an interception of each pass as it begins and ends, and of decoding loops, until the stack is left."""

    def call_hook(self, module: nn.Module, fn: Callable[[Any, Any], Any]) -> contextlib.AbstractContextManager[None]:
        """Within this context `fn(x, y)` of one module's own call is its result."""
        return torch_call_hook(module, fn)

    @contextlib.contextmanager
    def intercept(self, fns: Mapping[str, SiteFn], on_error: OnError | None = None) -> Iterator[None]:
        """Within this context every forward pass of the host runs with these functions at its sites.

        A norm's function is given the normalised rows that its gain multiplies. `on_error` is told what goes wrong at a site,
        which then leaves its output; None: it is raised. PatchConflictError where another thread uses the model; a forward
        pass that does not reach a site ends in SiteNotFiredError.
        """
        wirings: Mapping[str, Wiring | NormWiring] = self.wirings
        if any(behind(name) not in wirings for name in fns):
            wirings = {**wirings, **self.norms.wirings}
        interception = Interception(self.root, wirings, composed(fns, self.weight), on_error)
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_thread(self.core))
            opened = self.interceptions
            opened.append(interception)
            stack.callback(lambda: opened.__setitem__(slice(None), [i for i in opened if i is not interception]))
            interception.install(stack, self.call_hook)
            self.watch(stack, interception)
            yield

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within this context the functions of every open `intercept` leave the model alone."""
        before = [(interception, interception.idle) for interception in self.interceptions]
        try:
            for interception, _ in before:
                interception.idle = True
            yield
        finally:
            for interception, idle in before:
                interception.idle = idle

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the model is in evaluation mode, and this thread's alone (else PatchConflictError)."""
        return evaluating(self.core, self.root)

    def forward(self, tokens: Rows, attention_mask: RowMask = None) -> Output:
        """Logits of token rows, the way the host computes them in evaluation mode.

        Every pass that the library makes of its own accord is made here. The mode that the user's modules are in is put back.
        DataError where the model cannot read these tokens, UnsupportedModelError where it reads rows padded on the left
        otherwise than alone, PatchConflictError where another thread uses it.
        """
        self.check_readable(tokens, attention_mask)
        with self.evaluating():
            return self.run(tokens, attention_mask)

    def check_readable(self, tokens: Rows, attention_mask: RowMask = None) -> None:
        """Refuse rows that the model cannot read, as `forward`; rows that were seen last are not looked at again.

        What this tries out it cannot try out amid a pass that is cut short: such passes ask first.
        """
        seen, now = self._seen_rows, None if tokens.is_inference() else tokens._version
        if seen is None or now is None or seen[0]() is not tokens or seen[1] != now:
            Limits.of(self).refuse(tokens, "The batch", attention_mask)
            self._seen_rows = (weakref.ref(tokens), now)
        if attention_mask is not None and self.reads_tokens and starts_later(attention_mask):
            with self.evaluating():
                self._padding.check(self, attention_mask)

    def capture(
        self,
        tokens: Rows,
        names: Collection[str],
        attention_mask: RowMask = None,
        keep_blocks: bool = False,
        to_hidden: bool = False,
        until: int | None = None,
    ) -> Captured:
        """Output and site inputs of the model as it stands; UnsupportedSiteError where a site is called more than once.

        With `keep_blocks` also what each of `blocks` returned, for `resumed`. `to_hidden` ends the pass as `hidden` does,
        `until` a block as `stream_before` does, whose result is the output then.
        """
        inputs: dict[str, Tensor] = {}

        def keep(name: str, call: SiteCall) -> Tensor:
            if name in inputs:
                raise UnsupportedSiteError(
                    f"{name} is called more than once in a forward pass, so that it has no single input to capture."
                )
            inputs[name] = call.x.expand(len(tokens), *call.x.shape[1:]) if call.x.shape[0] == 1 else call.x
            return call.y

        run = self.hidden if to_hidden else self.forward
        if until is not None:
            run = functools.partial(self.stream_before, until)
        self.check_readable(tokens, attention_mask)
        fns = {name: functools.partial(keep, name) for name in names}
        with self.intercept(fns), shortcuts.kept_outputs(self.blocks if keep_blocks else ()) as blocks:
            output = run(tokens, attention_mask)
        return Captured(output, inputs, tuple(blocks))

    # --- shorter passes ---------------------------------------------------------------------------------------------
    def block_modules(self) -> Sequence[nn.Module]:
        """The host's residual blocks in the order of a forward pass; empty where it is not known to have any."""
        return ()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Residual blocks at which a pass may begin, tried out when first asked for; empty where that is not the same model."""
        return self.block_modules() if self._skips_blocks else ()

    @functools.cached_property
    def _skips_blocks(self) -> bool:
        modules = self.block_modules()
        return len(modules) > 1 and shortcuts.find_blocks_to_skip(self, modules)

    def block_of(self, name: str) -> int | None:
        """Index in `blocks` of the block that holds a site; None for embeddings, the unembedding and plain modules."""
        return self._blocks_of_sites.get(behind(name)) if self.blocks else None

    def first_block(self, names: Iterable[str]) -> int:
        """The block at which passes may begin that change these sites alone; 0 where they must begin at the beginning."""
        blocks = self.blocks
        if not blocks:
            return 0
        after = [len(blocks) if behind(name) == shortcuts.UNEMBEDDING else self.block_of(name) or 0 for name in names]
        return min(after, default=0)

    def block_after(self, names: Iterable[str]) -> int | None:
        """The block before which passes may end that need these sites alone; None where they must go on to the end."""
        blocks = [self.block_of(name) for name in names]
        last = max((block for block in blocks if block is not None), default=len(self.blocks))
        return None if None in blocks or last + 1 >= len(self.blocks) else last + 1

    @functools.cached_property
    def _blocks_of_sites(self) -> dict[str, int]:
        holders = {id(module): i for i, block in reversed([*enumerate(self.blocks)]) for module in block.modules()}
        owners = {name: id(find_module(self.root, wiring.owner)) for name, wiring in self.wirings.items()}
        return {name: holders[owner] for name, owner in owners.items() if owner in holders}

    def resumed(self, outputs: Sequence[Any], block: int) -> contextlib.AbstractContextManager[None]:
        """Within this context forward passes begin at a block: those before it return what they returned, uncomputed.

        Outputs and gradients of a pass that changes nothing before that block are those of the full pass. A site in a block
        that is left out does not fire. `outputs` are the `blocks` of a `capture(..., keep_blocks=True)` over the same rows with
        the same attention mask; `len(outputs)` leaves all of them out. SettingError where there is no such block.
        """
        return shortcuts.skipped(self.blocks, outputs, block)

    def stream_before(self, block: int, tokens: Rows, attention_mask: RowMask = None) -> Any:
        """What the block before one of `blocks` returned, from a forward pass that ends there; for `resumed`, where it may
        stand for every block before that one."""
        self.check_readable(tokens, attention_mask)
        return shortcuts.run_until_block(self, block, functools.partial(self.forward, tokens, attention_mask))

    def hidden(self, tokens: Rows, attention_mask: RowMask = None) -> Float[Tensor, "batch pos d_model"]:
        """The vectors that the unembedding receives, from a forward pass that ends there: no logits are made.

        UnsupportedModelError where no unembedding is called, SiteNotFiredError where another intercepted site is not reached.
        """
        self.check_readable(tokens, attention_mask)
        hidden = shortcuts.run_until_unembedding(self, functools.partial(self.forward, tokens, attention_mask))
        for interception in self.interceptions:
            interception.check_fired()
        return hidden

    @property
    def splits_at_unembedding(self) -> bool:
        """Whether `unembed(hidden(tokens))` are the logits; tried out on a few tokens when first asked for."""
        return self._after_unembedding is not None

    @functools.cached_property
    def _after_unembedding(self) -> shortcuts.AfterUnembedding | None:
        return shortcuts.find_after_unembedding(self)

    def unembed(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Logits of vectors before the unembedding, scaled and capped as the host does; UnsupportedModelError where unknown."""
        if self._after_unembedding is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does something to its logits after the unembedding that is not known, or has "
                "no unembedding; take them from a full forward pass."
            )
        return self._after_unembedding(shortcuts.product(self, x))

    # --- attention patterns -----------------------------------------------------------------------------------------
    def pattern_taps(self) -> Mapping[int, nn.Module]:
        """By layer, the module whose output is the attention pattern, or holds it; layers without attention are missing."""
        return {}

    def patterns(self) -> contextlib.AbstractContextManager[attention.Patterns]:
        """Within this context passes leave their softmaxed attention patterns [batch, head, query, key] by layer.

        They have gradients and are the last pass's, without blocks that it leaves out; grouped key/value heads are given once
        per query head. At padding, rows are what the host makes of them. UnsupportedModelError where it gives none; says why.
        """
        if self._why_no_patterns:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not give its attention patterns: {self._why_no_patterns}. Leave terms that "
                "compare patterns out."
            )
        return attention.collected_patterns(self.root, self.block_modules()[0], self.pattern_taps())

    @functools.cached_property
    def _why_no_patterns(self) -> str:
        return attention.why_no_patterns(self, self.pattern_taps())
