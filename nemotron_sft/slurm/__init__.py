"""Jobs on a Slurm cluster: submitted, followed, and run on their nodes."""
