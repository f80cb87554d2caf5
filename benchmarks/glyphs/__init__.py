"""Convergence on real classes: characters, as the CJK fonts of Debian draw them.

One character is one class and every font draws it once; small shifts, turns and scales make more.
The same network is trained under every margin and sample rate by fastmargin and by the same head
in plain PyTorch, in step: same batches, same initial weights. A brush-style font is held out.

    python -m benchmarks.glyphs
"""
