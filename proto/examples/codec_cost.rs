//! What one message costs in this crate: nanoseconds per operation, of the fastest of many short
//! rounds (the machine's other work only adds) and of the median round.
//!
//! `cargo run --release -p ringmain-proto --example codec_cost [PART OF A NAME]`

use std::hint::black_box;
use std::time::Instant;

use ringmain_proto::client::ClientId;
use ringmain_proto::codec::Codec;
use ringmain_proto::message::{ClientInfo, Publication, Push, Reply};
use ringmain_proto::ws::{self, Chunk, Reader};

const ROUNDS: usize = 101;
const TURNS: u32 = 10_000;

/// Prints the cost of `operation`, if its name was asked for.
fn measure(name: &str, mut operation: impl FnMut()) {
    if std::env::args().nth(1).is_some_and(|part| !name.contains(&part)) {
        return;
    }
    let mut costs: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..TURNS {
                operation();
            }
            start.elapsed().as_nanos() as f64 / f64::from(TURNS)
        })
        .collect();
    costs.sort_by(f64::total_cmp);
    println!("{name:<44} {:8.1} ns {:8.1} ns", costs[0], costs[ROUNDS / 2]);
}

/// A publish command whose data makes it about `bytes` long.
fn publish_command(bytes: usize) -> String {
    let shell = r#"{"id":123,"publish":{"channel":"room:general","data":{"text":""}}}"#;
    let text = "Lorem ipsum dolor sit amet, ".repeat(bytes / 28 + 1);
    let text = &text[..bytes.saturating_sub(shell.len())];
    shell.replace("\"text\":\"\"", &format!("\"text\":\"{text}\""))
}

/// A masked client frame.
fn client_frame(payload: &[u8]) -> Vec<u8> {
    let mask = [1u8, 2, 3, 4];
    let (mut header, len) = ws::frame_header(payload.len(), ws::Opcode::Text);
    header[1] |= 0x80;
    let masked = payload.iter().enumerate().map(|(i, byte)| byte ^ mask[i % 4]);
    header[..len].iter().copied().chain(mask).chain(masked).collect()
}

fn decoding() {
    for bytes in [68, 96, 128, 1024] {
        let command = publish_command(bytes);
        measure(&format!("decode publish, {} B", command.len()), || {
            for command in Codec::Json.decode(black_box(command.as_bytes())) {
                black_box(command.is_ok());
            }
        });
    }
    let subscribe =
        r#"{"id":2,"subscribe":{"channel":"room:general","recover":true,"offset":12,"epoch":"abcd"}}"#;
    for (name, command) in [("decode pong {}", "{}"), ("decode subscribe with position", subscribe)] {
        measure(name, || {
            for command in Codec::Json.decode(black_box(command.as_bytes())) {
                black_box(command.is_ok());
            }
        });
    }
}

fn framing() {
    for bytes in [68, 128, 1024, 16_384] {
        let frame = client_frame(publish_command(bytes).as_bytes());
        let mut buffer = frame.clone();
        let mut reader = Reader::new();
        measure(&format!("copy, unmask, check a frame of {bytes} B"), || {
            buffer.copy_from_slice(&frame);
            let mut chunk = Chunk::new(&mut buffer);
            black_box(reader.next(&mut chunk, 65_536).is_ok());
        });
    }
}

fn encoding() {
    let info = ClientInfo {
        user: "user-42",
        client: ClientId(0x5f8b_7a9e_3c1d_4e2f_9a0b_1c2d_3e4f_5a6b),
        conn_info: None,
        chan_info: None,
    };
    let text = publish_command(128);
    let data = &text.as_bytes()[text.find("{\"text").expect("as built above")..text.len() - 2];
    let bare = Publication { offset: 123_456, data, ..Publication::default() };
    let with_info = Publication { info: Some(info), ..bare.clone() };
    let mut out = Vec::with_capacity(4096);
    for (name, publication) in
        [("publication push, framed", bare.clone()), ("the same with publisher", with_info.clone())]
    {
        let push = Push::Publication { channel: "room:general", publication: &publication };
        measure(&format!("encode {name}"), || {
            out.clear();
            let start = ws::begin_frame(&mut out);
            Codec::Json.encode_push(black_box(&push), &mut out);
            ws::finish_frame(&mut out, start, ws::Opcode::Text);
            black_box(out.len());
        });
    }
    measure("encode publish reply, framed", || {
        out.clear();
        let start = ws::begin_frame(&mut out);
        Codec::Json.encode_reply(black_box(123), black_box(&Reply::Publish), &mut out);
        ws::finish_frame(&mut out, start, ws::Opcode::Text);
        black_box(out.len());
    });
    measure("write record with publisher", || {
        out.clear();
        black_box(black_box(&with_info).write_record(&mut out));
    });
    let record = out.clone();
    measure("read record with publisher", || {
        black_box(Publication::read_record(black_box(&record)).is_some());
    });
}

fn main() {
    decoding();
    framing();
    encoding();
}
