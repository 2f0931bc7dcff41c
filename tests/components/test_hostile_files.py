"""Whatever is in its files, a decomposition loads as it was saved or raises the named error: nothing is run, nothing hangs."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tl_paramdecomp import Decomposition, SubnetworkDecomposition
from tl_paramdecomp.components import files
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import DecompositionFileError, SettingError
from tl_paramdecomp.sites import Fingerprint, WeightSite

from ..support import hostile
from ..support.hostile import refusal, watched
from ..support.saved_folders import (
    METADATA,
    TENSORS,
    contents,
    forge,
    forge_format_1,
    join_safetensors,
    put,
    sealed,
    split_safetensors,
    values_of,
)

pytestmark = pytest.mark.timeout(300)  # a pipe that is waited for never ends
FORMAT_1 = Path(__file__).parent / "format_1"
LOADERS: dict[str, Callable[[Path], Any]] = {
    "components": Decomposition.load,
    "subnetworks": SubnetworkDecomposition.load,
}
BOTH_KINDS = pytest.mark.parametrize("kind", list(LOADERS))
BOTH_FILES = pytest.mark.parametrize("name", [TENSORS, METADATA])


def saved(kind: str, folder: Path, other: bool = False) -> Path:
    """A small decomposition of each kind, or another one of the same sites."""
    made = LOADERS[kind](FORMAT_1 / kind)
    if other:
        made.info["method"] = "by another hand"
        next(made.parameters()).data += 1
    return made.save(folder)


def small(importance: ImportanceConfig | None = None, names: tuple[str, ...] = ("a", "b")) -> Decomposition:
    sites = {name: WeightSite(name, 2, 3) for name in names}
    prints = {name: Fingerprint((2, 3), "float32", 1.0, 0.0, (1.0, 2.0), (0.5, 0.5)) for name in names}
    return Decomposition({name: (torch.ones(2, 4), torch.ones(4, 3)) for name in names}, sites, prints, importance)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# --- damage -----------------------------------------------------------------------------------------------------------


@BOTH_KINDS
@pytest.mark.parametrize("byte", ["1", "0", "3"])
def test_another_digit_of_the_format_does_not_make_it_format_1(tmp_path: Path, kind: str, byte: str) -> None:
    folder = saved(kind, tmp_path)
    content = (folder / METADATA).read_text()
    assert content.count('"format": 2') == 1
    (folder / METADATA).write_text(content.replace('"format": 2', f'"format": {byte}'))
    refusal(LOADERS[kind], folder)


@BOTH_KINDS
@pytest.mark.parametrize("turn", ["\n", " ", "\r\n line ends", "indent", "one line", "sorted", "bom", "ascii"])
def test_the_same_json_in_other_words_is_refused(tmp_path: Path, kind: str, turn: str) -> None:
    folder = saved(kind, tmp_path)
    text = (folder / METADATA).read_text()
    turned = {
        "\n": text + "\n",
        " ": " " + text,
        "\r\n line ends": text.replace("\n", "\r\n"),
        "indent": json.dumps(json.loads(text), indent=2),
        "one line": json.dumps(json.loads(text)),
        "sorted": json.dumps(json.loads(text), indent=1, sort_keys=True),
        "bom": "\ufeff" + text,
        "ascii": text.replace('"info"', '"inf\\u006f"'),
    }[turn]
    assert turned != text and (turn == "bom" or json.loads(turned) == json.loads(text))
    (folder / METADATA).write_bytes(turned.encode())
    refusal(LOADERS[kind], folder)


@BOTH_KINDS
@BOTH_FILES
def test_files_of_two_decompositions_do_not_mix(tmp_path: Path, kind: str, name: str) -> None:
    first, second = saved(kind, tmp_path / "a"), saved(kind, tmp_path / "b", other=True)
    (first / name).write_bytes((second / name).read_bytes())
    assert "replaced" in str(refusal(LOADERS[kind], first))


@BOTH_KINDS
def test_the_other_kind_is_refused(tmp_path: Path, kind: str) -> None:
    folder = saved(kind, tmp_path)
    (other,) = set(LOADERS) - {kind}
    assert f"{type(LOADERS[kind](folder)).__name__}.load" in str(refusal(LOADERS[other], folder))


# --- foreign files ----------------------------------------------------------------------------------------------------


@BOTH_KINDS
@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "itself", "long", "null byte", "file/inside"])
def test_what_is_no_folder(tmp_path: Path, kind: str, what: str) -> None:
    path, whole = tmp_path / "folder", LOADERS[kind](FORMAT_1 / kind)
    if what == "pipe":
        os.mkfifo(path)
    elif what in ("/dev/zero", "itself"):
        path.symlink_to(path if what == "itself" else what)
    elif what == "file/inside":
        path.write_text("mine")
        path = path / "inside"
    else:
        path = tmp_path / ("x" * 5000 if what == "long" else "\0")
    before = tree(tmp_path) if what == "file/inside" else None
    refusal(LOADERS[kind], path)
    with pytest.raises(DecompositionFileError):
        whole.save(path)
    assert before is None or tree(tmp_path) == before


@BOTH_KINDS
def test_links_to_whole_files_are_followed(tmp_path: Path, kind: str) -> None:
    """As in the hub's cache."""
    folder = saved(kind, tmp_path / "saved")
    (tmp_path / "links").mkdir()
    for name in (TENSORS, METADATA):
        (tmp_path / "links" / name).symlink_to(folder / name)
    LOADERS[kind](tmp_path / "links")


# --- JSON that fits its checksum --------------------------------------------------------------------------------------


ALSO: dict[str, tuple[type, ...]] = {
    "tied_to": (str, type(None)), "hidden": (type(None),), "d_mlp": (int,), "n_heads": (int,), "head_side": (str,),
    "norm": (int,), "bias_norm": (int,), "projections": (int,), "means": (int,), "importance": (type(None),),
}  # fmt: skip
"""Types that a field may have besides the one it has here."""


@BOTH_KINDS
def test_a_wrong_type_in_every_field(tmp_path: Path, kind: str) -> None:
    folder = saved(kind, tmp_path)
    values, tried = values_of(folder), 0
    for path in hostile.places(values):
        there = hostile.at(values, path)
        if path[0] == "checksum" or (path[0] == "info" and len(path) > 1) or any(key in path for key in range(1, 9)):
            continue  # all that is in a list is alike
        name = next(key for key in reversed(path) if isinstance(key, str))
        for new in (None, True, "x", 1, 1.5, [], {}, [there], {"x": there}):
            if type(new) is type(there) or type(new) in ALSO.get(name, ()):
                continue
            print(path, new)  # shown where it is not refused
            refusal(LOADERS[kind], forge(folder, hostile.replaced(values, path, new)))
            tried += 1
    assert tried > 150
    LOADERS[kind](forge(folder, values))


NO_SITE: list[dict[str, Any]] = [
    {"d_in": 0}, {"d_in": -2}, {"d_in": 10**12}, {"d_in": 10**400}, {"d_out": 2**63}, {"kind": "convolution"},
    {"n_heads": 0}, {"n_heads": 3}, {"n_heads": -1}, {"n_heads": None}, {"head_side": None}, {"head_side": "both"},
    {"name": "another"}, {"name": "embed.W_E"}, {"colour": "blue"}, {"aliases": "wte"}, {"aliases": [["wte"]]},
]  # fmt: skip


@pytest.mark.parametrize("change", NO_SITE, ids=str)
def test_sites_that_no_model_has(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = saved("components", tmp_path)
    values = values_of(folder)
    assert values["sites"][1]["head_side"] == "out"
    values["sites"][1] |= change
    refusal(Decomposition.load, forge(folder, values))


@pytest.mark.parametrize("field", ["hidden", "layers", "heads", "d_mlp"])
@pytest.mark.parametrize("kind", ["component_mlp", "vector_mlp", "shared_mlp", "global_mlp", "global_transformer"])
def test_absurd_settings_of_the_importance_function(tmp_path: Path, kind: str, field: str) -> None:
    """Nothing of that size is made before it is seen that the file does not hold it."""
    config = ImportanceConfig(kind, hidden=8, layers=1, heads=1, d_mlp=4)  # type: ignore[arg-type]
    folder = small(config).save(tmp_path)
    values = values_of(folder)
    for number in (10**6, 10**9, 10**12, 10**18, 2**63 - 1, 10**30, -1, 0):
        values["importance"][field] = number
        forge(folder, values)
        senseless = number < (0 if field == "layers" else 1)
        if senseless or field == "hidden" or kind == "global_transformer":
            refusal(Decomposition.load, folder)
        else:  # a setting that this kind does not have
            with watched():
                assert getattr(Decomposition.load(folder).importance.config, field) == number  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    [
        '"info": {"a": 1, "a": 2}',
        '"info": {"a": NaN}',
        '"info": {"a": -Infinity}',
        '"info": {"a": 1e999}',
        '"info": {"a": ' + "1" * 5000 + "}",
        '"info": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '"info": {}, "info": {}',
        '"info": {"a": 01}',
        '"info": {"a": \'b\'}',
        '"info": {"a": 1,}',
        '"info": {/* nothing */}',
        '"info": {"a": "\x01"}',
    ],
    ids=lambda text: text[:30],
)
@pytest.mark.parametrize("version", [1, 2])
def test_json_that_is_none(tmp_path: Path, text: str, version: int) -> None:
    """Names that stand twice, numbers that are none, depth without end; with a checksum that fits, or in format 1."""
    folder = saved("components", tmp_path)
    values = values_of(folder) | {"info": "here"}
    if version == 1:
        forge_format_1(folder, values)
        content = (folder / METADATA).read_text().replace('"info": "here"', text)
    else:
        body = json.dumps({k: v for k, v in values.items() if k != "checksum"}, indent=1)[:-2]
        body = body.replace('"info": "here"', text)
        content = f'{body},\n "checksum": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}'
    (folder / METADATA).write_text(content)
    refusal(Decomposition.load, folder)


@pytest.mark.parametrize(
    "digest", [None, 5, "", "0" * 64, "../../secret", "/etc/passwd", "\0" * 64, "A" * 64, "g" * 64, ["0" * 64]]
)
def test_a_digest_is_never_a_path(tmp_path: Path, digest: Any) -> None:
    folder = saved("components", tmp_path / "a" / "b" / "c")
    (tmp_path / "secret.safetensors").write_bytes((folder / TENSORS).read_bytes())
    refusal(Decomposition.load, forge(folder, values_of(folder) | {"sha256": digest}))


# --- tensors that fit their checksum ----------------------------------------------------------------------------------


@BOTH_KINDS
@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16", "I32", "U8", "I64", "BOOL", "C64", "F8_E4M3", "F4", "F128"])
@pytest.mark.parametrize("only", [True, False])
def test_other_dtypes(tmp_path: Path, kind: str, dtype: str, only: bool) -> None:
    """One tensor of another dtype, or all of them of one that components cannot have; sizes and offsets fit."""
    bits = {"F64": 64, "F16": 16, "BF16": 16, "I32": 32, "U8": 8, "I64": 64, "BOOL": 8, "C64": 64, "F128": 128}
    folder = saved(kind, tmp_path)
    header, _ = split_safetensors((folder / TENSORS).read_bytes())
    header.pop("__metadata__", None)
    order, forged, begin = sorted(header, key=lambda n: header[n]["data_offsets"]), {}, 0
    for name in order:
        changed = not only or name == order[0]
        entries = int(np.prod(header[name]["shape"], dtype=int))
        size = entries * bits.get(dtype, 8 if dtype.startswith("F8") else 4) // 8 if changed else entries * 4
        forged[name] = {**header[name], "data_offsets": [begin, begin + size]}
        forged[name] |= {"dtype": dtype} if changed else {}
        begin += size
    forge(folder, values_of(folder), join_safetensors(forged, bytes(begin)))
    if only or dtype not in ("F64", "F16", "BF16"):
        refusal(LOADERS[kind], folder)
    else:
        assert {p.dtype for p in LOADERS[kind](folder).parameters()} != {torch.float32}


@BOTH_KINDS
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_no_decomposition_of_nan_or_infinity(tmp_path: Path, kind: str, number: float) -> None:
    """It is not saved, the one before stays, and it does not load from a file that holds it."""
    folder = saved(kind, tmp_path)
    before = tree(folder)
    broken = LOADERS[kind](folder)
    list(broken.parameters())[-1].data.view(-1)[-1] = number
    with pytest.raises(DecompositionFileError, match="holds NaN or infinity"):
        broken.save(folder)
    assert tree(folder) == before
    content = bytearray((folder / TENSORS).read_bytes())
    content[-4:] = struct.pack("<f", number)
    assert "NaN" in str(refusal(LOADERS[kind], forge(folder, values_of(folder), bytes(content))))


# --- names ------------------------------------------------------------------------------------------------------------
NAMES = [
    "../../escape", "/tmp/escape", "..", ".", "a/b", "a\\b", "C:\\x", "слой.0.W", "重み", "e\u0301", "\u202e", "x" * 5000,
    "importance", "a b", "a\nb", "%s", "{}", "$(touch x)", "con",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_names_are_names_and_no_paths(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a" / "b"
    made = small(names=(name, "other"))
    made.save(folder)
    assert sorted(tree(tmp_path)) == ["a", "a/b", f"a/b/{TENSORS}", f"a/b/{METADATA}"]
    with watched():
        loaded = Decomposition.load(folder)
    assert list(loaded) == [name, "other"] and loaded.sites == made.sites


def test_names_that_cannot_be_told_apart(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="differ in more"):
        small(names=("a/b", "a.b"))
    folder = small(names=("a/b", "a/c")).save(tmp_path)
    text = (folder / METADATA).read_text().replace("a/c", "a.b")
    content = (folder / TENSORS).read_bytes().replace(b"a/c", b"a.b")
    refusal(Decomposition.load, forge(folder, json.loads(text), content))


def test_a_name_that_no_file_can_hold(tmp_path: Path) -> None:
    with pytest.raises(DecompositionFileError, match="Could not save"):
        small(names=("\ud800",)).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "info",
    [{"a": float("nan")}, {1: 0, "1": 0}, {"a": {1, 2}}, {"a": 10**5000}, {"a": b"x"}, {("a",): 1}],
    ids=["nan", "names that meet", "set", "long number", "bytes", "tuple"],
)
def test_info_that_json_cannot_hold(tmp_path: Path, info: Any) -> None:
    made = small()
    made.info = info
    with pytest.raises(DecompositionFileError, match="Could not save"):
        made.save(tmp_path)
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    made.info = {"a": deep}
    with pytest.raises(DecompositionFileError, match="Could not save"):
        made.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_more_json_than_is_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small()
    made.info["a"] = "x" * 5000
    folder = made.save(tmp_path / "a")
    monkeypatch.setattr(files, "LARGEST", 4000)
    with pytest.raises(DecompositionFileError, match="no more than 4000"):
        made.save(tmp_path / "b")
    assert "at most 4000" in str(refusal(Decomposition.load, folder))


# --- format 1 ---------------------------------------------------------------------------------------------------------
def _counted(*shape: int, first: int = 0) -> torch.Tensor:
    return (torch.arange(first, first + int(np.prod(shape))).float() / 8).reshape(shape)


def test_components_of_format_1_load() -> None:
    loaded = Decomposition.load(FORMAT_1 / "components")
    assert list(loaded) == ["embed.W_E", "blocks.0.attn.W_Q", "unembed.W_U"]
    assert torch.equal(loaded["wte"].V, _counted(5, 2)) and torch.equal(loaded["wte"].U, _counted(2, 2, first=10))
    assert torch.equal(loaded["lm_head"].V, _counted(2, 2, first=10).T) and loaded.tied == {"unembed.W_U": "embed.W_E"}
    assert torch.equal(loaded["blocks.0.attn.W_Q"].U, _counted(3, 4, first=30))
    assert loaded.sites["blocks.0.attn.W_Q"].head_side == "out" and loaded.info["list"] == [1, None, 0.1]
    assert loaded.importance is not None and loaded.importance.config == ImportanceConfig("shared_mlp", 2)
    for i, tensor in enumerate(loaded.importance.state_dict().values()):
        assert torch.equal(tensor, _counted(*tensor.shape, first=100 * i))


def test_subnetworks_of_format_1_load() -> None:
    loaded = SubnetworkDecomposition.load(FORMAT_1 / "subnetworks")
    assert loaded.n_subnetworks == 3 and loaded.threshold == 0.25 and list(loaded.norms) == ["ln_final.w"]
    assert torch.equal(loaded.encoder["blocks.0.attn.W_Q"].A, _counted(3, 2, 1))
    assert torch.equal(loaded.decoder["ln_final.w"].gain, _counted(3, 2, first=150))


@BOTH_KINDS
def test_format_1_is_saved_as_format_2(tmp_path: Path, kind: str) -> None:
    folder = put(tmp_path, contents(FORMAT_1 / kind))
    assert values_of(folder)["format"] == 1
    LOADERS[kind](folder).save(folder)
    old, new = values_of(FORMAT_1 / kind), values_of(folder)
    assert new.pop("format") == 2 and len(new.pop("checksum")) == 64
    assert new == {key: value for key, value in old.items() if key != "format"}
    assert (folder / METADATA).read_bytes() == sealed({"format": 2, **new})
    assert sorted(tree(folder)) == [TENSORS, METADATA]


@BOTH_KINDS
@pytest.mark.parametrize("extra", ["checksum", "checksun", "tensors"])
def test_format_1_has_no_more_than_it_had(tmp_path: Path, kind: str, extra: str) -> None:
    folder = put(tmp_path, contents(FORMAT_1 / kind))
    text = json.dumps(values_of(folder) | {extra: "0" * 64})
    (folder / METADATA).write_text(text)
    refusal(LOADERS[kind], folder)


@BOTH_KINDS
def test_tensors_of_format_1_are_checked_too(tmp_path: Path, kind: str) -> None:
    folder = put(tmp_path, contents(FORMAT_1 / kind))
    content = (folder / TENSORS).read_bytes()
    for i in range(0, len(content), 15):
        (folder / TENSORS).write_bytes(content[:i] + bytes([content[i] ^ (1 << i // 15 % 8)]) + content[i + 1 :])
        refusal(LOADERS[kind], folder)
