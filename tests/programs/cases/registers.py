"""General, SSE, AVX and x87 registers of a thread that never leaves user mode, and floating point under way."""

import ctypes
import mmap
import os
import struct
import threading
from pathlib import Path

from tests.programs.cases import Case, ThreadCase, Unsupported, libc, unlike

# The area that the spinning code works on, by offset: the flag it waits for, then what it loads and what it stores.
FLAG, LOAD_GENERAL, LOAD_VECTOR = 0, 0x40, 0x100
STORE_GENERAL, STORE_VECTOR, STORE_X87 = 0x340, 0x400, 0x640
GENERAL = [number for number in range(16) if number not in (4, 7)]  # without rsp, and rdi that holds the area
VECTOR_BYTES = 32


def spinning_code() -> bytes:
    """x86-64 code that loads every register from the area, spins until the flag is set, and stores every register."""

    def general(opcode: int, base: int) -> bytes:
        return b"".join(
            bytes([0x4C if number >= 8 else 0x48, opcode, 0x87 | (number & 7) << 3])
            + struct.pack("<i", base + 8 * index)
            for index, number in enumerate(GENERAL)
        )

    def vector(opcode: int, base: int) -> bytes:  # vmovdqu ymm, [rdi + offset] or the reverse
        return b"".join(
            bytes([0xC5, 0x7E if number >= 8 else 0xFE, opcode, 0x87 | (number & 7) << 3])
            + struct.pack("<i", base + VECTOR_BYTES * number)
            for number in range(16)
        )

    def x87(index: int) -> bytes:  # fstp tbyte [rdi + offset]
        return b"\xdb\xbf" + struct.pack("<i", STORE_X87 + 10 * index)

    saves = bytes.fromhex("53 55 41 54 41 55 41 56 41 57")  # push rbx, rbp, r12 to r15
    restores = bytes.fromhex("41 5f 41 5e 41 5d 41 5c 5d 5b")
    constants = bytes.fromhex("d9e8 d9eb")  # fld1, fldpi
    spin = bytes.fromhex("f390 833f00 74f9")  # pause; cmp dword [rdi], 0; je back
    return (
        saves
        + constants
        + vector(0x6F, LOAD_VECTOR)
        + general(0x8B, LOAD_GENERAL)
        + spin
        + general(0x89, STORE_GENERAL)
        + vector(0x7F, STORE_VECTOR)
        + x87(0)
        + x87(1)
        + bytes.fromhex("c5f877")  # vzeroupper
        + restores
        + b"\xc3"
    )


def address_of(memory: mmap.mmap) -> int:
    """Where a writable mapping is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class SpinningRegisters(Case):
    """A thread that is stopped in user mode with a value of its own in every register."""

    def setup(self) -> None:
        """Start the thread and wait until it spins."""
        if os.uname().machine != "x86_64" or " avx " not in Path("/proc/cpuinfo").read_text():
            raise Unsupported("the code needs an x86-64 processor with AVX")
        self.code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC, flags=mmap.MAP_PRIVATE)
        self.code.write(spinning_code())
        self.area = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE)
        self.general = os.urandom(8 * len(GENERAL))
        self.vectors = os.urandom(VECTOR_BYTES * 16)
        self.area[LOAD_GENERAL : LOAD_GENERAL + len(self.general)] = self.general
        self.area[LOAD_VECTOR : LOAD_VECTOR + len(self.vectors)] = self.vectors
        spin = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address_of(self.code))
        self.thread = threading.Thread(target=spin, args=(address_of(self.area),), daemon=True)
        self.thread.start()

    def verify(self) -> str | None:
        """Let it out of the loop and compare."""
        self.area[FLAG] = 1
        self.thread.join(10)
        if self.thread.is_alive():
            return "the thread still spins"
        general = self.area[STORE_GENERAL : STORE_GENERAL + len(self.general)]
        vectors = self.area[STORE_VECTOR : STORE_VECTOR + len(self.vectors)]
        if general != self.general:
            wrong = [n for i, n in enumerate(GENERAL) if general[8 * i : 8 * i + 8] != self.general[8 * i : 8 * i + 8]]
            return f"general registers {wrong} changed"
        if vectors != self.vectors:
            return "vector registers changed"
        # 1 and pi with a 64-bit mantissa, in the order they leave the stack.
        x87 = self.area[STORE_X87 : STORE_X87 + 20].hex()
        return unlike("x87 stack", "35c26821a2da0fc90040" + "0000000000000080ff3f", x87)


class FloatComputation(Case):
    """A chaotic iteration, in which one wrong bit once spoils everything after; repeated until asked."""

    STEPS = 50_000

    def setup(self) -> None:
        """Start iterating in a thread."""
        self.expected = self.iterate()
        self.wrong: list[float] = []
        self.rounds = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def iterate(self) -> float:
        """The logistic map, far into chaos."""
        x = 0.3141592653589793
        for _ in range(self.STEPS):
            x = 3.99 * x * (1.0 - x)
        return x

    def work(self) -> None:
        """Iterate until told to stop."""
        while not self.stop.is_set():
            result = self.iterate()
            self.rounds += 1
            if result != self.expected:
                self.wrong.append(result)

    def verify(self) -> str | None:
        """Every round must have had the same result."""
        self.stop.set()
        self.thread.join(30)
        if self.thread.is_alive():
            return "the thread still computes"
        return f"{len(self.wrong)} of {self.rounds} rounds went wrong" if self.wrong else None


class RoundingMode(ThreadCase):
    """The control words of SSE and x87: rounding upwards."""

    FE_UPWARD = 0x800

    def prepare(self) -> None:
        """Round upwards in this thread."""
        libm = ctypes.CDLL("libm.so.6")
        if libm.fesetround(self.FE_UPWARD):
            raise Unsupported("fesetround(FE_UPWARD)")
        self.third = self.divide()

    def divide(self) -> float:
        """1/3, computed now."""
        one, three = float(len("x")), float(len("xxx"))
        return one / three

    def check(self) -> str | None:
        """The mode, and what it does."""
        mode = libc.fegetround() if hasattr(libc, "fegetround") else ctypes.CDLL("libm.so.6").fegetround()
        if self.third <= 1 / 3:
            return "the mode had no effect to begin with"
        return unlike("rounding mode", self.FE_UPWARD, mode) or unlike("1/3 rounded upwards", self.third, self.divide())
