//! The wire formats are pure: bytes in, values out. This reads the sources and refuses the names of
//! what would make them otherwise.

use std::path::Path;

/// Names that no source file of this crate may contain: runtimes, sockets, clocks, randomness, files.
const FORBIDDEN: &[&str] = &[
    "glommio",
    "io_uring",
    "tokio",
    "rustix",
    "libc::",
    "TcpStream",
    "TcpListener",
    "UnixStream",
    "UdpSocket",
    "Instant",
    "SystemTime",
    "getrandom",
    "rand::",
    "std::thread",
    "std::fs",
    "std::env",
    "std::process",
];

fn check(folder: &Path, files: &mut usize) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            check(&path, files);
            continue;
        }
        *files += 1;
        let source = std::fs::read_to_string(&path).unwrap();
        for name in FORBIDDEN {
            assert!(!source.contains(name), "{} names {name}", path.display());
        }
    }
}

#[test]
fn sources_name_no_runtime_socket_clock_or_randomness() {
    let mut files = 0;
    check(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    assert!(files > 20, "only {files} files were read");
}
