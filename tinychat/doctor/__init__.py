"""`tinychat doctor`: what this machine is, what tinychat makes of it, and what would make it faster.

`machine` and `throttling` read what the system says of itself, `kernels` which of ours run, `speed` measures for a
second or two, `models` works out what fits, `advice` draws conclusions; each gives plain data under names that
`tinychat doctor --json` prints. `report` puts them into words. All reading is done below a root directory, so that
tests can show it boards that nobody has at hand.
"""
