//! Tests of the sans-IO core: whole nodes of several shards in one process, on virtual time, with
//! seeded cuts in every send. A failure of a seeded test prints its seed.

mod closing;
mod cluster;
mod cluster_nodes;
mod fairness;
mod fanout;
mod figures;
mod gaps;
mod harness;
mod infos;
mod late_bus;
mod mesh;
mod probe;
mod probe_connect;
mod probe_misc;
mod probe_subscribe;
mod protocol;
mod snapshot;
