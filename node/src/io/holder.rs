//! Who listens on a port, as far as `/proc` tells.
//!
//! Owns a walk over `/proc/net/tcp*` and the descriptors of all processes, used for one error message.

use std::fs;

use super::listen::Holder;

/// Processes looked at, at the most.
const PROCESSES_MAX: usize = 100_000;

/// The process that listens on TCP `port` of any address.
pub(super) fn holder_of(port: u16) -> Option<Holder> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|table| table.lines().filter_map(|line| listening_inode(line, port)).collect::<Vec<_>>())
        .collect();
    if inodes.is_empty() {
        return None;
    }
    let pids = fs::read_dir("/proc").ok()?.flatten().take(PROCESSES_MAX);
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(|&pid| holds(pid, &inodes))
        .map(|pid| Holder { pid, name: name_of(pid) })
}

/// The inode of a line of `/proc/net/tcp` if it is a socket that listens on `port`.
fn listening_inode(line: &str, port: u16) -> Option<String> {
    // sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode …
    let fields: Vec<&str> = line.split_whitespace().collect();
    let local_port = u16::from_str_radix(fields.get(1)?.rsplit_once(':')?.1, 16).ok()?;
    let listens = *fields.get(3)? == "0A";
    (listens && local_port == port).then(|| fields.get(9).map(|inode| format!("socket:[{inode}]")))?
}

fn holds(pid: u32, inodes: &[String]) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors.flatten().any(|descriptor| {
        let link = fs::read_link(descriptor.path());
        link.is_ok_and(|link| inodes.iter().any(|inode| link.as_os_str() == inode.as_str()))
    })
}

fn name_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).map(|name| name.trim_end().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listening_sockets_of_the_port_count() {
        let line = |local: &str, state: &str| {
            format!(
                "   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 4711 1"
            )
        };
        let check = |line: &str, expected: Option<&str>| {
            assert_eq!(listening_inode(line, 8000).as_deref(), expected, "{line}");
        };
        check(&line("0100007F:1F40", "0A"), Some("socket:[4711]"));
        check(&line("0100007F:1F41", "0A"), None);
        check(&line("0100007F:1F40", "01"), None);
        check("  sl  local_address rem_address   st", None);
    }
}
