"""The heads of other code bases under their own names: change the import, keep the script.

One module per code base. Constructor, forward signature, parameter and buffer names, layout and
``state_dict`` keys are the original's; each docstring and ``docs/migrating.md`` list the
differences, and ``faithful=True`` computes as the original does, in plain PyTorch.
"""
