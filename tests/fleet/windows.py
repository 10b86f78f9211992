"""Windows, as far as another system can play it: what is missing there is missing here.

A process with the environment `plays_windows` does so, and all that it spawns, too. It

- has no ``fcntl`` and the other modules that POSIX alone has, and none of the names in
  ``os`` and ``signal`` that Windows lacks,
- removes and renames no file that is open, and syncs none that is open for reading
  only,
- makes no text file without a named encoding,
- says that its platform is ``win32``.

What Flower, torch and the like import is loaded before: they know Windows, and would
look for parts of it that nobody plays. Needs ``/proc``, where open files are looked up.
"""

import builtins
import errno
import importlib.abc
import multiprocessing.resource_tracker
import os
import platform
import signal
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from multiprocessing import spawn
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# in a file sitecustomize.py, which Python reads as it starts
STAGE = "from tests.fleet.windows import play_or_die\n\nplay_or_die(bare={bare})\n"
MODULES = frozenset(
    "crypt fcntl grp nis posix_ipc pty pwd readline resource spwd syslog termios tty".split()
)
OF_OS = """
    O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC chown chroot confstr fchdir fchmod
    fchown fdatasync fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp
    getpriority getsid getuid killpg lchown lockf mkfifo mknod nice openpty pathconf pipe2
    posix_fadvise posix_spawn posix_spawnp pread pwrite sched_getaffinity sched_setaffinity setgid
    setpgid setsid setuid statvfs sync sysconf tcgetpgrp ttyname uname wait wait3 wait4
""".split()
OF_SIGNAL = """
    SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP SIGTSTP SIGUSR1
    SIGUSR2 SIG_BLOCK SIG_SETMASK SIG_UNBLOCK alarm getitimer pause pthread_kill pthread_sigmask
    setitimer siginterrupt sigpending sigtimedwait sigwait
""".split()
FOREIGN = """
    flwr.app flwr.clientapp flwr.serverapp flwr.serverapp.strategy matplotlib.backends.backend_agg
    matplotlib.figure matplotlib.font_manager networkx numpy
    rich.console rich.progress rich.table safetensors.numpy
    safetensors.torch torch.distributions typer.testing
""".split()
OF_PYTHON = """
    asyncio.subprocess concurrent.futures.process ctypes multiprocessing.popen_spawn_posix
    multiprocessing.synchronize shutil subprocess tempfile uuid
""".split()


class _Absent(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def plays_windows(folder: Path, *, bare: bool = False) -> dict[str, str]:
    """Return the environment of a process that plays Windows; `folder` is empty, and
    stays.

    One that imports nothing but Python's own library may do so on a bare stage.
    """
    (folder / "sitecustomize.py").write_text(STAGE.format(bare=bare), encoding="utf-8")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "PYTHONIOENCODING": "cp1252",
        "PYTHONWARNDEFAULTENCODING": "1",
    }


def play_or_die(*, bare: bool) -> None:
    """Play Windows; whoever cannot must not go on as if."""
    if "resource_tracker" in "".join(sys.orig_argv):
        return  # a process of multiprocessing's own, which Windows has not
    try:
        play([] if bare else FOREIGN)
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def play(foreign: Sequence[str]) -> None:
    """Let this process play Windows from here on."""
    assert not [name for name in sys.modules if name.startswith("flower_mcepl")], "too late"
    warnings.filterwarnings("ignore", category=EncodingWarning)  # others' business
    for name in (*foreign, *OF_PYTHON):
        __import__(name)
    platform.platform()  # which would ask Windows; now it remembers
    multiprocessing.resource_tracker._HAVE_SIGMASK = False  # type: ignore[attr-defined]
    sys.modules["msvcrt"] = _msvcrt()
    _hold_open_files()
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, _Absent())
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    warnings.filterwarnings("error", category=EncodingWarning, module="flower_mcepl")
    _let_processes_begin()
    sys.platform = "win32"


def _let_processes_begin() -> None:
    """Let multiprocessing begin a process as the real system does; what it carries out
    plays.
    """
    begin, carry_out, real = spawn.spawn_main, spawn._main, sys.platform  # type: ignore[attr-defined]

    def spawn_main(*arguments: Any, **more: Any) -> None:
        sys.platform = real
        begin(*arguments, **more)

    def _main(*arguments: Any) -> Any:
        sys.platform = "win32"
        return carry_out(*arguments)

    spawn.spawn_main, spawn._main = spawn_main, _main  # type: ignore[attr-defined]


def _msvcrt() -> types.ModuleType:
    """Return a module that locks as Windows does: each byte for who opened the file, at
    once or not.
    """
    import fcntl

    msvcrt: Any = types.ModuleType("msvcrt")
    msvcrt.LK_UNLCK, msvcrt.LK_NBLCK = 0, 2

    def locking(descriptor: int, mode: int, count: int) -> None:
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        assert (at, count) > (100, 0), "a locked byte can be read by nobody else: not the text's"
        if mode == msvcrt.LK_UNLCK:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    msvcrt.locking = locking
    return msvcrt


def _hold_open_files() -> None:
    import fcntl

    def refusing(function: Callable[..., Any], *, paths: int, onto: bool = True) -> Any:
        def checked(*arguments: Any, **more: Any) -> Any:
            names = [os.path.realpath(name) for name in arguments[:paths]]
            for name in names:
                if any(_inside(file, name) for file in _open_files()):
                    raise PermissionError(errno.EACCES, "used by another process", name)
            if not onto and os.path.lexists(names[1]):
                raise FileExistsError(errno.EEXIST, "exists", names[1])
            return function(*arguments, **more)

        return checked

    for name in ("remove", "unlink", "rmdir"):
        setattr(os, name, refusing(getattr(os, name), paths=1))
    os.replace = refusing(os.replace, paths=2)
    os.rename = refusing(os.rename, paths=2, onto=False)
    sync, opened = os.fsync, os.open

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        sync(number)

    def open_file(path: Any, flags: int, *more: Any, **others: Any) -> int:
        # shutil.rmtree walks over descriptors of folders only where the system can
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a folder cannot be opened", path)
        return opened(path, flags, *more, **others)

    os.fsync, os.open = fsync, open_file
    import shutil

    shutil._use_fd_functions = False  # type: ignore[attr-defined]


def _open_files() -> set[str]:
    """Return the files that this process has open, or mapped into its memory."""
    files = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            files.add(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:  # the list's own
            continue
    with builtins.open("/proc/self/maps", encoding="utf-8") as maps:
        files |= {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/" in line}
    return files


def _inside(file: str, place: str) -> bool:
    return file == place or file.startswith(f"{place}/")
