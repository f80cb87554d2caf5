"""The heads of other code bases under their own names: change the import, keep the script.

One module per code base. Constructor, forward signature, parameter and buffer names, layout and
``state_dict`` keys are the original's; what differs is said in each docstring and in
``docs/migrating.md``, and ``faithful=True`` computes as the original does, in plain PyTorch.
"""
