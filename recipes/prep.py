"""Turn chat data into packed training data: python recipes/prep.py [group=option] [key=value ...] (--help)."""

from omegaconf import DictConfig

from nemotron_sft import app
from nemotron_sft.config import Prep, check


def main(cfg: DictConfig) -> None:
    config = check(cfg, Prep)
    if config.inspect:
        from nemotron_sft.report import inspect

        inspect(config.inspect)
        return

    from nemotron_sft.prep import run
    from nemotron_sft.report import print_report

    metadata = run(config)
    print_report(metadata)


if __name__ == "__main__":
    app.run(main, "prep")
