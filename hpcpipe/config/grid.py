"""Checks of the degrees of parallelism against ranks, layers and microbatches."""

from hpcpipe.config.schema import Config


def degrees_fill_the_ranks(config: Config, world_size: int) -> str | None:
    """Check that pipeline x data is the number of ranks; pipeline = 0 stands for ranks / data."""
    pipeline, data = config.parallel.pipeline, config.parallel.data
    if pipeline == 0:
        if world_size % data == 0:
            return None
        problem = f"parallel.data = {data} does not divide the number of ranks, {world_size}"
        fewest = -(-world_size // data) * data
    else:
        if pipeline * data == world_size:
            return None
        product = f"parallel.pipeline = {pipeline} x parallel.data = {data}"
        problem = f"{product} needs {_ranks(pipeline * data)}, and {_ranks(world_size)} started"
        fewest = pipeline * data
    return f"{problem}: start with `-n {fewest}`{_or_degrees(config, world_size)}"


def layers_fill_the_stages(config: Config, num_stages: int) -> str | None:
    """Check that each stage can have a block, the last one at least the head."""
    layers, pipeline, data = config.model.layers, config.parallel.pipeline, config.parallel.data
    if layers + 1 >= num_stages:
        return None
    chunks = num_stages // pipeline
    if chunks == 1:
        counted = f"parallel.pipeline = {pipeline} stages"
    else:
        counted = f"{num_stages} stages (parallel.pipeline = {pipeline}, {chunks} on each rank)"
    fewer = f", start with `-n {layers // chunks * data}` or fewer ranks" if layers >= chunks else ""
    return (
        f"model.layers = {layers} is too few for {counted}, each of which needs a layer, the last one at least the"
        f" head: set model.layers = {num_stages - 1} or more{fewer}{_or_degrees(config, pipeline * data, chunks)}"
    )


def partition_covers_the_layers(config: Config, num_stages: int) -> str | None:
    """Check that a partition by hand has one entry per stage and every layer once."""
    partition, layers = config.parallel.partition, config.model.layers
    if partition == "auto":
        return None
    example = [layers // num_stages + (stage < layers % num_stages) for stage in range(num_stages)]
    cure = f'set it to "auto", or for example to {example}'
    if isinstance(partition, str):
        return f'parallel.partition = "{partition}": expected "auto" or a list: {cure}'
    shown = f"parallel.partition = {list(partition)}"
    if len(partition) != num_stages:
        return f"{shown} has {len(partition)} entries for {num_stages} stages: {cure}"
    empty = [stage for stage, count in enumerate(partition) if count < 1 and (stage == 0 or stage + 1 < num_stages)]
    if empty:
        return f"{shown} leaves stage {empty[0]} without a layer, and only the last may do with the head alone: {cure}"
    if sum(partition) != layers:
        return f"{shown} adds up to {sum(partition)} layers, and model.layers = {layers}: {cure}"
    return None


def data_divides_microbatches(config: Config, world_size: int) -> str | None:
    """Check that every replica gets the same number of microbatches."""
    microbatches, data = config.parallel.microbatches, config.parallel.data
    if microbatches % data == 0:
        return None
    low, high = microbatches // data * data, -(-microbatches // data) * data
    nearest = f"{low} or {high}" if low else f"{high}"
    return (
        f"parallel.microbatches = {microbatches} is not a multiple of parallel.data = {data}: set "
        f"parallel.microbatches = {nearest}{_or_degrees(config, world_size)}"
    )


def fitting_degrees(config: Config, world_size: int, chunks: int = 1) -> list[tuple[int, int]]:
    """List the (pipeline, data) that this model and batch allow on so many ranks.

    Parameters
    ----------
    config : Config
        Its layers bound the stages, its microbatches the replicas.
    world_size : int
        Number of ranks.
    chunks : int
        Stages per rank.

    Returns
    -------
    list of (int, int)
        Those nearest to the configured `parallel.data` first.
    """
    degrees = [
        (world_size // data, data)
        for data in range(1, min(world_size, config.parallel.microbatches) + 1)
        if world_size % data == 0
        and world_size // data * chunks <= config.model.layers
        and config.parallel.microbatches % data == 0
    ]
    return sorted(degrees, key=lambda degree: abs(degree[1] - config.parallel.data))


def _or_degrees(config: Config, world_size: int, chunks: int = 1) -> str:
    """Suggest degrees for the ranks that were started, if there are any."""
    degrees = fitting_degrees(config, world_size, chunks)
    if not degrees:
        return ""
    pipeline, data = degrees[0]
    return f", or set parallel.pipeline = {pipeline} and parallel.data = {data} for {_ranks(world_size)}"


def _ranks(count: int) -> str:
    """Count ranks in words."""
    return f"{count} rank" if count == 1 else f"{count} ranks"
