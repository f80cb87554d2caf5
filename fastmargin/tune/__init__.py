"""``fastmargin tune``: measures tile shapes of the Triton kernels and keeps the faster ones."""
