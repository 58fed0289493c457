"""Installation: `pip install -c constraints.txt -e .`; constraints.txt pins what is given here as ranges."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

DATA = ["datasets>=4", "matplotlib>=3.9", "openai>=2"]  # prepare_data.py, inspect_data.py, regenerate_data.py

INIT = Path(__file__).with_name("engine") / "__init__.py"
VERSION = INIT.read_text(encoding="utf-8").partition('__version__ = "')[2].partition('"')[0]

setup(
    name="draftspeed",
    version=VERSION,
    description="A training engine for draft models, the small networks behind speculative decoding",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_namespace_packages(include=["engine", "engine.*", "launcher", "launcher.*", "ds_configs"]),
    package_data={
        "engine.data": ["chat_templates/*.jinja"],
        "engine.evaluation": ["*.css"],
        "engine.parallel": ["proofs.json"],
        "launcher": ["recipes/*", "embedded/target/*", "slurm/*", "kubernetes/*"],
        "ds_configs": ["*.json"],
    },
    entry_points={"console_scripts": ["draftspeed = launcher.cli:main"]},
    install_requires=[
        "torch>=2.8",
        "transformers>=5.20,<6",
        "deepspeed>=0.19",
        "pydantic>=2.7",
        "annotated-types>=0.6",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "numpy>=2",
        "pyyaml>=6",
        "rich>=14.1",
        "jinja2>=3.1",
        "psutil>=5.9",
        "xxhash>=3.4",
    ],
    extras_require={
        "gpu": ["accelerate>=1.1", "liger-kernel>=0.8.5,<0.9", "nvidia-ml-py>=12.535"],
        "data": DATA,
        "dev": [
            *DATA,
            "jsonschema>=4.23",
            "mypy>=2.4",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "setuptools>=77",
            "tensorboard>=2.17",
            "triton>=3.3",
            "types-PyYAML",
        ],
        "wandb": ["wandb>=0.18"],
    },
)
