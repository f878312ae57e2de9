"""Many pictures on many machines: shards, the executors that make them, and what is there.

The work is cut into shards, each known by all that it depends on and kept as whole files. An
executor hands shards to workers. A shard may be made twice or on any machine, for its bytes are the
same. So whatever dies is made again, and a run goes on where it stopped.
"""
