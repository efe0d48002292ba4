"""Export a run's newest checkpoint to Hugging Face's format: python recipes/export.py RUN_DIR (--help)"""

from pathlib import Path

from nemotron_sft import app

DESCRIPTION = """\
Write the newest checkpoint of a training run as a Hugging Face directory: weights, config, tokenizer, chat template.
It appears under its name only when it was read back and found equal to the trained model.
"""


def main() -> None:
    parser = app.Parser(description=DESCRIPTION)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the directory of a training run")
    parser.add_argument("--out", metavar="DIR", help="where to write it (RUN_DIR/hf)")
    arguments = parser.parse_args()

    from nemotron_sft.train.export import export_run  # heavy

    export_run(arguments.run_dir, arguments.out)


if __name__ == "__main__":
    app.command(main)
