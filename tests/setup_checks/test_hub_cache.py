"""Whether models can be downloaded."""

from engine.setup_checks.hub_cache import HubFacts, is_writeable, judge_hub


def test_a_folder_that_can_be_created_is_writeable_and_a_file_is_not(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert is_writeable(tmp_path) and is_writeable(tmp_path / "a" / "b")
    assert not is_writeable(file) and not is_writeable(file / "a")


def test_a_folder_that_is_read_only_matters_only_for_downloads():
    read_only = HubFacts("node1", "/models", is_writeable=False, is_offline=False)
    assert judge_hub([read_only]).status == "warning" and "node1" in judge_hub([read_only]).text
    assert judge_hub([HubFacts("node1", "/models", is_writeable=False, is_offline=True)]).status == "ok"
    assert judge_hub([HubFacts("node1", "/models", is_writeable=True, is_offline=False)]).status == "ok"
