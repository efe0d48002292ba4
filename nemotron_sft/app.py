"""What the entry points share: Hydra start-up, one-line errors with exit status 2, and friendlier overrides."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable

from nemotron_sft.config import nearest
from nemotron_sft.errors import UserError
from nemotron_sft.paths import CONF, ROOT, USER_CONF
from nemotron_sft.slurm import node, submit

sys.path.append(str(ROOT))  # where Hydra finds hydra_plugins


def run(task: Callable, config_name: str) -> None:
    """Compose conf/`config_name`.yaml with the command line's overrides and call `task(cfg)`.

    Exits with 0, with 2 and one line on stderr for anything the user can mend, and with a traceback otherwise.
    With -m and cluster=slurm the config goes to a job instead, which comes back here with --frozen.
    """
    if sys.argv[1:2] == ["--frozen"]:
        return node.run(task, sys.argv[1:])
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # Let exceptions reach us instead of Hydra's own reporter, which exits with 1 and hides the key's neighbours.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = [open_key(part) for argument in sys.argv[1:] for part in spelled_out(argument)]

    @functools.wraps(task)
    def guarded(cfg):
        try:
            if "preflight" not in cfg or not cfg.preflight:  # which runs nothing, and so may run anywhere
                submit.here(cfg.cluster)
            task(cfg)
        except UserError as error:  # caught here, because Hydra would add a line of its own
            fail(str(error))
        except BrokenPipeError:  # `... | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + 13)

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error, config_name))
    except UserError as error:  # of a submission
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> None:
    """Print one error line and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def spelled_out(argument: str) -> list[str]:
    """`blend=my.json` as `blend=file blend.path=my.json`, and `template=my.jinja` alike."""
    if match := re.fullmatch(r"(?:(blend)=[^,]+\.(?:json|ya?ml)|(template)=[^,]+\.(?:jinja2?|j2))", argument):
        group = match[1] or match[2]
        return [f"{group}=file", f"{group}.{'path' if match[1] else 'name'}={argument.partition('=')[2]}"]
    return [argument]


def open_key(argument: str) -> str:
    """`a.b=1` becomes `++a.b=1`, so that Hydra lets every dotted key pass and config.check judges them all.

    Hydra itself knows only the keys spelled out in conf/; Megatron-Bridge has hundreds more. `data=PATH` is
    short for `data.path=PATH`, `export=RUN_DIR` for `export.run=RUN_DIR`, and `prep.shards=N` the same as `shards=N`.
    """
    argument = re.sub(r"^data=", "data.path=", argument)
    argument = re.sub(r"^export=", "export.run=", argument)
    argument = re.sub(r"^prep\.shards=", "shards=", argument)
    return f"++{argument}" if re.match(r"(?!hydra\.)[a-z_]\w*(\.\w+)+=", argument) else argument


def explain(error: Exception, config_name: str) -> str:
    """One line for an error of Hydra's own: unknown top-level keys and missing group options name the nearest."""
    text = str(error)
    groups = [entry.name for entry in CONF.iterdir() if entry.is_dir()]
    if match := re.search(r"Could not override '([\w.]+)'", text):
        key = match[1]
        found = re.findall(r"^(\w+):", (CONF / f"{config_name}.yaml").read_text(), flags=re.MULTILINE)
        top = [name for name in found if name not in ("defaults", "hydra")]
        best = nearest(key, [*top, *groups])
        return f"unknown key {key}" + (f": did you mean {best}?" if best else f": known keys: {', '.join(top)}")
    if match := re.search(r"Could not find '([\w.-]+)/([\w./-]+)'", text):
        group, option = match[1], match[2]
        options = sorted(p.stem for root in (CONF, USER_CONF) for p in (root / group).glob("*.yaml"))
        best = nearest(option, options)
        hint = f"did you mean {group}={best}? " if best else ""
        return f"no {group} named {option}: {hint}available: {', '.join(options)}"
    return " ".join(text.split())
