//! The folder is the layer. This reads the sources of the workspace and refuses names in the wrong place:
//! what decides must be replayable, so it knows no runtime, socket, clock or randomness; and `unsafe`
//! stays where the system calls are. And it wants what is declared to be used: every metric is counted
//! somewhere.

use std::path::{Path, PathBuf};

use ringmain::core::metrics::METRICS;
use ringmain::io::WIRE_METRICS;

/// Layers that take bytes, commands and `now` as arguments. The backends of the bus that speak to a
/// broker over a socket, and what drives and serves them, are not part of it.
const PURE: &[&str] = &["proto/src", "bus/src", "node/src/core"];
const BACKENDS: &[&str] =
    &["bus/src/redis", "bus/src/nats", "bus/src/kafka", "bus/src/runtime.rs", "bus/src/seldom.rs"];

/// The only places where `unsafe` may stand. The tests are of the first: only a handler shows that a signal
/// was raised, and only a filter or a limit of its own shows what a kernel that refuses is told.
const UNSAFE: &[&str] =
    &["node/src/io", "bench/src/io", "node/tests/wire_mutations.rs", "node/tests/wire_start.rs"];

/// What a pure layer may not name: `::` at an end is part of the name.
const IMPURE: &[&str] = &[
    "glommio",
    "io_uring",
    "tokio",
    "mio",
    "libc",
    "rustix",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "UnixListener",
    "UnixDatagram",
    "Instant",
    "SystemTime",
    "UNIX_EPOCH",
    "rand",
    "getrandom",
    "RandomState",
    "thread",
    "async",
    "await",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's folder").to_owned()
}

/// Rust sources below a folder of the workspace, by path from its root.
fn sources(folder: &str, found: &mut Vec<(String, String)>) {
    let Ok(entries) = std::fs::read_dir(root().join(folder)) else { return };
    for entry in entries {
        let entry = entry.expect("an entry of a folder");
        let name = entry.file_name().into_string().expect("a name in UTF-8");
        let path = format!("{folder}/{name}");
        if entry.file_type().expect("a file's type").is_dir() {
            if !matches!(name.as_str(), "target" | "node_modules") {
                sources(&path, found);
            }
        } else if name.ends_with(".rs") {
            let text = std::fs::read_to_string(entry.path()).expect("a source in UTF-8");
            found.push((path, text));
        }
    }
}

fn is_below(path: &str, folders: &[&str]) -> bool {
    folders.iter().any(|folder| {
        path.strip_prefix(folder)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || rest.starts_with(".rs"))
    })
}

/// The code of a line: without its comment and without what stands between quotes.
fn code(line: &str) -> String {
    let mut code = String::with_capacity(line.len());
    let (mut quoted, mut escaped, mut slash) = (false, false, false);
    for char in line.chars() {
        if quoted {
            quoted = escaped || char != '"';
            escaped = !escaped && char == '\\';
            continue;
        }
        if slash && char == '/' {
            break;
        }
        slash = char == '/';
        quoted = char == '"' && !code.ends_with('\'');
        code.push(char);
    }
    code
}

/// Whether a name stands in the code as a whole word.
fn names(code: &str, name: &str) -> bool {
    let is_word = |char: char| char.is_alphanumeric() || char == '_';
    code.match_indices(name).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + name.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

/// Lines of the files that name one of `forbidden`, as `path:line: name`.
fn findings(files: &[(String, String)], forbidden: &[&str]) -> Vec<String> {
    let mut findings = Vec::new();
    for (path, text) in files {
        for (index, line) in text.lines().enumerate() {
            let code = code(line);
            let found = forbidden.iter().filter(|name| names(&code, name));
            findings.extend(found.map(|name| format!("{path}:{}: {name}", index + 1)));
        }
    }
    findings
}

#[test]
fn what_decides_names_no_runtime_socket_clock_or_randomness() {
    for layer in PURE {
        let mut files = Vec::new();
        sources(layer, &mut files);
        files.retain(|(path, _)| !is_below(path, BACKENDS));
        assert!(files.len() >= 10, "{layer}: only {} files were read", files.len());
        assert_eq!(findings(&files, IMPURE), Vec::<String>::new());
    }
}

#[test]
fn unsafe_stands_under_io_alone() {
    for package in ["proto", "bus", "node", "bench"] {
        let mut files = Vec::new();
        sources(package, &mut files);
        assert!(files.len() >= 10, "{package}: only {} files were read", files.len());
        files.retain(|(path, _)| !is_below(path, UNSAFE));
        assert_eq!(findings(&files, &["unsafe", "allow(unsafe_code)"]), Vec::<String>::new());
    }
}

#[test]
fn every_metric_is_counted_somewhere() {
    let mut files = Vec::new();
    sources("node/src", &mut files);
    files.retain(|(path, _)| !path.ends_with("/metrics.rs"));
    let declared = METRICS.iter().map(|info| format!("Metric::{:?}", info.metric));
    let of_the_wire = WIRE_METRICS.iter().map(|(metric, ..)| format!("WireMetric::{metric:?}"));
    let unused: Vec<String> =
        declared.chain(of_the_wire).filter(|name| findings(&files, &[name]).is_empty()).collect();
    assert_eq!(unused, Vec::<String>::new());
}

#[test]
fn names_are_found_in_code_and_nowhere_else() {
    let check = |line: &str, forbidden: &[&str], expected: usize| {
        let files = [("a.rs".to_owned(), line.to_owned())];
        assert_eq!(findings(&files, forbidden).len(), expected, "{line}");
    };
    check("use std::time::Instant;", IMPURE, 1);
    check("let now = Instant::now(); // an instant", IMPURE, 1);
    check("let x = std::net::TcpStream::connect(a); let y = Instant::now();", IMPURE, 2);
    check("/// Like `tokio` does, with an Instant.", IMPURE, 0);
    check("let text = \"Instant // tokio\"; f()", IMPURE, 0);
    check("let text = \"a \\\" b\"; Instant::now()", IMPURE, 1);
    check("let quote = '\"'; Instant::now()", IMPURE, 1);
    check("use std::net::SocketAddr; let Instantly = random;", IMPURE, 0);
    check("async fn f() {}", IMPURE, 1);
    check("unsafe { f() }", &["unsafe"], 1);
    check("#![deny(unsafe_code)]", &["unsafe"], 0);
    check("#![allow(unsafe_code)]", &["allow(unsafe_code)"], 1);
    assert!(is_below("bus/src/redis/mod.rs", BACKENDS) && is_below("bus/src/redis.rs", BACKENDS));
    assert!(!is_below("bus/src/redistribute.rs", BACKENDS));
}
