"""What every host adapter offers: the model's weight sites, their weights, and a way to run it with functions at them."""

import contextlib
import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tl_paramdecomp.adapters.boundary import evaluating, interceptions_of, one_thread
from tl_paramdecomp.adapters.computed import made_plain, read_tensor
from tl_paramdecomp.adapters.fingerprint import Remembered, fingerprint
from tl_paramdecomp.adapters.identity import (
    behind,
    composed,
    identity_before,
    identity_fingerprint,
    identity_weight,
    is_identity,
    resolve,
    select,
)
from tl_paramdecomp.adapters.interception import Interception, OnError
from tl_paramdecomp.adapters.limits import Limits
from tl_paramdecomp.adapters.norm_wiring import NormWiring, read_gain, read_norm_bias, replaced_gains
from tl_paramdecomp.adapters.norms import Norms, find_norms, module_norms
from tl_paramdecomp.adapters.padding import PaddingTrials, starts_later
from tl_paramdecomp.adapters.patterns import Patterns, collected_patterns, why_no_patterns
from tl_paramdecomp.adapters.shortcuts import (
    AfterUnembedding,
    blocks_of_sites,
    find_after_unembedding,
    find_blocks_to_skip,
    kept_outputs,
    logit_settings,
    product,
    run_until_unembedding,
    skipped,
)
from tl_paramdecomp.adapters.swapping import changed_tensor
from tl_paramdecomp.adapters.wiring import (
    Wiring,
    find_module,
    read_bias,
    read_parameter,
    read_weight,
    stored_bias,
    stored_weight,
    structure,
)
from tl_paramdecomp.errors import UnsupportedModelError, UnsupportedSiteError
from tl_paramdecomp.sites import Fingerprint, SiteCall, SiteFn, SitePattern, WeightSite


class Captured(NamedTuple):
    """One clean forward pass."""

    output: Float[Tensor, "batch ..."]
    """Logits; where the pass ended before the unembedding, the vectors [batch, pos, d_model] that reached it."""
    inputs: dict[str, Tensor]
    """x of each captured site: [batch, pos, d_in], or indices [batch, pos] for an embedding."""
    blocks: tuple[Any, ...] = ()
    """What each of the adapter's `blocks` returned, where that was asked for."""

    @property
    def logits(self) -> Float[Tensor, "batch ..."]:
        """The pass's output, where it ran to the logits."""
        return self.output


class ModelAdapter(ABC):
    """Reads and runs one host model. It knows hosts; it knows no components.

    It refers to the model weakly, so that a cached adapter never keeps a model alive.
    """

    host: ClassVar[str]
    """The host's name in messages and saved files."""

    def __init__(self, model: Any) -> None:
        self._model_ref = weakref.ref(model)
        self._fingerprints: dict[str, Remembered] = {}
        self._seen_rows: tuple[weakref.ref[Tensor], int | None] | None = None
        self._padding = PaddingTrials()
        self.wirings: dict[str, Wiring] = {}
        self.refused: dict[str, str] = {}
        """Names this host has but cannot decompose exactly, each with the reason."""

    @property
    def model(self) -> Any:
        """The host object the user holds."""
        model = self._model_ref()
        if model is None:
            raise UnsupportedModelError("The model this adapter was made for is gone; keep a reference to it.")
        return model

    @property
    def root(self) -> nn.Module:
        """The torch module tree that holds the weights."""
        return self.model

    @property
    def core(self) -> nn.Module:
        """The innermost module that holds the weights: the same one for every host around it."""
        return self.root

    @property
    def interceptions(self) -> list[Interception]:
        """Contexts of `intercept` that are open on this model, on any host."""
        return interceptions_of(self.core)

    @property
    def processing(self) -> str | None:
        """What the host did to the weights after loading, such as folding LayerNorm; None when they are as trained."""
        return None

    def signature(self) -> Hashable:
        """What the wiring depends on; an adapter made of another is made anew."""
        return structure(self.root), self.flags(), tuple(logit_settings(self.root))

    def flags(self) -> tuple[Hashable, ...]:
        """Settings of the host that change the wiring."""
        return ()

    @property
    def sites(self) -> dict[str, WeightSite]:
        """Weight sites by canonical name, in execution order."""
        return {name: wiring.site for name, wiring in self.wirings.items()}

    def select(self, pattern: SitePattern) -> dict[str, WeightSite]:
        """Sites that a pattern selects, in execution order; what ends in `.pre_identity` selects inserted identities.

        Raises:
            NoMatchingSiteError, UnsupportedSiteError: Nothing matches, or only what cannot be decomposed.
        """
        return select(self.sites, pattern, self.refused)

    def resolve(self, name: str) -> str:
        """Canonical name of a site or inserted identity, from that or an alias.

        Raises:
            NoMatchingSiteError, UnsupportedSiteError: There is no such site, or it cannot be decomposed.
        """
        return resolve(self.sites, name, self.refused)

    def wiring(self, name: str) -> Wiring | None:
        """Where a site is in the host (for an inserted identity: the site behind it); None where there is none."""
        found = self.wirings.get(behind(name))
        return None if found is not None and is_identity(name) and found.site.kind != "linear" else found

    def site(self, name: str) -> WeightSite:
        """A site, or an inserted identity, by its canonical name."""
        found = self.wirings[behind(name)].site
        return identity_before(found) if is_identity(name) else found

    # --- reading ----------------------------------------------------------------------------------------------------
    def weight(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """W of a site, attached to the host's parameter; I for an inserted identity."""
        wiring = self.wirings[behind(name)]
        if is_identity(name):
            return identity_weight(wiring.site, read_parameter(self.root, wiring))
        return read_weight(self.root, wiring)

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        """Bias of a site, attached to the host's parameter, or None."""
        return None if is_identity(name) else read_bias(self.root, self.wirings[name])

    def fingerprint(self, name: str, fresh: bool = False) -> Fingerprint:
        """Fingerprint of a site's weight and bias, or a norm's; remembered until a parameter changes, unless `fresh`.

        A change that torch does not count (through `.data`) is noticed where it is of a whole tensor.
        """
        if is_identity(name):
            return identity_fingerprint(self.fingerprint(behind(name), fresh))
        parameters, known = self._parameters_of(name), self._fingerprints.get(name)
        if not fresh and known is not None and known.is_of(parameters):
            return known.found
        weight, bias = (self.weight, self.bias) if name in self.wirings else (self._gain_row, self.gain_bias)
        found = fingerprint(weight(name), bias(name))
        self._fingerprints[name] = Remembered.of(parameters, found)
        return found

    def _parameters_of(self, name: str) -> list[Tensor]:
        if name not in self.wirings:
            return [t for t in (self.gain(name), self.gain_bias(name)) if t is not None]
        wiring = self.wirings[name]
        owner = find_module(self.root, wiring.owner)
        bias = read_tensor(owner, wiring.bias, name) if wiring.bias else None
        return [t for t in (read_parameter(self.root, wiring), bias) if t is not None]

    # --- normalisation gains ----------------------------------------------------------------------------------------
    @functools.cached_property
    def norms(self) -> Norms:
        """The host's normalisations with gains, which are no weight sites; each is tried out when first asked for."""
        return find_norms(self.root, self.norm_candidates())

    def norm_candidates(self) -> Iterable[NormWiring]:
        """Modules that may be normalisations with gains, under their canonical names."""
        return module_norms(self.root)

    def is_norm(self, name: str) -> bool:
        """Whether this names a normalisation, and no weight site or inserted identity."""
        return behind(name) not in self.wirings and name in self.norms.wirings

    def gain(self, name: str) -> Float[Tensor, " width"]:
        """Gain of a norm, attached to the host's parameter.

        Raises:
            UnsupportedSiteError: The module holds none any more.
        """
        return read_gain(self.root, self.norms.wirings[name])

    def gain_bias(self, name: str) -> Float[Tensor, " width"] | None:
        """Bias of a norm, attached to the host's parameter, or None."""
        return read_norm_bias(self.root, self.norms.wirings[name])

    def _gain_row(self, name: str) -> Float[Tensor, "1 width"]:
        return self.gain(name).unsqueeze(0)

    # --- running ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def intercept(
        self, fns: Mapping[str, SiteFn], on_error: OnError | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Within this context every forward pass of the host runs with these functions at its sites.

        Args:
            fns: A function for each site, or norm; a norm's is given the normalised rows that its gain multiplies.
            on_error: Told what goes wrong at a site, which then leaves its output; None: it is raised.

        Raises:
            SiteNotFiredError: From the forward pass, where a site was not reached.
        """

    def forward(
        self, tokens: Shaped[Tensor, "batch ..."], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch ..."]:
        """Logits of token rows, the way the host computes them in evaluation mode.

        Every pass that the library makes of its own accord is made here. The mode that the user's modules are in is put back.

        Raises:
            DataError: The model cannot read these tokens.
            UnsupportedModelError: It reads rows that are padded on the left otherwise than alone.
            PatchConflictError: Another thread uses the model.
        """
        self.check_readable(tokens, attention_mask)
        with self.evaluating():
            return self.run(tokens, attention_mask)

    def check_readable(
        self, tokens: Shaped[Tensor, "batch ..."], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> None:
        """Refuse rows that the model cannot read; rows that were seen last are not looked at again.

        What this tries out it cannot try out amid a pass that is cut short: passes that are cut short ask first.

        Raises:
            DataError: A row is too long, no token ids, or holds an id that the model has not.
            UnsupportedModelError: The model reads rows that are padded like this otherwise than alone.
        """
        seen, now = self._seen_rows, None if tokens.is_inference() else tokens._version
        if seen is None or now is None or seen[0]() is not tokens or seen[1] != now:
            Limits.of(self).refuse(tokens, "The batch", attention_mask)
            self._seen_rows = (weakref.ref(tokens), now)
        if attention_mask is not None and self.reads_tokens and starts_later(attention_mask):
            with self.evaluating():
                self._padding.check(self, attention_mask)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the model is in evaluation mode, and this thread's alone.

        Raises:
            PatchConflictError: Another thread uses the model.
        """
        return evaluating(self.core, self.root)

    @abstractmethod
    def run(
        self, tokens: Shaped[Tensor, "batch ..."], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch ..."]:
        """Logits of token rows, in the mode that the model is in."""

    def capture(
        self,
        tokens: Shaped[Tensor, "batch ..."],
        names: Sequence[str],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        keep_blocks: bool = False,
        to_hidden: bool = False,
    ) -> Captured:
        """Output and site inputs of the model as it stands.

        Args:
            tokens: Rows.
            names: Sites.
            attention_mask: 1 where a position counts.
            keep_blocks: Keep what each of `blocks` returned as well, for `resumed`.
            to_hidden: End the pass before the unembedding, as `hidden` does.

        Raises:
            UnsupportedSiteError: A site is called more than once.
        """
        inputs: dict[str, Tensor] = {}
        run = self.hidden if to_hidden else self.forward
        self.check_readable(tokens, attention_mask)

        fns = {name: functools.partial(_keep_input, inputs, name, len(tokens)) for name in names}
        with self.intercept(fns), kept_outputs(self.blocks if keep_blocks else ()) as blocks:
            output = run(tokens, attention_mask)
        return Captured(output, inputs, tuple(blocks))

    @property
    def device(self) -> torch.device:
        """Device of the model's first parameter."""
        return next(self.root.parameters()).device

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of the table in which token ids are looked up; None where there is none, or several could be theirs."""
        tables = [wiring.site.d_in for wiring in self.wirings.values() if wiring.site.kind == "embedding"]
        return tables[0] if len(tables) == 1 else None

    @property
    def context_length(self) -> int | None:
        """Positions of the longest row that the model can read; None where nothing in it ends there."""
        return None

    @property
    def reads_tokens(self) -> bool:
        """Whether the model is a language model, whose rows are token ids, whatever it makes of them."""
        return True

    @property
    def gives_logits(self) -> bool:
        """Whether outputs are logits over a vocabulary, or a plain module's, which are taken for what their user does."""
        return True

    # --- shorter passes ---------------------------------------------------------------------------------------------
    def block_modules(self) -> Sequence[nn.Module]:
        """The host's residual blocks in the order of a forward pass; empty where it is not known to have any."""
        return ()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Residual blocks at which a forward pass may begin; empty where beginning later is not the same model.

        Tried out on a few tokens when first asked for.
        """
        return self.block_modules() if self._skips_blocks else ()

    @functools.cached_property
    def _skips_blocks(self) -> bool:
        modules = self.block_modules()
        return len(modules) > 1 and find_blocks_to_skip(self, modules)

    def block_of(self, name: str) -> int | None:
        """Index in `blocks` of the block that holds a site; None for embeddings, the unembedding and plain modules."""
        return self._blocks_of_sites.get(behind(name)) if self.blocks else None

    @functools.cached_property
    def _blocks_of_sites(self) -> dict[str, int]:
        return blocks_of_sites(self.root, self.block_modules(), self.wirings)

    @contextlib.contextmanager
    def resumed(self, outputs: Sequence[Any], block: int) -> Iterator[None]:
        """Within this context forward passes begin at a block: those before it return what they returned, uncomputed.

        Outputs and gradients of a pass that changes nothing before that block are those of the full pass. A site in a
        block that is left out does not fire.

        Args:
            outputs: `blocks` of a `capture(..., keep_blocks=True)` over the same rows with the same attention mask.
            block: The first block to compute; `len(outputs)` leaves all of them out.

        Raises:
            SettingError: There is no such block, or these are not the outputs of all blocks.
        """
        with skipped(self.blocks, outputs, block):
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

    def hidden(
        self, tokens: Shaped[Tensor, "batch ..."], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The vectors that the unembedding receives, from a forward pass that ends there: no logits are made.

        Raises:
            SiteNotFiredError: An intercepted site was not reached; the unembedding itself never is.
            UnsupportedModelError: The model has no unembedding that is called.
        """
        self.check_readable(tokens, attention_mask)
        hidden = run_until_unembedding(self, functools.partial(self.forward, tokens, attention_mask))
        for interception in self.interceptions:
            interception.check_fired()
        return hidden

    @property
    def splits_at_unembedding(self) -> bool:
        """Whether `unembed(hidden(tokens))` are the logits; tried out on a few tokens when first asked for."""
        return self._after_unembedding is not None

    @functools.cached_property
    def _after_unembedding(self) -> AfterUnembedding | None:
        return find_after_unembedding(self)

    def unembed(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Logits of vectors before the unembedding: x W_U + b, scaled and capped as the host does.

        Raises:
            UnsupportedModelError: The host does more than that between the unembedding and its logits.
        """
        if self._after_unembedding is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does something to its logits after the unembedding that is not known, or has "
                "no unembedding; take them from a full forward pass."
            )
        return self._after_unembedding(product(self, x))

    # --- attention patterns -----------------------------------------------------------------------------------------
    def pattern_taps(self) -> Mapping[int, nn.Module]:
        """By layer, the module whose output is the attention pattern, or holds it; layers without attention are missing."""
        return {}

    @contextlib.contextmanager
    def patterns(self) -> Iterator[Patterns]:
        """Within this context forward passes leave their softmaxed attention patterns, with gradients.

        A pass empties the dictionary first, so that it holds the last one's; blocks that a pass leaves out are missing. Grouped
        key/value heads are given once per query head. At padding, rows are what the host makes of them.

        Yields:
            [batch, head, query, key] by layer.

        Raises:
            UnsupportedModelError: The host does not give its patterns; says why.
        """
        if self._why_no_patterns:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not give its attention patterns: {self._why_no_patterns}. Leave terms that "
                "compare patterns out."
            )
        with collected_patterns(self.root, self.block_modules()[0], self.pattern_taps()) as kept:
            yield kept

    @functools.cached_property
    def _why_no_patterns(self) -> str:
        return why_no_patterns(self, self.pattern_taps())

    # --- changing weights -------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def replaced_weights(self, weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> Iterator[None]:
        """Within this context the sites hold other weights; afterwards the very same parameters are back.

        The host's parameter object is swapped, never written to, so a tied neighbour keeps its own and restoring is
        exact. Sites fused into one parameter are swapped together.
        """
        with contextlib.ExitStack() as stack:
            for name, matrix in weights.items():
                wiring = self.wirings[name]
                change = functools.partial(stored_weight, wiring, matrix)
                stack.enter_context(changed_tensor(find_module(self.root, wiring.owner), wiring.weight, change))
            yield

    @contextlib.contextmanager
    def replaced_biases(self, biases: Mapping[str, Float[Tensor, " d_out"]]) -> Iterator[None]:
        """Within this context the sites add other biases; afterwards the very same parameters are back.

        Raises:
            UnsupportedSiteError: A site adds none.
        """
        with contextlib.ExitStack() as stack:
            for name, bias in biases.items():
                wiring = self.wirings[name]
                owner = find_module(self.root, wiring.owner)
                old = read_tensor(owner, wiring.bias, name) if wiring.bias else None
                if old is None or wiring.bias is None:
                    raise UnsupportedSiteError(f"{name} adds no bias that could be replaced.")
                change = functools.partial(stored_bias, wiring, bias)
                stack.enter_context(changed_tensor(owner, wiring.bias, change))
            yield

    def replaced_gains(
        self, gains: Mapping[str, Float[Tensor, " _width"]], biases: Mapping[str, Float[Tensor, " _width"]]
    ) -> contextlib.AbstractContextManager[None]:
        """Within this context norms hold other gains and biases; afterwards the very same parameters are back.

        Raises:
            UnsupportedSiteError: A norm adds no bias.
        """
        return replaced_gains(self.root, self.norms.wirings if gains or biases else {}, gains, biases)

    def write_weights(self, weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> None:
        """Set the sites' weights for good, as parameters that nothing else shares: only the named maps change.

        Raises:
            UnsupportedSiteError: A weight is computed in a way that is not known, or cannot be parted from another's.
        """
        for name, matrix in weights.items():
            wiring = self.wirings[name]
            owner, attribute = find_module(self.root, wiring.owner), wiring.weight
            stored = stored_weight(wiring, matrix, read_parameter(self.root, wiring))
            if attribute in owner._parameters:
                old = read_parameter(self.root, wiring)
                owner._parameters[attribute] = nn.Parameter(stored, old.requires_grad)
            elif attribute in owner._buffers:
                owner._buffers[attribute] = stored
            else:
                made_plain(owner, attribute, stored)


def _keep_input(inputs: dict[str, Tensor], name: str, batch: int, call: SiteCall) -> Tensor:
    """A site's function that leaves its output and keeps its input."""
    if name in inputs:
        raise UnsupportedSiteError(
            f"{name} is called more than once in a forward pass, so that it has no single input to capture."
        )
    inputs[name] = call.x.expand(batch, *call.x.shape[1:]) if call.x.shape[0] == 1 else call.x
    return call.y


def make_interception(
    adapter: ModelAdapter, fns: Mapping[str, SiteFn], on_error: OnError | None, stack: contextlib.ExitStack
) -> Interception:
    """The shared engine set up for one adapter, which knows of it until the stack is left.

    Raises:
        PatchConflictError: Another thread uses the model.
    """
    wirings: dict[str, Wiring | NormWiring] = dict(adapter.wirings)
    if any(behind(name) not in wirings for name in fns):
        wirings |= adapter.norms.wirings
    interception = Interception(adapter.root, wirings, composed(fns, adapter.weight), on_error)
    stack.enter_context(one_thread(adapter.core))
    adapter.interceptions.append(interception)
    stack.callback(_forget, adapter.interceptions, interception)
    return interception


def _forget(interceptions: list[Interception], gone: Interception) -> None:
    interceptions[:] = [interception for interception in interceptions if interception is not gone]
