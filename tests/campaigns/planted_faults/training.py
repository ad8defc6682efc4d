"""Faults of weights, of teaching, and of pretraining."""

from tests.campaigns.planted_faults.fault import CORE, TOOLS, Fault

TEACHING = "mor_layers/training"
PRETRAINING = "mor_tools/pretraining"

TRAINING_FAULTS = [
    # Weights and teaching.
    Fault(
        "a teacher's temperature is not squared",
        CORE + "training/distillation.py",
        "return temperature**2 * F.kl_div(",
        "return temperature * F.kl_div(",
        TEACHING,
    ),
    Fault(
        "student and teacher are swapped",
        CORE + "training/distillation.py",
        "F.kl_div(log_q, log_p, reduction",
        "F.kl_div(log_p, log_q, reduction",
        TEACHING,
    ),
    Fault(
        "an average is a sum",
        CORE + "weights/uptraining.py",
        "return (total / len(parts)).to(parts[0].dtype)",
        "return total.to(parts[0].dtype)",
        "mor_layers/weights",
    ),
    Fault(
        "the upper layers are the lower ones",
        CORE + "weights/uptraining.py",
        '"upper": num_shared - size + layer,',
        '"upper": layer,',
        "mor_layers/weights",
    ),
    Fault(
        "the last of the stepwise layers is left out",
        CORE + "weights/uptraining.py",
        "round(layer * (num_shared - 1) / max(size - 1, 1))",
        "round(layer * (num_shared - 1) / size)",
        "mor_layers/weights",
    ),
    # Pretraining.
    Fault(
        "a resumed run reads a batch twice",
        TOOLS + "pretraining/data/datasets.py",
        "first=first_step * settings.training.global_batch_size,",
        "first=max(0, first_step - 1) * settings.training.global_batch_size,",
        PRETRAINING + "/test_resume.py",
    ),
    Fault(
        "the learning rate is a step late",
        TOOLS + "pretraining/optimizer.py",
        "lr_warmup_steps=training.warmup_steps,",
        "lr_warmup_steps=training.warmup_steps + 1,",
        PRETRAINING,
    ),
    Fault(
        "the final learning rate is 0",
        TOOLS + "pretraining/optimizer.py",
        '"min_lr": training.final_learning_rate,',
        '"min_lr": 0.0,',
        PRETRAINING,
    ),
    Fault(
        "there is no weight decay",
        TOOLS + "pretraining/optimizer.py",
        "        start_wd=training.weight_decay,\n        end_wd=training.weight_decay,",
        "        start_wd=0.0,\n        end_wd=0.0,",
        PRETRAINING,
    ),
    Fault(
        "routers are not told of optimizer steps",
        TOOLS + "pretraining/training.py",
        "        update_routers(self.chunks)\n",
        "",
        PRETRAINING,
    ),
    Fault(
        "causal validation is not causal",
        TOOLS + "pretraining/training.py",
        "with causal_routing(self.chunks) if causal else nullcontext():",
        "with nullcontext():",
        PRETRAINING,
    ),
    Fault(
        "documents see one another in training",
        TOOLS + "pretraining/training.py",
        "return is_same.tril().logical_not()",
        "return torch.ones_like(is_same).tril().logical_not()",
        PRETRAINING,
    ),
    Fault(
        "the held-out split is at the beginning",
        TOOLS + "pretraining/data/text.py",
        "key=lambda d: _hash([d.name]))",
        "key=lambda d: d.name)",
        PRETRAINING + "/data/test_text.py",
    ),
    Fault(
        "documents have no end",
        TOOLS + "pretraining/data/text.py",
        "builder.add_document([*encoding.ids, tokenizer.eod], [len(encoding.ids) + 1])",
        "builder.add_document([*encoding.ids], [len(encoding.ids)])",
        PRETRAINING + "/data/test_text.py",
    ),
    Fault(
        "a metric keeps the number that its step has within the recursion",
        TOOLS + "reports/rows.py",
        'f"step_{int(found[1]) + earlier}/"',
        'f"step_{int(found[1])}/"',
        "mor_tools/pretraining/reporting/test_report.py",
    ),
]
