"""submitit's text of an sbatch script."""

from __future__ import annotations

from typing import Any

from nemotron_sft.train.compat.registry import patch

PARAMETERS = (
    "(command, folder, job_name, partition, time, nodes, ntasks_per_node, cpus_per_task, cpus_per_gpu, num_gpus, "
    "gpus_per_node, gpus_per_task, qos, setup, teardown, mem, mem_per_gpu, mem_per_cpu, signal_delay_s, comment, "
    "constraint, exclude, account, gres, mail_type, mail_user, nodelist, dependency, exclusive, array_parallelism, "
    "wckey, stderr_to_stdout, map_count, additional_parameters, srun_args, use_srun)"
)


@patch(
    {"submitit.slurm.slurm:_make_sbatch_string": PARAMETERS},
    seen="submitit 1.5.4",
    until="submitit can write the script of a command, not only of a pickled function",
)
def sbatch_script(**settings: Any) -> str:
    """submitit's executors submit a pickled Python function; the script around a command of one's own is private."""
    from submitit.slurm.slurm import _make_sbatch_string

    return _make_sbatch_string(**settings)
