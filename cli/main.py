"""`dynamictrl`: finds the verb, runs it, and turns every failure into one readable paragraph and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from types import FrameType

import click

from ..bundle.errors import EdgeError
from .console import give_up_stdout

__all__ = ["main"]

# verb -> (module of this package, one-line help); the module has a click command named `command`
VERBS = {
    "export": ("export", "Turn a checkpoint into a bundle of ONNX graphs and weights."),
    "calibrate": ("calibrate", "Turn a bundle into a quantized bundle (int8, fp8)."),
    "build": ("build", "Build TensorRT engines of a bundle, for one or more GPUs."),
    "animate": ("animate", "Animate a photo with a pose clip and a prompt."),
    "bench": ("bench", "Measure how long a clip's stages, steps and blocks take here."),
    "inspect": ("inspect", "Show what is in a bundle, and check that it is whole."),
    "compare": ("compare", "Measure the difference between two clips."),
    "doctor": ("doctor", "Say what this machine has and lacks."),
    "demo": ("demo", "Make a first clip from built-in tiny weights and a drawn person."),
}


class LazyGroup(click.Group):
    """A group that imports a verb's module only when that verb is asked for: --help stays quick without torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"{__package__}.{VERBS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"dynamictrl-edge {version('dynamictrl-edge')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def cli() -> None:
    """Animate a person's photo with a pose clip and a prompt, fast, on one NVIDIA GPU or a CPU.

    Exit codes: 0 done; 2 wrong usage; 3 bad input; 4 bundle or engine refused; 5 device or memory; 130 interrupted.
    """


INTERRUPTED = 130
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE = 1.0  # seconds in which a repeated Ctrl-C is not meant as a second one


@contextlib.contextmanager
def _stoppable(last: bool) -> Iterator[None]:
    """Ctrl-C, a service manager's stop and a closed terminal end the work with `KeyboardInterrupt`, so that all clean up.

    People press Ctrl-C twice: the second must not break off the cleaning up after the first.
    """
    stopped = -PATIENCE

    def stop(signum: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        if time.monotonic() - stopped >= PATIENCE:
            stopped = time.monotonic()
            raise KeyboardInterrupt

    before = {}
    try:
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, stop)
    except ValueError:
        pass  # not the main thread: the host application owns the signals
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler or signal.SIG_DFL)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `dynamictrl` command; always exits."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments, last=True))


def run(arguments: list[str], *, last: bool = False) -> int:
    """Runs one command line and returns its exit code; errors go to stderr as one paragraph.

    `last`: the process ends after this. Its result stands, so signals that come while Python shuts down are ignored.
    """
    verbose = "--verbose" in arguments
    try:
        with _stoppable(last):
            # What a command returns is nothing; the parser returns the code that a command or --help ended with.
            code = cli.main(args=arguments, prog_name="dynamictrl", standalone_mode=False)
            if sys.stdout is not None:  # it is None where the caller closed it
                sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.UsageError as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        _say("Interrupted. No half-written output was left.")
        return INTERRUPTED
    except EdgeError as error:
        if verbose:
            traceback.print_exc()
        _say(str(error))
        return error.exit_code
    except ModuleNotFoundError as error:
        if verbose:
            traceback.print_exc()
        _say(
            f"The package {error.name!r} is not installed. Run 'dynamictrl doctor': it names the command that installs it."
        )
        return 5
    except MemoryError:
        if verbose:
            traceback.print_exc()
        _say("Out of memory. Make a smaller or shorter clip, or give a budget with --memory.")
        return 5
    except BrokenPipeError:
        give_up_stdout()  # the reader of our output has gone, as in `... | head`
        return 1
    except Exception as error:
        if verbose:
            traceback.print_exc()
        _say(
            f"Internal error: {type(error).__name__}: {error}. This is a defect of dynamictrl; run again with --verbose "
            "and report what it prints."
        )
        return 1


def _say(text: str) -> None:
    click.echo(f"dynamictrl: {text}", err=True)
