"""Writes `transformer_engine/signatures.json`: what Transformer Engine's functions take, by name.

    pip download --no-deps transformer-engine==VERSION && unzip transformer_engine-*.whl -d SOURCES
    python record.py SOURCES VERSION

Sources are parsed, not run: its modules need CUDA to be imported.
"""

import ast
import json
import sys
from pathlib import Path

RECORDED = {
    "module/linear.py": ["Linear.__init__", "Linear.forward"],
    "module/layernorm_linear.py": ["LayerNormLinear.__init__", "LayerNormLinear.forward"],
    "module/grouped_linear.py": ["GroupedLinear.__init__", "GroupedLinear.forward"],
    "module/layernorm.py": ["LayerNorm.__init__"],
    "module/rmsnorm.py": ["RMSNorm.__init__"],
    "module/fp8_padding.py": ["Fp8Padding.__init__", "Fp8Padding.forward"],
    "module/fp8_unpadding.py": ["Fp8Unpadding.__init__", "Fp8Unpadding.forward"],
    "attention/dot_product_attention/dot_product_attention.py": [
        "DotProductAttention.__init__",
        "DotProductAttention.forward",
    ],
    "attention/rope.py": ["apply_rotary_pos_emb"],
    "quantization.py": ["fp8_autocast", "fp8_model_init"],
}


def signature(function: ast.FunctionDef) -> list[dict[str, object]]:
    """Name, kind and default (None: there is none) of each parameter but `self`."""
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    padding: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    rows = [
        ("POSITIONAL_OR_KEYWORD", a, d)
        for a, d in zip(positional, padding + given.defaults, strict=True)
    ]
    rows += [
        ("KEYWORD_ONLY", a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    if given.kwarg is not None:
        rows.append(("VAR_KEYWORD", given.kwarg, None))
    return [
        {"name": a.arg, "kind": kind, "default": None if d is None else ast.unparse(d)}
        for kind, a, d in rows
        if a.arg != "self"
    ]


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = (m for m in node.body if isinstance(m, ast.FunctionDef))
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


if __name__ == "__main__":
    sources, version = Path(sys.argv[1]), sys.argv[2]
    record: dict[str, object] = {"version": version}
    for file, names in RECORDED.items():
        functions = functions_of(sources / "transformer_engine" / "pytorch" / file)
        record |= {name: signature(functions[name]) for name in names}
    target = Path(__file__).with_name("transformer_engine") / "signatures.json"
    rows = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items()]
    target.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
