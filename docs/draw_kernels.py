"""Draw the pictures of docs/kernels.md, readable on light and on dark.

python docs/draw_kernels.py [FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.small { font-size: 11.5px } .mid { text-anchor: middle } .end { text-anchor: end }
.bold { font-weight: 600 } .in { fill: #ffffff }
rect { stroke-width: 1 }
.x { fill: #3f6f9f } .w { fill: #a8641a } .y { fill: #44803a } .p { fill: #85589a }
.cell { fill: none; stroke: #8b949e } .off { fill: none; stroke: #d1643f; stroke-dasharray: 3 3 }
.pale { fill: #3f6f9f; fill-opacity: 0.25; stroke: #8b949e }
.line { stroke: #6e7781; fill: none; marker-end: url(#head) } .plain { stroke: #6e7781; fill: none }
.frame { fill: none; stroke: #c23b22; stroke-width: 2.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #d5dbe1 } .in { fill: #ffffff }
  .line, .plain { stroke: #9aa4ae } .frame { stroke: #ff7b66 } .off { stroke: #ff9a7a }
}
"""
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#8b949e"/></marker></defs>'
)


class Picture:
    """An SVG file, drawn from top to bottom."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size = (width, height)
        self.parts = [f"<title>{title}</title>", f"<style>{STYLE}</style>", HEAD]

    def box(self, x: float, y: float, w: float, h: float, kind: str, text: str = "") -> None:
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="2" class="{kind}"/>')
        lines = text.split("\n") if text else []
        for i, line in enumerate(lines):
            at = y + h / 2 + 4.5 + 15 * (i - (len(lines) - 1) / 2)
            inside = "in " if kind in ("x", "w", "y", "p") else ""
            self.text(x + w / 2, at, line, f"{inside}mid small")

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        safe = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text x="{x}" y="{y}" class="{kind}">{safe}</text>')

    def line(self, *points: tuple[float, float], kind: str = "line") -> None:
        path = " L".join(f"{x},{y}" for x, y in points)
        self.parts.append(f'<path d="M{path}" class="{kind}"/>')

    def source(self) -> str:
        width, height = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        body = "\n".join(self.parts)
        return f'{head} width="{width}" height="{height}">\n{body}\n</svg>\n'


def layout() -> Picture:
    """HWNC in memory, and the taps of two output pixels."""
    p = Picture(860, 330, "The HWNC layout, and the taps of a corner and of an inner pixel")
    p.text(10, 20, "A map, kernel 3 x 3, padding 1", "bold")
    size, left, top = 34, 50, 70

    def taps(column: int, row: int) -> None:
        for i in range(-1, 2):
            for j in range(-1, 2):
                inside = 0 <= row + i < 6 and 0 <= column + j < 6
                p.box(
                    left + (column + j) * size + 3, top + (row + i) * size + 3, size - 6, size - 6,
                    "x" if inside else "off",
                )  # fmt: skip

    for row in range(6):
        for column in range(6):
            p.box(left + column * size, top + row * size, size, size, "cell")
    taps(0, 0)
    taps(4, 3)
    p.box(left, top, size, size, "frame")
    p.box(left + 4 * size, top + 3 * size, size, size, "frame")
    p.text(10, 305, "Corner: 4 taps of 9, the dashed ones are no step of the loop. Inside: 9.")
    p.text(330, 20, "The same map in memory: [H, W, N, C], channels innermost", "bold")
    x = 330
    for i, name in enumerate(("(0,0)", "(0,1)", "(0,2)", "(0,3)")):
        p.box(x + i * 104, 45, 100, 86, "x", f"pixel {name}\nN rows\nof C values")
    p.text(750, 92, "...", "bold")
    p.line((380, 136), (380, 158), (484, 158), (484, 136))
    p.text(500, 163, "one column to the right: N rows further", "small")
    p.text(330, 188, "one line down: W * N rows further", "small")
    p.text(330, 222, "A tile of the result is one pixel of 128 images. Under tap (r, s) it needs")
    p.text(330, 241, "128 consecutive rows of x, that begin (r * W + s) * N rows further on:")
    p.text(330, 260, "a block at one offset, the same for every row. No im2col, no halo,")
    p.text(330, 279, "no mask, and no work on padding.")
    return p


def conv() -> Picture:
    """The tile and the loop of the forward kernel."""
    p = Picture(860, 350, "One program of the convolution's forward kernel")
    p.text(10, 20, "One step of the loop (r, s, c)", "bold")
    p.box(20, 50, 80, 128, "x", "a\n128 images\nx 64 chan-\nnels of x")
    p.text(20, 197, "at row + (r * W + s) * N", "small")
    p.box(160, 74, 128, 80, "w", "w[r, s, c:c+64]\n64 x 128 outputs")
    p.box(292, 74, 64, 80, "w", "+ 64")
    p.text(122, 119, "x", "bold")
    p.text(372, 119, "+=", "bold")
    p.box(400, 50, 128, 128, "y", "acc\n128 x 128\nfloat32")
    p.box(532, 50, 64, 128, "y", "acc_n\n128 x 64")
    p.text(400, 197, "192 outputs: two accumulators, 128 + 64, one a", "small")
    p.line((600, 114), (640, 114))
    p.box(645, 84, 205, 60, "p", "+ bias, ReLU, one rounding,\nstores of 16 bytes a thread")
    p.text(10, 240, "The flat loop of a pixel with taps r 0..2, s 1..2 and 128 channels", "bold")
    steps = [(r, s, c) for r in range(3) for s in (1, 2) for c in (0, 64)]
    for i, (r, s, c) in enumerate(steps):
        p.box(20 + i * 68, 256, 64, 26, "x" if (r + s) % 2 else "w", f"{r}, {s}, {c}")
    p.box(20 + 2 * 68 - 2, 252, 4 * 68, 34, "frame")
    p.text(
        20 + 2 * 68,
        306,
        "The pipeline, 4 stages on sm_90 and 3 on sm_80, runs across the ends of taps.",
        "",
    )
    p.text(20 + 2 * 68, 325, "Three nested loops would empty and fill it for each tap.")
    return p


def weight() -> Picture:
    """What a program of the weight gradient adds up."""
    p = Picture(860, 360, "One program of the convolution's weight gradient")
    p.text(10, 20, "Tap (r, s) = (0, 0), padding 1: the pixels it connects", "bold")
    size = 26
    for k, (left, name, shift) in enumerate(((30, "dz", 1), (230, "x", 0))):
        for row in range(6):
            for column in range(6):
                p.box(left + column * size, 40 + row * size, size, size, "cell")
        for row in range(5):
            p.box(
                left + shift * size + 2, 40 + (row + shift) * size + 4, 5 * size - 4, size - 8,
                "y" if k == 0 else "x",
            )  # fmt: skip
        p.text(left + 3 * size, 215, name, "mid bold")
    p.text(
        10,
        243,
        "In each line a run of (q_hi - q_lo) * N rows, contiguous in both. Blocks of 64",
        "",
    )
    p.text(
        10,
        262,
        "rows of all runs are shared out among the splits: nothing is gathered.",
        "",
    )
    p.text(470, 20, "A step of conv2: 64 rows, the five taps of a line", "bold")
    for i in range(5):
        p.box(470, 34 + i * 22, 118, 20, "x", f"tap {i}: 64(48) x 64")
        p.box(742, 34 + i * 22, 108, 20, "w", "64 x 128")
    p.box(606, 58, 106, 62, "y", "dz\n64 x 128\noutputs")
    p.text(719, 93, "+=", "bold")
    p.text(470, 164, "of conv4: 192 channels by 192 outputs", "bold")
    for y, rows in ((176, 128), (218, 64)):
        height = rows * 0.3
        p.box(470, y, 118, height, "x", f"{rows} x 64")
        p.box(742, y, 66, height, "w", f"{rows} x 128")
        p.box(811, y, 42, height, "w", f"x {64}")
    p.box(606, 190, 68, 32, "y", "64 x 128")
    p.box(677, 190, 36, 32, "y", "x 64")
    p.text(719, 210, "+=", "bold")
    p.text(10, 300, "dw of these taps, channels and outputs:", "bold")
    for i in range(4):
        p.box(30 + i * 112, 314, 104, 34, "p", f"split {i}: float32")
    p.line((480, 331), (520, 331))
    p.box(526, 314, 200, 34, "w", "sum_update: in order, once")
    return p


def lrn() -> Picture:
    """The strip of the LRN + pooling kernel and a thread's chunk."""
    p = Picture(860, 360, "LRN and pooling: a program's strip, a thread's chunk")
    p.text(10, 20, "A program: a strip of 7 columns, going down", "bold")
    size, left, top = 34, 40, 40
    for row in range(7):
        for column in range(7):
            kind = "x" if row in (2, 3, 4) else "pale"
            p.box(left + column * size, top + row * size, size, size, kind)
    for i in range(3):
        p.box(
            left + 2 * i * size + 2 * (i == 1),
            top + 2 * size - 2 * (i == 1) + 2,
            3 * size,
            3 * size,
            "frame",
        )
    p.text(290, 120, "row 2p: kept from the", "small")
    p.text(290, 135, "window above", "small")
    p.text(290, 158, "row 2p + 1: new", "small")
    p.text(290, 192, "row 2p + 2: new, kept", "small")
    p.text(290, 207, "for the next", "small")
    p.text(10, 306, "3 pooled columns share two columns, and windows above each other a row:")
    p.text(
        10,
        325,
        "in a strip every normalised value is computed once. Computed again: a column",
        "",
    )
    p.text(10, 344, "where strips meet and a row where programs meet.")
    p.text(470, 20, "A thread: a chunk of 8 channels of one image", "bold")
    names = ("b0", "b1", *(f"a{i}" for i in range(8)), "c0", "c1")
    for i, name in enumerate(names):
        p.box(470 + i * 31, 45, 29, 34, "x" if name[0] == "a" else "p", name)
    p.text(470, 98, "4 bytes", "small")
    p.text(590, 98, "16 bytes, one load", "small")
    p.text(790, 98, "4 bytes", "small")
    p.text(470, 128, "Sums of squares as a tree in registers:")
    p.text(470, 147, "s01, s23, s45, s67, then s0123, s2345, s4567,", "small")
    p.text(470, 163, "then each window is two of them and one square more", "small")
    p.text(470, 196, "Value and place of a maximum in one integer:")
    p.box(470, 208, 290, 32, "y", "28 bits of a d^-0.75, in the order of its value")
    p.box(764, 208, 84, 32, "p", "8 - place")
    p.text(470, 262, "one integer maximum finds both, and of equals the first", "small")
    return p


def linear() -> Picture:
    """Split K of the fully connected layer."""
    p = Picture(860, 305, "fc6: a product split along K, and what finishes it")
    p.text(10, 20, "fc6 of a batch of 128: 9216 inputs, 4096 outputs", "bold")
    for i in range(4):
        p.box(20 + 72 * i, 60, 70, 60, "x", f"K / 4\nsplit {i}")
    p.text(20, 52, "x [128, 9216]", "small")
    p.text(20, 158, "w [4096, 9216], a row an output", "small")
    for i in range(4):
        for j in range(3):
            p.box(20 + 72 * i, 166 + 30 * j, 70, 28, "w", "64 outputs" if i == 0 else "")
    p.text(20, 275, "64 blocks of outputs x 4 splits = 256")
    p.text(20, 292, "programs, 36 steps of 64 each")
    p.line((316, 130), (360, 130))
    for i in range(4):
        p.box(370, 60 + 44 * i, 150, 38, "p", f"partial sums {i}\nfloat32 [128, 4096]")
    p.line((526, 145), (572, 145))
    p.box(580, 110, 150, 70, "y", "finish_partials\nadds in order\n+ bias, ReLU, dropout")
    p.line((734, 145), (772, 145))
    p.box(778, 125, 66, 40, "y", "y\nbfloat16")
    p.text(370, 270, "No random number inside of the loop: a mask is a function of")
    p.text(370, 289, "(seed, offset, row, feature), drawn once, in the last pass")
    return p


PICTURES: dict[str, Callable[[], Picture]] = {
    "layout": layout,
    "conv": conv,
    "weight": weight,
    "lrn": lrn,
    "linear": linear,
}


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("kernels"))
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw().source())
