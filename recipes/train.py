"""Fine-tune a model on packed chat data with Megatron-Bridge.

  python recipes/train.py                                tiny model, newest prep output, this machine
  python recipes/train.py optimizer.lr=1e-5 train.epochs=3 data=output/data/mine
  python recipes/train.py experiment=nano3_sft           a whole named run
  torchrun --nproc_per_node=8 recipes/train.py ...       all GPUs of this machine
  python recipes/train.py run_dir=output/train/tiny-...  resume

Every field of Megatron-Bridge's config sections is a key, also those that are not listed here.
"""

from nemotron_sft import app
from nemotron_sft.config import TrainConfig, check


def main(cfg) -> None:
    config = check(cfg, TrainConfig)
    from nemotron_sft.train.run import train  # the first heavy import

    train(config, cfg)


if __name__ == "__main__":
    app.run(main, "train")
