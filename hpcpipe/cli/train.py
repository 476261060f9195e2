"""``hpcpipe train``: train as a configuration says."""

import argparse

from hpcpipe.cli.parser import path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser(
        "train", help="train a model", description="Train a model, under mpirun, srun or alone."
    )
    parser.add_argument("config", type=path, metavar="CONFIG", help="TOML file, such as configs/quickstart.toml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="override a key of the configuration; may be given several times",
    )
    parser.add_argument(
        "--resume",
        type=_checkpoint,
        default="auto",
        metavar="auto|never|PATH",
        help="go on from the newest checkpoint that verifies (default), never, or from the one at a path",
    )
    parser.set_defaults(run=run)


def _checkpoint(text: str) -> str:
    """Refuse an empty path."""
    return text if text in ("auto", "never") else str(path(text))


def run(args: argparse.Namespace) -> int:
    """Train; every rank runs this."""
    from hpcpipe.cluster.environment import limit_blas_threads

    limit_blas_threads()
    from hpcpipe.train.run import train

    return int(train(args.config, args.overrides, args.resume))
