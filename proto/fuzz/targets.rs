//! The bodies of the fuzz targets: one function for each parser, given any bytes.
//!
//! They are shared with the test that replays the committed corpora, so that a finding of the fuzzer
//! becomes a test by adding its file. Run one with `cargo +nightly fuzz run json` in `proto`.

use ringmain_proto::codec::Codec;
use ringmain_proto::http::{AllowedOrigins, Head, check_upgrade, parse_head};
use ringmain_proto::json;
use ringmain_proto::limits::JSON_DEPTH_MAX;
use ringmain_proto::message::{Publication, Request};
use ringmain_proto::proxy::{self, ProxyHeader};
use ringmain_proto::ws::{Chunk, Event, Reader, WsError};

/// A target by the name of its corpus.
pub(crate) type Target = fn(&[u8]);

/// All targets.
pub(crate) const ALL: &[(&str, Target)] = &[
    ("json", json),
    ("commands", commands),
    ("ws_reader", ws_reader),
    ("http_head", http_head),
    ("proxy", proxy),
    ("record", record),
];

fn is_json(text: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(text).is_ok()
}

/// The scanner accepts what serde_json accepts, but for its own depth limit.
pub(crate) fn json(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let depth_may_differ =
        data.iter().filter(|byte| matches!(byte, b'[' | b'{')).count() >= JSON_DEPTH_MAX as usize - 1;
    let valid = json::is_valid(text);
    assert!(depth_may_differ || valid == is_json(data), "{text:?}");
}

/// Commands come out in a bounded number, the last one may be an error, and data is JSON.
pub(crate) fn commands(data: &[u8]) {
    let commands: Vec<_> = Codec::Json.decode(data).collect();
    assert!(!commands.is_empty() && commands.len() <= data.len() + 1);
    let (last, before) = commands.split_last().expect("not empty");
    assert!(before.iter().all(Result::is_ok), "nothing follows an error");
    for command in before.iter().chain([last]).flatten() {
        if let Request::Publish { data, .. } | Request::Rpc { data, .. } | Request::Send { data } =
            &command.request
        {
            assert!(data.is_empty() || json::is_valid(std::str::from_utf8(data).expect("UTF-8")));
        }
    }
}

/// How the bytes are cut changes neither events nor error. The first two bytes choose the cuts.
pub(crate) fn ws_reader(data: &[u8]) {
    let [first, second, wire @ ..] = data else { return };
    let whole = read_frames(wire, &[usize::MAX]);
    let cut = read_frames(wire, &[usize::from(*first) + 1, usize::from(*second) + 1]);
    assert_eq!(whole, cut);
}

fn read_frames(wire: &[u8], pieces: &[usize]) -> (Vec<String>, Option<WsError>) {
    let mut reader = Reader::new();
    let mut events = Vec::new();
    let mut rest = wire.to_vec();
    for piece in pieces.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let tail = rest.split_off((*piece).min(rest.len()));
        let mut chunk = Chunk::new(&mut rest);
        loop {
            match reader.next(&mut chunk, 1000) {
                Ok(Some(event)) => events.push(describe(&event)),
                Ok(None) => break,
                Err(error) => return (events, Some(error)),
            }
        }
        assert!(chunk.is_empty());
        assert!(reader.buffered_bytes() <= 4096);
        rest = tail;
    }
    (events, None)
}

fn describe(event: &Event<'_>) -> String {
    match event {
        Event::Text(text) => assert!(text.as_bytes().len() <= 1000),
        Event::Binary(payload) => assert!(payload.len() <= 1000),
        _ => {}
    }
    format!("{event:?}")
}

/// A head that is complete stays so, whatever follows; its checks answer something.
pub(crate) fn http_head(data: &[u8]) {
    let result = parse_head(data);
    for cut in [data.len() / 2, data.len().saturating_sub(1)] {
        if let Ok(Head::Done { consumed, .. }) = parse_head(&data[..cut]) {
            assert!(matches!(result, Ok(Head::Done { consumed: same, .. }) if same == consumed));
        }
    }
    let Ok(Head::Done { consumed, request }) = result else { return };
    assert!(consumed <= data.len());
    let origins = AllowedOrigins::new(["https://*.example.com", "*a*b*"]);
    let mut answer = Vec::new();
    match check_upgrade(&request, &origins) {
        Ok(upgrade) => upgrade.write_response(&mut answer),
        Err(error) => error.write_response(&mut answer),
    }
    assert!(answer.starts_with(b"HTTP/1.1 "));
    let _ = (request.keep_alive(), request.path(), request.query("format"));
}

/// A header that is complete stays so; one that failed cannot be mended by more bytes.
pub(crate) fn proxy(data: &[u8]) {
    let result = proxy::parse(data);
    if let Ok(ProxyHeader::Done { consumed, .. }) = result {
        assert!(consumed <= data.len());
    }
    for cut in 0..data.len() {
        match proxy::parse(&data[..cut]) {
            Ok(ProxyHeader::Incomplete) => {}
            settled => assert_eq!(settled, result, "cut at {cut}"),
        }
    }
}

/// What reads as a record is the same when written and read again.
pub(crate) fn record(data: &[u8]) {
    let Some((publication, total)) = Publication::read_record(data) else { return };
    assert!(total <= data.len());
    let mut written = Vec::new();
    let len = publication.write_record(&mut written);
    assert_eq!((len, len), (written.len(), publication.record_len()));
    assert_eq!(Publication::read_record(&written), Some((publication, len)));
}
