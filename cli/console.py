"""What a person sees while waiting, and what a program reads: progress on stderr, JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from ..bundle.errors import from_os_error

__all__ = [
    "Bars",
    "Progress",
    "give_up_stdout",
    "json_option",
    "note",
    "print_json",
    "results",
    "verbose_option",
    "working",
]

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
verbose_option = click.option(
    "--verbose", is_flag=True, help="On an error, print the trace as well.", expose_value=False
)


def note(text: str) -> None:
    """A sentence for the person, on stderr."""
    click.echo(text, err=True)


def print_json(value: Any) -> None:
    with results():
        click.echo(json.dumps(value, indent=1, default=str))


@contextmanager
def results() -> Iterator[None]:
    """Around what prints results on stdout: a disk that is full under a redirection is an error to read, not a trace.

    Raises:
        InputError: stdout cannot be written to.
        BrokenPipeError: its reader has gone.
    """
    try:
        yield
        if sys.stdout is not None:  # it is None where the caller closed it
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up_stdout()
        raise from_os_error(error, "write to", "standard output") from error


def give_up_stdout() -> None:
    """What is still buffered goes nowhere; otherwise Python would complain once more while it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """Named stages with a bar each; silent unless stderr is a terminal."""

    def __init__(self, bars: Any | None):
        self._bars = bars
        self._task: Any = None

    def stage(self, name: str, total: float | None = None) -> None:
        """Starts the next stage; the one before is complete."""
        if self._bars is None:
            return
        self.done()
        self._task = self._bars.add_task(name, total=total)

    def advance(self, amount: float = 1) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, amount)

    def rename(self, name: str) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, description=name)

    def done(self) -> None:
        if self._bars is not None and self._task is not None:
            task = self._bars.tasks[self._task]
            self._bars.update(self._task, total=task.total or 1, completed=task.total or 1)
            self._task = None


class Bars:
    """Turns calls of (stage, done, total) into progress bars; `names`: what stages are called for a person."""

    def __init__(self, progress: Progress, names: Mapping[str, str] | None = None):
        self._progress, self._names = progress, names or {}
        self._stage, self._done = "", 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._progress.stage(self._names.get(stage, stage), total if total > 1 else None)
            self._stage, self._done = stage, 0
        self._progress.advance(done - self._done)
        self._done = done


@contextmanager
def working(quiet: bool = False) -> Iterator[Progress]:
    """A `Progress` for the duration of a block."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield Progress(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        progress = Progress(bars)
        yield progress
        progress.done()
