"""Give up root, tie this process's life to its parent's, and become a PostgreSQL program.

Run as ``python -I -S pgexec.py PARENT_PID ACCOUNT DIRECTORY PROGRAM [ARGUMENT ...]``, where ACCOUNT is ``same``,
``setuid:UID:GID`` or ``namespace:UID:GID``. It is a program of its own because a ``preexec_fn`` would run between fork
and exec of a process full of threads: gRPC's fork handlers start threads there, and a process with threads may not
enter a user namespace. Standard library only: ``-I -S`` keeps the site and its start-up time out.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CLONE_NEWUSER = 0x10000000  # linux/sched.h


def call_libc(function: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def become_user(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def enter_namespace(uid: int, gid: int) -> None:
    """Be uid in a user namespace of one uid, which outside of it stays the uid that we have now.

    PostgreSQL only refuses to run where its own uid reads 0; the files stay those of the uid outside, and exec drops
    every capability, since the uid inside is not 0.
    """
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    if outer_uid == 0:
        os.setgroups([])
    call_libc("unshare", CLONE_NEWUSER)
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {outer_uid} 1"), ("gid_map", f"{gid} {outer_gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def follow_parent(parent: int) -> None:
    """Have the kernel send SIGINT, PostgreSQL's fast shutdown, when the parent's thread that spawned us is gone."""
    call_libc("prctl", PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    if os.getppid() != parent:
        raise ProcessLookupError(f"the parent {parent} is already gone")


def main(parent: str, account: str, directory: str, *command: str) -> None:
    how, *ids = account.split(":")
    if how == "setuid":
        become_user(*map(int, ids))
    elif how == "namespace":
        enter_namespace(*map(int, ids))
    if sys.platform == "linux":
        follow_parent(int(parent))  # after the change of uid, which clears the signal
    os.umask(0o077)
    os.chdir(directory)
    os.execv(command[0], command)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"pgexec: {error}")
