"""How a script starts and ends: heavy imports, errors as one message, exit codes.

run_script(main, config)
"""

import atexit
import ctypes
import gc
import logging
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from captioner.runtime.errors import UserError, escape_controls

# On a CPU bitsandbytes warns at import that an optional kernel, which it would fetch from the hub, is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's garbage collector looks at all that is imported again and again, which takes a fifth of the imports."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def import_bitsandbytes() -> None:
    """Import bitsandbytes without torch's compiler: what it has compiled at import is for machines without its library.

    That takes 0.8 s; torch.compile can be used afterwards. The torchvision is looked at too, if there is one.
    """
    check_torchvision()
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import bitsandbytes  # noqa: F401

    del os.environ["TORCHDYNAMO_DISABLE"]
    if before is not None:
        os.environ["TORCHDYNAMO_DISABLE"] = before


def find_home() -> None:
    """Make the current folder the home where there is none, as for a user of a container who is in no passwd.

    Libraries keep their caches there, and some can't even be imported without.
    """
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = os.getcwd()
        print(f"note: HOME is not set, and this user has no home: caches are kept in {os.environ['HOME']}")


def check_torchvision() -> None:
    """End the process if a torchvision is there that can't be imported: nothing here needs one, but transformers would.

    What that raises then does not say why.
    """
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
            return
        reason = str(error).partition("\n")[0] or type(error).__name__
        told = f"torchvision: can't be imported ({reason}), mostly for being another torch's"
        sys.exit(
            report_error(UserError(f"{told}; nothing here needs it: pip uninstall torchvision, or install its fit"))
        )


def run_script(main, config) -> None:
    """Call main(config); an error that the user can mend is one message and exit code 2, no traceback."""
    gc.enable()
    gc.freeze()  # what is imported stays, and need not be looked at
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # captions and names may hold what the terminal can't show
    try:
        main(config)
        if sys.stdout is not None:  # as without a console on Windows
            sys.stdout.flush()
    except UserError as error:
        sys.exit(report_error(error))
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        if not _has_lost_reader():
            raise
        print("nobody reads what is printed any more: ended", file=sys.stderr)
        sys.exit(141)  # as a shell tells of SIGPIPE
    _DONE.append(True)


def _has_lost_reader() -> bool:
    """Whether standard output goes into a pipe that is closed, as after `| head`; nothing is written to it then."""
    try:
        look = select.poll()
        look.register(sys.stdout, 0)
        if look.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain again at its end
            return True
    except (AttributeError, TypeError, ValueError, OSError):  # Windows has no poll, a notebook's output no file
        pass
    return False


_DONE: list[bool] = []  # by run_script


@atexit.register
def _leave() -> None:
    """At exit, when threads have ended and what was registered since this was imported is done: end a script's process.

    Python would look for garbage in all that was imported, a second or two for nothing.
    """
    gc.unfreeze()  # else libraries complain of what is left
    if _DONE:
        with suppress(TypeError, AttributeError):  # not on Windows
            ctypes.CDLL(None).fflush(None)  # what libraries in C have printed
        with suppress(OSError, ValueError, AttributeError):  # where nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def report_error(error: UserError) -> int:
    message = str(error).rpartition("UserError: ")[2].strip()  # torch wraps a worker's error in its traceback
    print(f"error: {escape_controls(message)}", file=sys.stderr)
    return 2
