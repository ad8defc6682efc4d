"""Comparisons: several pretraining configurations on one text, with several seeds, at equal cost.

| module | contents |
|---|---|
| `costs` | parameters, FLOPs and key-value bytes of a configuration, and of a run of n steps |
| `plan` | which runs a comparison consists of, so that the chosen quantities are equal |
| `runs` | running them, through `mor_tools.pretraining`; resumes |
| `results` | what the finished runs came to, from their summaries and histories |
| `statistics` | spread over seeds, and whether a difference lies beyond it |
| `page` | compare.html, compare.md and compare.json |

`torchrun -m mor_tools.comparison` runs a comparison; `mor compare` starts it.
"""
