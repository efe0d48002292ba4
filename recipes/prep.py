"""Turn chat data into packed training data: template, tokens, loss mask, packs, splits.

  python recipes/prep.py blend=tiny                                the data in this repository
  python recipes/prep.py blend=my.json tokenizer.model=PATH_OR_HUB_ID
  python recipes/prep.py blend=nano3 sample=1000                   1,000 records of each open dataset
  python recipes/show.py output/data/tiny --pack 7                 look at a pack

A rerun continues where an interrupted run stopped, and does nothing if nothing changed.
"""

import sys

from omegaconf import DictConfig

from nemotron_sft import app
from nemotron_sft.config import Prep, check
from nemotron_sft.console import say


def main(cfg: DictConfig) -> None:
    config = check(cfg, Prep)
    from nemotron_sft.data import prep, report, tracked  # the first heavy import
    from nemotron_sft.record import wandb

    if config.shard is not None:
        print(prep.run_shard(config))
        return
    wandb.check(config.tracking)
    metadata = prep.run(config)
    tracked.record_data(config.tracking, cfg, metadata)
    report.print_report(metadata)
    directory = metadata["directory"]
    if metadata["unchanged"]:
        say(f"Nothing changed: {directory} is up to date (force=true prepares it again)", sys.stdout)
    else:
        say(f"Wrote {directory}; {directory}/report.html shows the mix and some packs", sys.stdout)


if __name__ == "__main__":
    app.run(main, "prep")
