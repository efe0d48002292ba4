"""What the commands share: Hydra start-up, one-line errors with exit status 2, and friendlier overrides."""

from __future__ import annotations

import argparse
import functools
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemotron_sft.config import nearest
from nemotron_sft.console import say
from nemotron_sft.errors import UserError
from nemotron_sft.paths import CONF, ROOT, USER_CONF
from nemotron_sft.slurm import node, submit

APPS = ("prep", "train")  # the Hydra apps: conf/NAME.yaml and recipes/NAME.py
# Keys that are commands of their own now.
COMMANDS = {
    "inspect": "recipes/show.py {}",
    "pack": "recipes/show.py PATH --pack {}",
    "lineage": "recipes/show.py {}",
    "export": "recipes/export.py {}",
    "export.run": "recipes/export.py {}",
}
# Hydra imports every plugin that is installed, at each start. multi-storage-client, which Megatron-Core depends on,
# brings one that reads configs from object stores: we do not use it, and it takes 0.4 s. None in sys.modules is
# Python's own way to say that a module cannot be imported. Can go when the plugin imports its package lazily
# (seen in multi-storage-client 0.51).
UNUSED_PLUGINS = ("hydra_plugins.hydra_msc_plugin",)


def run(task: Callable, config_name: str) -> None:
    """Compose conf/`config_name`.yaml with the command line's overrides and call `task(cfg)`; see `command`.

    With -m and cluster=slurm the config goes to a job instead, which comes back here with --frozen.
    """
    if sys.argv[1:2] == ["--frozen"]:
        return node.run(task, sys.argv[1:])
    command(lambda: compose(task, config_name))


def command(main: Callable[[], None]) -> None:
    """Call `main`, and turn its end into an exit status.

    0; 2 and one line on stderr for anything the user can fix; 130 for Ctrl-C; 141 where the reader of the output has
    seen enough (`... | head`); a traceback for any other error.
    """
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still in the buffer
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> None:
    """Print one error line and exit with status 2."""
    say(f"error: {message}")
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Of a plain command: --help keeps the line ends of its texts, and a wrong argument is one line."""

    def __init__(self, **texts: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **texts)

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(f"{message}; see python recipes/{self.prog} --help")


def compose(task: Callable, config_name: str) -> None:
    """Let Hydra compose the config and call `task` with it. Raises UserError for whatever Hydra refuses."""
    for name in UNUSED_PLUGINS:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    import hydra
    from hydra.errors import HydraException

    sys.path.append(str(ROOT))  # where Hydra finds hydra_plugins
    # Let exceptions reach us instead of Hydra's own reporter, which exits with 1 and hides the key's neighbours.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = overrides(sys.argv[1:], config_name)

    def checked(cfg: Any) -> None:
        if "preflight" not in cfg or not cfg.preflight:  # which runs nothing, and so may run anywhere
            submit.here(cfg.cluster)
        task(cfg)

    @functools.wraps(task)
    def guarded(cfg: Any) -> None:  # a `command` in itself, because Hydra adds lines of its own to what a task raises
        command(lambda: checked(cfg))

    try:
        if {"--help", "-h"} & set(sys.argv):  # Hydra's own lists every group there is, and takes a second more
            return print(help_text(sys.modules[task.__module__].__doc__ or "", config_name, sys.argv[1:]))
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, config_name)) from None


# --- the command line --------------------------------------------------------------------------------------


def overrides(arguments: list[str], config_name: str) -> list[str]:
    """The command line as Hydra is to read it.

    Raises UserError for keys that are commands of their own, and for dotted keys below one that the app does not have.
    """
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        if equals and key in COMMANDS and not value.startswith("{"):
            raise UserError(f"{key}= is a command of its own: python {COMMANDS[key].format(value)}")
    opened = [open_key(part) for argument in arguments for part in spelled_out(argument)]
    for argument in opened:
        top = argument.removeprefix("++").partition(".")[0]
        if argument.startswith("++") and top not in own_keys(config_name):
            raise UserError(unknown(top, config_name))
    return opened


def spelled_out(argument: str) -> list[str]:
    """`blend=my.json` as `blend=file blend.path=my.json`, and `template=my.jinja` alike."""
    if match := re.fullmatch(r"(?:(blend)=[^,]+\.(?:json|ya?ml)|(template)=[^,]+\.(?:jinja2?|j2))", argument):
        group = match[1] or match[2]
        return [f"{group}=file", f"{group}.{'path' if match[1] else 'name'}={argument.partition('=')[2]}"]
    return [argument]


def open_key(argument: str) -> str:
    """`a.b=1` becomes `++a.b=1`, so that Hydra lets every dotted key pass and config.check judges them all.

    Hydra itself knows only the keys spelled out in conf/; Megatron-Bridge has hundreds more. `data=PATH` is
    short for `data.path=PATH`, and `prep.shards=N` the same as `shards=N`.
    """
    argument = re.sub(r"^data=", "data.path=", argument)
    argument = re.sub(r"^prep\.shards=", "shards=", argument)
    return f"++{argument}" if re.match(r"(?!hydra\.)[a-z_]\w*(\.\w+)+=", argument) else argument


# --- groups, and what to say about wrong ones --------------------------------------------------------------


def groups(config_name: str) -> list[str]:
    """The config groups of an app: those that the defaults list of its conf file names."""
    text = (CONF / f"{config_name}.yaml").read_text()
    named = re.findall(r"^  - (\w+): ", text, flags=re.MULTILINE)
    return sorted(named)


def options(group: str) -> list[str]:
    """The options of a config group, the user's own among them."""
    return sorted({file.stem for root in (CONF, USER_CONF) for file in (root / group).glob("*.yaml")})


def own_keys(config_name: str) -> list[str]:
    """The top-level keys of an app, its groups among them."""
    text = (CONF / f"{config_name}.yaml").read_text()
    return [*re.findall(r"^(?!defaults|hydra)(\w+):", text, flags=re.MULTILINE), *groups(config_name)]


def help_text(about: str, config_name: str, arguments: list[str]) -> str:
    """What --help prints: what the app is for, its groups with their options, and the config as composed."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(config_name, [argument for argument in arguments if not argument.startswith("-")])
    listed = "\n".join(f"{group}: {', '.join(options(group))}" for group in groups(config_name))
    keys = "Keys (key=value) and their values"
    return f"{about}\nGroups (group=option)\n\n{listed}\n\n{keys}\n\n{OmegaConf.to_yaml(cfg)}"


def explain(error: Exception, config_name: str) -> str:
    """One line for an error of Hydra's own: unknown top-level keys and missing group options name the nearest."""
    text = str(error)
    if match := re.search(r"Could not override '([\w.]+)'", text):
        return unknown(match[1], config_name)
    if match := re.search(r"Could not find '([\w.-]+)/([\w./-]+)'", text):
        group, option = match[1], match[2]
        best = nearest(option, options(group))
        hint = f"did you mean {group}={best}? " if best else ""
        return f"no {group} named {option}: {hint}available: {', '.join(options(group))}"
    return " ".join(text.split())


def unknown(key: str, config_name: str) -> str:
    """What to say of a top-level key that an app does not have."""
    own = own_keys(config_name)
    if others := [app for app in APPS if key in own_keys(app)]:
        return f"{key} is a key of recipes/{others[0]}.py: recipes/{config_name}.py has no use for it"
    best = nearest(key, own)
    return f"unknown key {key}: " + (f"did you mean {best}?" if best else f"known keys: {', '.join(sorted(own))}")
