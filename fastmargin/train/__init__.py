"""``fastmargin train``: a face network from a folder of images, on one or several GPUs.

The recipe is close to insightface's: SGD, a quadratic schedule, images mirrored at random.
Everything else belongs in a program of one's own; the examples show how short it is.
"""
