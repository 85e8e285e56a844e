"""codjax: end-to-end reinforcement learning over packs of tasks, in JAX.

The program in one line: tasks → packs → rollouts → credit → token forests → update → new weights.
Start reading at `codjax.train`.
"""

__version__ = "0.1.0"
