"""Reports for people: self-contained HTML pages, and the same figures for TensorBoard and wandb.

| module | what |
|---|---|
| `rows` | what a training run notes of each step, and reading it back |
| `plots` | figures that follow the reader's light or dark mode |
| `page` | the HTML around them, and text coloured by depth |
| `training_figures` | a run: losses, depths, routing, load of experts |
| `inspection_figures`, `inspection_page` | what a model does with a text |
| `trackers` | TensorBoard and Weights & Biases |
"""
