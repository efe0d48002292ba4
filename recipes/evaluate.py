"""Run lm-eval on a model: python recipes/evaluate.py RUN_OR_HF_DIR --tasks tiny [--against BASE] (--help)"""

from pathlib import Path

from nemotron_sft import app

DESCRIPTION = """\
Run tasks of EleutherAI's lm-eval on a run's newest checkpoint, or on a Hugging Face directory.
The scores, with standard errors, are printed and written to evaluation-TASKS.json in the run directory.
"""
EPILOG = """\
tasks: `tiny`, made of this repository's prompts; FILE.jsonl of prompts as heldout.path takes it; any name that
`lm_eval ls tasks` lists, whose data comes from the hub.

examples:
  python recipes/evaluate.py output/train/tiny-DATE --tasks tiny
  python recipes/evaluate.py output/train/mine-DATE --tasks gsm8k,ifeval --chat --against Qwen/Qwen3-8B --limit 200
"""


def main() -> None:
    parser = app.Parser(description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", type=Path, metavar="RUN_OR_HF_DIR", help="a run directory or a Hugging Face directory")
    parser.add_argument("--tasks", required=True, metavar="TASK,...", help="what to run")
    parser.add_argument("--against", metavar="BASE", help="compare with this run, Hugging Face directory or hub id")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N samples of each task")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="samples at a time (16)")
    parser.add_argument("--chat", action="store_true", help="put the questions of lm-eval's tasks in the chat template")
    parser.add_argument("--thinking", action="store_true", help="let the model reason; what follows that is scored")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer, reasoning included")
    arguments = parser.parse_args()
    tasks = tuple(filter(None, arguments.tasks.split(",")))
    numbers = {"--limit": arguments.limit, "--batch-size": arguments.batch_size,
               "--max-new-tokens": arguments.max_new_tokens}  # fmt: skip
    if not tasks:
        raise app.UserError("--tasks must name a task")
    if bad := next((name for name, number in numbers.items() if number is not None and number < 1), None):
        raise app.UserError(f"{bad} must be at least 1")

    from nemotron_sft.train.harness import Settings, evaluate  # heavy

    settings = Settings(
        tasks, arguments.limit, arguments.batch_size, arguments.chat, arguments.thinking, arguments.max_new_tokens
    )
    evaluate(arguments.model, arguments.against, settings)


if __name__ == "__main__":
    app.command(main)
