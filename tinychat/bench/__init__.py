"""`tinychat bench`: how fast a model runs here, and how near that comes to what the machine's memory allows.

`shapes` are published models as data, `random_weights` fills one, `write` makes a checkpoint of it. `subject` is what
is measured, `measure` one run of it, `contexts` decoding at length; `traffic` counts bytes, `probe` reads memory beside
the tokens. `report` words it, `command` is the command line. Light: no torch on the cpu backend.
"""
