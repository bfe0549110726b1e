"""A program in seccomp strict mode: it may only read, write and exit.

Reads the file it is told until something is in it, which it then writes to the other; ends with 7.
"""

import ctypes
import os
import sys

PR_SET_SECCOMP, SECCOMP_MODE_STRICT = 22, 1
SYS_EXIT = 60

libc = ctypes.CDLL(None)
question, answer = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY)
os.write(answer, b"r")
libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0)
while not (content := os.read(question, 100)):
    pass
os.write(answer, content)
libc.syscall(SYS_EXIT, 7)
