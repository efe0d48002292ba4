"""What the training benchmarks share: data, clock, observer, profile, and one process per case."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
