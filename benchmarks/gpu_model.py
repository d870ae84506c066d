"""How long a kernel should take on an H200, from what it moves and counts. See gpu_notes.py for the kernels."""

from math import ceil
from typing import NamedTuple

BANDWIDTH, MATRIX = 4.3e12, 780e12  # of an H200: a copy's bytes, and bf16 operations, a second
L2_BYTES, L2_BANDWIDTH = 50e6, 5.5e12
SMS, CLOCK = 132, 1.755e9
LANES, EXPS, DOUBLES, SM_BYTES = 128, 16, 64, 64  # of one multiprocessor, a clock
LAUNCH, MEMORY_TURN, L2_TURN = 2.5e-6, 1e-6, 0.4e-6  # seconds

Touch = tuple[str, float, int]  # tensor, its bytes, how many times; a name with ~ is of a workspace


class Launch(NamedTuple):
    """grid blocks of `warps` warps; touches; operations: lane instructions, exponentials, fp64, tensor core.

    turns: how many times a block waits on memory; by_row: a block comes back to its own rows alone."""

    kernel: str
    grid: int
    touches: list[Touch]
    turns: float = 1
    warps: int = 8
    registers: int = 32
    shared: int = 0
    lanes: float = 0
    exps: float = 0
    doubles: float = 0
    matrix: float = 0
    by_row: bool = False
    turn: float = MEMORY_TURN
    repeat: int = 1

    @property
    def resident(self) -> int:
        """Blocks on one multiprocessor."""
        by_shared = 233472 // (self.shared + 1024)
        return min(32, 64 // self.warps, 65536 // (32 * self.warps * ceil(self.registers / 8) * 8), by_shared)

    def bounds(self, hbm: float, l2: float) -> dict[str, float]:
        """Seconds that each limit alone would ask for."""
        at_once, rate = SMS * self.resident, min(self.grid, SMS) * CLOCK
        return {
            "memory": hbm / BANDWIDTH,
            "L2": l2 / L2_BANDWIDTH,
            "few blocks": (hbm + l2) / (rate * SM_BYTES),
            "instructions": self.lanes / (rate * LANES),
            "exponentials": self.exps / (rate * EXPS),
            "fp64": self.doubles / (rate * DOUBLES),
            "tensor cores": self.matrix / MATRIX,
            "waiting": ceil(self.grid / at_once) * self.turns * self.turn * self.repeat,
        }


class Case(NamedTuple):
    op: str
    source: str
    shape: str
    launches: list[Launch]
    why: str

    def traffic(self) -> list[tuple[float, float]]:
        """(bytes to and from memory, bytes from L2) of each launch: a second touch hits L2 where all of it stayed."""
        seen: set[str] = set()
        found = []
        for launch in self.launches:
            hbm = l2 = 0.0
            share = min(1.0, SMS * launch.resident / launch.grid) if launch.by_row else 1.0
            kept = {name: size * (share if times > 1 else 1) for name, size, times in launch.touches}
            held = sum(kept[n] for n, _, times in launch.touches if "~" not in n and (times > 1 or n in seen))
            for name, size, times in launch.touches:
                fits = (kept[name] if "~" in name else held) <= L2_BYTES
                first = name not in seen and "~" not in name
                hbm += size * (first + (0 if fits else times - first))
                l2 += size * (times - first) * fits
                seen.add(name)
            found.append((hbm, l2))
        return found

    def needed(self) -> float:
        """Bytes of inputs and outputs, each once."""
        sizes: dict[str, float] = {}
        for name, size, _ in (touch for launch in self.launches for touch in launch.touches):
            sizes[name] = max(size, sizes.get(name, 0))
        return sum(size for name, size in sizes.items() if "~" not in name)

    def floor(self) -> float:
        return max(self.needed() / BANDWIDTH, sum(launch.matrix for launch in self.launches) / MATRIX)

    def predicted(self) -> tuple[float, str]:
        """Seconds, and what bounds the longest launch."""
        bounds = [launch.bounds(*moved) for launch, moved in zip(self.launches, self.traffic(), strict=True)]
        longest = max(bounds, key=lambda b: max(b.values()))
        starts = LAUNCH * sum(launch.repeat for launch in self.launches)
        bound = max(longest, key=longest.__getitem__)
        return starts + sum(max(b.values()) for b in bounds), "launch" if starts > longest[bound] else bound

    def row(self) -> str:
        hbm, l2 = (sum(column) for column in zip(*self.traffic(), strict=True))
        seconds, bound = self.predicted()
        kinds = {"lanes": "lane", "exps": "exp", "doubles": "fp64", "matrix": "matrix"}
        totals = {word: sum(getattr(launch, kind) for launch in self.launches) for kind, word in kinds.items()}
        work = ", ".join(f"{short(count)} {word}" for word, count in totals.items() if count) or "none"
        names = " + ".join(f"{n.kernel} x {n.repeat}" if n.repeat > 1 else n.kernel for n in self.launches)
        cells = [f"`{self.op}`", self.shape, names, short(self.needed()), short(hbm), short(l2), work]
        cells += [micro(self.floor()), micro(seconds), f"{seconds / self.floor():.3g}", bound, "not run yet"]
        return f"| {' | '.join(cells)} |"


def short(count: float) -> str:
    """3.2 G, with three digits."""
    power, unit = next(((p, u) for p, u in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= p), (1, ""))
    return f"{count / power:.3g} {unit}".rstrip()


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds > 1e-4 else f"{seconds * 1e6:.2g}"
