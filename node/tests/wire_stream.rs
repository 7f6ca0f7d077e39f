//! One log streamed to many readers through small socket buffers: readers stop, leave and end in the
//! middle, and every byte is checked. Alone in its process, whose memory it measures.

mod wire_support;

use ringmain::core::metrics::Metric;
use wire_support::node::Node;
use wire_support::sockets::{await_live, private_bytes};
use wire_support::stream::{Streamer, plan, run};

/// Rounds until the allocator's high-water marks are reached; as many again must not raise them.
const WARM_ROUNDS: u64 = 5;

#[test]
fn every_byte_arrives_once_and_in_order_and_nothing_is_left() {
    let node = Node::start(&plan(|_| {}), |_| Streamer::default);
    let mut memory = Vec::new();
    for seed in 0..2 * WARM_ROUNDS {
        let tally = run(&node, 15_000_000, seed).unwrap();
        assert!(tally.fins > 10 && tally.left > 10, "nobody left: {tally:?}");
        await_live(node.address().port(), 0);
        memory.push(private_bytes());
    }
    let (warm, after) = (memory[WARM_ROUNDS as usize - 1], memory[2 * WARM_ROUNDS as usize - 1]);
    assert!(after < warm + 1024 * 1024, "memory grows: {memory:?}");
    let metrics = node.shards[0].metrics.clone();
    node.stop();
    let (sends, short) = (metrics.value(Metric::Sends), metrics.value(Metric::SendsShort));
    println!("{sends} sends, {short} short; {memory:?} bytes");
    assert!(short > 1_000, "the sockets were never full: the test shows nothing");
}
