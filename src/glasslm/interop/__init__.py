"""Where a model can go from here, and what can come in: tables of names, and the files of other people's programs.

Nothing here computes. A model that has no equivalent elsewhere is refused with the switch to change; what was written
is read again with the library that it is for, and its logits are compared, before anybody relies on it.
"""
