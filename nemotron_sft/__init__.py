"""nemotron-sft: chat data in, fine-tuned Nemotron-class model out. Importing this package is cheap."""

__version__ = "0.2.0"
