//! What the cases say, and what they expect.
//!
//! Where the suite allows more than one outcome, the strictest is expected: what came before a breach is
//! answered, and invalid UTF-8 is refused at its first byte that cannot follow.

use std::fmt::Display;

use crate::wire_support::websocket::*;

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The client closes with 1000 once it has everything.
    Ours,
    /// The server closes with this code.
    Theirs(u16),
    /// What was sent holds a close frame; the answer to it is among what is expected.
    Sent,
}

/// One case.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) id: String,
    /// Pieces, one write each.
    pub(crate) sent: Vec<Vec<u8>>,
    /// Frames that come back, the answer to the client's own close frame apart.
    pub(crate) expected: Vec<Received>,
    pub(crate) ending: Ending,
}

impl Case {
    /// Whether a message comes back.
    pub(crate) fn has_messages(&self) -> bool {
        self.expected.iter().any(|(opcode, _)| matches!(*opcode, TEXT | BINARY))
    }
}

const PROTOCOL: Ending = Ending::Theirs(1_002);
const UTF8: Ending = Ending::Theirs(1_007);
const HELLO: &[u8] = b"Hello, world!";
/// "κόσμε".
const KOSME: &[u8] = b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5";

/// How a stream is cut into writes.
#[derive(Clone, Copy)]
enum Cut {
    /// Everything at once.
    Whole,
    /// A frame at a time.
    Frames,
    /// So many bytes at a time.
    Bytes(usize),
}

/// The three ways in which many cases are repeated: as it comes, frame by frame, byte by byte.
const CUTS: [Cut; 3] = [Cut::Whole, Cut::Frames, Cut::Bytes(1)];

fn cut(frames: &[Vec<u8>], cut: Cut) -> Vec<Vec<u8>> {
    match cut {
        Cut::Whole => vec![frames.concat()],
        Cut::Frames => frames.to_vec(),
        Cut::Bytes(count) => frames.concat().chunks(count).map(<[u8]>::to_vec).collect(),
    }
}

/// The table under construction.
#[derive(Default)]
struct Table(Vec<Case>);

impl Table {
    fn add(&mut self, id: impl Display, sent: Vec<Vec<u8>>, expected: &[Received], ending: Ending) {
        let (id, expected) = (id.to_string(), expected.to_vec());
        self.0.push(Case { id, sent, expected, ending });
    }

    /// A message that comes back.
    fn echo(&mut self, id: impl Display, opcode: u8, payload: &[u8], frames: &[Vec<u8>], how: Cut) {
        self.add(id, cut(frames, how), &[(opcode, payload.to_vec())], Ending::Ours);
    }
}

/// A message in fragments of so many bytes.
fn fragments(opcode: u8, payload: &[u8], size: usize) -> Vec<Vec<u8>> {
    let count = payload.len().div_ceil(size).max(1);
    let one = |index: usize| {
        let part = &payload[index * size..payload.len().min((index + 1) * size)];
        let opcode = if index == 0 { opcode } else { CONTINUATION };
        frame(if index + 1 == count { FIN | opcode } else { opcode }, part)
    };
    (0..count).map(one).collect()
}

fn whole(opcode: u8, payload: &[u8]) -> Vec<u8> {
    frame(FIN | opcode, payload)
}

fn text(payload: &[u8]) -> Received {
    (TEXT, payload.to_vec())
}

fn pong(payload: &[u8]) -> Received {
    (PONG, payload.to_vec())
}

fn closed(code: u16) -> Received {
    (CLOSE, close_payload(code, b""))
}

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut table = Table::default();
    framing(&mut table);
    pings(&mut table);
    reserved_bits(&mut table);
    opcodes(&mut table);
    fragmentation(&mut table);
    utf8_framed(&mut table);
    utf8_sequences(&mut table);
    closes(&mut table);
    limits(&mut table);
    table.0
}

/// 1: text and binary messages around the three forms of a length.
fn framing(table: &mut Table) {
    for (section, opcode, byte) in [(1, TEXT, b'*'), (2, BINARY, 0xfe)] {
        for (number, len) in [0, 125, 126, 127, 128, 65_535, 65_536, 65_536].into_iter().enumerate() {
            let payload = vec![byte; len];
            let how = if number == 7 { Cut::Bytes(997) } else { Cut::Whole };
            let frames = [whole(opcode, &payload)];
            table.echo(format!("1.{section}.{}", number + 1), opcode, &payload, &frames, how);
        }
    }
}

/// 2: pings and pongs.
fn pings(table: &mut Table) {
    let odd: &[u8] = b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff";
    let long = [0xfe; 126];
    for (number, payload, how) in [
        (1, &b""[..], Cut::Whole),
        (2, HELLO, Cut::Whole),
        (3, odd, Cut::Whole),
        (4, &long[..125], Cut::Whole),
        (6, &long[..125], Cut::Bytes(1)),
    ] {
        let sent = cut(&[whole(PING, payload)], how);
        table.add(format!("2.{number}"), sent, &[pong(payload)], Ending::Ours);
    }
    table.add("2.5", vec![whole(PING, &long)], &[], PROTOCOL);
    table.add("2.7", vec![whole(PONG, b"")], &[], Ending::Ours);
    table.add("2.8", vec![whole(PONG, b"unsolicited pong payload")], &[], Ending::Ours);
    let sent = cut(&[whole(PONG, b"unsolicited pong payload"), whole(PING, b"ping payload")], Cut::Whole);
    table.add("2.9", sent, &[pong(b"ping payload")], Ending::Ours);
    let payloads: Vec<_> = (0..10).map(|n| format!("payload-{n}").into_bytes()).collect();
    let sent: Vec<_> = payloads.iter().map(|payload| whole(PING, payload)).collect();
    let expected: Vec<_> = payloads.iter().map(|payload| pong(payload)).collect();
    table.add("2.10", cut(&sent, Cut::Whole), &expected, Ending::Ours);
    table.add("2.11", cut(&sent, Cut::Bytes(1)), &expected, Ending::Ours);
}

/// 3: reserved bits. What is sent before is answered.
fn reserved_bits(table: &mut Table) {
    let with = |rsv: u8, opcode, payload: &[u8]| frame(FIN | rsv << 4 | opcode, payload);
    table.add("3.1", vec![with(1, TEXT, HELLO)], &[], PROTOCOL);
    for (rsv, how) in (2..5).zip(CUTS) {
        let sent = [whole(TEXT, HELLO), with(rsv, TEXT, HELLO), whole(PING, b"")];
        table.add(format!("3.{rsv}"), cut(&sent, how), &[text(HELLO)], PROTOCOL);
    }
    table.add("3.5", vec![with(5, BINARY, b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff")], &[], PROTOCOL);
    table.add("3.6", vec![with(6, PING, HELLO)], &[], PROTOCOL);
    table.add("3.7", vec![with(7, CLOSE, b"")], &[], PROTOCOL);
}

/// 4: reserved opcodes, of data frames and of control frames.
fn opcodes(table: &mut Table) {
    for (section, first) in [(1, 3), (2, 11)] {
        let id = |number| format!("4.{section}.{number}");
        table.add(id(1), vec![whole(first, b"")], &[], PROTOCOL);
        table.add(id(2), vec![whole(first + 1, b"reserved opcode payload")], &[], PROTOCOL);
        let after_text = |opcode, payload: &[u8], how| {
            cut(&[whole(TEXT, HELLO), whole(opcode, payload), whole(PING, b"")], how)
        };
        let ways: [(u8, &[u8], Cut); 3] =
            [(2, b"", Cut::Whole), (3, HELLO, Cut::Whole), (4, HELLO, Cut::Bytes(1))];
        for (step, payload, how) in ways {
            table.add(id(step + 1), after_text(first + step, payload, how), &[text(HELLO)], PROTOCOL);
        }
    }
}

/// 5: fragments, with control frames between them, and out of place.
fn fragmentation(table: &mut Table) {
    let halves = [frame(TEXT, b"fragment1"), whole(CONTINUATION, b"fragment2")];
    let both = text(b"fragment1fragment2");
    for (number, opcode) in [(1, PING), (2, PONG)] {
        let sent = [frame(opcode, b"fragment1"), whole(CONTINUATION, b"fragment2")];
        table.add(format!("5.{number}"), cut(&sent, Cut::Whole), &[], PROTOCOL);
    }
    for (number, how) in (0..).zip(CUTS) {
        let id = |first: usize| format!("5.{}", first + number);
        table.add(id(3), cut(&halves, how), std::slice::from_ref(&both), Ending::Ours);
        let sent = [halves[0].clone(), whole(PING, b"ping payload"), halves[1].clone()];
        table.add(id(6), cut(&sent, how), &[pong(b"ping payload"), both.clone()], Ending::Ours);
        for (first, fin) in [(9, FIN), (12, 0)] {
            let sent = [frame(fin | CONTINUATION, b"non-continuation payload"), whole(TEXT, HELLO)];
            table.add(id(first), cut(&sent, how), &[], PROTOCOL);
        }
    }
    let more = [frame(CONTINUATION, b"fragment3"), whole(TEXT, b"fragment4")];
    let sent = [halves.to_vec(), more.to_vec()].concat();
    table.add("5.15", cut(&sent, Cut::Whole), &[both], PROTOCOL);
    for (number, fin) in [(16, 0), (17, FIN)] {
        let once = [
            frame(fin | CONTINUATION, b"fragment1"),
            frame(TEXT, b"fragment2"),
            whole(CONTINUATION, b"fragment3"),
        ];
        let sent = [once.clone(), once].concat();
        table.add(format!("5.{number}"), cut(&sent, Cut::Whole), &[], PROTOCOL);
    }
    let sent = [frame(TEXT, b"fragment1"), whole(TEXT, b"fragment2")];
    table.add("5.18", cut(&sent, Cut::Whole), &[], PROTOCOL);
    let parts: Vec<_> = (1..6).map(|n| format!("fragment{n}").into_bytes()).collect();
    let mut sent = fragments(TEXT, &parts.concat(), parts[0].len());
    sent.insert(2, whole(PING, b"pongme 1!"));
    sent.insert(5, whole(PING, b"pongme 2!"));
    let expected = [pong(b"pongme 1!"), pong(b"pongme 2!"), text(&parts.concat())];
    table.add("5.19", cut(&sent, Cut::Whole), &expected, Ending::Ours);
    table.add("5.20", cut(&sent, Cut::Frames), &expected, Ending::Ours);
}

/// 6.1 to 6.4: UTF-8 over fragments, and refused as soon as it is known to be none.
fn utf8_framed(table: &mut Table) {
    let empty = |payload: &[u8]| [frame(TEXT, b""), frame(CONTINUATION, payload), whole(CONTINUATION, b"")];
    table.echo("6.1.1", TEXT, b"", &[whole(TEXT, b"")], Cut::Whole);
    table.echo("6.1.2", TEXT, b"", &empty(b""), Cut::Whole);
    table.echo("6.1.3", TEXT, b"middle frame payload", &empty(b"middle frame payload"), Cut::Whole);
    let greeting = "Hello-µ@ßöäüàá-UTF-8!!".as_bytes();
    let half = "Hello-µ@ßöä".len();
    table.echo("6.2.1", TEXT, greeting, &[whole(TEXT, greeting)], Cut::Whole);
    table.echo("6.2.2", TEXT, greeting, &fragments(TEXT, greeting, half), Cut::Whole);
    table.echo("6.2.3", TEXT, greeting, &fragments(TEXT, greeting, 1), Cut::Whole);
    table.echo("6.2.4", TEXT, KOSME, &fragments(TEXT, KOSME, 1), Cut::Whole);
    let bad = [KOSME, b"\xed\xa0\x80edited"].concat();
    table.add("6.3.1", vec![whole(TEXT, &bad)], &[], UTF8);
    table.add("6.3.2", cut(&fragments(TEXT, &bad, 1), Cut::Whole), &[], UTF8);
    // 6.4: what would make the message whole is never sent.
    let beyond = [KOSME, b"\xf4\x90\x80\x80edited"].concat();
    for (number, ends) in [(1, [11, 15]), (2, [12, 13])] {
        let parts = [frame(TEXT, &beyond[..ends[0]]), frame(CONTINUATION, &beyond[ends[0]..ends[1]])];
        table.add(format!("6.4.{number}"), parts.to_vec(), &[], UTF8);
        let head = whole(TEXT, &beyond).len() - beyond.len();
        let mut begun = whole(TEXT, &beyond);
        begun.truncate(head + ends[1]);
        let rest = begun.split_off(head + ends[0]);
        table.add(format!("6.4.{}", number + 2), vec![begun, rest], &[], UTF8);
    }
}

/// 6.5 to 6.23: sequences from Markus Kuhn's stress test, each as one message.
fn utf8_sequences(table: &mut Table) {
    let prefixes: Vec<&[u8]> = (1..=KOSME.len()).map(|end| &KOSME[..end]).collect();
    let continuations: Vec<u8> = (0x80..0xbf).collect();
    let lonely: Vec<Vec<u8>> = [(0xc0, 0xdf), (0xe0, 0xef), (0xf0, 0xf7), (0xf8, 0xfb), (0xfc, 0xfd)]
        .map(|(from, to)| (from..to).flat_map(|byte| [byte, b' ']).collect())
        .into();
    let lonely: Vec<&[u8]> = lonely.iter().map(Vec::as_slice).collect();
    let cut_short: [&[u8]; 10] = [
        b"\xc0",
        b"\xe0\x80",
        b"\xf0\x80\x80",
        b"\xf8\x80\x80\x80",
        b"\xfc\x80\x80\x80\x80",
        b"\xdf",
        b"\xef\xbf",
        b"\xf7\xbf\xbf",
        b"\xfb\xbf\xbf\xbf",
        b"\xfd\xbf\xbf\xbf\xbf",
    ];
    let non_characters = non_characters();
    let non_characters: Vec<&[u8]> = non_characters.iter().map(Vec::as_slice).collect();
    let sections: [&[&[u8]]; 19] = [
        &[
            b"hello$world",
            b"hello\xc2\xa2world",
            b"hello\xe2\x82\xacworld",
            b"hello\xf0\xa4\xad\xa2world",
            KOSME,
        ],
        &prefixes,
        &[b"\x00", b"\xc2\x80", b"\xe0\xa0\x80", b"\xf0\x90\x80\x80"],
        &[b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80"],
        &[b"\x7f", b"\xdf\xbf", b"\xef\xbf\xbf", b"\xf4\x8f\xbf\xbf"],
        &[b"\xf7\xbf\xbf\xbf", b"\xfb\xbf\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf\xbf"],
        &[b"\xed\x9f\xbf", b"\xee\x80\x80", b"\xef\xbf\xbd", b"\xf4\x8f\xbf\xbf", b"\xf4\x90\x80\x80"],
        &[
            b"\x80",
            b"\xbf",
            b"\x80\xbf",
            b"\x80\xbf\x80",
            b"\x80\xbf\x80\xbf",
            b"\x80\xbf\x80\xbf\x80",
            b"\x80\xbf\x80\xbf\x80\xbf",
            &continuations,
        ],
        &lonely,
        &cut_short,
        &[&cut_short.concat()],
        &[b"\xfe", b"\xff", b"\xfe\xfe\xff\xff"],
        &[
            b"\xc0\xaf",
            b"\xe0\x80\xaf",
            b"\xf0\x80\x80\xaf",
            b"\xf8\x80\x80\x80\xaf",
            b"\xfc\x80\x80\x80\x80\xaf",
        ],
        &[
            b"\xc1\xbf",
            b"\xe0\x9f\xbf",
            b"\xf0\x8f\xbf\xbf",
            b"\xf8\x87\xbf\xbf\xbf",
            b"\xfc\x83\xbf\xbf\xbf\xbf",
        ],
        &[
            b"\xc0\x80",
            b"\xe0\x80\x80",
            b"\xf0\x80\x80\x80",
            b"\xf8\x80\x80\x80\x80",
            b"\xfc\x80\x80\x80\x80\x80",
        ],
        &[
            b"\xed\xa0\x80",
            b"\xed\xad\xbf",
            b"\xed\xae\x80",
            b"\xed\xaf\xbf",
            b"\xed\xb0\x80",
            b"\xed\xbe\x80",
            b"\xed\xbf\xbf",
        ],
        &[
            b"\xed\xa0\x80\xed\xb0\x80",
            b"\xed\xa0\x80\xed\xbf\xbf",
            b"\xed\xad\xbf\xed\xb0\x80",
            b"\xed\xad\xbf\xed\xbf\xbf",
            b"\xed\xae\x80\xed\xb0\x80",
            b"\xed\xae\x80\xed\xbf\xbf",
            b"\xed\xaf\xbf\xed\xb0\x80",
            b"\xed\xaf\xbf\xed\xbf\xbf",
        ],
        &non_characters,
        &[
            b"\xef\xbf\xb9",
            b"\xef\xbf\xba",
            b"\xef\xbf\xbb",
            b"\xef\xbf\xbc",
            b"\xef\xbf\xbd",
            b"\xef\xbf\xbe",
            b"\xef\xbf\xbf",
        ],
    ];
    for (section, sequences) in (5..).zip(sections) {
        for (number, payload) in (1..).zip(sequences) {
            let id = format!("6.{section}.{number}");
            // The standard library's word on what is UTF-8.
            if std::str::from_utf8(payload).is_ok() {
                table.echo(id, TEXT, payload, &[whole(TEXT, payload)], Cut::Whole);
            } else {
                table.add(id, vec![whole(TEXT, payload)], &[], UTF8);
            }
        }
    }
}

/// U+FFFE and U+FFFF, and the last two of every fourth plane's quarter: not characters, but UTF-8.
fn non_characters() -> Vec<Vec<u8>> {
    let mut all = vec![b"\xef\xbf\xbe".to_vec(), b"\xef\xbf\xbf".to_vec()];
    for first in 0xf0..=0xf4 {
        for second in [0x8f, 0x9f, 0xaf, 0xbf] {
            if (first == 0xf4 && second != 0x8f) || (first, second) == (0xf0, 0x8f) {
                continue;
            }
            all.extend([0xbe, 0xbf].map(|last| vec![first, second, 0xbf, last]));
        }
    }
    all
}

/// 7: closing handshakes. What follows a close frame is not answered.
fn closes(table: &mut Table) {
    let ours = || whole(CLOSE, &close_payload(1_000, b""));
    let answered = [closed(1_000)];
    table.echo("7.1.1", TEXT, b"Hello World!", &[whole(TEXT, b"Hello World!")], Cut::Whole);
    let after: [(u8, Vec<Vec<u8>>); 3] = [
        (2, vec![ours(), ours()]),
        (3, vec![ours(), whole(PING, b"ping after close")]),
        (4, vec![ours(), whole(TEXT, b"Hello World!")]),
    ];
    for (number, sent) in after {
        table.add(format!("7.1.{number}"), cut(&sent, Cut::Whole), &answered, Ending::Sent);
    }
    let sent = [frame(TEXT, b"fragment1"), ours(), whole(CONTINUATION, b"fragment2")];
    table.add("7.1.5", cut(&sent, Cut::Whole), &answered, Ending::Sent);
    let long = b"BAsd7&jh23".repeat(26_215);
    let sent = [whole(TEXT, &long[..256 * 1024]), whole(TEXT, b"Hello World!"), ours(), whole(PING, b"")];
    let expected = [text(&long[..256 * 1024]), text(b"Hello World!"), closed(1_000)];
    table.add("7.1.6", cut(&sent, Cut::Whole), &expected, Ending::Sent);
    table.add("7.3.1", vec![whole(CLOSE, b"")], &[(CLOSE, Vec::new())], Ending::Sent);
    table.add("7.3.2", vec![whole(CLOSE, b"a")], &[], PROTOCOL);
    for (number, reason) in [(3, 0), (4, 12), (5, 123)] {
        let sent = vec![whole(CLOSE, &close_payload(1_000, &b"*".repeat(reason)))];
        table.add(format!("7.3.{number}"), sent, &answered, Ending::Sent);
    }
    table.add("7.3.6", vec![whole(CLOSE, &close_payload(1_000, &[b'*'; 124]))], &[], PROTOCOL);
    let reason = [KOSME, b"\xed\xa0\x80edited"].concat();
    table.add("7.5.1", vec![whole(CLOSE, &close_payload(1_000, &reason))], &[], UTF8);
    let valid = [1_000, 1_001, 1_002, 1_003, 1_007, 1_008, 1_009, 1_010, 1_011, 3_000, 3_999, 4_000, 4_999];
    for (number, code) in (1..).zip(valid) {
        let sent = vec![whole(CLOSE, &close_payload(code, b""))];
        table.add(format!("7.7.{number}"), sent, &[closed(code)], Ending::Sent);
    }
    for (number, code) in (1..).zip([0, 999, 1_004, 1_005, 1_006, 1_016, 1_100, 2_000, 2_999]) {
        table.add(format!("7.9.{number}"), vec![whole(CLOSE, &close_payload(code, b""))], &[], PROTOCOL);
    }
    for (number, code) in [(1, 5_000), (2, 65_535)] {
        table.add(format!("7.13.{number}"), vec![whole(CLOSE, &close_payload(code, b""))], &[], PROTOCOL);
    }
}

/// 9 and 10: large messages, whole, in fragments and in pieces; many in a row.
fn limits(table: &mut Table) {
    const KIB: usize = 1_024;
    for (kind, opcode, byte) in [(0, TEXT, b'*'), (1, BINARY, 0xfe)] {
        for (number, kib) in (1..).zip([64, 256, 1_024, 4_096, 8_192, 16_384]) {
            let payload = vec![byte; kib * KIB];
            let id = format!("9.{}.{number}", 1 + kind);
            table.echo(id, opcode, &payload, &[whole(opcode, &payload)], Cut::Whole);
        }
        let payload = vec![byte; 4_096 * KIB];
        for (number, size) in (1..).zip((0..9).map(|power| 64 << (2 * power))) {
            let id = format!("9.{}.{number}", 3 + kind);
            table.echo(id, opcode, &payload, &fragments(opcode, &payload, size), Cut::Whole);
        }
        let payload = vec![byte; KIB * KIB];
        for (number, size) in (1..).zip((0..6).map(|power| 64 << power)) {
            let id = format!("9.{}.{number}", 5 + kind);
            table.echo(id, opcode, &payload, &[whole(opcode, &payload)], Cut::Bytes(size));
        }
        for (number, len) in (1..).zip([0, 16, 64, 256, 1_024, 4_096]) {
            let payload = vec![byte; len];
            let sent = vec![whole(opcode, &payload); 1_000];
            let expected = vec![(opcode, payload); 1_000];
            table.add(format!("9.{}.{number}", 7 + kind), sent, &expected, Ending::Ours);
        }
    }
    let payload = [b'*'; 65_536];
    table.echo("10.1.1", TEXT, &payload, &fragments(TEXT, &payload, 1_300), Cut::Whole);
}
