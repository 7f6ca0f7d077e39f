//! The data plane: the shard loop, the wire and the mesh.
