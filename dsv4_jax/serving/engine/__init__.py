"""Continuous batching: which tokens of which requests are computed next, and where they are kept.

Everything here but the programs and the loop that runs them is plain Python without arrays or
clocks of its own: the scheduler hands out `StepPlan`s and is told what came of them.
"""
