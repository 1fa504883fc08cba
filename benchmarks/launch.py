"""Start a command and tell how long it took and how much memory it had: `launch.py MARKER COMMAND [ARGUMENT ...]`.

A process of its own for `startup.py`, which runs it without site-packages: the peak memory that the kernel reports of
a child is never less than that of the process which started it, so that one has to be smaller than any command.
It waits for MARKER on the command's standard error, then kills it; with an empty MARKER for its good end. Prints
milliseconds until then, milliseconds of CPU, and KiB of peak memory.
"""

import os
import select
import sys
import time

#: The longest silence: most commands say nothing, those with a marker log what they do.
TIMEOUT_S = 60.0


def main() -> None:
    """Do it once.

    Raises:
        SystemExit: the command did not get there; the message has what it said.
    """
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
    said, there, ended = b"", False, False
    while not (there or ended) and select.select([heard], [], [], TIMEOUT_S)[0]:
        piece = os.read(heard, 65536)
        said += piece
        there, ended = bool(marker) and marker.encode() in said, not piece
    wall_s = time.perf_counter() - begin
    if not ended:
        os.kill(pid, 9)
    _, status, usage = os.wait4(pid, 0)
    if ended:
        wall_s = time.perf_counter() - begin
    if not (there if marker else status == 0):
        sys.exit(said.decode(errors="replace").strip() or f"nothing said in {wall_s:.0f} s, status {status}")
    peak_kib = usage.ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    print(wall_s * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3, peak_kib)


if __name__ == "__main__":
    main()
