"""Fine-tune a model on packed chat data: python recipes/train.py [group=option] [key=value ...] (--help)."""

from nemotron_sft import app
from nemotron_sft.config import TrainConfig, check


def main(cfg) -> None:
    config = check(cfg, TrainConfig)
    if config.lineage:
        from nemotron_sft.record import show

        show.show(config.lineage)
        return
    from nemotron_sft.train.run import train  # the first heavy import

    train(config, cfg)


if __name__ == "__main__":
    app.run(main, "train")
