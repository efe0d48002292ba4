"""Turn chat data into packed training data: python recipes/prep.py [group=option] [key=value ...] (--help)."""

from omegaconf import DictConfig

from nemotron_sft import app
from nemotron_sft.config import Prep, check


def main(cfg: DictConfig) -> None:
    config = check(cfg, Prep)
    from nemotron_sft import prep

    print(prep.run(config)["splits"])


if __name__ == "__main__":
    app.run(main, "prep")
