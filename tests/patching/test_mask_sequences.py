"""A whole model under any sequence of operations on masks, against a forward pass made by hand.

By hand means: the model's own unpatched forward pass, in which every weight site's output is replaced by the textbook form
b + (m * h) U + d x (W - V U) of masks that a plain loop worked out (`support/mask_algebra`).
"""

import functools
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tl_paramdecomp as tlpd

from ..support import mask_algebra as algebra
from ..support.mask_algebra import Rows, Textbook
from ..support.models import VOCAB, C, build, decomposition_of, logits, plain
from ..support.searching import few_and_many, searching

Books = Mapping[str, Textbook]


class Matrix(NamedTuple):
    """A weight [d_in, d_out] and bias as the host holds them."""

    W: Tensor
    b: Tensor | None


def textbook_output(dec: tlpd.Decomposition, name: str, book: Textbook, matrix: Matrix, x: Tensor) -> Tensor:
    W, b = matrix
    arrays = [t.detach().numpy() for t in (x, W, dec[name].V, dec[name].U)]
    bias = None if b is None else b.detach().numpy()
    return torch.from_numpy(book.output(*arrays, bias, dec.sites[name].head_side))


# --- transformers' GPT-2: at its modules ------------------------------------------------------------------------------
def gpt2_modules(model: Any) -> dict[nn.Module, dict[str, Matrix]]:
    """The sites that each module computes, in the order of its output's columns."""
    body, made = model.transformer, {}
    for i, block in enumerate(body.h):
        qkv, width = block.attn.c_attn, model.config.n_embd
        parts = zip("QKV", qkv.weight.split(width, 1), qkv.bias.split(width))
        made[qkv] = {f"blocks.{i}.attn.W_{letter}": Matrix(W, b) for letter, W, b in parts}
        rest = {"attn.W_O": block.attn.c_proj, "mlp.W_in": block.mlp.c_fc, "mlp.W_out": block.mlp.c_proj}
        made |= {one: {f"blocks.{i}.{role}": Matrix(one.weight, one.bias)} for role, one in rest.items()}
    made[body.wte] = {"embed.W_E": Matrix(body.wte.weight, None)}
    made[body.wpe] = {"pos_embed.W_pos": Matrix(body.wpe.weight, None)}
    made[model.lm_head] = {"unembed.W_U": Matrix(model.lm_head.weight.T, None)}
    return made


def gpt2_by_hand(model: Any, dec: tlpd.Decomposition, books: Books, tokens: Tensor) -> Tensor:
    def replaced(sites: dict[str, Matrix], module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        parts = [textbook_output(dec, name, books[name], matrix, args[0]) for name, matrix in sites.items()]
        return torch.cat(parts, -1)

    modules = gpt2_modules(model)
    assert {name for sites in modules.values() for name in sites} == set(dec)
    handles = [module.register_forward_hook(functools.partial(replaced, sites)) for module, sites in modules.items()]
    try:
        return logits(model, tokens)
    finally:
        for handle in handles:
            handle.remove()


# --- HookedTransformer: at its hook points ----------------------------------------------------------------------------
def hooked_by_hand(model: Any, dec: tlpd.Decomposition, books: Books, tokens: Tensor) -> Tensor:
    seen: dict[str, Tensor] = {"tokens": tokens, "positions": torch.arange(tokens.shape[1]).unsqueeze(0)}
    hooks: list[tuple[str, Callable[..., Any]]] = []
    left = set(dec)

    def read(point: str, norm: Any = None) -> None:
        """What stands at a point; a norm's point is before its gain and bias, but after them in TransformerLens 2."""
        bare = norm is None or version("transformer-lens").startswith("2.")

        def keep(value: Tensor, hook: Any) -> None:
            seen[point] = value.clone() if bare else value * norm.w + norm.b

        hooks.append((point, keep))

    def write(point: str, name: str, source: str, matrix: Matrix, flat: int = 0) -> None:
        left.discard(name)

        def put(value: Tensor, hook: Any) -> Tensor:
            x = seen[source].flatten(-2) if flat else seen[source]
            return textbook_output(dec, name, books[name], matrix, x).reshape(value.shape)

        hooks.append((point, put))

    write("hook_embed", "embed.W_E", "tokens", Matrix(model.embed.W_E, None))
    write("hook_pos_embed", "pos_embed.W_pos", "positions", Matrix(model.pos_embed.W_pos, None))
    for i, block in enumerate(model.blocks):
        at, attn, mlp = f"blocks.{i}", block.attn, block.mlp
        for point, norm in {"ln1.hook_normalized": block.ln1, "ln2.hook_normalized": block.ln2}.items():
            read(f"{at}.{point}", norm)
        for point in ("attn.hook_z", "mlp.hook_post"):
            read(f"{at}.{point}")
        for letter in "QKV":
            W, b = (getattr(attn, f"{kind}_{letter}") for kind in "Wb")
            matrix = Matrix(W.permute(1, 0, 2).flatten(1), b.flatten())
            write(f"{at}.attn.hook_{letter.lower()}", f"{at}.attn.W_{letter}", f"{at}.ln1.hook_normalized", matrix)
        write(f"{at}.hook_attn_out", f"{at}.attn.W_O", f"{at}.attn.hook_z", Matrix(attn.W_O.flatten(0, 1), attn.b_O), 1)
        for name, point, source, b in (
            ("W_in", "mlp.hook_pre", "ln2.hook_normalized", mlp.b_in),
            ("W_out", "hook_mlp_out", "mlp.hook_post", mlp.b_out),
        ):
            write(f"{at}.{point}", f"{at}.mlp.{name}", f"{at}.{source}", Matrix(getattr(mlp, name), b))
    read("ln_final.hook_normalized", model.ln_final)
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert left == {"unembed.W_U"}
    matrix = Matrix(model.unembed.W_U, model.unembed.b_U)
    return textbook_output(dec, "unembed.W_U", books["unembed.W_U"], matrix, seen["ln_final.hook_normalized"])


# --- a torch module: written out --------------------------------------------------------------------------------------
def plain_by_hand(model: nn.Sequential, dec: tlpd.Decomposition, books: Books, x: Tensor) -> Tensor:
    first, last = model[0], model[2]
    hidden = textbook_output(dec, "0.weight", books["0.weight"], Matrix(first.weight.T, first.bias), x)
    return textbook_output(dec, "2.weight", books["2.weight"], Matrix(last.weight.T, None), hidden.tanh())


# --- the sequences ----------------------------------------------------------------------------------------------------
BY_HAND = {"gpt2": gpt2_by_hand, "hooked": hooked_by_hand, "plain": plain_by_hand}


@functools.cache
def target(host: str) -> tuple[Any, tlpd.Decomposition]:
    model = plain() if host == "plain" else build(host)
    return model, decomposition_of(model)


def masked(data: st.DataObject, dec: tlpd.Decomposition, row: Rows) -> tuple[tlpd.Masks, Books]:
    """A drawn sequence, as the library has it and as the textbook has it."""
    masks, sites = dec.masks(), dec.sites
    books = {name: Textbook(row, C, site.n_heads) for name, site in sites.items()}
    for called, operation in data.draw(algebra.sequences(sites.values(), dict.fromkeys(sites, C), row)):
        name = next(site.name for site in sites.values() if called in (site.name, *site.aliases))
        masks, books[name] = operation.of(masks, called), books[name](operation)
    return masks, books


def agree(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-8 * (1.0 + expected.abs().max()))


@few_and_many(8, 1000)
@pytest.mark.parametrize("host", BY_HAND)
def test_any_sequence_is_the_forward_pass_by_hand(host: str, examples: int) -> None:
    model, dec = target(host)

    @searching(examples)
    @given(data=st.data(), row=algebra.rows(decoding=False, batches=2), seed=st.integers(0, 999))
    def passes(data: st.DataObject, row: Rows, seed: int) -> None:
        masks, books = masked(data, dec, row)
        generator, shape = torch.Generator().manual_seed(seed), (row.batch, row.prompt)
        if host == "plain":
            inputs = torch.randn(*shape, 6, generator=generator, dtype=torch.float64)
        else:
            inputs = torch.randint(0, VOCAB, shape, generator=generator)
        expected = BY_HAND[host](model, dec, books, inputs)
        with tlpd.patched(model, dec, masks):
            found = logits(model, inputs)
        assert agree(found, expected)

    passes()


@few_and_many(6, 1000)
def test_any_sequence_while_generating_is_one_long_pass_by_hand(examples: int) -> None:
    """Every decoding step's logits, with a cache and without one."""
    model, dec = target("gpt2")

    @searching(examples)
    @given(
        data=st.data(), batch=st.integers(1, 2), prompt=st.integers(1, 4), new=st.integers(2, 4), cache=st.booleans()
    )
    def generations(data: st.DataObject, batch: int, prompt: int, new: int, cache: bool) -> None:
        row = Rows(batch, prompt, decoded=new - 1)
        masks, books = masked(data, dec, row)
        tokens = torch.randint(3, VOCAB, (batch, prompt), generator=torch.Generator().manual_seed(prompt))
        settings = {
            "max_new_tokens": new,
            "min_new_tokens": new,
            "do_sample": False,
            "pad_token_id": 0,
            "use_cache": cache,
        }
        steps: list[Tensor] = []  # `generate` itself gives them in float32
        with torch.no_grad(), tlpd.patched(model, dec, masks):
            handle = model.lm_head.register_forward_hook(lambda module, args, out: steps.append(out[:, -1].clone()))
            made = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
            handle.remove()
        whole = gpt2_by_hand(model, dec, books, made[:, :-1])
        assert len(steps) == new
        for step, found in enumerate(steps):
            assert agree(found, whole[:, prompt - 1 + step]), f"step {step}"

    generations()
