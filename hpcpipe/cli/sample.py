"""``hpcpipe sample``: let the model of a checkpoint write text."""

import argparse

from hpcpipe.cli.parser import path

# Logits over less than this overflow; the most likely token is chosen long before.
_LEAST_TEMPERATURE = 1e-6


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser(
        "sample", help="write text with a checkpoint", description="Continue a prompt with the model of a checkpoint."
    )
    parser.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help="a checkpoint, or a run directory")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to write (default 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0 takes the most likely token (default 0.7)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="SEED", help="seed of the random choices (default 1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the prompt and what follows it."""
    from hpcpipe.cluster.environment import limit_blas_threads
    from hpcpipe.errors import UsageError

    if args.tokens < 0:
        raise UsageError(f"--tokens {args.tokens}: give a number of tokens, 0 or more")
    if not 0 <= args.temperature < float("inf"):
        raise UsageError(f"--temperature {args.temperature}: give 0 for the most likely text, or a number above")
    limit_blas_threads()
    from hpcpipe.telemetry.text import visible
    from hpcpipe.train.sample import sample

    temperature = args.temperature if args.temperature >= _LEAST_TEMPERATURE else 0.0
    text = sample(args.checkpoint, args.prompt, args.tokens, temperature, args.seed)
    print(visible(text, kept="\n\t"))
    return 0
