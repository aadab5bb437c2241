"""Many processes, one run: rank 0 leads, the others follow.

Only rank 0 runs the loop, reads text and writes files. Each verb that it calls on its engine is sent to the other ranks,
which do the same with theirs, so that nothing above the seam knows of ranks, and only the first machine needs the text.
torchrun starts the processes; what they say to each other is numbers and JSON, never a pickle.
"""
