"""Start a command and tell how long it took and how much memory it had: `launch.py MARKER COMMAND [ARGUMENT ...]`.

A process of its own for `startup.py`, which runs it without site-packages: the peak memory that the kernel reports of
a child is never less than that of the process which started it, so that one has to be smaller than any command.
It waits for the first line of standard error with MARKER, then kills the command; with an empty MARKER for its end.
Prints milliseconds until then, milliseconds of CPU, KiB of peak memory, and the exit code, negative for a signal.
"""

import os
import sys
import time


def main() -> None:
    """Do it once."""
    marker, *command = sys.argv[1:]
    heard, told = os.pipe()
    begin = time.perf_counter()
    pid = os.posix_spawn(
        command[0],
        command,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, told, 2),
            (os.POSIX_SPAWN_CLOSE, heard),
            (os.POSIX_SPAWN_CLOSE, told),
        ],
    )
    os.close(told)
    said = b""
    while piece := os.read(heard, 65536):
        said += piece
        if marker and marker.encode() in said:
            wall_s = time.perf_counter() - begin
            os.kill(pid, 9)
            break
    _, status, usage = os.wait4(pid, 0)
    if not (marker and marker.encode() in said):
        wall_s = time.perf_counter() - begin
        sys.stderr.write(said.decode(errors="replace"))
    cpu_s = usage.ru_utime + usage.ru_stime
    peak_kib = usage.ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    print(wall_s * 1e3, cpu_s * 1e3, peak_kib, os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
