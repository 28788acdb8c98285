"""A valid taxonomy of six methods, small enough to be known by heart; tests copy it and break it in one place."""

from pathlib import Path

PROSE = "Long enough to be prose for the schema's sake, and no longer than that."
TEXT = "What it is about, what its methods trade, how they differ, and what to ask before choosing one. " * 4
FACETS = "facets: {stage: [post-training], training: none, calibration: false, exact: false, frees_memory: true, changes_architecture: false}"


def _category(name: str, order: int, more: str = "") -> str:
    return f"name: {name}\nsummary: {name} in one sentence.\norder: {order}\ntext: |\n  {TEXT}\n{more}"


def _method(name: str, paper: str, relations: str, facets: str = FACETS, more: str = "") -> str:
    return (
        f"name: {name}\nsummary: What {name} does.\npapers: [{paper}]\ntags: [post-training, {name.lower()}-like]\n"
        f"relations:\n{relations}idea: |\n  {PROSE}\nwhen: |\n  {PROSE}\n{facets}\n{more}"
    )


def _paper(key: str, title: str, venue: str, category: str, more: str) -> str:
    url = f"https://example.org/{key}"
    return f"{key}:\n  title: '{title}'\n  venue: {venue}\n  url: {url}\n  categories:\n  - {category}\n{more}"


LAYERS = "compression/quantization/weight_only"
RTN = f"{LAYERS}/rtn.yaml"
GPTQ = f"{LAYERS}/gptq.yaml"
AWQ = f"{LAYERS}/awq.yaml"
LORA = "finetuning/lora.yaml"
QLORA = "finetuning/qlora.yaml"
DORA = "finetuning/dora_x.yaml"
MODULE = f"refimpl/{LAYERS}/rtn.py"

CLAIMS = """\
impl: RTN
claims:
- id: error-bound
  says: No weight moves by more than half a step.
  source: {paper: rtn-2018, where: Table 1}
  expect: {below: 0.50001, unit: steps}
- id: groups
  says: Small groups have a smaller error.
  source: {paper: gptq, where: Table 2}
  expect: {below: 1.0, unit: ratio}
  holds: false
  why: It was larger here.
arena: {weights: {bits: [4], group_size: [32]}}
"""

QUESTIONS = """\
questions:
- asks: How far does a weight move?
  answer: By half a step at most, whatever the group, as the claim below measures.
  claims: [rtn/error-bound]
"""

FILES = {
    "survey.yaml": "compression: Model compression\ncompression/quantization: Quantization\nfinetuning: Fine-tuning\n",
    "papers/2018.yaml": _paper("rtn-2018", "Integers & more: 5% of $100_x", "CVPR", LAYERS, "  arxiv: '1712.05877'\n"),
    "papers/2021.yaml": _paper("lora", "LoRA", "ICLR", "finetuning", "  authors: [Ada B. See, Émile Ø]\n"),
    "papers/2023.yaml": _paper(
        "gptq", "GPTQ: Accurate", "ICLR", LAYERS, "  arxiv: '2210.17323'\n  listed:\n  - compression/quantization\n"
    )
    + _paper("awq", "AWQ of weights", "arXiv", LAYERS, "  code: https://example.org/code\n")
    + _paper("qlora", "QLoRA", "NeurIPS", "finetuning", ""),
    "compression/_category.yaml": _category("Compression", 1, "survey_path: [compression]\n"),
    "compression/quantization/_category.yaml": _category("Quantization", 1),
    f"{LAYERS}/_category.yaml": _category("Weights only", 1, QUESTIONS),
    "finetuning/_category.yaml": _category("Fine-tuning", 2),
    "systems/_category.yaml": _category("Systems", 3),
    "systems/frameworks/_category.yaml": _category("Frameworks", 1),
    "systems/frameworks/peft.yaml": (
        "name: PEFT\nsummary: Adapters for everybody.\ncode: https://example.org/peft\nsupports: [fine-tuning]\n"
        "features: [adapters]\nlibraries: [PyTorch]\nships:\n- lora\nsources: [https://example.org/docs]\n"
    ),
    RTN: _method("RTN", "rtn-2018", "  generalizes: []\n", more=CLAIMS),
    GPTQ: _method(
        "GPTQ",
        "gptq",
        "  builds_on:\n  - rtn\n  composes_with: [lora]\n",
        FACETS.replace("calibration: false", "calibration: true").replace(
            "[post-training]", "[post-training, prefill]"
        ),
    ),
    AWQ: _method("AWQ", "awq", "  alternative_to:\n  - gptq\n", FACETS[:-1] + ", gqa: true}"),
    LORA: _method("LoRA", "lora", "  generalizes: []\n", FACETS.replace("none", "partial")),
    QLORA: _method("QLoRA", "qlora, lora", "  builds_on:\n  - lora\n  combines: [lora, rtn]\n"),
    DORA: _method("DoRA", "qlora", "  builds_on:\n  - lora\n  alternative_to: [lora, qlora]\n"),
}


# What fills the empty places of a scaffolded YAML file, from top to bottom.
FILLED = {
    'summary: ""': "summary: Does what it says.",
    "papers: []": "papers: [awq]",
    'idea: ""': f"idea: {PROSE}",
    'when: ""': f"when: {PROSE}",
    "facets: {}": "facets: {stage: [post-training], training: none, calibration: false, exact: false, frees_memory: true, changes_architecture: false}",
    'says: ""': "says: It is better than rounding.",
    '{paper: "", where: ""}': "{paper: awq, where: Table 4}",
    "{unit: ratio}": "{unit: ratio, below: 1.0}",
}


def write(checkout: Path) -> Path:
    """Write the tree, and the one module that it says is implemented; returns the folder `taxonomy`."""
    for name, text in {
        **{f"taxonomy/{name}": text for name, text in FILES.items()},
        MODULE: "class RTN:\n    pass\n",
    }.items():
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return checkout / "taxonomy"
