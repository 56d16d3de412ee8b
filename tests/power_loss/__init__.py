"""A simulator of power loss: what a disk may hold at any moment of a real run, and what becomes of it.

``log`` records every operation on the files of a run, by any number of processes. ``states`` makes of a log
what a power loss after each operation may leave, under three models of a file system. ``checks`` judges such
states: what is in sight in them, and what a run or a command makes of them that goes on there. ``runs`` has
the runs and commands that are recorded, ``study`` goes through all of them and counts.
"""
