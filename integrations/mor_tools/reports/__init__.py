"""Reports: self-contained HTML pages, and the same figures for TensorBoard and wandb.

| module | contents |
|---|---|
| `rows` | the records of a training run, one per step, and reading them back |
| `plots` | figures that follow the reader's light or dark mode |
| `page` | the HTML of a page, and text colored by depth |
| `training_figures` | figures of a run: losses, depths, routing, load of experts |
| `inspection_figures`, `inspection_page` | depths and scores of the tokens of a text |
| `comparison` | several runs on one page |
| `trackers` | TensorBoard and Weights & Biases |
"""
