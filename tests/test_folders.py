from pathlib import Path

from moebox.folders import config_folder, data_folder, state_folder


def test_the_specification_of_xdg_holds(monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere/data")
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/ignored")
    assert data_folder() == Path("/somewhere/data/moebox")
    assert state_folder() == Path.home() / ".local/state/moebox"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert data_folder() == Path.home() / ".local/share/moebox"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere/config")
    assert config_folder() == Path("/somewhere/config/moebox")
