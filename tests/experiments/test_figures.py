"""Figures of toy targets: what they show is what was computed, and matplotlib is needed for nothing else."""

import subprocess
import sys

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.toy_models import TMS, ResidMLP, ResidMLPConfig, TMSConfig

matplotlib = pytest.importorskip("matplotlib")

from tl_paramdecomp.experiments import figures as toys  # noqa: E402
from tl_paramdecomp.report.plotting import save  # noqa: E402

METHOD = tlpd.SPD(n_components=6, measure="mse", start="random", warm_up_steps=5,
                  importance=ImportanceConfig("component_mlp", hidden=4))  # fmt: skip


def decomposed(model, sites, features):
    x = torch.rand(8, features, generator=torch.Generator().manual_seed(0))
    return tlpd.decompose(model, sites, METHOD, x, steps=1, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def tms():
    torch.manual_seed(0)
    model = TMS(TMSConfig(4, 2, identity=True))
    return model, decomposed(model, "*", 4)


@pytest.fixture(scope="module")
def resid():
    torch.manual_seed(0)
    model = ResidMLP(ResidMLPConfig(2, n_features=4, d_resid=8, n_neurons=6))
    torch.nn.init.normal_(model.W_E)
    return model, decomposed(model, "layers.*", 4)


def test_vectors_are_those_of_the_target(tms):
    figure = toys.vector_figure(*tms)
    panels = {(row, ax.get_title()): ax for row in (0, 1) for ax in figure.axes[row * len(figure.axes) // 2 :][:1]}
    W = tms[0].linear1.weight.detach().T
    for ax in panels.values():
        assert ax.get_title() == "target"
        ends = [line.get_xydata()[0].tolist() for line in ax.lines if len(line.get_xydata()) == 1]
        assert torch.allclose(torch.tensor(ends[:4]), W if ax is figure.axes[0] else tms[0].linear2.weight.detach())
    assert [t.get_text() for t in figure.legends[0].texts] == [f"feature {j}" for j in range(4)]


def test_importances_stand_in_the_features_order():
    matrix = torch.zeros(3, 7)
    matrix[range(3), [4, 0, 6]] = 1.0
    matrix[1, 2] = 0.5
    figure = toys.importance_figure({"a.weight": matrix, "b.weight": matrix}, spare=0.5)
    shown = torch.tensor(figure.axes[0].images[0].get_array().tolist())
    assert shown.shape == (3, 5) and torch.equal(shown[:, :3], torch.eye(3))
    assert shown[1, 3] == 0.5  # what is left over comes after, strongest first
    assert figure.axes[0].get_title() == "a.weight" and "5 of 7" in figure.axes[0].get_xlabel()


def test_neurons_stand_by_feature(resid):
    figure = toys.neuron_figure(*resid, n_features=3)
    dots = figure.axes[0].collections[0].get_offsets()
    assert len(dots) == 3 * 6
    assert [ax.get_title() for ax in figure.axes[:2]] == ["target", "component of the feature"]


def test_figures_are_written_and_leave_settings_alone(tms, tmp_path):
    before = dict(matplotlib.rcParams)
    written = save(toys.vector_figure(*tms), tmp_path / "new" / "vectors.png")
    assert written.read_bytes().startswith(b"\x89PNG") and dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_extra_is_named():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from tl_paramdecomp.errors import MissingExtraError\n"
        "from tl_paramdecomp.experiments.figures import importance_figure\n"
        "import torch\n"
        "try: importance_figure({'a': torch.eye(2)})\n"
        "except MissingExtraError as error: print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tl-paramdecomp[plots]" in shown.stdout
