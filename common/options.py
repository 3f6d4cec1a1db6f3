"""Options of a command: one frozen dataclass, from which its command line and its `modal run` signature are made.

Each command's dataclass lives in the config.py of its package, and is stored in every checkpoint and result. Nothing
here or there needs torch, so that --help and a remote launch are quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import operator
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

from common.errors import UserError

SHA256 = re.compile("[0-9a-f]{64}")


def option(
    default: Any,
    help: str,
    *,
    path: bool = False,
    may_change: bool = False,
    in_tag: bool = False,
    plain_name: bool = False,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    recipes: dict[str, dict[str, Any]] | None = None,
    quotes: type[ResultsOptions] | None = None,
) -> Any:  # Any: as dataclasses.field, it stands where a value of the field's type does
    """A dataclass field, and all that is to be known of an option.

    Args:
        default: dataclasses.MISSING if it must be given.
        help: the one sentence that --help shows.
        path: it names a file or folder, which on Modal lies on the Volume. It may change, like the next.
        may_change: an interrupted run may resume with another value, because it touches no result.
        in_tag: it makes the run another, so that any value but the default stands in the run's name.
        plain_name: it becomes the name of a folder.
        above, at_least, below: bounds of a number.
        recipes: the named sets of options that it chooses from.
        quotes: it holds options of the command with this dataclass.
    """
    about = {name: value for name, value in locals().items() if name != "default"}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class ResultsOptions:
    """Where a command writes; every other option class derives from this one."""

    results_dir: str = option("results", "folder that everything is read from and written to", may_change=True)

    def __post_init__(self) -> None:
        """Check what `option` says of each value; UserError if a number is out of bounds, or a name is no name."""
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), flag_of(field.name)
            about = field.metadata
            for bound, holds in (("above", operator.gt), ("at_least", operator.ge), ("below", operator.lt)):
                if about[bound] is not None and not (holds(value, about[bound]) and math.isfinite(value)):
                    raise UserError(
                        f"{flag} is {value}; it must be {bound.replace('_', ' ')} {about[bound]}, and finite"
                    )
            empty = not value and bool(field.default)
            if about["plain_name"] and (empty or value.startswith(".") or "/" in value or "\\" in value):
                raise UserError(f"{flag} {value!r} must be a plain folder name, without slashes or a leading dot")


@dataclass(frozen=True, kw_only=True)
class SeedOptions(ResultsOptions):
    """Options of a command that draws at random and writes."""

    seed: int = option(42, "seed of every random draw of this command", at_least=0, below=2**63)
    restart: bool = option(
        False, "replace a finished run or suite of the same name; an unfinished one resumes", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class ResumableOptions(SeedOptions):
    """Options of a training, which resumes where it was interrupted."""

    checkpoint_seconds: float = option(60.0, "seconds between savings of last.ckpt", may_change=True, at_least=0)
    tensorboard: bool = option(False, "write curves, pictures and options for TensorBoard as well", may_change=True)


Config = TypeVar("Config", bound=ResultsOptions)


def names_of(config_class: type[ResultsOptions], property: str) -> list[str]:
    """The options that `option` says something of, such as "path"."""
    return [field.name for field in dataclasses.fields(config_class) if field.metadata[property]]


def tag_suffix(config: ResultsOptions) -> str:
    """What a run's name says of the options that make it another than the default one."""
    values = {name: getattr(config, name) for name in names_of(type(config), "in_tag")}
    return "".join(
        f"_{name}_{str(value).replace(',', '-')}"
        for name, value in values.items()
        if value != config.__dataclass_fields__[name].default
    )


def identity(config_class: type[ResultsOptions], options: dict[str, Any]) -> dict[str, Any]:
    """The options that make a run what it is. One that a stored run does not have yet means its default."""
    return {
        field.name: options.get(field.name, field.default)
        for field in dataclasses.fields(config_class)
        if not (field.metadata["path"] or field.metadata["may_change"])
    }


def difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two sets of options, in words; empty if nothing does."""
    return ", ".join(
        f"{flag_of(name)} {_shown(there.get(name))} there, {_shown(here.get(name))} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    )


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] if SHA256.fullmatch(text) else text


def flag_of(name: str) -> str:
    """An option as the command line has it."""
    return "--" + name.replace("_", "-")


def command_line(config: ResultsOptions) -> str:
    """The options of a command as a shell has them, but those that have their default."""
    words = []
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), flag_of(field.name)
        if value != field.default:
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


class _Parser(argparse.ArgumentParser):
    """argparse's own, which says what is wrong in one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the options")


def parse_args(config_class: type[Config], argv: list[str] | None = None, program: str | None = None) -> Config:
    """Build a command's config from the command line; one flag per field; UserError for a value without sense.

    Usage names the `program`, which is the command's own without one.
    """
    parser = _Parser(program, description=config_class.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    types_of = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        annotation = types_of[field.name]
        help_text = field.metadata["help"].replace("%", "%%")
        has_default = field.default not in (dataclasses.MISSING, None, "") and annotation is not bool
        if has_default and "default" not in help_text:
            help_text += f" (default: {field.default})"
        if typing.get_origin(annotation) is types.UnionType:  # X | None is parsed as X
            annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
        kwargs: dict[str, Any] = {"help": help_text, "dest": field.name}
        if annotation is bool:
            kwargs.update(action=argparse.BooleanOptionalAction)
        elif field.default is dataclasses.MISSING:
            kwargs.update(type=annotation, required=True)
        elif typing.get_origin(annotation) is Literal:
            kwargs.update(choices=typing.get_args(annotation))
        elif recipes := field.metadata["recipes"]:
            texts = {name: " ".join(f"{flag_of(n)} {v}" for n, v in recipe.items()) for name, recipe in recipes.items()}
            kwargs.update(choices=list(recipes))
            kwargs["help"] += "; " + "; ".join(f"{name} is {text}" for name, text in texts.items())
        else:
            kwargs.update(type=annotation, metavar=annotation.__name__.upper())
        parser.add_argument(flag_of(field.name), **kwargs)
    words = _with_quotes_joined(sys.argv[1:] if argv is None else argv, names_of(config_class, "quotes"))
    return _with_recipe(config_class, vars(parser.parse_args(words)))


def _with_quotes_joined(words: list[str], quotes: list[str]) -> list[str]:
    """`--stage-1 "--restart"` as `--stage-1=--restart`: argparse takes a value of one word for the next option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in map(flag_of, quotes):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _with_recipe(config_class: type[Config], given: dict[str, Any]) -> Config:
    """The config of the options that were given; what a recipe says stands behind them."""
    for name in names_of(config_class, "recipes"):
        known = config_class.__dataclass_fields__[name].metadata["recipes"]
        if (chosen := given.get(name, "")) not in ("", *known):
            raise UserError(f"{flag_of(name)} {chosen!r} is none of {', '.join(known)}")
        given = known.get(chosen, {}) | given
    return config_class(**given)


def with_signature_of(config_class: type[Config], use: Callable[[Config], None]) -> Callable[..., None]:
    """A function for the modal client whose keywords are the options: it builds the config and calls `use`.

    The client gives every option a value: what the user gave is told from a default by the command line's words.
    """

    def modal_main(**options: Any) -> None:
        given = {
            field.name: options[field.name]
            for field in dataclasses.fields(config_class)
            if field.name in options and (options[field.name] != field.default or _was_given(field.name, sys.argv))
        }
        use(_with_recipe(config_class, given))

    modal_main.__doc__, modal_main.__qualname__ = config_class.__doc__, "modal_main"  # as if it were no inner function
    modal_main.__signature__ = inspect.signature(config_class)  # type: ignore[attr-defined]
    modal_main.__annotations__ = typing.get_type_hints(config_class)
    return modal_main


def _was_given(name: str, words: Iterable[str]) -> bool:
    flags = (flag_of(name), flag_of(f"no_{name}"))
    return any(word.split("=")[0] in flags for word in words)
