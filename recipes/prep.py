"""Turn chat data into packed training data: python recipes/prep.py [group=option] [key=value ...] (--help)"""

from omegaconf import DictConfig

from nemotron_sft import app
from nemotron_sft.config import Prep, check


def main(cfg: DictConfig) -> None:
    config = check(cfg, Prep)
    from nemotron_sft.data import prep, report, tracked  # the first heavy import
    from nemotron_sft.record import show, wandb

    if config.lineage:
        show.show(config.lineage)
        return
    if config.inspect:
        report.inspect(config.inspect, config.pack)
        return
    if config.shard is not None:
        print(prep.run_shard(config))
        return
    wandb.check(config.tracking)
    metadata = prep.run(config)
    tracked.record_data(config.tracking, cfg, metadata)
    report.print_report(metadata)
    directory = metadata["directory"]
    if metadata["unchanged"]:
        print(f"Nothing changed: {directory} is up to date (force=true prepares it again)")
    else:
        print(f"Wrote {directory}; {directory}/report.html shows the mix and some packs")


if __name__ == "__main__":
    app.run(main, "prep")
