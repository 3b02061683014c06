"""How a script starts and ends: heavy imports, errors as one message, exit codes.

start_imports()                 # before those that take seconds
run_script(main, config)
"""

import atexit
import errno
import gc
import logging
import os
import select
import signal
import sys

from captioner.runtime.errors import UserError, escape_controls, lacks_memory

# On a CPU bitsandbytes warns at import that an optional kernel, which it would fetch from the hub, is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Nothing here needs these two, but transformers imports them where they are: scikit-learn takes it more than a second,
# and it fails on a torchvision of another torch.
LEFT_OUT = ("torchvision", "sklearn")

LESS_MEMORY = (
    "end other programs, or take less at once with --per-device-train-batch-size, --per-device-eval-batch-size and "
    "--dataloader-workers 0 of main.py, or --batch-size of eval.py; what was saved is kept"
)


def find_home() -> None:
    """Make the current folder the home where there is none, as for a user of a container who is in no passwd.

    Libraries keep their caches there, and some can't even be imported without.
    """
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = os.getcwd()
        print(f"note: HOME is not set, and this user has no home: caches are kept in {os.environ['HOME']}")


def start_imports() -> None:
    """Have a script's imports take less time, without a look for garbage, which they don't leave, and without LEFT_OUT;
    and Ctrl-C, or want of memory, end them without a traceback. Until run_script()."""
    gc.disable()
    for name in LEFT_OUT:
        sys.modules.setdefault(name, None)
    sys.excepthook = _end_imports
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where nohup has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_script(main, config) -> None:
    """Call main(config); an error that the user can mend is one message and exit code 2, no traceback."""
    if frozen := not gc.isenabled():  # by start_imports()
        gc.freeze()  # what was imported stays: to look through it for garbage takes a third of a second each time
        gc.enable()
    if sys.excepthook is _end_imports:  # no library has put its own there
        sys.excepthook = _SHOW_ERROR
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # captions and names may hold what the terminal can't show
    try:
        main(config)
        if sys.stdout is not None:  # as without a console on Windows
            sys.stdout.flush()
        if main.__module__ == "__main__":  # not called by a test
            _DONE.append(sys.modules["__main__"])
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
    except Exception as error:  # safetensors has a type of its own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            where = error.filename or "what is written, or what is printed"
            sys.exit(report_error(UserError(f"{where}: a disk is full ({error.strerror}): free some space")))
        if not lacks_memory(error):
            raise
        sys.exit(report_error(explain_memory(error)))
    finally:
        if frozen:  # else the interpreter takes for leaks, at its end, what it does not look at
            gc.unfreeze()


def explain_memory(error: Exception) -> UserError:
    """What to do about an error by which memory was refused."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return UserError(f"out of memory ({reason}): {LESS_MEMORY}")


_SHOW_ERROR = sys.excepthook


def _end_imports(kind, error, trace) -> None:
    if lacks_memory(error):
        os._exit(report_error(explain_memory(error)))
    _SHOW_ERROR(kind, error, trace)


_DONE: list = []  # scripts, by run_script


@atexit.register  # before what the heavy imports register, so that it comes after that
def _leave() -> None:
    """End a script that is done: Python would take all apart that was imported, which takes it seconds.

    Not what has run it as a part, as a notebook or runpy: how that ends is not known here.
    """
    if sys.modules["__main__"] in _DONE and not hasattr(sys, "ps1"):
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(0)


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


def report_error(error: UserError) -> int:
    message = str(error).rpartition("UserError: ")[2].strip()  # torch wraps a worker's error in its traceback
    print(f"error: {escape_controls(message)}", file=sys.stderr)
    return 2
