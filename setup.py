"""What pyproject.toml can not say: configs/ stays beside the package here, and lies inside it when it is installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tif_jax*"]), "tif_jax.configs"],
    package_dir={"tif_jax.configs": "configs"},
    package_data={
        "": ["*.html", "*.css", "*.js", "*.json", "*.csv", "*.txt", "*.md"]
    },  # what lies beside modules, if anything
)
