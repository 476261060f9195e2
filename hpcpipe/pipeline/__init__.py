"""The pipeline runtime: a stage computes its layers, the executor walks one list of actions."""
