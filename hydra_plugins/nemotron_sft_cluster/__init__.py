"""Hydra plugins: `-m` submits jobs, and options of one's own are found.

Hydra imports every plugin at each start, so nothing heavy is imported here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher


class ClusterLauncher(SlurmLauncher):
    """-m cluster=local runs the jobs of a sweep one after another, -m cluster=slurm submits them.

    Freezes every job's config here and now, and lets nemotron_sft.slurm submit them.

    The stock launcher composes on the node when the job starts, so that edits of conf/ reach queued jobs; it sees
    only rank 0's errors; and it reports failed jobs to Slurm as completed.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        from nemotron_sft.slurm import submit

        if self.config.cluster.kind == "local":
            status = submit.run_here(job_overrides)
        else:
            compose = self.hydra_context.config_loader.load_sweep_config
            configs = [compose(self.config, list(overrides)) for overrides in job_overrides]
            status = submit.launch(self.config.hydra.job.config_name, configs)
        if status:
            raise SystemExit(status)
        return []


class ClusterSweeper(BasicSweeper):
    """All combinations of the values given, in one launch. Unlike Hydra's own it writes no multirun.yaml."""

    def sweep(self, arguments: list[str]) -> Any:
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        (jobs,) = self.split_arguments(parser.parse_overrides(arguments), max_batch_size=None)
        return [self.launcher.launch(jobs, initial_job_idx=0)]


class UserConfigs(SearchPathPlugin):
    """~/.config/nemotron-sft is searched after conf/: cluster/mine.yaml there is cluster=mine."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own = Path.home() / ".config" / "nemotron-sft"
        if own.is_dir():
            search_path.append("user", f"file://{own}")


here = "hydra_plugins.nemotron_sft_cluster"
store = ConfigStore.instance().store
store(group="hydra/launcher", name="cluster", node={"_target_": f"{here}.ClusterLauncher"})
store(
    group="hydra/sweeper",
    name="cluster",
    node={"_target_": f"{here}.ClusterSweeper", "max_batch_size": None, "params": None},
)
