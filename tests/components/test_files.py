"""Decompositions on disk: the same after loading, and a named error for whatever has happened to the files."""

import hashlib
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tl_paramdecomp import Decomposition
from tl_paramdecomp.components import files
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import DecompositionFileError, DeviceError
from tl_paramdecomp.sites import Fingerprint, WeightSite

from ..support.saved_folders import METADATA, TENSORS, forge, values_of

SITES = {
    "embed.W_E": WeightSite("embed.W_E", 7, 4, "embedding", aliases=("wte",)),
    "blocks.0.attn.W_Q": WeightSite("blocks.0.attn.W_Q", 4, 6, n_heads=2, head_side="out", has_bias=True),
    "unembed.W_U": WeightSite("unembed.W_U", 4, 7, tied_to="embed.W_E", aliases=("lm_head", "lm_head.weight")),
}


def make(
    importance: ImportanceConfig | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Decomposition:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (
            torch.randn(s.d_in, 3, generator=generator).to(dtype),
            torch.randn(3, s.d_out, generator=generator).to(dtype),
        )
        for name, s in SITES.items()
    }
    prints = {
        name: Fingerprint((s.d_in, s.d_out), "float32", 1 / 3, 0.1, (1e-30, -2.5), (0.5, 3.0))
        for name, s in SITES.items()
    }
    return Decomposition(factors, SITES, prints, importance, {"method": "none", "versions": {"torch": "2"}}, generator)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize(
    "importance",
    [None, *(ImportanceConfig(k, 5, s) for k in ("component_mlp", "shared_mlp") for s in ("clamped", "leaky"))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loaded_decomposition_is_the_saved_one(
    tmp_path: Path, importance: ImportanceConfig | None, dtype: torch.dtype
) -> None:
    saved = make(importance, dtype)
    assert saved.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    loaded = Decomposition.load(str(tmp_path / "a" / "b"))
    assert list(loaded) == list(saved) and loaded.sites == saved.sites
    assert [s.aliases for s in loaded.sites.values()] == [s.aliases for s in saved.sites.values()]
    assert loaded.fingerprints == saved.fingerprints and loaded.info == saved.info
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert all(
        torch.equal(t, loaded.state_dict()[k]) and t.dtype == loaded.state_dict()[k].dtype
        for k, t in saved.state_dict().items()
    )
    if importance is not None:
        inputs = {"embed.W_E": torch.tensor([[0, 6]]), "blocks.0.attn.W_Q": torch.randn(1, 2, 4, dtype=dtype)}
        for name, g in saved.importances(inputs).items():
            assert torch.equal(loaded.importances(inputs)[name].lower, g.lower)
            assert torch.equal(loaded.importances(inputs)[name].upper, g.upper)


def test_the_files_are_safetensors_and_json_alone(tmp_path: Path) -> None:
    make(ImportanceConfig(hidden=4)).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [TENSORS, METADATA]
    for path in tmp_path.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(path.read_bytes())
    assert "blocks.0.attn.W_Q.V" in safetensors.torch.load_file(tmp_path / TENSORS)


def test_saving_and_loading_draw_no_random_numbers(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    make(ImportanceConfig(hidden=4)).save(tmp_path)
    Decomposition.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    make(seed=0).save(tmp_path)
    make(seed=1).save(tmp_path)
    assert torch.equal(Decomposition.load(tmp_path)["wte"].V, make(seed=1)["wte"].V)


def test_other_files_of_a_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    make().save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 3


def test_a_missing_folder_or_file(tmp_path: Path) -> None:
    with pytest.raises(DecompositionFileError, match="does not exist.*Decomposition.save"):
        Decomposition.load(tmp_path / "nowhere")
    with pytest.raises(DecompositionFileError, match="not a saved decomposition"):
        Decomposition.load(tmp_path)
    make().save(tmp_path / "a")
    (tmp_path / "a" / TENSORS).unlink()
    with pytest.raises(DecompositionFileError, match=TENSORS) as caught:
        Decomposition.load(tmp_path / "a")
    assert isinstance(caught.value, OSError)


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    for use in (make().save, Decomposition.load):
        with pytest.raises(DecompositionFileError, match="is a file"):
            use(path)
    with pytest.raises(DecompositionFileError, match="Could not save"):
        make().save(path / "inside")
    assert path.read_text() == "mine"


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_tensors(tmp_path: Path, length: int) -> None:
    make().save(tmp_path)
    content = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(content[:length])
    with pytest.raises(DecompositionFileError, match=TENSORS):
        Decomposition.load(tmp_path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "JSON"),
        ("{not json", "JSON"),
        ("[1, 2]", "format None"),
        ('{"format": 3}', "format 3.*reads formats 1 and 2"),
        ('{"format": 2}', "checksum"),
        ('{"format": true}', "format True"),
        ('{"name": "another tool"}', "format None"),
        ('"\\ud800"', "format None"),
    ],
)
def test_json_of_something_else(tmp_path: Path, text: str, said: str) -> None:
    make().save(tmp_path)
    (tmp_path / METADATA).write_text(text)
    with pytest.raises(DecompositionFileError, match=said):
        Decomposition.load(tmp_path)
    before = digest(tmp_path)
    with pytest.raises(DecompositionFileError, match=said):
        make().save(tmp_path)
    assert digest(tmp_path) == before


def test_tensors_of_something_else_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / TENSORS).write_bytes(b"mine")
    with pytest.raises(DecompositionFileError, match="of its own"):
        make().save(tmp_path)
    assert (tmp_path / TENSORS).read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


def test_binary_rubbish_as_json(tmp_path: Path) -> None:
    make().save(tmp_path)
    (tmp_path / METADATA).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DecompositionFileError, match=f"{METADATA} cannot be read.*utf-8"):
        Decomposition.load(tmp_path)


def test_tensors_of_another_decomposition_are_noticed(tmp_path: Path) -> None:
    make(seed=0).save(tmp_path / "a")
    make(seed=1).save(tmp_path / "b")
    (tmp_path / "b" / TENSORS).replace(tmp_path / "a" / TENSORS)
    with pytest.raises(DecompositionFileError, match="not the file that decomposition.json describes.*replaced"):
        Decomposition.load(tmp_path / "a")


@pytest.mark.parametrize("broken", ["sites", "fingerprints", "importance", "info", "extra"])
def test_metadata_that_does_not_agree(tmp_path: Path, broken: str) -> None:
    make(ImportanceConfig(hidden=4)).save(tmp_path)
    metadata = values_of(tmp_path)
    if broken == "sites":
        metadata["sites"][0]["d_in"] = 8
    elif broken == "extra":
        metadata["sites"][0]["colour"] = "blue"
    elif broken == "importance":
        metadata["importance"]["hidden"] = 5
    elif broken == "fingerprints":
        del metadata["fingerprints"]["embed.W_E"]
    else:
        del metadata["info"]
    with pytest.raises(DecompositionFileError, match="agree with each other.*damaged or was edited"):
        Decomposition.load(forge(tmp_path, metadata))


def test_an_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # permission bits do not bind root, as which tests may run
    with pytest.raises(DecompositionFileError, match="Could not save.*Permission denied"):
        make().save(tmp_path / "a")


def test_a_full_disk_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(seed=0).save(tmp_path)
    before = digest(tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(DecompositionFileError, match="No space left"):
        make(seed=1).save(tmp_path)
    assert digest(tmp_path) == before


def test_what_json_cannot_hold(tmp_path: Path) -> None:
    saved = make()
    saved.info["model"] = object()
    with pytest.raises(DecompositionFileError, match="not JSON serializable"):
        saved.save(tmp_path / "a")
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").iterdir())


def test_components_without_numbers_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(DecompositionFileError, match="meta"):
        make().to("meta").save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    make().save(tmp_path)
    with pytest.raises(DeviceError, match="cuda:99"):
        Decomposition.load(tmp_path, device="cuda:99")


def test_loading_onto_a_device(tmp_path: Path) -> None:
    make(ImportanceConfig(hidden=4)).save(tmp_path)
    assert {p.device.type for p in Decomposition.load(tmp_path, device=torch.device("cpu")).parameters()} == {"cpu"}
