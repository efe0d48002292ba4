"""Look at an output: python recipes/show.py PATH [--pack N] (--help)"""

from pathlib import Path

from nemotron_sft import app

DESCRIPTION = "Look at prepared data, a training run, or a checkpoint."
EPILOG = """\
examples:
  python recipes/show.py output/data/tiny                  its mix, lengths, drops, and where it comes from
  python recipes/show.py output/data/tiny --pack 7         a pack as text: what is trained is green
  python recipes/show.py output/data/tiny/validation.npy   the first pack of another split
  python recipes/show.py output/train/tiny-DATE            a summary of a run, and where it comes from
"""


def main() -> None:
    parser = app.Parser(description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("path", type=Path, metavar="PATH", help="prepared data, a file of packs, a run or a checkpoint")
    parser.add_argument("--pack", type=int, metavar="N", help="show this pack of prepared data, counted from 0")
    arguments = parser.parse_args()
    show(arguments.path, arguments.pack)


def show(path: Path, pack: int | None) -> None:
    """Print what there is to see of `path`. Raises UserError for a path that is no output."""
    from nemotron_sft.data import report
    from nemotron_sft.data.packed import read_metadata
    from nemotron_sft.record import lineage
    from nemotron_sft.record.show import print_lineage
    from nemotron_sft.train.show import find_run, print_run

    if pack is not None or path.is_file():
        report.print_pack(path, pack or 0)
        return
    if run_dir := find_run(path):  # first: a Megatron checkpoint has a metadata.json of its own
        print_run(run_dir)
    elif (path / "metadata.json").exists():
        report.print_report(read_metadata(path))
    elif not lineage.find(path):
        raise app.UserError(f"{path} is no output: give prepared data, a run directory, or a checkpoint of one")
    print_lineage(path)


if __name__ == "__main__":
    app.command(main)
