import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The runs are tiny: two threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """It takes longer than a tiny run."""
    for module in ("reporter",):
        monkeypatch.setattr(f"cs_lm.training.{module}.plotted", lambda *_: "no plot")
