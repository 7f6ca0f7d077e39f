use proptest::prelude::*;

use super::*;
use crate::limits::MESSAGE_BYTES_MAX;

const MASK: [u8; 4] = [0x12, 0x34, 0x56, 0x78];
const FIN: u8 = 0x80;

/// A client's frame.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    match payload.len() {
        len @ 0..126 => out.push(0x80 | len as u8),
        len @ 126..=0xffff => {
            out.push(0x80 | 126);
            out.extend_from_slice(&(len as u16).to_be_bytes());
        }
        len => {
            out.push(0x80 | 127);
            out.extend_from_slice(&(len as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(&MASK);
    out.extend(payload.iter().enumerate().map(|(i, byte)| byte ^ MASK[i % 4]));
    out
}

fn text(payload: &str) -> Event<'static> {
    Event::Text(payload.to_owned().into())
}

fn owned(event: Event<'_>) -> Event<'static> {
    match event {
        Event::Text(text) => Event::Text(String::from_utf8(text.as_bytes().to_vec()).unwrap().into()),
        Event::Binary(payload) => Event::Binary(payload.into_owned().into()),
        Event::Ping(payload) => Event::Ping(payload.into_owned().into()),
        Event::Pong(payload) => Event::Pong(payload.into_owned().into()),
        Event::Close { code, reason } => Event::Close { code, reason: reason.into_owned().into() },
    }
}

/// Everything that comes out of `wire`, given in pieces of these lengths (the last one repeats).
fn read_in(wire: &[u8], pieces: &[usize], max: usize) -> (Vec<Event<'static>>, Option<WsError>, Reader) {
    let mut reader = Reader::new();
    let mut events = Vec::new();
    let mut rest = wire.to_vec();
    let mut lengths = pieces.iter().chain(pieces.last().into_iter().cycle());
    while !rest.is_empty() {
        let len = (*lengths.next().unwrap()).clamp(1, rest.len());
        let tail = rest.split_off(len);
        let mut chunk = Chunk::new(&mut rest);
        loop {
            match reader.next(&mut chunk, max) {
                Ok(Some(event)) => events.push(owned(event)),
                Ok(None) => break,
                Err(error) => return (events, Some(error), reader),
            }
        }
        assert!(chunk.is_empty(), "what is left of a chunk must be taken");
        rest = tail;
    }
    (events, None, reader)
}

/// Whole, and cut at every byte: the same events, the same error.
fn check(wire: &[u8], expected: &[Event<'static>], error: Option<WsError>) {
    for piece in [usize::MAX, 1, 2, 3, 7] {
        let (events, failed, reader) = read_in(wire, &[piece], MESSAGE_BYTES_MAX);
        assert_eq!((events.as_slice(), failed), (expected, error), "pieces of {piece}");
        if error.is_none() {
            assert_eq!(reader.buffered_bytes(), 0, "an idle reader holds nothing");
        }
    }
    for cut in 1..wire.len() {
        let (events, failed, _) = read_in(wire, &[cut, usize::MAX], MESSAGE_BYTES_MAX);
        assert_eq!((events.as_slice(), failed), (expected, error), "cut at {cut}");
    }
}

#[test]
fn whole_messages_and_control_frames() {
    check(&frame(FIN | 1, b"hello"), &[text("hello")], None);
    check(&frame(FIN | 1, b""), &[text("")], None);
    let binary = Event::Binary(vec![0xff, 0].into());
    check(&frame(FIN | 2, &[0xff, 0]), &[binary], None);
    let long = "ä".repeat(40_000 / 2);
    let (events, ..) = read_in(&frame(FIN | 1, long.as_bytes()), &[usize::MAX], MESSAGE_BYTES_MAX);
    assert_eq!(events, [text(&long)]);
    let wire =
        [frame(FIN | 9, b"p"), frame(FIN | 10, b""), frame(FIN | 1, b"a"), frame(FIN | 1, b"b")].concat();
    let expected = [Event::Ping(b"p".to_vec().into()), Event::Pong(vec![].into()), text("a"), text("b")];
    check(&wire, &expected, None);
}

#[test]
fn fragments_with_control_frames_between() {
    let wire = [
        frame(1, b"one "),
        frame(FIN | 9, b"ping"),
        frame(0, b""),
        frame(0, b"two "),
        frame(FIN | 10, b"pong"),
        frame(FIN, b"three"),
        frame(FIN | 1, b"next"),
    ];
    let expected = [
        Event::Ping(b"ping".to_vec().into()),
        Event::Pong(b"pong".to_vec().into()),
        text("one two three"),
        text("next"),
    ];
    check(&wire.concat(), &expected, None);
}

#[test]
fn rules_of_fragmentation() {
    let continuation = Some(WsError::Protocol("continuation of nothing"));
    check(&frame(FIN, b"x"), &[], continuation);
    check(&[frame(FIN | 1, b"a"), frame(0, b"x")].concat(), &[text("a")], continuation);
    check(&[frame(1, b""), frame(FIN, b""), frame(FIN, b"")].concat(), &[text("")], continuation);
    let within = Some(WsError::Protocol("a new message within a fragmented one"));
    check(&[frame(1, b"a"), frame(FIN | 1, b"b")].concat(), &[], within);
    check(&[frame(2, b"a"), frame(1, b"b")].concat(), &[], within);
}

#[test]
fn close_frames() {
    let close = |code: Option<u16>, reason: &str| Event::Close { code, reason: reason.to_owned().into() };
    let body = |code: u16, reason: &[u8]| [&code.to_be_bytes(), reason].concat();
    check(&frame(FIN | 8, b""), &[close(None, "")], None);
    check(&frame(FIN | 8, b"\x03"), &[], Some(WsError::Protocol("close frame of one byte")));
    for code in [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999] {
        check(&frame(FIN | 8, &body(code, "grüß".as_bytes())), &[close(Some(code), "grüß")], None);
    }
    for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535] {
        let error = Some(WsError::Protocol("close code is not allowed"));
        check(&frame(FIN | 8, &body(code, b"")), &[], error);
    }
    check(&frame(FIN | 8, &body(1000, b"\xff")), &[], Some(WsError::Utf8));
    check(&frame(FIN | 8, &body(1000, &[b'x'; 123])), &[close(Some(1000), &"x".repeat(123))], None);
}

#[test]
fn nothing_is_read_after_a_close_or_an_error() {
    let close = Event::Close { code: None, reason: "".into() };
    check(&[frame(FIN | 8, b""), frame(FIN | 1, b"late"), vec![0xff; 9]].concat(), &[close], None);
    let mut reader = Reader::new();
    let mut bytes = [frame(0x83, b""), frame(FIN | 1, b"late")].concat();
    let mut chunk = Chunk::new(&mut bytes);
    assert!(reader.next(&mut chunk, 100).is_err());
    assert!(chunk.is_empty());
    let mut bytes = frame(FIN | 1, b"later");
    assert_eq!(reader.next(&mut Chunk::new(&mut bytes), 100), Ok(None));
    assert_eq!(reader.buffered_bytes(), 0);
}

#[test]
fn the_size_limit_is_exact_and_known_at_the_header() {
    let max = MESSAGE_BYTES_MAX;
    let most = frame(FIN | 2, &vec![7; max]);
    for pieces in [usize::MAX, 1000] {
        assert_eq!(read_in(&most, &[pieces], max).0.len(), 1);
    }
    let more = frame(FIN | 2, &vec![7; max + 1]);
    let (_, error, reader) = read_in(&more[..14], &[1], max);
    assert_eq!(error, Some(WsError::TooBig), "no byte of the payload is there");
    assert_eq!(reader.buffered_bytes(), 0);
    let halves = |second: usize| [frame(2, &vec![7; max / 2]), frame(FIN, &vec![7; second])].concat();
    assert_eq!(read_in(&halves(max / 2), &[997], max).0.len(), 1);
    assert_eq!(read_in(&halves(max / 2 + 1), &[997], max).1, Some(WsError::TooBig));
    let huge = [0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
    assert_eq!(read_in(&huge, &[1], max).1, Some(WsError::TooBig));
    assert_eq!(WsError::TooBig.close_reason().code(), 1009);
}

#[test]
fn invalid_text_fails_at_its_first_bad_byte() {
    // "κόσμε" then a surrogate, as Autobahn's cases 6.4 cut it.
    let valid = "κόσμε".as_bytes();
    let bad = [valid, b"\xed\xa0\x80", b"edited"].concat();
    let wire = frame(FIN | 1, &bad);
    let header_len = wire.len() - bad.len();
    for piece in [1, 2, usize::MAX] {
        let (events, error, _) = read_in(&wire[..header_len + valid.len() + 2], &[piece], MESSAGE_BYTES_MAX);
        assert_eq!((events.len(), error), (0, Some(WsError::Utf8)), "pieces of {piece}");
        let (_, error, _) = read_in(&wire[..header_len + valid.len() + 1], &[piece], MESSAGE_BYTES_MAX);
        assert_eq!(error, None, "ED alone may still become valid");
    }
    check(&[frame(1, valid), frame(0, b"\xf4"), frame(FIN, b"\x90")].concat(), &[], Some(WsError::Utf8));
    check(&[frame(1, b"a\xc3"), frame(FIN, b"\xa4")].concat(), &[text("aä")], None);
    check(&frame(FIN | 1, b"cut \xe2\x82"), &[], Some(WsError::Utf8));
    check(&[frame(1, b"cut \xe2\x82"), frame(FIN, b"")].concat(), &[], Some(WsError::Utf8));
    assert_eq!(WsError::Utf8.close_reason().code(), 1007);
}

#[test]
fn memory_follows_what_arrived_not_what_was_announced() {
    let wire = frame(FIN | 2, &vec![1; 60_000]);
    let mut reader = Reader::new();
    let mut head = wire[..100].to_vec();
    assert_eq!(reader.next(&mut Chunk::new(&mut head), MESSAGE_BYTES_MAX), Ok(None));
    assert!(reader.buffered_bytes() < 400, "{}", reader.buffered_bytes());
    let mut rest = wire[100..].to_vec();
    let mut chunk = Chunk::new(&mut rest);
    let event = reader.next(&mut chunk, MESSAGE_BYTES_MAX).unwrap().unwrap();
    assert!(matches!(event, Event::Binary(payload) if payload.len() == 60_000));
    assert_eq!(reader.buffered_bytes(), 0);
}

#[test]
fn a_whole_message_is_not_copied_and_the_rest_of_the_chunk_stays() {
    let mut bytes = [frame(FIN | 1, b"first"), frame(FIN | 1, b"second")].concat();
    let range = bytes.as_ptr_range();
    let mut reader = Reader::new();
    let mut chunk = Chunk::new(&mut bytes);
    let Ok(Some(Event::Text(text))) = reader.next(&mut chunk, 100) else {
        panic!("a borrowed message");
    };
    assert!(range.contains(&text.as_bytes().as_ptr()));
    assert_eq!(chunk.remaining(), frame(FIN | 1, b"second").len());
}

prop_compose! {
    fn any_frame()(
        kind in prop::sample::select(vec![0x81u8, 0x82, 0x01, 0x02, 0x00, 0x80, 0x89, 0x8a]),
        payload in prop_oneof![
            "[a-zäß€😀]{0,40}".prop_map(String::into_bytes),
            prop::collection::vec(any::<u8>(), 0..200),
        ],
    ) -> Vec<u8> {
        let cut = if kind & 8 != 0 { 125 } else { usize::MAX };
        frame(kind, &payload[..payload.len().min(cut)])
    }
}

proptest! {
    #[test]
    fn how_the_bytes_arrive_changes_nothing(
        frames in prop::collection::vec(any_frame(), 1..8),
        pieces in prop::collection::vec(1usize..60, 1..12),
        max in 50usize..400,
    ) {
        let wire = frames.concat();
        let (whole, whole_error, _) = read_in(&wire, &[usize::MAX], max);
        let (cut, cut_error, _) = read_in(&wire, &pieces, max);
        prop_assert_eq!(whole, cut);
        prop_assert_eq!(whole_error, cut_error);
    }

    #[test]
    fn any_bytes_are_survived(wire in prop::collection::vec(any::<u8>(), 0..300), piece in 1usize..40) {
        let (events, _, reader) = read_in(&wire, &[piece], 128);
        prop_assert!(events.len() <= wire.len());
        prop_assert!(reader.buffered_bytes() <= 1024);
    }
}
