"""``fastmargin demo``: margin heads on 400 real face images, in a few minutes on two cores.

Not imported by ``import fastmargin``; the console command of :mod:`fastmargin.cli` starts it.
"""
