"""What `python -m grn.bench` measures: a function for each choice of conf/benchmark, and the measuring itself.

Each is called with the `model` config, `device` and `repeats` beside the keys of its choice; it prints its tables and
returns what goes into `bench.json`, plain containers.
"""
