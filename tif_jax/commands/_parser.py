"""What reads a command line; it imports no JAX."""

import argparse

from tif_jax.errors import InputError


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would exit."""

    def error(self, message: str):
        raise InputError(f"{message}; `{self.prog} --help` lists the flags")
