"""What a run made, for others: the model with its card, or its impacts as a data set; to a folder or the Hugging Face hub."""

import logging

from tif_jax.commands import _arguments
from tif_jax.errors import InputError
from tif_jax.sharing.share import push_to_hub, save_impact, save_pretrained
from tif_jax.weights import hub

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    parser = _arguments.Parser(prog="tif share", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="what a run left; or a folder in it, as DIR/backbone"
    )
    parser.add_argument(
        "--to", required=True, metavar="FOLDER|hf:OWNER/NAME", help="a new folder, or a name on the hub"
    )
    parser.add_argument("--impact", action="store_true", help="the impacts instead of the model")
    parser.add_argument("--private", action="store_true", help="on the hub: a new repository is private")
    parser.add_argument("--license", default="", metavar="NAME", help="for the card, as hubs know it: apache-2.0")
    parser.add_argument(
        "--base-model", default="", metavar="hf:OWNER/NAME", help="for the card, where the run does not say it"
    )
    given = parser.parse_args(argv)
    _arguments.log_to_stderr()
    if hub.is_name(given.to):
        options = dict(license=given.license, base_model=given.base_model, private=given.private, impact=given.impact)
        print(push_to_hub(given.workdir, given.to, **options))
        return
    if given.private:
        raise InputError("--private is for the hub; a folder is as private as you make it")
    if given.impact:
        logger.info("%s is written", save_impact(given.workdir, given.to, license=given.license))
    else:
        options = dict(license=given.license, base_model=given.base_model)
        logger.info("%s is written", save_pretrained(given.workdir, given.to, **options))
