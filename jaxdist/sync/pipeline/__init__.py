"""Pipeline parallelism: the axis `stage` of the mesh, along which the blocks of a chain lie.

schedule   who does what when, as a table of data
check      whether a table keeps the order of things, what it stashes, how much of it is bubble
picture    a table for a person to look at
balance    which blocks each stage gets
"""
