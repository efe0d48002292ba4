"""Exports, as far as no model is needed: what is refused, and how much memory there is."""

import pytest

from nemotron_sft.errors import UserError
from nemotron_sft.train import export, memory


def test_a_model_that_is_gone_is_named(tmp_path, monkeypatch):
    """Its config.json says what is exported, so a directory that has moved is one line, not a search on the hub."""
    monkeypatch.setattr(export, "newest_iteration", lambda path: path / "iter_0000002")
    monkeypatch.setattr(export, "read_metadata", lambda path: {})
    for source, refused in (("base", True), ("/models/some/base", True), ("Qwen/Qwen3-8B", False)):
        config = f"init_from: {source}\nmodel: {{hf: {source}}}\ndata: {{path: data}}\n"
        (tmp_path / "config.yaml").write_text(config)
        if refused:
            with pytest.raises(UserError, match=f"{source}, the model that .* started from, is not there any more"):
                export._job(tmp_path, None)
        else:
            assert export._job(tmp_path, None).source == source


def test_memory_left_in_control_groups_of_both_versions(tmp_path):
    """A Slurm step inside a job with a limit; version 1 beside version 2; a container that hides its parents."""
    mine, root = tmp_path / "cgroup", tmp_path / "root"
    mine.write_text("4:memory:/slurm/job_1/step_0\n3:cpuset:/\n0::/system.slice/job_1/step_0\n")

    def group(path, **files):
        (root / path).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (root / path / f"memory.{name}").write_text(f"{value}\n")

    assert not list(memory.left_in_groups(mine, root))
    group("system.slice/job_1/step_0", max="max", current=5)
    group("system.slice/job_1", max=1000, current=400)
    group("memory/slurm/job_1", limit_in_bytes=900, usage_in_bytes=100)
    assert sorted(memory.left_in_groups(mine, root)) == [600, 800]
    group("", max=700, current=300)  # of a container
    assert sorted(memory.left_in_groups(mine, root)) == [400, 600, 800]
    assert not list(memory.left_in_groups(tmp_path / "none", root))
